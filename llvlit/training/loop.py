"""Training of one model of the family, from scratch or from its checkpoint.

Matrices inside the layers are optimized with Muon, everything else with AdamW; the learning rate rises
linearly, stays, and falls linearly to zero.  A run continues from its checkpoint after a kill, on the very
batches it would have seen.  Checkpoints are safetensors, the optimizers' state included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from llvlit.training.recipe import Recipe, build_model, check_same, shape_of


@dataclass(frozen=True)
class TrainingState:
    """A point in a run: its step, loss curve, and seconds spent so far."""

    step: int = 0
    seconds: float = 0.0
    curve: Sequence[dict[str, float]] = ()


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
            tokens, weights = (torch.from_numpy(array).to(device) for array in stream.batch(index, n_windows))
            _, loss = losses(model, tokens, weights)
            parts = {"plain": loss[0::2], "rated": loss[1::2], "verdict": loss[weights[:, 1:] > 1]}
            for name, values in parts.items():
                sums[name] += values.sum().item()
                counts[name] += values.numel()
    return {name: sums[name] / max(1, counts[name]) for name in sums}


@dataclass(frozen=True)
class Run:
    """A model in training: its optimizers, its recipe, and all else that it is made from, by name."""

    model: GPT2LMHeadModel
    recipe: Recipe
    made_from: Mapping[str, Any]
    optimizers: tuple[torch.optim.Optimizer, ...]

    @classmethod
    def begin(cls, size: str, recipe: Recipe, vocabulary: int, inputs: Mapping[str, str], device: str) -> Run:
        """Run at its first step; matrices inside the layers are Muon's, all other weights AdamW's."""
        model = build_model(size, vocabulary=vocabulary, length=recipe.length, seed=recipe.seed)
        torch.nn.Module.to(model, device)
        matrices = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]
        inside = set(map(id, matrices))
        others = [weight for weight in model.parameters() if id(weight) not in inside]
        rate, decay = recipe.learning_rate, recipe.weight_decay
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        made_from = {"size": asdict(shape_of(size)), "vocabulary": vocabulary, **asdict(replace(recipe, steps=0))}
        return cls(model, recipe, {**inputs, **made_from}, (muon, adamw))

    def take(self, loss: torch.Tensor, rate: float) -> None:
        """One step down the gradient, at a rate relative to the peak."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * rate
            optimizer.step()
            optimizer.zero_grad()

    def store(self, path: Path, state: TrainingState) -> None:
        """Write a checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{slot}": value for slot, value in slots.items()}
        facts = {"identity": self.made_from, "steps": self.recipe.steps, "state": asdict(state)}
        save_tensors(path, tensors, {"kind": "training", **facts})

    def restore(self, path: Path) -> TrainingState:
        """Go on from a checkpoint; InputError if it is of another run."""
        tensors, metadata = load_tensors(path, kind="training")
        check_same(path, metadata["identity"], self.made_from)
        state, recipe = TrainingState(**metadata["state"]), self.recipe
        planned = replace(recipe, steps=metadata["steps"])
        if any(planned.rate(step) != recipe.rate(step) for step in range(state.step)):
            raise InputError(
                f"{path} stands at step {state.step} of {planned.steps}; steps={recipe.steps} would need another "
                "learning rate in the past. Keep the number of steps of that run."
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    _, _, index, slot = name.split(".", 3)
                    slots.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        return state


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
    run = Run.begin(size, recipe, vocabulary, inputs, device)
    state = run.restore(checkpoint) if checkpoint.is_file() else TrainingState()
    loss_of = torch.compile(losses) if compiled else losses
    training, held_out = streams
    began = time.perf_counter() - state.seconds
    running: list[torch.Tensor] = []
    if visit is not None:
        visit(state.step, run.model, None)
    for step in range(state.step, recipe.steps):
        tokens, weights = (torch.from_numpy(array).to(device) for array in training.batch(step, recipe.n_windows))
        if step >= recipe.late_from:
            weights = torch.where(weights > 1, recipe.late_verdict_weight, weights)
        loss, per_token = loss_of(run.model, tokens, weights)
        run.take(loss, recipe.rate(step))
        running.append(per_token.mean())
        done = step + 1
        if visit is not None:
            visit(done, run.model, running[-1].item())
        if done % checkpoint_every == 0 or done == recipe.steps:
            mean = torch.stack(running).mean().item()
            if not np.isfinite(mean):
                raise NumericalError(
                    f"The loss is not finite at step {done}. Lower learning_rate={recipe.learning_rate}; "
                    f"the last good checkpoint is {checkpoint}."
                )
            running.clear()
            held = held_out_loss(run.model, held_out, n_batches=2, n_windows=recipe.n_windows)
            point = {"step": done, "training": mean, **{f"held_out_{part}": value for part, value in held.items()}}
            state = TrainingState(done, time.perf_counter() - began, [*state.curve, point])
            run.store(checkpoint, state)
    return run.model.eval(), state
