"""Training of one model of the family, from scratch or from its checkpoint.

Matrices inside the layers are optimized with Muon, everything else with AdamW; the learning rate rises
linearly, stays, and falls linearly to zero.  A run continues from its checkpoint after a kill, on the very
batches it would have seen.  Checkpoints are safetensors, the optimizers' state included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel

from llvlit.errors import InputError, NumericalError
from llvlit.files import load_tensors, save_tensors
from llvlit.training.corpus import WindowStream
from llvlit.training.recipe import Recipe, build_model, shape_of


@dataclass(frozen=True)
class TrainingState:
    """A point in a run: its step, loss curve, and seconds spent so far."""

    step: int
    seconds: float
    curve: tuple[dict[str, float], ...]


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


def losses(model: GPT2LMHeadModel, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
            _, loss = losses(model, tokens, weights)
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
    inputs: Mapping[str, str],
    device: str = "cpu",
    compiled: bool = False,
    checkpoint_every: int = 100,
    visit: Callable[[int, GPT2LMHeadModel, float | None], None] | None = None,
) -> tuple[GPT2LMHeadModel, TrainingState]:
    """Model of a size, trained from scratch or from its checkpoint.

    Parameters
    ----------
    checkpoint
        Written every ``checkpoint_every`` steps; if it exists, the run continues there.  It must come from
        the same size, recipe and inputs; only ``steps`` may differ, and only before the learning rate falls.
    inputs
        What else the run is made from, by name, such as the corpus' fingerprint.
    compiled
        Run ``torch.compile`` first (needs a C++ compiler on the CPU).
    visit
        Called with the number of steps done, the model and the step's loss, before the first step (no loss yet) and
        after each.

    Raises
    ------
    InputError
        If the checkpoint belongs to another size, recipe or input.
    NumericalError
        If the loss is not finite.
    """
    model = build_model(size, vocabulary=vocabulary, length=recipe.length, seed=recipe.seed)
    torch.nn.Module.to(model, device)
    optimizers = _optimizers(model, recipe)
    identity = {
        **inputs,
        "size": asdict(shape_of(size)),
        "vocabulary": vocabulary,
        **asdict(replace(recipe, steps=0)),
    }
    state = TrainingState(0, 0.0, ())
    if checkpoint.is_file():
        state = _restore(checkpoint, model, optimizers, identity, recipe)
    loss_of = torch.compile(losses) if compiled else losses
    training, held_out = streams
    curve = list(state.curve)
    began = time.perf_counter() - state.seconds
    running: list[torch.Tensor] = []
    if visit is not None:
        visit(state.step, model, None)
    for step in range(state.step, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
        tokens, weights = (torch.from_numpy(a).to(device) for a in training.batch(step, recipe.n_windows))
        if step >= recipe.late_from:
            weights = torch.where(weights > 1, recipe.late_verdict_weight, weights)
        loss, per_token = loss_of(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running.append(per_token.mean())
        if visit is not None:
            visit(step + 1, model, running[-1].item())
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
    differing = [f"{key} {stored.get(key)}, not {now}" for key, now in identity.items() if stored.get(key) != now]
    if differing:
        raise InputError(
            f"{path} was trained with {'; '.join(differing)}. Choose another --out, or the settings of that run."
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
