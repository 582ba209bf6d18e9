"""Whether an architecture can be replayed: tried on prompts before their first use, refused by name if not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llvlit.engine.exclusive import parts_of
from llvlit.engine.models import LanguageModel, wrap_model
from llvlit.engine.precision import in_float32
from llvlit.engine.replay import (
    ContextCache,
    Recording,
    ReplayStyle,
    first_output,
    map_leaves,
    record,
    run_all_tokens,
    run_candidates,
    run_model,
    run_together,
)
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.errors import ModelError, NumericalError

TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-5}
"""Relative to a layer's update of each number; in float64 too, most architectures take norms and softmax in float32."""

LOOSER = 5.0
"""The same for derivatives, which amplify rounding more."""

ROUNDING = 16
"""Units in the last place of the residual stream itself."""

HINT = "The command `llvlit architectures` tells what works."

_CANNOT_RUN = (RuntimeError, TypeError, IndexError, AttributeError, AssertionError, KeyError, ValueError)
"""What a layer raises that is handed what it does not expect."""


@dataclass(frozen=True)
class _Checked:
    """What was checked of a module: weights, parts and their forwards, on which shortest and longest prompt."""

    subject: tuple[str, list[nn.Module], list[Any]]
    shortest: tuple[int, ...]
    longest: tuple[int, ...]
    style: ReplayStyle


_CHECKED: WeakKeyDictionary[nn.Module, _Checked] = WeakKeyDictionary()
"""The last check of each module (a memo of :func:`check_replay`)."""


def check_replay(model: LanguageModel, tokens: TokenizedPrompts) -> ReplayStyle:
    """How the model's layers are run, after a check that recording and replaying them is exact.

    The shortest and the longest prompt run through the plain model; their recorded states, a replay of each state, and
    of a changed state beside it, and the derivative there must agree with the model's own layers: with attention to a
    frozen context, or else with the layers' own kernel, or else with the whole prompt anew for each candidate.  So
    must a state that a push before the first layer has moved in the plain model: what else the last token hands on,
    besides the residual stream, shows there.  Numbers are compared in the size of the layer's update at
    each token: one token with massive activations says nothing about another.  Products with a derivative share
    what they have in common where that gives the same numbers as differentiating row by row.

    To be called while the model is :func:`llvlit.engine.exclusive.exclusive`.  The answer is kept until a longer or
    shorter prompt comes, or a part of the module is another one.

    Raises
    ------
    ModelError
        If they do not: the architecture masks, positions or caches in a way that a replay does not see.
    """
    parts = parts_of(model.module)[1:]  # the module itself would keep its own memo alive
    subject = (model.fingerprint, parts, [part.__dict__.get("forward") for part in parts])
    known = _CHECKED.get(model.module)
    if known and known.subject != subject:
        known = None
    seen = (known.shortest, known.longest) if known else ()
    shortest, longest = (extreme([*seen, *tokens.ids], key=len) for extreme in (min, max))  # of equals, the one seen
    new = {shortest, longest}.difference(seen)
    if known and not new:
        return known.style
    if not known:
        _check_parts(model)
    style = known.style if known else None
    if model.dtype not in TOLERANCE:  # in 16 bits, a mistake would pass for rounding
        style = _find_style(_in_float32(model), shortest, longest, new, style)
    style = _find_style(model, shortest, longest, new, style)
    _CHECKED[model.module] = _Checked(subject, shortest, longest, style)
    return style


def _in_float32(model: LanguageModel) -> LanguageModel:
    """A copy of the model that computes in float32."""
    module = in_float32(model.module)
    if module is None:
        raise ModelError(
            f"{model.name} is checked in float32 before its first use in {model.dtype}, for which there is no memory. "
            "Hold one layer at a time: load_model(..., stream=True)."
        )
    return wrap_model(module, model.tokenizer, name=model.name)


@contextmanager
def _every_error_a_refusal(model: LanguageModel, what: str = "cannot be replayed") -> Iterator[None]:
    """Whatever a layer raises that is handed what it does not expect refuses the architecture; a lack of memory not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _CANNOT_RUN as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise refusal(model, None, f"{what} ({first_line})") from error


def _check_parts(model: LanguageModel) -> None:
    """Refuse by its reason what would else be refused by its numbers."""
    for index, module in enumerate(model.layers):
        for part in module.modules():
            if getattr(part, "is_kv_shared_layer", False):
                raise refusal(model, index, "attends to keys and values of an earlier layer: they move with the token")


def _masks_inside(model: LanguageModel) -> bool:
    """Whether a layer has a mask of its own, between positions that candidates do not have."""
    buffers = [buffer for layer in model.layers for buffer in layer.buffers() if buffer.dtype == torch.bool]
    return any(each.ndim >= 2 and each.shape[-1] == each.shape[-2] > 1 for each in buffers)


def _find_style(
    model: LanguageModel,
    shortest: tuple[int, ...],
    longest: tuple[int, ...],
    new: set[tuple[int, ...]],
    known: ReplayStyle | None,
) -> ReplayStyle:
    """The fastest style that is right on the new ones of two prompts, and was on those before."""
    from llvlit.engine.fast import FrozenContext, fast_layer  # here: it loads transformers

    samples = [torch.tensor([ids], device=model.device) for ids in new]
    plain = [_plain_outputs(model, sample) for sample in samples]
    pushed = [_plain_outputs(model, sample, pushed=True) for sample in samples]
    first = known or ReplayStyle(
        n_outputs=min(n_outputs for _, n_outputs in plain),
        frozen_context=FrozenContext,
        whole_prompts=_masks_inside(model),
        shares_point=True,
    )
    faster = [replace(first, frozen_context=None, stand_in=partial(fast_layer, frozen_context=False))]
    if first.frozen_context:
        faster.insert(0, replace(first, stand_in=partial(fast_layer, frozen_context=True)))
    for style in [
        *([] if first.whole_prompts else faster),
        replace(faster[-1], whole_prompts=True, equal_lengths=True),
    ]:
        try:
            with _every_error_a_refusal(model):
                if not style.equal_lengths and len(longest) > len(shortest):
                    style = replace(style, equal_lengths=_length_matters(model, shortest, longest, style))
                agree = [
                    _compare_replay(model, sample, expected, moved, style)
                    for sample, (expected, _), (moved, _) in zip(samples, plain, pushed, strict=True)
                ]
        except ModelError:
            if style.whole_prompts:
                raise
        else:
            break
    return replace(style, shares_point=all(agree) and style.shares_point)


def _plain_outputs(
    model: LanguageModel, tokens: torch.Tensor, *, pushed: bool = False
) -> tuple[list[torch.Tensor], int]:
    """The residual stream before layer 0 and after each of the plain model, and the length of what layers return.

    Parameters
    ----------
    pushed
        Whether the last token is pushed before layer 0.
    """
    states: list[torch.Tensor] = []
    lengths: list[int] = []

    def noting(layer: nn.Module) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not states:
                if hidden_states.ndim != 3:
                    raise refusal(model, None, f"hand on {hidden_states.ndim - 2} streams of states, not one")
                if (width := hidden_states.shape[-1]) != model.hidden_size:
                    raise refusal(
                        model, None, f"hand on {width} numbers a token, not the hidden size {model.hidden_size}"
                    )
                hidden_states = _changed(hidden_states) if pushed else hidden_states
                states.append(hidden_states)
            output = layer(hidden_states, *args, **kwargs)
            states.append(first_output(output))
            lengths.append(len(output) if isinstance(output, tuple | list) else 0)
            return output

        return forward

    with _every_error_a_refusal(model, f"cannot run a prompt in {model.dtype}"):
        run_model(model, tokens, noting, use_cache=False)
    if len(lengths) != model.n_layers:
        raise refusal(model, None, "does not call each of its layers once")
    return states, min(lengths)


def _changed(hidden: torch.Tensor) -> torch.Tensor:
    """The same residual stream, the last token at another state."""
    return torch.cat([hidden[:, :-1], hidden[:, -1:] + 0.5 * hidden[:, -1:].flip(-1)], dim=1)


def _length_matters(
    model: LanguageModel, shortest: tuple[int, ...], longest: tuple[int, ...], style: ReplayStyle
) -> bool:
    """Whether the shortest prompt's numbers are others where the longest is beside it.

    Its layers may be handed something else, or make something else of it.
    """
    n_tokens = len(shortest)
    padded = torch.tensor([[*shortest, *[0] * (len(longest) - n_tokens)], longest], device=model.device)
    last = torch.tensor([n_tokens - 1, len(longest) - 1], device=model.device)
    beside, alone = record(model, padded, last, style), record(model, padded[:1, :n_tokens], last[:1], style)
    if not all(_is_cut_from(*pair) for pair in zip(_tensors(alone), _tensors(beside), strict=True)):
        return True
    hidden = beside.hidden
    with torch.no_grad():
        for layer, call, call_beside in zip(model.layers, alone.calls, beside.calls, strict=True):
            cut = hidden[:1, :n_tokens].contiguous()
            expected, _ = run_all_tokens(layer, cut, call, alone.cache)
            hidden, _ = run_all_tokens(layer, hidden, call_beside, beside.cache)
            if not agrees(expected, hidden[:1, :n_tokens], cut):
                return True
    return False


def _tensors(recording: Recording) -> list[torch.Tensor]:
    leaves: list[Any] = [recording.hidden]
    map_leaves([(call.args, call.kwargs) for call in recording.calls], leaves.append)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _is_cut_from(tensor: torch.Tensor, longer: torch.Tensor) -> bool:
    if tensor.dtype == torch.bool:
        longer, tensor = longer.int(), tensor.int()
    cut = longer[tuple(slice(size) for size in tensor.shape)]
    return cut.shape == tensor.shape and bool(((tensor - cut).abs() <= 1e-5 * (1 + tensor.abs())).all())


def _compare_replay(
    model: LanguageModel,
    tokens: torch.Tensor,
    expected: list[torch.Tensor],
    pushed: list[torch.Tensor],
    style: ReplayStyle,
) -> bool:
    """Whether products with the derivatives may share their point; raises if a replay is wrong.

    The prompt runs in two rows: what a layer makes of the strides of rows shows with several prompts only.  Each layer
    starts at the plain model's own state, so that it answers for its own rounding alone, not for what massive
    activations have made of that of all layers before it.
    """
    tokens = tokens.expand(2, -1)
    last = torch.tensor([tokens.shape[1] - 1] * 2, device=tokens.device)
    recording = record(model, tokens, last, style)
    hidden = recording.hidden
    shares_point = style.shares_point
    for index, (module, call) in enumerate(zip(model.layers, recording.calls, strict=True)):
        changed = _changed(hidden)
        states = [hidden[:, -1], changed[:, -1], pushed[index][:, -1].expand(2, -1), changed[:, -1]]
        candidates = torch.stack(states[: 4 if tokens.shape[1] == 3 else 3], dim=1)  # not as many as tokens
        with torch.no_grad():
            with _Choices() as among_tokens:
                after, context = run_all_tokens(module, hidden, call, recording.cache)
            after_changed, _ = run_all_tokens(module, changed, call, recording.cache)
            if context.keys is None and not style.whole_prompts:
                raise refusal(model, index, "keeps no keys and values of its own in its cache")
            with _Choices() as among_all:
                replayed = run_candidates(module, candidates, call, recording, context)
            n_tokens, n_candidates = tokens.shape[1], candidates.shape[1]
            if not style.whole_prompts and {n_tokens, n_tokens + n_candidates} <= among_tokens.sizes | among_all.sizes:
                raise refusal(model, index, "chooses among the tokens, where equal ones tie")
            beside, joined = run_together(module, hidden, candidates, call, recording.cache, last)
        for start, reference, value, what in (
            (hidden, expected[index + 1], after, "sees something that its recorded call lacks"),
            (hidden[:, :-1], after[:, :-1], after_changed[:, :-1], "lets earlier tokens see the last one"),
            (hidden[:, -1], after[:, -1], replayed[:, 0], "gives another next state on replay"),
            (
                changed[:, -1],
                after_changed[:, -1],
                replayed[:, 1],
                "gives a changed state another next state on replay",
            ),
            (
                pushed[index][:, -1],
                pushed[index + 1][:, -1],
                replayed[:, 2],
                "depends on the last token in another way than by its state alone",
            ),
            (hidden, after, beside, "gives another next state beside candidates"),
            (candidates, replayed, joined, "gives candidates another next state beside all tokens"),
        ):
            if not torch.isfinite(value).all():
                raise not_finite(model, f"layer {index}")
            if not agrees(reference, value, start):
                raise refusal(model, index, what)
        shares_point = _derivatives_agree(model, index, hidden, recording, context) and shares_point
        hidden = expected[index + 1].expand_as(after).contiguous()
    return shares_point


class _Choices(TorchFunctionMode):
    """Inside, of how many each choice of the largest (``topk``) is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, torch.Tensor.topk):
            self.sizes.add((args[0] if args else kwargs["input"]).shape[-1])
        return func(*args, **(kwargs or {}))


def _derivatives_agree(
    model: LanguageModel, index: int, hidden: torch.Tensor, recording: Recording, context: ContextCache
) -> bool:
    """Whether products at a shared point are those of the layer with all tokens; raises if the replay's own are not."""
    layer, call = model.layers[index], recording.calls[index]
    numbers = torch.arange(1, hidden.shape[-1] + 1, device=hidden.device, dtype=hidden.dtype)
    cotangent = torch.cos(numbers).expand(len(hidden), 1, -1)  # one that all prompts share
    cotangents = torch.stack([torch.cos(numbers), 2 * torch.cos(numbers)]).expand(len(hidden), -1, -1)
    with torch.enable_grad():
        point = hidden[:, -1:].clone().requires_grad_()
        try:
            after, _ = run_all_tokens(layer, torch.cat([hidden[:, :-1], point], dim=1), call, recording.cache)
            (product,) = torch.autograd.grad(after[:, -1:], point, cotangent)
            expected = torch.cat([product, 2 * product], dim=1)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT_RUN:
            return False

        def agree(*, shared: bool) -> bool:
            rows = hidden[:, -1:].repeat(1, 2, 1).requires_grad_()
            value = run_candidates(layer, rows, call, recording, context, shared=shared)
            return agrees(expected, torch.autograd.grad(value, rows, cotangents)[0], cotangents, looser=LOOSER)

        if not agree(shared=False):
            raise refusal(model, index, "has another derivative on replay")
        try:
            return agree(shared=True)
        except torch.OutOfMemoryError:
            raise
        except _CANNOT_RUN:
            return False


def agrees(reference: torch.Tensor, value: torch.Tensor, start: torch.Tensor, *, looser: float = 1.0) -> bool:
    """Whether two tensors agree in the size of what changed since ``start``, row by row and number by number."""
    change = (reference - start).abs()
    allowed = looser * TOLERANCE.get(reference.dtype, 1e-2) * (change + change.mean(dim=-1, keepdim=True))
    allowed += ROUNDING * torch.finfo(reference.dtype).eps * reference.abs()
    return bool(((reference - value).abs() <= allowed).all())


def refusal(model: LanguageModel, layer: int | None, reason: str) -> ModelError:
    """Error that refuses an architecture by name, with the reason."""
    where = "its layers" if layer is None else f"layer {layer}"
    verb = "" if layer is None else "it "
    return ModelError(
        f"{model.name}: the architecture {type(model.module).__name__} is refused, since {where}: {verb}{reason}. "
        f"{HINT}"
    )


def not_finite(model: LanguageModel, where: str) -> NumericalError:
    """Error that tells after which layer, or of which prompts, a state is not finite."""
    return NumericalError(
        f"The residual stream of {model.name} is not finite after {where}. "
        "Check the model's weights; load it in float32 or float64."
    )
