"""Models, the hub, errors and files: what loads gives the same numbers; what does not load says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from conftest import EXACT, byte_tokenizer, tiny_module
from llvlit import files
from llvlit.engine import models, precision
from llvlit.engine.depth import depth_system
from llvlit.engine.models import LanguageModel, embedded_names, load_model, wrap_model
from llvlit.errors import FileError, InputError, LlvlitError, ModelError, NumericalError, unknown_name
from llvlit.files import load_tensors, save_tensors, write_atomically, write_json
from llvlit.hub import hub_reachable
from llvlit.method.concepts import random_directions
from llvlit.method.gains import adjoint_gains, measured_gains
from llvlit.prompts import Prompts

TOKENS = torch.tensor([[5, 17, 260, 33, 8, 90], [1, 2, 3, 4, 5, 6]])
SECONDS = 10.0
"""What a refusal may take, the import of torch and transformers on a busy machine not counted."""
TINY = {"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save(module: torch.nn.Module, folder: Path) -> Path:
    """Folder of a model in the hub's format, with a tokenizer."""
    module.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_module("gpt2", dtype=torch.float32), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def copied(gpt2_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt2_folder, tmp_path / "model"))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Loading


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text"])
def test_saved_model_has_the_same_logits(architecture: str, tmp_path: Path) -> None:
    module = tiny_module(architecture, dtype=torch.float32)
    model = load_model(str(save(module, tmp_path)), device="cpu")
    assert not model.module.training
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model.module(TOKENS).logits, module(TOKENS).logits)
    assert (model.n_layers, model.hidden_size, model.max_positions) == (4, 24, 128)
    assert model.n_parameters == sum(parameter.numel() for parameter in module.parameters())
    assert model.name == str(tmp_path)
    assert model.tokenizer.decode(model.tokenizer("a film")["input_ids"]) == "a film"


def test_float64_computes_in_float64(tmp_path: Path) -> None:
    module = tiny_module("gpt2")
    folder = save(module, tmp_path)
    for dtype in ("float64", torch.float64):
        model = load_model(folder, device="cpu", dtype=dtype)
        assert model.dtype == torch.float64
        with torch.no_grad():
            assert (model.module(TOKENS).logits - module(TOKENS).logits).abs().max() < EXACT
    assert load_model(folder).dtype == torch.float32  # whatever the file holds


def test_final_norm_comes_after_the_layers(tmp_path: Path) -> None:
    for architecture, norm in (("gpt2", "ln_f"), ("llama", "norm")):
        model = load_model(save(tiny_module(architecture), tmp_path / architecture))
        assert model.after_layers == (getattr(model.module.base_model, norm),)


def test_fingerprint_is_of_the_weights(gpt2_folder: Path, tmp_path: Path) -> None:
    first, again = load_model(gpt2_folder), load_model(gpt2_folder, dtype="float64")
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 16
    other = tiny_module("gpt2", dtype=torch.float32)
    same = load_model(save(other, tmp_path / "same"))
    assert same.fingerprint == first.fingerprint
    with torch.no_grad():
        other.transformer.h[2].mlp.c_fc.bias[3] += 1e-3
    assert load_model(save(other, tmp_path / "other")).fingerprint != first.fingerprint


def test_loading_is_quiet_and_restores_the_reports(gpt2_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(gpt2_folder)
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


# Names, devices, types


def test_unknown_embedded_name_has_neighbors() -> None:
    with pytest.raises(ModelError, match=r"Did you mean 'embedded/small'.*Valid: .*embedded/small"):
        load_model("embedded/smal")


def test_unknown_name_sentence() -> None:
    sentence = unknown_name("basis", "krilov", ("random", "krylov"), hint="See the book.")
    assert sentence == "basis='krilov' is not known. Did you mean 'krylov'? Valid: krylov, random. See the book."
    assert "Did you mean" not in unknown_name("basis", "zzz", ("random", "krylov"))


@pytest.mark.parametrize("device", ["gpux", "cuda:99", "meta", ""])
def test_unusable_device(gpt2_folder: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"device='{device}' cannot be used here"):
        load_model(gpt2_folder, device=device)


# Types


@pytest.mark.parametrize("dtype", ["bf16", "half", torch.int8])
def test_unknown_type(gpt2_folder: Path, dtype: object) -> None:
    with pytest.raises(InputError, match=r"dtype=.* Valid: bfloat16, float16, float32, float64\."):
        load_model(gpt2_folder, dtype=dtype)


def test_what_is_stored_in_sixteen_bits_is_computed_in_float32_and_said(prompts: Prompts) -> None:
    model = load_model("embedded/small", device="cpu")
    assert model.dtype == torch.float32
    assert model.precision == "float32, weights stored in float16"
    directions = random_directions(13, 64, seed=0)
    assert measured_gains(model, prompts, directions).metadata["precision"] == model.precision


def states_of(module: torch.nn.Module) -> torch.Tensor:
    """The last token's state after each layer of each probe, by way of the model's own list."""
    seen = []
    for text in precision.PROBES:
        ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            seen.append(torch.stack(module(ids, output_hidden_states=True).hidden_states[1:-1])[:, 0, -1].double())
    return torch.stack(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_sixteen_bits_on_request_with_what_they_cost(gpt2_folder: Path, dtype: object) -> None:
    exact, half = load_model(gpt2_folder, device="cpu"), load_model(gpt2_folder, device="cpu", dtype=dtype)
    assert half.dtype == models.DTYPES[str(dtype).removeprefix("torch.")]
    told = float(re.search(r"states up to ([0-9.]+)% off float32", half.precision)[1]) / 100
    reference, states = states_of(exact.module), states_of(half.module)  # without the last layer's
    seen = float(((states - reference).norm(dim=-1) / reference.norm(dim=-1)).max())
    assert 0 < seen <= told + 5e-4 and told < 3 * seen
    assert half.identity != exact.identity


def test_sixteen_bits_of_a_wrapped_module_are_told_and_left_as_they_are() -> None:
    module = tiny_module("llama", dtype=torch.bfloat16)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.warns(UserWarning, match=r"mine computes in bfloat16; states up to [0-9.]+% off float32"):
        model = wrap_model(module, byte_tokenizer(), name="mine")
    assert model.module is module and module.dtype == torch.bfloat16
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())


def test_states_that_overflow_sixteen_bits_are_said_to(tmp_path: Path) -> None:
    module = tiny_module("llama", dtype=torch.float32)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight *= 1e6
    folder = save(module, tmp_path)
    assert load_model(folder, device="cpu").dtype == torch.float32
    with pytest.raises(NumericalError, match=r"not finite in float16\. .*bfloat16"):
        load_model(folder, device="cpu", dtype="float16")


@pytest.fixture(scope="module")
def in_bfloat16(gpt2_folder: Path) -> LanguageModel:
    return load_model(gpt2_folder, device="cpu", dtype="bfloat16")


def test_steps_that_sixteen_bits_do_not_resolve_are_refused(
    in_bfloat16: LanguageModel, prompts: Prompts, gpt2_folder: Path
) -> None:
    directions = random_directions(5, 24, seed=0)
    with pytest.raises(InputError, match=r"amplitude=0.01 drowns in rounding: in bfloat16"):
        measured_gains(in_bfloat16, prompts, directions, amplitude=0.01)
    layer = depth_system(in_bfloat16, prompts).layer(1)
    with pytest.raises(InputError, match=r"method='central' takes steps that drown in .*bfloat16"):
        layer.jvp(torch.ones(len(prompts), 1, 24), method="central")
    expected = adjoint_gains(load_model(gpt2_folder, device="cpu"), prompts, directions).mean
    found = adjoint_gains(in_bfloat16, prompts, directions).mean
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_sixteen_bits_hide_no_mistake_from_the_check(prompts: Prompts) -> None:
    """What is wrong by less than bfloat16 resolves is found in float32."""
    module = tiny_module("gpt2", dtype=torch.bfloat16)

    class Leaky(type(module.transformer.h[1])):
        def forward(self, hidden: torch.Tensor, *args: object, **options: object) -> object:
            out = super().forward(hidden, *args, **options)
            return (out[0] + 1e-3 * hidden[:, -1:], *out[1:]) if isinstance(out, tuple) else out + 1e-3 * hidden[:, -1:]

    module.transformer.h[1].__class__ = Leaky
    with pytest.warns(UserWarning, match="bfloat16"):
        model = wrap_model(module, byte_tokenizer(), name="leaky")
    with pytest.raises(ModelError, match=r"leaky: .* is refused, since layer 1"):
        depth_system(model, prompts)


# Memory


def test_cost_is_not_measured_where_there_is_no_memory_for_it(
    gpt2_folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "free_memory", lambda device: 1000)
    monkeypatch.setattr(precision, "free_memory", lambda device: 1000)
    model = load_model(gpt2_folder, device="cpu", dtype="float16")
    assert model.precision.endswith("what that costs was not measured")
    with pytest.raises(ModelError, match=r"checked in float32 .* no memory.*stream=True"):
        depth_system(model, prompts)


def test_device_without_memory_is_said_to_have_none(gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(ModelError, match=r"no memory left for .*CUDA out of memory.*device='cpu'.*stream=True"):
        load_model(gpt2_folder, device="cpu")


# The hub


def test_hub_is_not_asked_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("HTTPS_PROXY", raising=False)
        monkeypatch.delenv("https_proxy", raising=False)
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
            monkeypatch.setenv(variable, "0")
            assert hub_reachable()
            monkeypatch.setenv(variable, "1")
            assert not hub_reachable()
            monkeypatch.delenv(variable)


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_proxy_is_asked_in_the_hubs_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with listening() as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        assert hub_reachable()
    assert not hub_reachable()


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:none", "http://a..b", "nonsense"])
def test_unreachable_hub_is_told_at_once(endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint or f"http://127.0.0.1:{closed_port()}")
    began = time.perf_counter()
    assert not hub_reachable(timeout=0.5)
    assert time.perf_counter() - began < SECONDS


def test_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that drops packets: the connection is given the time-out and no more."""
    asked = []

    def never(address: object, timeout: float) -> object:
        asked.append((address, timeout))
        raise TimeoutError

    for variable in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "create_connection", never)
    assert not hub_reachable()
    assert asked == [(("huggingface.co", 443), 2.0)]


def test_hub_id_without_a_network_names_what_there_is() -> None:
    began = time.perf_counter()
    with pytest.raises(ModelError, match=r"hub cannot be reached.*embedded/small.*local folder") as caught:
        load_model("gpt2")
    assert time.perf_counter() - began < SECONDS
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    with pytest.raises(ModelError, match="Did you mean 'embedded/small'"):
        load_model("embeded/small")


def test_hub_that_fails_names_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers, but has no such model (here: the library's own refusal to go there)."""
    monkeypatch.setattr(models, "hub_reachable", lambda: True)
    with pytest.raises(ModelError, match=r"Could not load model 'no/such'.*embedded/small.*local folder"):
        load_model("no/such")


IN_FRESH_PYTHON = """
import time
from transformers import AutoModelForCausalLM, AutoTokenizer
from llvlit.errors import ModelError
from llvlit.engine.models import load_model
began = time.perf_counter()
for name in ("gpt2", "half/cached", "wholly/cached"):
    try:
        print(name, load_model(name, device="cpu").n_layers)
    except ModelError as error:
        print(name, error)
print(time.perf_counter() - began)
"""


def test_closed_port_and_the_cache(gpt2_folder: Path, tmp_path: Path) -> None:
    """A fresh process, not told that it is offline: what the cache holds is loaded, all else refused at once."""
    for name in ("half", "wholly"):
        folder = tmp_path / "hub" / f"models--{name}--cached"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("1" * 40)
        shutil.copytree(gpt2_folder, folder / "snapshots" / ("1" * 40))
        if name == "half":
            (folder / "snapshots" / ("1" * 40) / "model.safetensors").unlink()
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy", "HF_HUB_CACHE"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    done = subprocess.run(
        [sys.executable, "-c", IN_FRESH_PYTHON], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    unknown, half, whole, seconds = done.stdout.splitlines()
    assert unknown.startswith("gpt2 The hub cannot be reached") and "embedded/small" in unknown
    assert half.startswith("half/cached The hub cannot be reached") and "embedded/small" in half
    assert whole == "wholly/cached 4"
    assert float(seconds) < SECONDS
    assert "Retry" not in done.stdout + done.stderr


# Folders that cannot be used


def test_pickle_is_refused_by_name(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    torch.save({"weights": torch.zeros(2)}, copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file \(pytorch_model\.bin .*runs code.*save_pretrained"):
        load_model(copied)
    shutil.copy(copied / "pytorch_model.bin", copied / "other.bin")
    save_tensors(copied / "adapter.safetensors", {"weights": torch.zeros(2)}, {})
    with pytest.raises(ModelError, match="Could not load"):  # safetensors, but not of the model: still no pickle
        load_model(copied)


def test_folder_without_config_or_absent(copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(copied)
    with pytest.raises(ModelError, match="There is no model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="There is no model folder"):
        load_model("./absent")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99999])
def test_weights_cut_short(copied: Path, kept: float) -> None:
    path = copied / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=f"Could not load model '{copied}'"):
        load_model(copied)


@pytest.mark.parametrize("change", [{"n_layer": 6}, {"n_embd": 32}])
def test_weights_that_would_be_random_are_refused(copied: Path, change: dict[str, int]) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=r"do not fit its configuration: \d+ tensors .*transformer\.h\."):
        load_model(copied)


def test_folder_without_tokenizer(copied: Path) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_model(copied)


@pytest.mark.parametrize("content", ['{"model_type": "gp', "{}", '{"model_type": "nope"}'])
def test_broken_config(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    with pytest.raises(ModelError, match="Could not load model"):
        load_model(copied)


# Models that are no causal decoders


def test_encoder_is_refused(tmp_path: Path) -> None:
    folder = save(BertForMaskedLM(BertConfig(**TINY)), tmp_path / "bert")
    with pytest.raises(ModelError, match=r"bert.*\(bert\) is not a causal decoder"):
        load_model(folder)
    with pytest.raises(ModelError, match="not a causal decoder"):  # a head alone makes no decoder
        wrap_model(BertLMHeadModel._from_config(BertConfig(**TINY), attn_implementation="eager"), byte_tokenizer())


def test_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = T5Config(vocab_size=300, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=2)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"\(t5\) is not a causal decoder"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"mine .*not a causal decoder"):
        wrap_model(T5ForConditionalGeneration(config), byte_tokenizer(), name="mine")


@pytest.mark.parametrize(
    "model_type", ["big_bird", "data2vec-text", "rembert", "bert-generation", "roberta-prelayernorm"]
)
def test_every_encoder_with_a_causal_head_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match="not a causal decoder"):
        load_model(tmp_path)


def test_fused_attention_is_refused(gpt2_folder: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(gpt2_folder, attn_implementation="sdpa")
    with pytest.raises(ModelError, match=r"mine runs 'sdpa' attention.*attn_implementation='eager'"):
        wrap_model(module, byte_tokenizer(), name="mine")


def test_module_without_layers_is_refused(gpt2_folder: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(gpt2_folder, attn_implementation="eager")
    module.config.n_layer = 7
    with pytest.raises(ModelError, match=r"mine \(GPT2LMHeadModel\) has no list of 7 layers"):
        wrap_model(module, byte_tokenizer(), name="mine")


def test_embedded_names_are_sorted_by_size() -> None:
    sizes = [
        (models.EMBEDDED_FOLDER / name.split("/")[1] / "model.safetensors").stat().st_size for name in embedded_names()
    ]
    assert sizes == sorted(sizes) and sizes


# Files


@contextmanager
def full_disk(n_bytes: int = 500) -> Iterator[None]:
    """Writes of more than ``n_bytes`` to one file fail, in Python and in Rust, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    notes, tensors = tmp_path / "notes.json", tmp_path / "tensors.safetensors"
    write_json(notes, {"old": 1})
    save_tensors(tensors, {"old": np.arange(3)}, {"kind": "test"})
    with full_disk():
        for write in (
            lambda: write_json(notes, ["new"] * 1000),
            lambda: save_tensors(tensors, {"new": np.zeros(1000)}, {"kind": "test"}),
        ):
            with pytest.raises(FileError, match=r"Could not write .*as it was"):
                write()
    assert json.loads(notes.read_text()) == {"old": 1}
    assert list(load_tensors(tensors, kind="test")[0]) == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.json", "tensors.safetensors"]


def test_read_only_folder_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.json"
    write_json(path, {"old": 1})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for target, name in ((files.tempfile, "mkstemp"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, refuse)
            with pytest.raises(FileError, match="Permission denied"):
                write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Could not write"):
        write_json(tmp_path / "file" / "notes.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="Could not write"):
        write_json(tmp_path / "folder", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "notes", write)
    assert list(tmp_path.iterdir()) == []


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "notes"
    write_atomically(path, lambda temporary: (temporary.write_text("old"), None)[1])
    seen = []
    half, go_on = threading.Event(), threading.Event()

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        half.set()
        go_on.wait(SECONDS)
        temporary.write_text("new")

    writer = threading.Thread(target=write_atomically, args=(path, write))
    writer.start()
    assert half.wait(SECONDS)
    seen.append(path.read_text())
    go_on.set()
    writer.join()
    assert [*seen, path.read_text()] == ["old", "new"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # as any file the user makes


def test_tensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    arrays = {"a": np.arange(6).reshape(2, 3).T, "b": torch.randn(3, 2, dtype=torch.float64).T}
    save_tensors(path, arrays, {"kind": "test", "seed": 3})
    tensors, metadata = load_tensors(path, kind="test")
    assert np.array_equal(tensors["a"].numpy(), arrays["a"]) and torch.equal(tensors["b"], arrays["b"])
    assert metadata["seed"] == 3


def test_tensors_of_others_are_refused(tmp_path: Path, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tensors.safetensors"
    save_tensors(path, {"a": np.zeros(9)}, {"kind": "test"})
    with pytest.raises(FileError, match="holds 'test', not 'gains'"):
        load_tensors(path, kind="gains")
    with pytest.raises(FileError, match="There is no file"):
        load_tensors(tmp_path / "absent", kind="test")
    with pytest.raises(FileError, match="not written by llvlit"):
        load_tensors(gpt2_folder / "model.safetensors", kind="test")
    monkeypatch.setattr(files, "FORMAT_VERSION", files.FORMAT_VERSION + 1)
    with pytest.raises(FileError, match="has format 2; this llvlit reads 3"):
        load_tensors(path, kind="test")
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"cannot be read as a whole safetensors file.*Compute it again"):
        load_tensors(path, kind="test")


def test_every_error_of_ours_is_caught_by_one_name() -> None:
    from llvlit import errors

    ours = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(ours) == 8 and all(issubclass(error, LlvlitError) for error in ours)
    assert issubclass(InputError, ValueError)
