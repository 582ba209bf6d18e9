"""Folders that were tampered with: nothing outside is read, nothing is built that does not fit, every error is ours."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import byte_tokenizer, tiny_module
from llvlit.engine.depth import depth_system
from llvlit.engine.models import LanguageModel, load_model
from llvlit.errors import InputError, LlvlitError, ModelError
from llvlit.prompts import Prompts

SECONDS = 10.0
"""What a refusal may take."""


def save(folder: Path, *, sharded: bool = False) -> Path:
    module = tiny_module("llama", dtype=torch.float32, num_hidden_layers=2)
    module.save_pretrained(folder, **({"max_shard_size": "20KB"} if sharded else {}))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tmp_path / "sharded", sharded=True)


def rename_shard(folder: Path, name: Any) -> None:
    """Let the index name another file for one tensor."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = name
    path.write_text(json.dumps(index))


def test_shards_beside_their_index_are_loaded(sharded: Path, whole: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_model(sharded, device="cpu").fingerprint == load_model(whole, device="cpu").fingerprint


class Trap:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch trapped",))


@pytest.mark.parametrize("name", ["../whole.safetensors", "/dev/zero", "trap.bin", "sub/whole.safetensors", 7, None])
def test_an_index_names_weights_beside_it_alone(name: Any, sharded: Path, whole: Path) -> None:
    shutil.copy(whole / "model.safetensors", sharded.parent / "whole.safetensors")
    (sharded / "trap.bin").write_bytes(pickle.dumps(Trap()))
    rename_shard(sharded, name)
    began = time.perf_counter()
    with pytest.raises(ModelError, match=r"weights are \*\.safetensors files beside their index"):
        load_model(sharded, device="cpu")
    assert time.perf_counter() - began < SECONDS
    rename_shard(sharded, str((sharded.parent / "whole.safetensors").resolve()))
    with pytest.raises(ModelError, match="beside their index"):
        load_model(sharded, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_out_of_a_folder_are_refused(name: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name} leads out of its folder"):
        load_model(folder, device="cpu")


def test_links_of_the_hubs_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--mine" / "snapshots" / ("1" * 40), tmp_path / "models--mine" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in whole.iterdir():
        shutil.copy(path, blobs / f"{path.name}-blob")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{path.name}-blob")
    assert load_model(snapshot, device="cpu").n_layers == 2


def test_what_is_no_file_of_a_model_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(ModelError, match="no regular file"):
        load_model(folder, device="cpu")
    (folder / "pipe.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ModelError, match="adapter to another model"):
        load_model(folder, device="cpu")
    (folder / "adapter_config.json").unlink()
    change(folder, {"tokenizer_file": "/etc/passwd"}, "tokenizer_config.json")
    with pytest.raises(ModelError, match="names a file elsewhere"):
        load_model(folder, device="cpu")


def change(folder: Path, entries: dict[str, Any], name: str = "config.json") -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 10**9),
        ("vocab_size", 10**12),
        ("hidden_size", -24),
        ("intermediate_size", 4096),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 0),
        ("head_dim", None),
        ("hidden_act", ["gelu"]),
        ("rope_parameters", {"rope_type": "no such"}),
        ("transformers_weights", "../elsewhere.safetensors"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("max_position_embeddings", "long"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told_at_once(key: str, value: Any, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change(folder, {key: value})
    began = time.perf_counter()
    if (key, value) == ("head_dim", None):  # the default
        assert load_model(folder, device="cpu").n_layers == 2
    else:
        with pytest.raises(ModelError):
            load_model(folder, device="cpu")
    assert time.perf_counter() - began < SECONDS


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"7", b'{"model_type": 7, "model": 7}', b"{}"],
    ids=["empty", "not UTF-8", "deep lists", "deep objects", "a list", "a number", "other kinds", "no entry"],
)
def test_damaged_files_are_told_as_ours(name: str, content: bytes, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / name).write_bytes(content)
    try:
        load_model(folder, device="cpu")
    except ModelError:
        return
    assert name == "tokenizer_config.json"  # whose entries all have defaults


KEYS = sorted(tiny_module("llama", num_hidden_layers=1).config.to_dict())
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 10**9, -(10**9), 2**63, 10**30, 0.5, 1e308, "", "x", "/dev/zero", "float16"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-3, 10**6), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@settings(max_examples=60, deadline=SECONDS * 1000, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(KEYS), value=ODD)
def test_one_key_changed_gives_a_model_or_an_error_of_ours(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    change(folder, {key: value})
    try:
        model = load_model(folder, device="cpu")
        assert (model.n_layers, model.hidden_size) == (2, 24)
        assert model.max_positions and model.identity
    except LlvlitError:
        return


def test_a_revision_is_for_models_of_the_hub(whole: Path) -> None:
    for name in (str(whole), "embedded/small"):
        with pytest.raises(InputError, match="is for models of the hub"):
            load_model(name, revision="main")


@pytest.mark.parametrize(
    "options", [{"name": 7}, {"name": ""}, {"name": "a\0b"}, {"device": 1}, {"dtype": [1]}, {"revision": 3}]
)
def test_arguments_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(LlvlitError, match=next(iter(options))):
        load_model(**{"name": "embedded/small", **options})


def test_a_token_that_the_model_does_not_know_is_told(whole: Path) -> None:
    model = load_model(whole, device="cpu")
    module = tiny_module("llama", vocab_size=50)
    small = LanguageModel(module, model.tokenizer, "small", module.model.layers, ())
    with pytest.raises(ModelError, match="the embedding of small has 50"):
        depth_system(small, Prompts(["a film"], [1]))
