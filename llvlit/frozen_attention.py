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
from transformers import AttentionInterface

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
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    own_bias: torch.Tensor


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
    n_prompts, n_heads, n_candidates, head_size = query.shape
    n_key_heads = key.shape[1]
    scale = head_size**-0.5 if scaling is None else scaling
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
