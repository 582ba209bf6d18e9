"""Tiny random models in float64, one seeded generator, and the tolerances, each with its reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

import pytest
import torch
from filelock import FileLock
from playwright.sync_api import Browser
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llvlit.engine.models import LanguageModel, wrap_model
from llvlit.prompts import Prompts
from llvlit.publishing.browser import CHROMIUM, chromium

EXACT = 1e-12
"""float64 arithmetic of some thousand operations on numbers near 1."""

SOFTMAX32 = 3e-6
"""Norms and softmax in float32, as most architectures take them in any type: 6e-8 a layer, then amplified."""

SIZE = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "phi": {"num_attention_heads": 3, "num_key_value_heads": 3},
}
WHOLE_PROMPTS: dict[str, dict[str, object]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "bloom": {},
}
"""Architectures that mask on their own: each candidate runs with its whole prompt."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocabulary = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def tiny_module(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: object):
    """Random transformers model whose weights are large enough that every nonlinearity matters."""
    extra = ARCHITECTURES.get(model_type) or WHOLE_PROMPTS.get(model_type) or {}
    config = AutoConfig.for_model(model_type, **{**SIZE, "pad_token_id": 0, **extra, **options})
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return module.eval()


def tiny_model(model_type: str = "gpt2", **options: object) -> LanguageModel:
    """The same, as a LanguageModel."""
    return wrap_model(tiny_module(model_type, **options), byte_tokenizer(), name=f"tiny-{model_type}")


def affine_model(*, seed: int = 9) -> LanguageModel:
    """A GPT-2 whose layer norms have weight zero and so leave constants: every layer is x + b."""
    model = tiny_model("gpt2", seed=seed)
    with torch.no_grad():
        for layer in model.layers:
            layer.ln_1.weight.zero_()
            layer.ln_2.weight.zero_()
    return model


PROMPTS = Prompts(
    (
        "the film was good",
        "a dull film",
        "I liked it a lot, truly",
        "I did not",
        "bad",
        "what a lovely day it was",
    ),
    (1, 0, 1, 0, 0, 1),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--draws", type=int, help="draws of each kind of the fuzzer (default: a few hundred in all)")


@pytest.fixture(autouse=True)
def gradients_are_on() -> Iterator[None]:
    """An interrupt planted inside ``torch.no_grad`` may leave gradients off: the next test starts with them on."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    return tiny_model("gpt2")


@pytest.fixture
def prompts() -> Prompts:
    return PROMPTS


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260312)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once for all workers: the first that asks for it fills it, the others wait."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = place / name, place / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                fill(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium of the system, for tests that look at pages; without one they are skipped."""
    if not any(map(shutil.which, CHROMIUM)):
        pytest.skip("no Chromium on the PATH; install it (Debian: apt-get install chromium) to run the browser tests")
    with chromium() as opened:
        yield opened
