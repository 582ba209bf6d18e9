"""One layer as a map of last tokens: steps, derivatives forward and backward, its context frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from llvlit.errors import InputError
from llvlit.replay import ContextCache, LayerCall, Recording, run_candidates

NUMBERS_PER_BATCH = {"cpu": 1_000_000, "cuda": 16_000_000}
"""Rows times hidden size that run together: what the caches of a processor hold, and what fills an accelerator.

The temporary memory of a call is about twenty times that.
"""

CENTRAL_STEP = 2e-3
"""Step of central differences, relative to the state's norm."""


@dataclass(frozen=True)
class FrozenBatch:
    """One layer of one batch of prompts: everything a replay needs."""

    members: torch.Tensor
    call: LayerCall
    recording: Recording
    context: ContextCache


@dataclass(frozen=True)
class FrozenLayer:
    """Last-token map f_l of one layer, for every prompt, its context frozen.

    Attributes
    ----------
    index : int
        Layer l.
    states : (n_prompts, hidden_size) tensor
        Operating point: the state before the layer.
    next_states : (n_prompts, hidden_size) tensor
        The state after it.
    """

    index: int
    module: nn.Module = field(repr=False)
    states: torch.Tensor = field(repr=False)
    next_states: torch.Tensor = field(repr=False)
    batches: tuple[FrozenBatch, ...] = field(repr=False)
    after: tuple[nn.Module, ...] = field(repr=False, default=())

    def step(self, candidates: torch.Tensor) -> torch.Tensor:
        """Next states ``(n_prompts, k, hidden_size)`` of k candidate states of each prompt, same shape.

        Raises
        ------
        InputError
            If the shape is not ``(n_prompts, k, hidden_size)``.
        """
        self._check("candidates", candidates)
        out = torch.empty_like(candidates)
        with torch.no_grad():
            for batch, rows in self._pieces(candidates.shape[1]):
                out[batch.members, rows] = self._replay(batch, candidates[batch.members, rows])
        return out

    def jvp(self, tangents: torch.Tensor, *, method: str = "jvp") -> torch.Tensor:
        """Jacobian-vector products A_l t ``(n_prompts, k, hidden_size)`` at the operating point.

        Parameters
        ----------
        tangents : (n_prompts, k, hidden_size) tensor
        method
            ``jvp``: forward-mode derivative, exact.  ``central``: central differences of relative step
            ``2e-3``, an independent check.

        Raises
        ------
        InputError
            If the shape or the method does not fit.
        """
        self._check("tangents", tangents)
        if method not in ("jvp", "central"):
            raise InputError(f"method={method!r} is not known. Valid: 'jvp', 'central'.")
        out = torch.empty_like(tangents)
        with torch.no_grad():
            for batch, rows in self._pieces(tangents.shape[1]):
                tangent = tangents[batch.members, rows]
                point = self.states[batch.members].unsqueeze(1).expand_as(tangent).contiguous()
                derivative = self._forward_mode if method == "jvp" else self._central_difference
                out[batch.members, rows] = derivative(batch, point, tangent)
        return out

    def _forward_mode(self, batch: FrozenBatch, point: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        def function(candidates: torch.Tensor) -> torch.Tensor:
            return self._replay(batch, candidates)

        return torch.func.jvp(function, (point,), (tangent.contiguous(),))[1]

    def _central_difference(self, batch: FrozenBatch, point: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        size = tangent.norm(dim=-1, keepdim=True)
        scale = CENTRAL_STEP * point.norm(dim=-1, keepdim=True) / torch.where(size > 0, size, 1.0)
        both = torch.cat([point + scale * tangent, point - scale * tangent], dim=1)
        plus, minus = self._replay(batch, both).chunk(2, dim=1)
        return (plus - minus) / (2 * scale)

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Vector-Jacobian products A_l^T w ``(n_prompts, k, hidden_size)``; ``cotangents`` has the same shape."""
        self._check("cotangents", cotangents)
        out = torch.empty_like(cotangents)
        for batch, rows in self._pieces(cotangents.shape[1]):
            cotangent = cotangents[batch.members, rows]
            with torch.enable_grad():
                point = self.states[batch.members].unsqueeze(1).expand_as(cotangent).clone().requires_grad_()
                value = self._replay(batch, point)
                out[batch.members, rows] = torch.autograd.grad(value, point, cotangent)[0]
        return out

    def _replay(self, batch: FrozenBatch, candidates: torch.Tensor) -> torch.Tensor:
        recording = batch.recording
        out = run_candidates(self.module, candidates, batch.call, recording.cache, batch.context, recording.last)
        return apply_modules(self.after, out)

    def _pieces(self, n_candidates: int) -> Iterator[tuple[FrozenBatch, slice]]:
        for batch in self.batches:
            n_rows = max(1, numbers_per_batch(self.states.device) // (len(batch.members) * self.states.shape[1]))
            for start in range(0, n_candidates, n_rows):
                yield batch, slice(start, min(n_candidates, start + n_rows))

    def dense(self, *, method: str = "jvp") -> DenseLayer:
        """The same linearization with every prompt's Jacobian formed: worth it for more than H products.

        Costs H products and H^2 numbers a prompt; exact Jacobians come row by row, which is cheaper than
        column by column, since reverse mode has fused kernels.
        """
        n_prompts, hidden_size = self.states.shape
        identity = torch.eye(hidden_size, dtype=self.states.dtype, device=self.states.device)
        units = identity.expand(n_prompts, -1, -1)
        jacobians = self.vjp(units) if method == "jvp" else self.jvp(units, method=method).transpose(1, 2)
        return DenseLayer(self.states, self.next_states, jacobians)

    def _check(self, argument: str, value: torch.Tensor) -> None:
        expected = (len(self.states), "k", self.states.shape[1])
        if value.ndim != 3 or value.shape[0] != expected[0] or value.shape[2] != expected[2] or not value.shape[1]:
            raise InputError(f"{argument} has shape {tuple(value.shape)}; expected {expected}, k at least 1.")


@dataclass(frozen=True)
class DenseLayer:
    """A layer's linearization at every prompt, as matrices; takes the place of a :class:`FrozenLayer`.

    Attributes
    ----------
    states, next_states : (n_prompts, hidden_size) tensor
        Operating points before and after the layer.
    jacobians : (n_prompts, hidden_size, hidden_size) tensor
    """

    states: torch.Tensor = field(repr=False)
    next_states: torch.Tensor = field(repr=False)
    jacobians: torch.Tensor = field(repr=False)

    def jvp(self, tangents: torch.Tensor, *, method: str = "jvp") -> torch.Tensor:
        """Products A_l t ``(n_prompts, k, hidden_size)``; ``method`` was chosen when the matrices were formed."""
        return tangents @ self.jacobians.transpose(1, 2)


def numbers_per_batch(device: torch.device) -> int:
    """Rows times hidden size that run together on a device."""
    return NUMBERS_PER_BATCH["cpu" if device.type == "cpu" else "cuda"]


def apply_modules(modules: tuple[nn.Module, ...], hidden: torch.Tensor) -> torch.Tensor:
    """Residual stream after some modules, one after the other."""
    for module in modules:
        hidden = module(hidden)
    return hidden
