"""Training of the shipped family: GPT-2-architecture models that differ in size alone.

Matrices inside the layers are optimized with Muon, everything else with AdamW; the learning rate rises
linearly, stays, and falls linearly to zero.  A run continues from its checkpoint after a kill, on the very
batches it would have seen.  Checkpoints are safetensors, the optimizers' state included.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from llvlit.errors import InputError, NumericalError, unknown_name
from llvlit.files import load_tensors, save_tensors
from llvlit.training.corpus import WindowStream


@dataclass(frozen=True)
class Size:
    """Shape of one member of the family."""

    n_layers: int
    hidden_size: int
    n_heads: int


HEAD_SIZE = 32
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


@dataclass(frozen=True)
class TrainingState:
    """A point in a run: its step, loss curve, and seconds spent so far."""

    step: int
    seconds: float
    curve: tuple[dict[str, float], ...]


def shape_of(size: str) -> Size:
    """Shape of a member by name, or by ``LAYERSxHIDDEN`` such as ``24x64`` (32 numbers a head, as in all members).

    Raises
    ------
    InputError
        If there is no such member, or the hidden size is no multiple of 32.
    """
    if size in SIZES:
        return SIZES[size]
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if not numbers or int(numbers[2]) % HEAD_SIZE:
        raise InputError(
            unknown_name("size", size, SIZES, hint="Or LAYERSxHIDDEN, such as 24x64, hidden a multiple of 32.")
        )
    return Size(int(numbers[1]), int(numbers[2]), int(numbers[2]) // HEAD_SIZE)


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


def _optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.transformer.h.named_parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _losses(model: GPT2LMHeadModel, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean loss, and the loss of every predicted token ``(n_windows, length - 1)``, in nats."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (loss * weight).sum() / weight.sum(), loss.detach().view(len(tokens), -1)


def held_out_loss(model: GPT2LMHeadModel, stream: WindowStream, *, n_batches: int, n_windows: int) -> dict[str, float]:
    """Mean loss in nats per token on held-out windows: ``plain``, ``rated``, and of the ``verdict`` alone."""
    device = next(model.parameters()).device
    sums = {"plain": 0.0, "rated": 0.0, "verdict": 0.0}
    counts = dict.fromkeys(sums, 0)
    with torch.no_grad():
        for index in range(n_batches):
            tokens, weights = (torch.from_numpy(a).to(device) for a in stream.batch(index, n_windows))
            _, loss = _losses(model, tokens, weights)
            verdict = weights[:, 1:] > 1
            for name, values in (
                ("plain", loss[0::2]),
                ("rated", loss[1::2]),
                ("verdict", loss[verdict]),
            ):
                sums[name] += values.sum().item()
                counts[name] += values.numel()
    return {name: sums[name] / max(1, counts[name]) for name in sums}


def train_model(
    size: str,
    recipe: Recipe,
    streams: tuple[WindowStream, WindowStream],
    checkpoint: Path,
    *,
    vocabulary: int,
    corpus_fingerprint: str,
    device: str = "cpu",
    compiled: bool = False,
    checkpoint_every: int = 100,
    progress: Callable[[int, int, str], None] | None = None,
    visit: Callable[[int, GPT2LMHeadModel], None] | None = None,
) -> tuple[GPT2LMHeadModel, TrainingState]:
    """Model of a size, trained from scratch or from its checkpoint.

    Parameters
    ----------
    checkpoint
        Written every ``checkpoint_every`` steps; if it exists, the run continues there.  It must come from
        the same recipe and corpus; only ``steps`` may differ, and only before the learning rate falls.
    compiled
        Run ``torch.compile`` first (needs a C++ compiler on the CPU).
    visit
        Called with the number of steps done and the model, before the first step and after each.

    Raises
    ------
    InputError
        If the checkpoint belongs to another recipe or corpus.
    NumericalError
        If the loss is not finite.
    """
    model = build_model(size, vocabulary=vocabulary, length=recipe.length, seed=recipe.seed)
    torch.nn.Module.to(model, device)
    optimizers = _optimizers(model, recipe)
    identity = {"size": size, "corpus": corpus_fingerprint, **asdict(replace(recipe, steps=0))}
    state = TrainingState(0, 0.0, ())
    if checkpoint.is_file():
        state = _restore(checkpoint, model, optimizers, identity, recipe)
    losses = torch.compile(_losses) if compiled else _losses
    training, held_out = streams
    curve = list(state.curve)
    began = time.perf_counter() - state.seconds
    running: list[torch.Tensor] = []
    if visit is not None:
        visit(state.step, model)
    for step in range(state.step, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
        tokens, weights = (torch.from_numpy(a).to(device) for a in training.batch(step, recipe.n_windows))
        if step >= recipe.late_from:
            weights = torch.where(weights > 1, recipe.late_verdict_weight, weights)
        loss, per_token = losses(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running.append(per_token.mean())
        if visit is not None:
            visit(step + 1, model)
        if progress is not None:
            progress(step + 1, recipe.steps, f"loss {running[-1].item():.3f}")
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            mean = torch.stack(running).mean().item()
            if not np.isfinite(mean):
                raise NumericalError(
                    f"The loss is not finite at step {step + 1}. Lower learning_rate={recipe.learning_rate}; "
                    f"the last good checkpoint is {checkpoint}."
                )
            running.clear()
            held = held_out_loss(model, held_out, n_batches=2, n_windows=recipe.n_windows)
            curve.append({"step": step + 1, "training": mean, **{f"held_out_{k}": v for k, v in held.items()}})
            state = TrainingState(step + 1, time.perf_counter() - began, tuple(curve))
            _store(checkpoint, model, optimizers, identity, recipe, state)
    return model.eval(), state


def _store(
    path: Path,
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    identity: dict[str, Any],
    recipe: Recipe,
    state: TrainingState,
) -> None:
    tensors = {f"model.{name}": value for name, value in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{slot}": value for slot, value in slots.items()}
    metadata = {"kind": "training", "identity": identity, "steps": recipe.steps, "state": asdict(state)}
    save_tensors(path, tensors, metadata)


def _restore(
    path: Path,
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    identity: dict[str, Any],
    recipe: Recipe,
) -> TrainingState:
    tensors, metadata = load_tensors(path, kind="training")
    stored = metadata["identity"]
    differing = sorted(key for key in identity if stored.get(key) != identity[key])
    if differing:
        raise InputError(
            f"{path} was trained with other settings ({', '.join(differing)}). "
            "Choose another --out, or the settings of that run."
        )
    done = metadata["state"]["step"]
    planned = replace(recipe, steps=metadata["steps"])
    if any(planned.rate(step) != recipe.rate(step) for step in range(done)):
        raise InputError(
            f"{path} stands at step {done} of {metadata['steps']}; steps={recipe.steps} would need another "
            "learning rate in the past. Keep the number of steps of that run."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, slot = name.split(".", 3)
                slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    state = metadata["state"]
    return TrainingState(state["step"], state["seconds"], tuple(state["curve"]))
