"""Attention of candidates to a frozen context: each to the context and itself, its cost linear in both.

An eager kernel would see candidates behind the context's tokens: a mask between all pairs of them, and on the way back
gradients of the context's keys and values that nobody asks for.  Here the layer's attention module finds, in the place
of its mask, what a candidate sees; the projections around it stay the layer's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from transformers import AttentionInterface

from llvlit.engine.shared_point import are_equal

NAME = "llvlit_frozen_context"


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
    **_: Any,
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
        If the layer hands something else in place of its mask.
    """
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
            _for_every_head(each, ctx.n_groups) for each in (context.keys, context.values, key, value)
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
        cotangent = cotangents[0].transpose(1, 2)
        of_query, of_key = (cotangent @ ctx.derivative).chunk(2, dim=-1)
        of_value = ctx.on_own * cotangent
        if ctx.n_groups > 1:
            of_key, of_value = (each.unflatten(1, (-1, ctx.n_groups)).sum(dim=2) for each in (of_key, of_value))
        return of_query, of_key, of_value, None, None, None


def _for_every_head(each: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Keys or values of every query head, where groups of them share one."""
    return each if n_groups == 1 else each.repeat_interleave(n_groups, dim=1)


AttentionInterface.register(NAME, attend)


@contextmanager
def frozen_attention(layer: nn.Module) -> Iterator[None]:
    """Inside, the attention of a layer is :func:`attend`; its configuration is as before on leaving."""
    configs: dict[int, Any] = {id(part.config): part.config for part in layer.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
