"""Record, slice, replay: a layer of any causal decoder as a map of its last token, the context frozen.

A forward pass whose layers do nothing records what the model hands each of them (mask, positions, ...).  A
layer is then run twice: once on all tokens, which yields the next states and the context's keys and values;
and as often as wanted on *candidates*, alternative last tokens that stand side by side behind the context.
Each candidate sees the context and itself.  A layer whose context is more than keys and values (a recurrent state,
an index, a mask of its own) runs the whole prompt again for each candidate, which is slower and as exact.  No
architecture has code of its own, and no module is changed, not even for a moment: where something else must run, it
runs in a stand-in that shares the module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llvlit.engine.models import LanguageModel

if TYPE_CHECKING:
    from transformers import DynamicCache


class ContextCache:
    """Read-only cache: hands a layer the context's keys and values before its own, and stores nothing.

    Built without a context, it notes the keys and values of the tokens that pass through.  Candidates stand side by
    side at one position: a layer that would count them from the cache's length is told that it cannot.

    Where a call has no cache, the tokens themselves are the context.
    """

    tokens: torch.Tensor | None = None

    def __init__(
        self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, *, for_candidates: bool = False
    ) -> None:
        self.keys = keys
        self.values = values
        self.is_recording = keys is None
        self.for_candidates = for_candidates

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(n_prompts, n_heads, n_tokens, head_size)`` that the layer attends to."""
        if self.is_recording:
            self.keys, self.values = keys.contiguous(), values.contiguous()  # as each kernel wants them
            return self.keys, self.values
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)

    def get_seq_length(self, *_: Any) -> int:
        """Number of tokens before those that pass through."""
        if self.for_candidates:
            raise TypeError("it takes positions from its cache, where candidates have all the same")
        return 0


@dataclass(frozen=True)
class LayerCall:
    """What a model hands one layer besides the residual stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor, change: Callable[[Any], Any]) -> torch.Tensor:
        """Residual stream after a layer that is handed ``hidden`` and this, each leaf of its nests changed."""
        args, kwargs = map_leaves((self.args, self.kwargs), change)
        return first_output(layer(hidden, *args, **kwargs))


@dataclass(frozen=True)
class ReplayStyle:
    """How the layers of an architecture are run; found out by :func:`llvlit.engine.check.check_replay`.

    Attributes
    ----------
    n_outputs : int
        Length of the tuples that layers return, 0 where they return the residual stream alone.
    equal_lengths : bool
        Whether only prompts of one length may share a batch, since what a model does with the positions of all
        follows from the longest.
    frozen_context : callable or None
        Of keys, values, biases and whether a prompt's candidates are equal: what a layer gets in the place of its mask;
        see :class:`llvlit.engine.fast.FrozenContext`.  None where candidates run through the layer's own kernel,
        behind the context's tokens and a mask.
    whole_prompts : bool
        Whether each candidate runs with all tokens of its prompt, as in the full model.
    shares_point : bool
        Whether products with the derivative share what all rows of a prompt have in common; else the layer's own
        modules are differentiated row by row.
    stand_in : callable
        Of a layer, and for products that share their point of the numbers of prompts and rows: what runs in the
        layer's place for candidates.
    """

    n_outputs: int
    equal_lengths: bool = False
    frozen_context: Callable[..., Any] | None = None
    whole_prompts: bool = False
    shares_point: bool = False
    stand_in: Callable[..., nn.Module] = lambda layer, rows: layer


@dataclass(frozen=True)
class Recording:
    """The embedded tokens of a batch and the call of every layer.

    Attributes
    ----------
    hidden : (n_prompts, n_tokens, hidden_size) tensor
        Residual stream before layer 0; prompts are padded on the right.
    last : (n_prompts,) int tensor
        Position of each prompt's last token.
    calls : tuple of LayerCall
    cache : DynamicCache or None
        Stands in the calls where a cache belongs; None where whole prompts run.
    style : ReplayStyle
    """

    hidden: torch.Tensor
    last: torch.Tensor
    calls: tuple[LayerCall, ...]
    cache: DynamicCache | None
    style: ReplayStyle


def stand_in(module: nn.Module, change: Callable[[nn.Module], dict[str, Any]]) -> nn.Module:
    """A module that shares all parameters with another, some attributes of its parts changed.

    Parameters
    ----------
    change
        Of a part: the attributes that its stand-in has instead.  Parts in which nothing changes stand for themselves;
        those of a part with another ``forward`` are not looked at.
    """
    attributes = change(module)
    children = module._modules
    if "forward" not in attributes:
        children = {name: part and stand_in(part, change) for name, part in children.items()}
    if not attributes and all(part is module._modules[name] for name, part in children.items()):
        return module
    copy = object.__new__(type(module))
    vars(copy).update(vars(module), _modules=children, **attributes)
    return copy


def run_model(
    model: LanguageModel, tokens: torch.Tensor, in_place_of: Callable[[nn.Module], Callable[..., Any]], **options: Any
) -> None:
    """Forward pass of token ids ``(n_prompts, n_tokens)`` with functions in the places of the layers."""
    forwards = {id(layer): in_place_of(layer) for layer in model.layers}

    def change(part: nn.Module) -> dict[str, Any]:
        if id(part) in forwards:  # and no hook: it would read the weights of a layer that does nothing
            return {"forward": forwards[id(part)], "_forward_pre_hooks": {}}
        return _fresh_frequencies(part)

    with torch.no_grad():
        stand_in(model.module.base_model, change)(input_ids=tokens, **options)


def _fresh_frequencies(part: nn.Module) -> dict[str, Any]:
    """Rotary frequencies as they are in a new module, where calls change them by the lengths that they have seen."""
    originals = [name for name in (*vars(part), *part._buffers) if name.endswith("original_inv_freq")]
    if not originals:
        return {}
    buffers = dict(part._buffers)
    for name in originals:
        current = name.removesuffix("original_inv_freq") + "inv_freq"
        buffers[current] = getattr(part, name).to(buffers[current], copy=True)
    longest = {name: part.original_max_seq_len for name in vars(part) if name.endswith("max_seq_len_cached")}
    return {"_buffers": buffers, **longest}


def record(model: LanguageModel, tokens: torch.Tensor, last: torch.Tensor, style: ReplayStyle) -> Recording:
    """Recording of a batch of token ids ``(n_prompts, n_tokens)``, padded on the right."""
    from transformers import DynamicCache  # here: whoever runs no model does without the seconds it takes to load

    seen: list[tuple[torch.Tensor, LayerCall]] = []
    cache = None if style.whole_prompts else DynamicCache()
    cached = {} if cache is None else {"past_key_values": cache}

    def idle(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((hidden_states, LayerCall(args, kwargs)))
        return (hidden_states, *[None] * (style.n_outputs - 1)) if style.n_outputs else hidden_states

    seen_by_all = torch.ones_like(tokens)
    run_model(model, tokens, lambda _: idle, attention_mask=seen_by_all, use_cache=cache is not None, **cached)
    return Recording(seen[0][0], last, tuple(call for _, call in seen), cache, style)


def run_all_tokens(
    layer: nn.Module, hidden: torch.Tensor, call: LayerCall, cache: DynamicCache | None
) -> tuple[torch.Tensor, ContextCache]:
    """Residual stream after a layer ``(n_prompts, n_tokens, hidden_size)``, and its keys and values."""
    context = ContextCache()
    if cache is None:
        context.tokens = hidden
        return call.run(layer, hidden, _as_it_is), context
    return call.run(layer, hidden, lambda value: context if value is cache else value), context


def run_candidates(
    layer: nn.Module,
    candidates: torch.Tensor,
    call: LayerCall,
    recording: Recording,
    context: ContextCache,
    *,
    shared: bool = False,
    often: bool = False,
) -> torch.Tensor:
    """Outputs ``(n_prompts, n_candidates, hidden_size)`` for candidate last tokens of each prompt.

    Parameters
    ----------
    shared
        Whether a prompt's candidates are all equal and stand there for derivatives.
    often
        Whether these come many times, so that a single row, too, has its attention's derivative formed.
    """
    if context.tokens is not None:
        return _run_whole_prompts(layer, context.tokens, candidates, call, recording.last)
    keys, values = context.keys, context.values
    assert keys is not None and values is not None
    n_tokens, style = keys.shape[-2], recording.style
    rows = tuple(candidates.shape[:2]) if shared and style.shares_point else None
    reader = ContextCache(*(() if style.frozen_context else (keys, values)), for_candidates=True)

    def cut(value: Any) -> Any:
        if value is recording.cache:
            return reader
        if not isinstance(value, torch.Tensor):
            return value
        if style.frozen_context and _is_mask(value, n_tokens) and value.is_floating_point():
            seen = _seen_by_last(value, recording.last)
            return style.frozen_context(keys, values, *seen, rows is not None and (often or rows[1] > 1))
        return _cut(value, recording.last, n_tokens, candidates.shape[1])

    return call.run(style.stand_in(layer, rows=rows), candidates, cut)


def run_together(
    layer: nn.Module,
    hidden: torch.Tensor,
    candidates: torch.Tensor,
    call: LayerCall,
    cache: DynamicCache | None,
    last: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens and the candidates behind them in one call: both residual streams after the layer.

    The same numbers as :func:`run_all_tokens` and :func:`run_candidates`, for one set of matrix products.
    """
    n_tokens, n_candidates = hidden.shape[1], candidates.shape[1]
    if cache is None:
        after = call.run(layer, hidden, _as_it_is)
        return after, _run_whole_prompts(layer, hidden, candidates, call, last) if n_candidates else candidates

    def extend(value: Any) -> Any:
        if value is cache:
            return ContextCache(for_candidates=n_candidates > 0)
        if not isinstance(value, torch.Tensor):
            return value
        behind = _cut(value, last, n_tokens, n_candidates)
        if behind is value:
            return value
        before = value.expand(len(last), *value.shape[1:])
        if value.ndim < 4:
            return torch.cat([before, behind], dim=1)
        blind = before.new_full((*before.shape[:3], n_candidates), _hidden(value.dtype))
        return torch.cat([torch.cat([before, blind], dim=-1), behind], dim=-2)

    out = call.run(layer, torch.cat([hidden, candidates], dim=1), extend)
    return out[:, :n_tokens], out[:, n_tokens:]


def _run_whole_prompts(
    layer: nn.Module, hidden: torch.Tensor, candidates: torch.Tensor, call: LayerCall, last: torch.Tensor
) -> torch.Tensor:
    """Outputs for candidates, each in the place of its prompt's last token, one call of all tokens after the other."""
    prompts = torch.arange(len(last), device=last.device)
    is_last = (torch.arange(hidden.shape[1], device=last.device) == last.unsqueeze(1)).unsqueeze(-1)
    outputs = []
    for candidate in candidates.unbind(dim=1):
        tokens = torch.where(is_last, candidate.unsqueeze(1), hidden)
        outputs.append(call.run(layer, tokens, _as_it_is)[prompts, last])
    return torch.stack(outputs, dim=1)


def _as_it_is(value: Any) -> Any:
    return value


def first_output(output: Any) -> torch.Tensor:
    """The residual stream in a layer's output, be it a tensor, a tuple or a list."""
    return output[0] if isinstance(output, tuple | list) else output


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dicts with its leaves changed.

    A function of the module, not a closure that calls itself: such a one is a reference cycle, and would keep
    every layer's context alive until the garbage collector comes by.
    """
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)


def _cut(value: torch.Tensor, last: torch.Tensor, n_tokens: int, n_candidates: int) -> torch.Tensor:
    """A recorded argument, cut to the last token's position and repeated for every candidate.

    Attention masks are (batch, head, token, token), positions (batch, token), rotary embeddings and other
    features (batch, token, feature), where the batch may be 1; anything else is handed on as it is.
    """
    if _is_mask(value, n_tokens):
        return _candidate_mask(value, last, n_candidates)
    if value.ndim in (2, 3) and value.shape[1] == n_tokens:
        return value[_rows(value, last), last].unsqueeze(1).expand(-1, n_candidates, *value.shape[2:])
    return value


def _rows(value: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Index of each prompt in a recorded argument, whose batch may be 1."""
    return torch.arange(len(last), device=value.device) if value.shape[:1] == (len(last),) else 0 * last


def _is_mask(value: torch.Tensor, n_tokens: int) -> bool:
    return value.ndim == 4 and value.shape[-2:] == (n_tokens, n_tokens)


def _seen_by_last(mask: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token's row of a mask, cut into context ``(batch, head, 1, token)`` and itself ``(batch, head, 1, 1)``.

    In the context, the original last token is hidden: candidates stand in its place.
    """
    row = mask[_rows(mask, last), :, last, :].unsqueeze(2)
    index = last.view(-1, 1, 1, 1).expand(-1, row.shape[1], 1, 1)
    return row.scatter(-1, index, _hidden(row.dtype)), row.gather(-1, index)


def _candidate_mask(mask: torch.Tensor, last: torch.Tensor, n_candidates: int) -> torch.Tensor:
    """Mask (batch, head, candidate, token + candidate): each candidate sees the context and itself."""
    context, own = _seen_by_last(mask, last)
    itself = torch.eye(n_candidates, dtype=torch.bool, device=mask.device)
    candidates = torch.where(itself, own, torch.full_like(own, _hidden(mask.dtype)))
    return torch.cat([context.expand(-1, -1, n_candidates, -1), candidates], dim=-1)


def _hidden(dtype: torch.dtype) -> float | bool:
    """What a mask of that type holds where a token is not seen."""
    return False if dtype == torch.bool else torch.finfo(dtype).min
