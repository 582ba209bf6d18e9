"""Weights read layer by layer: the whole model's numbers, one layer in memory, each read once, errors that say why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import llvlit
from conftest import PROMPTS, byte_tokenizer, tiny_module
from llvlit.engine import stream as streaming
from llvlit.engine.depth import last_token_states
from llvlit.engine.models import LanguageModel, load_model, wrap_model
from llvlit.engine.replay import LayerCall
from llvlit.errors import FileError, ModelError
from llvlit.method.concepts import random_directions
from llvlit.prompts import Prompts

ALIKE = Prompts(("the film was good", "the book was poor"), (1, 0))
"""Of one length, so that one check of the replay serves both."""


def save(folder: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny_module(model_type, dtype=dtype, **options).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def both(folder: Path, *, dtype: str = "float32") -> tuple[LanguageModel, LanguageModel]:
    return tuple(load_model(folder, device="cpu", dtype=dtype, stream=stream) for stream in (False, True))  # type: ignore


@pytest.fixture
def streamed(tmp_path: Path) -> LanguageModel:
    return load_model(save(tmp_path / "llama"), device="cpu", stream=True)


def measured(model: LanguageModel, prompts: Prompts = ALIKE) -> np.ndarray:
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    return np.asarray(llvlit.measured_gains(model, prompts, directions).per_prompt)


def adjoint(model: LanguageModel, prompts: Prompts = ALIKE) -> np.ndarray:
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    return np.asarray(llvlit.adjoint_gains(model, prompts, directions).per_prompt)


def at_all_tokens(model: LanguageModel, prompts: Prompts = ALIKE) -> np.ndarray:
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    return np.asarray(llvlit.adjoint_gains(model, prompts, directions, positions="all").per_prompt)


def identified(model: LanguageModel, prompts: Prompts = ALIKE) -> np.ndarray:
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    return np.asarray(llvlit.identify(model, prompts, directions, order=3).A)


def of_depth_system(model: LanguageModel) -> np.ndarray:
    system = llvlit.depth_system(model, PROMPTS)
    return system.propagate(system.states[:, :1] + 1.0).numpy()


def steered(model: LanguageModel) -> np.ndarray:
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    prompt = model.tokenizer("I liked", return_tensors="pt")
    with llvlit.steer(model, directions, np.full(model.n_layers, 3.0)):
        return model.module.generate(**prompt, max_new_tokens=4, do_sample=False, output_logits=True).numpy()


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("gptj", {"rotary_dim": 4, "n_embd": 24, "n_layer": 4, "n_head": 4, "n_inner": 48}),  # buffers in its layers
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3}),  # stored expert by expert, run fused
    ],
)
def test_streamed_numbers_are_the_whole_models(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole, part = both(save(tmp_path / "model", model_type, **options))
    assert part.identity == whole.identity
    assert (part.device, part.dtype, part.n_parameters) == (whole.device, whole.dtype, whole.n_parameters)
    for numbers in (
        lambda model: measured(model, PROMPTS),
        lambda model: adjoint(model, PROMPTS),
        lambda model: at_all_tokens(model, PROMPTS),
        lambda model: identified(model, PROMPTS),
        lambda model: last_token_states(model, PROMPTS, final_norm=True).numpy(),
        lambda model: llvlit.concept_directions(model, PROMPTS).vectors.numpy(),
        of_depth_system,
        steered,
    ):
        np.testing.assert_array_equal(numbers(part), numbers(whole))


def test_weights_of_16_bits_and_names_without_a_prefix_are_read_as_the_loader_reads_them(tmp_path: Path) -> None:
    folder = save(tmp_path / "gpt2", "gpt2", dtype=torch.bfloat16)
    rename(folder, lambda key: key.removeprefix("transformer."))
    for dtype in ("float32", "float64"):
        whole, part = both(folder, dtype=dtype)
        np.testing.assert_array_equal(measured(part), measured(whole))
        assert part.dtype == getattr(torch, dtype)


def rename(folder: Path, new_name: Callable[[str], str | None]) -> None:
    """Store tensors under other names, or, where it is None, not at all."""
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {new_name(key): value for key, value in load_file(path).items()}
        tensors.pop(None, None)
        save_file(tensors, path, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers have weights in memory, graphs that hold them included, whenever one is run."""
    weights: list[StorageWeakRef] = []
    counts: list[int] = []
    run = LayerCall.run

    def counted(self: LayerCall, layer: torch.nn.Module, *args: Any) -> torch.Tensor:
        output = run(self, layer, *args)
        weights.append(StorageWeakRef(layer.mlp.gate_proj.weight.untyped_storage()))
        counts.append(len({weight.cdata for weight in weights if not weight.expired()}))
        return output

    monkeypatch.setattr(LayerCall, "run", counted)
    return counts


@pytest.mark.parametrize("numbers", [measured, adjoint, at_all_tokens, identified])
def test_one_layer_is_in_memory(
    numbers: Callable[[LanguageModel], np.ndarray], streamed: LanguageModel, alive: list[int]
) -> None:
    numbers(streamed)
    assert set(alive) == {1} and len(alive) > streamed.n_layers
    held = [any(not weight.is_meta for weight in layer.parameters()) for layer in streamed.layers]
    assert sum(held) <= 1


def test_each_layer_is_read_once_whatever_the_number_of_batches(
    streamed: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llvlit.engine.layer.ROWS_PER_CALL", 40)  # some tokens: a prompt or two
    assert streamed.stream is not None
    for numbers, passes in (
        (measured, 1),
        (last_token_states, 1),
        (identified, 1),
        (adjoint, 2),  # there and back
        (at_all_tokens, 2),
    ):
        numbers(streamed, PROMPTS)  # which checks the replay
        before = streamed.stream.reads
        numbers(streamed, PROMPTS)
        assert streamed.stream.reads - before <= 1 + passes * streamed.n_layers, numbers


def test_threads_share_a_streamed_model(streamed: LanguageModel) -> None:
    expected = [measured(streamed), adjoint(streamed), identified(streamed)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda numbers: numbers(streamed), [measured, adjoint, identified] * 2))
    for one, other in zip(found, expected * 2, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_that_goes_in_the_middle_costs_what_comes_after_it_alone(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "llama"), device="cpu", stream=True)
    expected = measured(model)
    layers = iter(llvlit.engine.depth.sweep(model, ALIKE))
    states = next(layers).next_states.clone()
    for path in (tmp_path / "llama").glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    with pytest.raises(FileError, match=r"can no longer be read .*Put the file back"):
        list(layers)
    assert states.isfinite().all() and all(weight.is_meta for weight in model.layers.parameters())
    for path in (tmp_path / "llama").glob("*.away"):
        path.rename(path.with_suffix(".safetensors"))
    np.testing.assert_array_equal(measured(model), expected)


def test_a_file_that_changes_is_not_the_models(streamed: LanguageModel, tmp_path: Path) -> None:
    for path in (tmp_path / "llama").glob("*.safetensors"):
        os.utime(path, ns=(0, 0))
    with pytest.raises(FileError, match="have changed since it was loaded"):
        measured(streamed)


def test_an_interrupt_while_weights_are_read_leaves_none(
    streamed: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = llvlit.depth_system(streamed, ALIKE)
    expected = system.step(2, system.states[:, :1])
    system.step(1, system.states[:, :1])
    stream: Any = streamed.stream
    load = stream._load

    def interrupted(tensors: dict[str, Any]) -> None:
        load(dict(list(tensors.items())[:2]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "_load", interrupted)
        system.step(2, system.states[:, :1])
    assert all(weight.is_meta for weight in streamed.layers.parameters())
    assert torch.equal(system.step(2, system.states[:, :1]), expected)


def test_folders_that_do_not_fit_are_refused_when_they_are_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama")
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    rename(lacking, lambda key: None if key.endswith("layers.2.mlp.up_proj.weight") else key)
    beyond = Path(shutil.copytree(folder, tmp_path / "beyond"))
    rename(beyond, lambda key: key.replace("layers.2.mlp.up_proj", "layers.9.mlp.up_proj"))
    wider = Path(shutil.copytree(folder, tmp_path / "wider"))
    change(wider, intermediate_size=40)
    quantized = Path(shutil.copytree(folder, tmp_path / "quantized"))
    change(quantized, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    for place, reason in (
        (lacking, r"do not fit its configuration: weight, of shape \(48, 24\), is not stored so"),
        (beyond, "describes 4 layers; model.layers.9.mlp.up_proj.weight is stored, too"),
        (wider, r"weight, of shape \(40, 24\), is not stored so"),
        (quantized, "Quantized weights cannot be read layer by layer"),
    ):
        with pytest.raises(ModelError, match=reason):
            load_model(place, device="cpu", stream=True)
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(ModelError, match=r"has no \*.safetensors file"):
        load_model(tmp_path / "empty", device="cpu", stream=True)


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "llama")
    monkeypatch.setattr(streaming, "free_memory", lambda _: 10_000)
    with pytest.raises(ModelError, match=r"needs 0.0 GB in float32, and cpu has 0.0 GB free. Pass stream=True"):
        load_model(folder, device="cpu")
    assert load_model(folder, device="cpu", stream=True).n_layers == 4


def test_blanks_are_no_model(streamed: LanguageModel) -> None:
    with pytest.raises(ModelError, match="weights without numbers"):
        wrap_model(streamed.module, streamed.tokenizer)
