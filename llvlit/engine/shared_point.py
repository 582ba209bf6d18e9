"""Many products at one operating point a prompt: what they share is computed once, not row by row.

A graph for k products holds every prompt's operating point in k equal rows.  Inside :func:`shared_point` the modules
that nearly all the work is in (linear maps, activations, layer norms) look at the first row and answer for all.  On
the way back an activation multiplies by a derivative found once; a cotangent that all prompts share, as each row of
the identity is, passes a linear map once; and a layer norm's derivative, symmetric but for its weight, takes its
fused kernel in both directions.  Whatever else a layer holds sees k rows and differentiates as it always does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


class _Linear(Function):
    """Rows times a matrix, plus a bias."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, module: nn.Linear | Conv1D) -> torch.Tensor:
        """Value of the first row, for all."""
        weight = module.weight.detach()
        ctx.weight = weight if isinstance(module, nn.Linear) else weight.T
        return _plain(module, rows[:, :1]).expand(-1, rows.shape[1], -1)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Cotangents times the matrix, once for all prompts where they share them."""
        (cotangent,) = cotangents
        if cotangent.stride(0) == 0:
            return (cotangent[:1] @ ctx.weight).expand(len(cotangent), -1, -1), None
        return cotangent @ ctx.weight, None


class _Activation(Function):
    """A function of each number by itself."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Value of the first row, for all; its derivative is kept."""
        with torch.enable_grad():
            point = rows[:, :1].detach().requires_grad_()
            value = _plain(module, point)
            (ctx.derivative,) = torch.autograd.grad(value.sum(), point)
        return value.detach().expand(-1, rows.shape[1], -1)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Cotangents times the derivative."""
        return cotangents[0] * ctx.derivative, None


class _LayerNorm(Function):
    """Each row standardized, times a weight, plus a bias."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, module: nn.LayerNorm) -> torch.Tensor:
        """Value of the first row, for all; the rows, their means and reciprocal deviations are kept."""
        value, mean, reciprocal = torch.native_layer_norm(
            rows[:, :1], module.normalized_shape, module.weight, module.bias, module.eps
        )
        kept = (one.expand(-1, rows.shape[1], -1).contiguous() for one in (mean, reciprocal))
        ctx.point = (rows.detach().contiguous(), *kept)
        ctx.weight = None if module.weight is None else module.weight.detach()
        return value.expand(-1, rows.shape[1], -1)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Cotangents times the derivative, S diag(weight)."""
        return _LayerNormDerivative.apply(cotangents[0], ctx.weight, *ctx.point), None


class _LayerNormDerivative(Function):
    """Rows times S diag(weight), where S, the derivative of standardizing, is symmetric."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor | None, *point: torch.Tensor) -> torch.Tensor:
        """One fused pass."""
        ctx.weight, ctx.point = weight, point
        return _standardized(rows, weight, *point)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The transpose: rows times S, then times the weight."""
        rows = _standardized(cotangents[0], None, *ctx.point)
        return (rows if ctx.weight is None else rows * ctx.weight), None, None, None, None


def _standardized(
    rows: torch.Tensor, weight: torch.Tensor | None, point: torch.Tensor, mean: torch.Tensor, reciprocal: torch.Tensor
) -> torch.Tensor:
    return torch.ops.aten.native_layer_norm_backward(
        rows, point, point.shape[-1:], mean, reciprocal, weight, None, [True, False, False]
    )[0]


def are_equal(rows: torch.Tensor, *, dim: int) -> bool:
    """Whether a tensor holds the same along a dimension; costs nothing where one number serves all."""
    return rows.stride(dim) == 0 or torch.equal(rows, rows.narrow(dim, 0, 1).expand_as(rows))


def _plain(module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What the module's class computes, whatever stands in its place."""
    return type(module).forward(module, *args, **kwargs)


def _rule(module: nn.Module) -> type[Function] | None:
    if type(module) in (nn.Linear, Conv1D):
        return _Linear
    if type(module) is nn.LayerNorm:
        return _LayerNorm
    return _Activation if type(module) in ACTIVATIONS else None


@contextmanager
def shared_point(layer: nn.Module, n_prompts: int, n_rows: int) -> Iterator[None]:
    """Inside, a layer takes rows ``(n_prompts, n_rows, hidden_size)`` that are equal for each prompt.

    A module that is handed anything else does what it always does.
    """

    def forward(module: nn.Module, rule: type[Function], *args: Any, **kwargs: Any) -> torch.Tensor:
        is_expected = len(args) == 1 and not kwargs and args[0].shape[:-1] == (n_prompts, n_rows)
        if is_expected and are_equal(args[0], dim=1):
            return rule.apply(args[0], module)
        return _plain(module, *args, **kwargs)

    rules = [(module, rule) for module in layer.modules() if (rule := _rule(module)) and "forward" not in vars(module)]
    try:
        for module, rule in rules:
            module.forward = partial(forward, module, rule)
        yield
    finally:
        for module, _ in rules:
            vars(module).pop("forward", None)
