"""Two short cuts for candidates, behind one door: attention to a frozen context, and products at a shared point.

*Frozen context.*  An eager kernel would see candidates behind the context's tokens: a mask between all pairs of them,
and on the way back gradients of the context's keys and values that nobody asks for.  Here the attention finds, in the
place of its mask, what a candidate sees, at a cost linear in candidates and tokens; the projections around it stay
the layer's own.

*Shared point.*  A graph for k products holds every prompt's operating point in k equal rows.  The modules that nearly
all the work is in (linear maps, activations, layer norms) look at the first row and answer for all.  On the way back an
activation multiplies by a derivative found once; a cotangent that all prompts share, as each row of the identity is,
passes a linear map once; and a layer norm's derivative, symmetric but for its weight, takes its fused kernel in both
directions.  Whatever else a layer holds sees k rows and differentiates as it always does.

Both are for a layer's stand-in (:func:`llvlit.engine.replay.stand_in`); the layer itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from transformers import AttentionInterface
from transformers.activations import ACT2CLS
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.pytorch_utils import Conv1D

from llvlit.engine.replay import stand_in

NAME = "llvlit_frozen_context"
ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


def fast_layer(layer: nn.Module, *, frozen_context: bool, rows: tuple[int, int] | None = None) -> nn.Module:
    """Stand-in of a layer that takes the short cuts.

    Parameters
    ----------
    frozen_context
        Whether its attention is :func:`attend`.
    rows
        Numbers of prompts and of rows a prompt, all equal, where they stand there for products with the derivative:
        rows ``(n_prompts, n_rows, size)`` share their point.  A part that is handed anything else does what it
        always does.
    """

    def change(part: nn.Module) -> dict[str, Any]:
        attributes = vars(part)
        if rows and "forward" not in attributes and (rule := _rule(part)):
            return {"forward": partial(_forward_shared, part, rule, rows)}
        if frozen_context and (config := attributes.get("config")) is not None:
            copy = object.__new__(type(config))
            vars(copy).update(vars(config), _attn_implementation_internal=NAME)
            return {"config": copy}
        return {}

    return stand_in(layer, change)


@dataclass(frozen=True)
class FrozenContext:
    """What every candidate of a prompt sees, as it stands in a layer's call in place of the attention mask.

    Attributes
    ----------
    keys, values : (n_prompts, n_key_heads, n_tokens, head_size) tensor
    bias : (n_prompts, n_heads or 1, 1, n_tokens) tensor
        Added to the scores of the context: hides the original last token, padding, and what a window leaves out.
    own_bias : (n_prompts, n_heads or 1, 1, 1) tensor
        Added to a candidate's score of itself.
    shared_point : bool
        Whether a prompt's candidates are all equal, for the sake of several products with the derivative there.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    own_bias: torch.Tensor
    shared_point: bool = False


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention ``(n_prompts, n_candidates, n_heads, head_size)`` as ``transformers`` calls it.

    Parameters
    ----------
    query : (n_prompts, n_heads, n_candidates, head_size) tensor
    key, value : (n_prompts, n_key_heads, n_candidates, head_size) tensor
        The candidates' own.
    attention_mask : FrozenContext

    Raises
    ------
    TypeError
        If the layer hands something else in place of its mask, or weights of its own, such as attention sinks.
    """
    if unknown := [name for name, other in others.items() if isinstance(other, nn.Parameter)]:
        raise TypeError(f"the attention has weights that are not known here ({', '.join(unknown)})")
    if not isinstance(attention_mask, FrozenContext):
        raise TypeError(f"the attention got {type(attention_mask).__name__} in place of its frozen context")
    context = attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if context.shared_point and all(are_equal(each, dim=2) for each in (query, key, value)):
        return _SharedAttention.apply(query, key, value, context, scale, softcap), None
    n_prompts, n_heads, n_candidates, head_size = query.shape
    n_key_heads = key.shape[1]
    grouped = (n_prompts, n_key_heads, n_heads // n_key_heads * n_candidates)  # heads that share keys, side by side
    queries = (query * scale).reshape(*grouped, head_size)
    seen = (queries @ context.keys.transpose(-1, -2)).view(n_prompts, n_heads, n_candidates, -1)
    shared = (n_prompts, n_key_heads, -1, n_candidates, head_size)
    own = (queries.view(shared) * key.unsqueeze(2)).sum(-1).view(n_prompts, n_heads, n_candidates, 1)
    if softcap is not None:
        seen, own = (softcap * torch.tanh(scores / softcap) for scores in (seen, own))
    weights = torch.cat([seen + context.bias, own + context.own_bias], dim=-1).softmax(dim=-1)
    on_context, on_own = weights.split([weights.shape[-1] - 1, 1], dim=-1)
    of_context = on_context.reshape(*grouped, -1) @ context.values
    of_own = on_own.reshape(*shared[:4], 1) * value.unsqueeze(2)
    mixed = of_context.view(n_prompts, n_heads, n_candidates, -1) + of_own.view(n_prompts, n_heads, n_candidates, -1)
    return mixed.transpose(1, 2), None


class _SharedAttention(Function):
    """:func:`attend` where a prompt's candidates are all equal: its derivative is a small matrix a prompt and head."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: FrozenContext,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of the first candidate, for all.

        With weights w over the tokens j, scores s and mixture m, the derivative of m is
        ``sum_j w_j (v_j - m) ds_j + w_own dv_own``, where ``ds_j = scale k_j dq`` (times the slope of a softcap), and
        of the candidate itself also ``scale q dk_own``.
        """
        n_rows, ctx.n_groups = query.shape[2], query.shape[1] // key.shape[1]
        query, key, value = (each[:, :, :1] for each in (query, key, value))
        keys, values, key, value = (
            repeat_kv(each, ctx.n_groups) for each in (context.keys, context.values, key, value)
        )
        scores = scale * torch.cat([query @ keys.transpose(-1, -2), query @ key.transpose(-1, -2)], dim=-1)
        slope: float | torch.Tensor = scale
        if softcap is not None:
            bent = torch.tanh(scores / softcap)
            scores, slope = softcap * bent, scale * (1 - bent**2)
        weights = (scores + torch.cat([context.bias, context.own_bias], dim=-1)).softmax(dim=-1)
        on_context, ctx.on_own = weights.split([weights.shape[-1] - 1, 1], dim=-1)
        mixed = on_context @ values + ctx.on_own * value
        pull, own_pull = (weights * slope).transpose(-1, -2).split([weights.shape[-1] - 1, 1], dim=-2)
        pulled, own_pulled = pull * keys, own_pull * key
        outer = torch.cat([value, -mixed], dim=-2).transpose(-1, -2)
        inner = torch.cat([own_pulled, pulled.sum(dim=-2, keepdim=True) + own_pulled], dim=-2)
        of_query = values.transpose(-1, -2) @ pulled + outer @ inner
        of_key = (value - mixed).transpose(-1, -2) * (own_pull * query)
        ctx.derivative = torch.cat([of_query, of_key], dim=-1)
        return mixed.transpose(1, 2).expand(-1, n_rows, -1, -1)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Cotangents of the candidates' queries, keys and values."""
        derivative, on_own, n_groups = ctx.derivative, ctx.on_own, ctx.n_groups
        transposed = derivative.transpose(-1, -2)

        def back(cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
            cotangent = cotangent.transpose(1, 2)
            of_query, of_key = (cotangent @ derivative).chunk(2, dim=-1)
            of_value = on_own * cotangent
            if n_groups > 1:
                of_key, of_value = (each.unflatten(1, (-1, n_groups)).sum(dim=2) for each in (of_key, of_value))
            return of_query, of_key, of_value

        def forth(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            key, value = (repeat_kv(each, n_groups) for each in (key, value))
            moved = torch.cat([query, key], dim=-1) @ transposed
            return torch.addcmul(moved, on_own, value).transpose(1, 2)

        return *_product(back, forth, *cotangents), None, None, None


AttentionInterface.register(NAME, attend)


class _Product(Function):
    """Cotangents times a derivative; differentiated once more, tangents times its transpose."""

    @staticmethod
    def forward(ctx: Any, back: Callable[..., Any], forth: Callable[..., Any], cotangent: torch.Tensor) -> Any:
        """Cotangents of the inputs."""
        ctx.forth = forth
        return back(cotangent)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Tangent of the output: one call, where differentiating each step back would take a handful."""
        return None, None, ctx.forth(*tangents)


def _product(back: Callable[..., Any], forth: Callable[..., Any], cotangent: torch.Tensor) -> Any:
    """Cotangents of the inputs from that of the output, which may be differentiated once more."""
    return _Product.apply(back, forth, cotangent) if torch.is_grad_enabled() else back(cotangent)


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
        weight, transposed = ctx.weight, ctx.weight.T

        def back(cotangent: torch.Tensor) -> torch.Tensor:
            if cotangent.stride(0) == 0:
                return (cotangent[:1] @ weight).expand(len(cotangent), -1, -1)
            return cotangent @ weight

        return _product(back, lambda tangent: tangent @ transposed, *cotangents), None


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
        kept = (each.expand(-1, rows.shape[1], -1).contiguous() for each in (mean, reciprocal))
        ctx.point = (rows.detach().contiguous(), *kept)
        ctx.weight = None if module.weight is None else module.weight.detach()
        return value.expand(-1, rows.shape[1], -1)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Cotangents times the derivative, S diag(weight)."""
        weight, point = ctx.weight, ctx.point

        def forth(tangent: torch.Tensor) -> torch.Tensor:
            rows = _standardized(tangent, None, *point)
            return rows if weight is None else rows * weight

        return _product(lambda cotangent: _standardized(cotangent, weight, *point), forth, *cotangents), None


class _RMSNorm(Function):
    """Each row divided by the root of its mean square, times gains."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Value of the first row, for all; gains are what the module makes of ones, be they weights or 1 + weights.

        With u the row over its root mean square 1/r, the derivative is ``diag(gains r) (I - u u^T / H)``.
        """
        epsilon = _epsilon(module)
        point = rows[:, :1].detach()
        reciprocal = (point.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        gains = _plain(module, torch.ones_like(point[:1])) * (1 + epsilon) ** 0.5
        ctx.scale, ctx.unit = (gains * reciprocal).detach(), point * reciprocal
        return _plain(module, point).expand(rows.shape)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Cotangents times the derivative."""
        scale, unit = ctx.scale, ctx.unit

        def across(rows: torch.Tensor) -> torch.Tensor:
            return torch.addcmul(rows, unit, (rows * unit).mean(dim=-1, keepdim=True), value=-1)

        def forth(tangent: torch.Tensor) -> torch.Tensor:
            return across(tangent) * scale

        return _product(lambda cotangent: across(cotangent * scale), forth, *cotangents), None


def _epsilon(module: nn.Module) -> float:
    """What is added to a mean square; zero where it cannot be told."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0)


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
    if type(module).__name__.endswith("RMSNorm") and _epsilon(module):
        return _RMSNorm
    return _Activation if type(module) in ACTIVATIONS else None


def _forward_shared(
    module: nn.Module, rule: type[Function], rows: tuple[int, int], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The module's answer for all rows from the first, where the rows of each prompt are equal."""
    of_heads = rule is _RMSNorm and len(args) == 1 and args[0].ndim == 4  # norms of single heads' queries and keys
    is_expected = len(args) == 1 and not kwargs and args[0].shape[: 2 if of_heads else -1] == rows
    if is_expected and are_equal(args[0], dim=1):
        return rule.apply(args[0], module)
    return _plain(module, *args, **kwargs)
