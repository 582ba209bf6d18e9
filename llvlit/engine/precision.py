"""Types of numbers: which a model computes in, which its weights were stored in, and what 16 bits cost."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import safe_open
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
HALVES = (torch.bfloat16, torch.float16)

PROBES = (
    "The film was good, and",
    "A dull story. I did not like any of it.",
    "In 1984 he moved to the coast with her.",
)
"""Texts on whose last tokens it is measured what 16 bits cost."""

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types by the names that safetensors give them."""


def stored_types(folder: Path, files: Iterable[str]) -> list[str]:
    """Names of the types of a folder's matrices."""
    found = set()
    for file in files:
        with safe_open(folder / file, framework="pt") as weights:
            slices = [weights.get_slice(key) for key in weights.keys()]  # noqa: SIM118 (not a dict)
            found |= {part.get_dtype() for part in slices if len(part.get_shape()) > 1}
    return sorted(NAMES.get(each, each) for each in found)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU, no more than the process's group may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no such group, or no limit
        group = Path("/sys/fs/cgroup")
        most, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - taken)
    return int(free)


def last_states(module: PreTrainedModel, layers: nn.ModuleList, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The last token's state after each layer, for each probe, ``(n_probes, n_layers, hidden_size)``, in float64."""
    states: list[torch.Tensor] = []

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden[0, -1].to("cpu", torch.float64))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            for text in PROBES:
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                module(input_ids=ids.to(module.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states).view(len(PROBES), len(layers), -1)


def rounding_error(states: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative deviation of a state from what it should be."""
    return float(((states - reference).norm(dim=-1) / reference.norm(dim=-1)).nan_to_num(nan=torch.inf).max())


def precision(module: PreTrainedModel, stored: Iterable[str] = (), error: float | None = None) -> str:
    """What a model computes in, what its weights were stored in if that is another type, and what 16 bits cost."""
    name = str(module.dtype).removeprefix("torch.")
    others = [each for each in stored if each != name]
    told = f"{name}, weights stored in {' and '.join(others)}" if others else name
    if module.dtype not in HALVES:
        return told
    cost = "what that costs was not measured" if error is None else f"states up to {error:.1%} off float32"
    return f"{told}; {cost}"


def in_float32(module: PreTrainedModel) -> PreTrainedModel | None:
    """A copy that computes in float32; None if there is no memory for one."""
    needed = 4 * sum(parameter.numel() for parameter in module.parameters())
    return copy.deepcopy(module).float() if needed < free_memory(module.device) else None
