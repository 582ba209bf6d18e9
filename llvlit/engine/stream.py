"""Weights that stay in their files: one part of a model is in memory at a time, a layer, the embedding or the head.

The module is built with blanks: tensors on PyTorch's meta device, which have a shape and no numbers.  A part gets its
weights when it is called, and gives them back when another one is.  The loader of ``transformers`` makes them from what
the files hold, so that renamed, fused and 16-bit weights are those of the whole model; where nothing has to be changed
they are the mapped files themselves.  Norms and the like outside the layers are small, and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from llvlit.engine.folder import misfit, weight_files
from llvlit.engine.precision import free_memory
from llvlit.errors import FileError, ModelError
from llvlit.hub import quiet_transformers

_LOADING = RLock()
"""Held while weights come and go: transformers is silenced meanwhile, for all threads."""


def check_memory(shell: nn.Module, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """ModelError, before anything is loaded, if a model is larger than the memory of the device."""
    needed = sum(value.numel() for value in shell.parameters()) * dtype.itemsize
    there = free_memory(device) if device.type in ("cpu", "cuda") else needed
    if needed > there:
        raise ModelError(
            f"{name!r} needs {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{there / 1e9:.1f} GB free. Pass stream=True, which holds one layer at a time."
        )


def without_weights(shell: Any, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """What ``from_pretrained`` gives for a folder, given the model on the meta device: zeros that take no memory."""
    if getattr(shell.config, "quantization_config", None) is not None:
        raise ModelError("Quantized weights cannot be read layer by layer. Load the model without stream=True.")
    unique = {id(value): (name, value) for name, value in reversed(shell.state_dict(keep_vars=True).items())}
    zeros = {  # of tied weights the first
        name: torch.zeros((), dtype=dtype if value.is_floating_point() else value.dtype).expand(value.shape)
        for name, value in unique.values()
    }
    options = {"attn_implementation": "eager", "output_loading_info": True}
    module, loading = type(shell).from_pretrained(None, config=shell.config, state_dict=zeros, dtype=dtype, **options)
    if (folder / "generation_config.json").exists():
        module.generation_config = type(module.generation_config).from_pretrained(folder)
    return module, loading


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a tensor stands in a module: the module's table, the name in it, and what stands there meanwhile."""

    table: dict[str, Any]
    name: str
    blank: torch.Tensor

    @property
    def is_blank(self) -> bool:
        return self.table[self.name] is self.blank


@dataclass(frozen=True, eq=False)
class _Part:
    """What comes and goes together: names in the files, and the places of what they hold, with those tied to them."""

    keys: tuple[str, ...]
    places: tuple[_Place, ...]


class Stream:
    """The weights of a module, read from a folder of safetensors when they are used.

    Attributes
    ----------
    device : torch.device
        Where they are used.
    unused : set of str
        Names in the files that are not of the module.
    reads : int
        Number of parts that were read so far, a part as often as it was.

    Raises
    ------
    ModelError
        When a part is read, if a weight is missing or of another shape.
    FileError
        If a file can no longer be read, or is not the one that it was.
    """

    def __init__(
        self, module: nn.Module, layers: Iterable[nn.Module], folder: Path, device: torch.device, name: str
    ) -> None:
        """Put blanks in the place of all weights, and read what stays."""
        self.device, self.name, self.reads = device, name, 0
        self._held = _Part((), ())
        self._places = _blank(module, device)
        self._files: dict[Path, tuple[int, int]] = {}
        self._file_of: dict[str, Path] = {}
        for path in (folder / file for file in weight_files(folder)):
            self._files[path] = _state(path)
            with safe_open(path, framework="pt") as stored:
                self._file_of |= dict.fromkeys(stored.keys(), path)
        self._load, target = _loader(module, device)
        targets = {key: target(key, self._places) for key in self._file_of}
        self.unused = {key for key, name in targets.items() if name not in self._places}

        def part(names: Iterable[str]) -> _Part:
            blanks = {id(self._places[name].blank) for name in names}
            tied = {name: place for name, place in self._places.items() if id(place.blank) in blanks}
            return _Part(tuple(key for key, name in targets.items() if name in tied), tuple(tied.values()))

        prefix_of = {id(each): f"{prefix}." for prefix, each in module.named_modules()}
        ends: Any = module
        self._part_of: dict[str, _Part] = {}
        for each in (*layers, ends.get_input_embeddings(), ends.get_output_embeddings()):
            if each is None:
                continue
            own = [name for name in self._places if name.startswith(prefix_of[id(each)])]
            self._part_of |= dict.fromkeys(own, part(own))
            each.register_forward_pre_hook(self._hook(part(own)))
        self._fill(part(self._places.keys() - self._part_of.keys()))

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the module's ``state_dict``."""
        place = self._places[name]
        if name in self._part_of:
            self._hold(self._part_of[name])
        return place.table[place.name]

    def _hook(self, part: _Part) -> Callable[..., None]:
        def hold(_module: nn.Module, _args: Any) -> None:
            self._hold(part)

        return hold

    def _hold(self, part: _Part) -> None:
        """Let go of the part that is held, and read this one."""
        with _LOADING:
            if part.keys == self._held.keys:
                return
            self._release()
            self._held, self.reads = part, self.reads + 1
            try:
                self._fill(part)
            except BaseException:
                self._release()
                raise

    def _release(self) -> None:
        for place in self._held.places:
            place.table[place.name] = place.blank
        self._held = _Part((), ())

    def _fill(self, part: _Part) -> None:
        paths = {self._file_of[key] for key in part.keys}
        with quiet_transformers(), ExitStack() as stack:
            try:
                if any(_state(path) != self._files[path] for path in paths):
                    raise FileError(f"The weights of {self.name} have changed since it was loaded. Load it again.")
                opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            except (OSError, SafetensorError) as error:
                problem = f"The weights of {self.name} can no longer be read ({error})."
                raise FileError(f"{problem} Put the file back, and call again.") from error
            self._load({key: opened[self._file_of[key]].get_slice(key) for key in part.keys})
        read = {id(place.blank): place.table[place.name] for place in part.places if not place.is_blank}
        for place in part.places:
            if id(place.blank) not in read:
                raise misfit(self.name, f": {place.name}, of shape {tuple(place.blank.shape)}, is not stored so")
            if place.is_blank:
                place.table[place.name] = read[id(place.blank)]


def _state(path: Path) -> tuple[int, int]:
    """What changes with a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _blank(module: nn.Module, device: torch.device) -> dict[str, _Place]:
    """Blanks for all that a module's ``state_dict`` names, and their places; buffers beside it go to the device."""
    blanks: dict[int, torch.Tensor] = {}
    places = {}
    for prefix, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for name, value in table.items():
                if value is not None and name in owner._non_persistent_buffers_set:
                    table[name] = value.to(device)
                elif value is not None:
                    blank = torch.empty(value.shape, dtype=value.dtype, device="meta")
                    if isinstance(value, nn.Parameter):
                        blank = nn.Parameter(blank, requires_grad=value.requires_grad)
                    places[f"{prefix}.{name}".lstrip(".")] = _Place(table, name, blanks.setdefault(id(value), blank))
    for place in places.values():
        place.table[place.name] = place.blank
    return places


def _loader(module: Any, device: torch.device) -> tuple[Callable[[dict[str, Any]], None], Callable[..., str]]:
    """What puts weights from files into a module as its own loader does, and what tells under which name."""
    from transformers import conversion_mapping, core_model_loading, modeling_utils

    core: Any = core_model_loading
    rules: Any = conversion_mapping.get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, core.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core.WeightConverter)]
    dtype = next(module.parameters()).dtype
    plan = modeling_utils.LoadStateDictConfig(dtype=dtype, device_map={"": device}, weight_mapping=rules)
    load = core.convert_and_load_state_dict_in_model
    if "tp_plan" in signature(load).parameters:  # in earlier versions of transformers 5
        load = partial(load, tp_plan=None)

    def put(tensors: dict[str, Any]) -> None:
        report, _ = load(module, tensors, plan)
        for problem in report.conversion_errors.values():
            raise ModelError(f"Weights could not be converted: {problem.strip().splitlines()[-1]}")

    def target(key: str, names: dict[str, Any]) -> str:
        for known in ((renamings, converters), ([], [])):
            name = core.rename_source_key(key, *known, module.base_model_prefix, names)[0]
            if name in names:
                return str(name)
        return key

    return put, target
