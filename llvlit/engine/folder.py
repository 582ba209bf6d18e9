"""A model's folder, looked at before anything in it is loaded: which files it names, and what sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llvlit.checks import shown
from llvlit.errors import ModelError
from llvlit.files import read_json

LARGEST_SIZE = 4096
"""Sizes, counts of heads and the like up to this are no danger, whatever the weights are."""

SPARE_NUMBERS = 2**27
"""Numbers that a model may hold besides its weights, such as tables of positions."""

NO_SIZE = re.compile(r"position|ctx|context|seq|length|theta|base|token|window|chunk|scale|factor|period|(_id|_ids)$")
"""Whole numbers of a configuration that no tensor has as a size."""

Shapes = dict[str, tuple[int, ...]]


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that a folder's index lists, or of the only one; ModelError if one is no plain name."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index, "an index of weights").get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names the file {shown(name)}; weights are *.safetensors files beside their index."
            )
    return names


def check_files(folder: Path) -> dict[str, Any]:
    """Configuration in a folder whose files all lie in it.

    Raises
    ------
    ModelError
        If a file is a link that leads out of the folder (in the hub's cache, out of the repository's own), no regular
        file, or named where a plain name belongs.
    FileError
        If a file cannot be read as what it is.
    """
    in_cache = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    root = (folder.parent.parent if in_cache else folder).resolve()
    for path in folder.iterdir():
        if not path.resolve().is_relative_to(root):
            raise ModelError(f"{path} leads out of its folder, to {path.resolve()}. Put the file itself there.")
        if not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path} is no regular file.")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter to another model. Merge the two, and save the whole.")
    if (folder / "tokenizer_config.json").exists():
        for key, value in read_json(folder / "tokenizer_config.json", "a tokenizer's configuration").items():
            if key.endswith("_file") and isinstance(value, str) and Path(value).name != value:
                raise ModelError(f"{folder / 'tokenizer_config.json'}: {key}={shown(value)} names a file elsewhere.")
    return read_json(folder / "config.json", "a model's configuration")


def stored_shapes(folder: Path, config: dict[str, Any]) -> Shapes:
    """Shapes of the weights in a folder; ModelError if a number in its configuration is beyond what they hold."""
    shapes: Shapes = {}
    for name in weight_files(folder):
        with safe_open(folder / name, framework="pt") as stored:  # whose header must fit the file's size
            for key in stored.keys():  # noqa: SIM118 (not a dict)
                shapes[key] = tuple(stored.get_slice(key).get_shape())
    check_numbers(config, shapes, str(folder / "config.json"))
    return shapes


def check_numbers(config: dict[str, Any], shapes: Shapes, where: str) -> None:
    """ModelError if a number in a configuration is beyond what weights of these shapes hold."""
    largest = max([LARGEST_SIZE, *(size for shape in shapes.values() for size in shape)])
    for key, value in _whole_numbers(config):
        if key == "transformers_weights":
            raise ModelError(f"{where}: {key}={shown(value)} names weights; remove it.")
        most = len(shapes) if "layers" in key or key == "n_layer" else largest
        if isinstance(value, int) and abs(value) > (2**40 if NO_SIZE.search(key) else most):
            raise ModelError(f"{where}: {key}={shown(value)} does not fit weights of sizes to {most}.")


def _whole_numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Whole numbers in a nest of objects and lists, with the names of their entries; and what names weights."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _whole_numbers(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _whole_numbers(entry, key)
    elif (isinstance(value, int) and not isinstance(value, bool)) or key == "transformers_weights":
        yield key, value


def check_size(shell: torch.nn.Module, shapes: Shapes, name: str) -> None:
    """ModelError if a model, built without memory, holds more numbers than the weights it is to be filled with."""
    described = sum(tensor.numel() for tensor in (*shell.parameters(), *shell.buffers()))
    stored = sum(math.prod(shape) for shape in shapes.values())
    if described > stored + SPARE_NUMBERS:
        raise misfit(name, f", which describes {described:,} numbers; {stored:,} are stored")


def misfit(name: str, what: str) -> ModelError:
    """Error that tells how a model's weights and configuration contradict each other."""
    return ModelError(f"The weights of {name!r} do not fit its configuration{what}. Save the model again.")


def missing_layers(unused: set[str], layers_name: str, n_layers: int) -> list[str]:
    """Weights of layers that the file has beyond those of the model."""
    pattern = re.compile(rf"(?:^|\.){re.escape(layers_name)}\.(\d+)\.")
    return sorted(key for key in unused if (match := pattern.search(key)) and int(match[1]) >= n_layers)


def refuse_encoder(config: dict[str, Any], name: str) -> None:
    """ModelError for a configuration of anything but a causal decoder."""
    from transformers.models.auto import modeling_auto

    encoders = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
    model_type, architectures = config["model_type"], config.get("architectures") or []
    causal = all(a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for a in architectures)
    is_encoder = model_type in encoders and not config.get("is_decoder")
    known = model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.get("is_encoder_decoder") or is_encoder or not known or (architectures and not causal):
        raise ModelError(
            f"{name} ({model_type}) is not a causal decoder: earlier tokens would see the last one, and the "
            "context could not be frozen. Use a decoder such as gpt2."
        )
