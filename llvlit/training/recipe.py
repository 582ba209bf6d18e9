"""What the members of the family share, and in what they differ: the recipe, and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llvlit import checks
from llvlit.errors import InputError, unknown_name


@dataclass(frozen=True)
class Size:
    """Shape of one member of the family."""

    n_layers: int
    hidden_size: int
    n_heads: int


HEAD_SIZE = 32
MOST_PARAMETERS = 10**9
SIZES = {
    "small": Size(n_layers=12, hidden_size=64, n_heads=2),
    "medium": Size(n_layers=18, hidden_size=96, n_heads=3),
    "large": Size(n_layers=24, hidden_size=128, n_heads=4),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that the members of a family share.

    Attributes
    ----------
    verdict_weight, late_verdict_weight : float
        Weight of a verdict token in the loss: modest while the model learns the language, large from step
        ``late_from`` on, when there is something to read a verdict from.
    learning_rate : float
        Peak of both optimizers (Muon's update is scaled to AdamW's root mean square).
    warmup, decay : float
        Fractions of ``steps`` in which the learning rate rises and falls.
    """

    steps: int = 1800
    n_windows: int = 16
    length: int = 160
    verdict_weight: float = 4.0
    late_verdict_weight: float = 40.0
    late_from: int = 1000
    learning_rate: float = 1e-2
    weight_decay: float = 0.05
    warmup: float = 0.03
    decay: float = 0.4
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step, relative to the peak."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, rise, fall)


def check_same(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError for the first thing by which a run that is stored differs from the one that is asked for."""
    for name, value in now.items():
        if stored.get(name) != value:
            raise InputError(
                f"{path} was trained with {name} {stored.get(name)}, not {value}. "
                f"Choose another --out, or the {name} of that run."
            )


def shape_of(size: str) -> Size:
    """Shape of a member by name, or by ``LAYERSxHIDDEN`` such as ``24x64`` (32 numbers a head, as in all members).

    Raises
    ------
    InputError
        If there is no such member, the hidden size is no multiple of 32, or it would have over a billion parameters.
    """
    if checks.text("size", size) in SIZES:
        return SIZES[size]
    numbers = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", size)
    if not numbers or int(numbers[2]) % HEAD_SIZE:
        raise InputError(
            unknown_name("size", size, SIZES, hint="Or LAYERSxHIDDEN, such as 24x64, hidden a multiple of 32.")
        )
    n_layers, hidden_size = int(numbers[1]), int(numbers[2])
    if 12 * n_layers * hidden_size**2 > MOST_PARAMETERS:
        raise InputError(f"size={size!r} has over {MOST_PARAMETERS} parameters, too many for a family this small.")
    return Size(n_layers, hidden_size, hidden_size // HEAD_SIZE)


def build_model(size: str, *, vocabulary: int, length: int, seed: int) -> GPT2LMHeadModel:
    """Untrained model of a size of the family, its weights drawn from ``seed``."""
    shape = shape_of(size)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=shape.hidden_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)
