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

from llvlit.engine.exclusive import parts_of
from llvlit.engine.fast import FrozenContext, fast_layer
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
    frozen context, or else with the layers' own kernel.  Numbers are compared in the size of the layer's update at
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
    """Refuse what no comparison of single layers would see."""
    for index, module in enumerate(model.layers):
        for part in module.modules():
            if getattr(part, "is_kv_shared_layer", False):
                raise refusal(model, index, "attends to keys and values of an earlier layer: they move with the token")
        for name, buffer in module.named_buffers():
            if buffer.dtype == torch.bool and buffer.ndim >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1:
                raise refusal(model, index, f"masks inside its attention (buffer {name!r})")


def _find_style(
    model: LanguageModel,
    shortest: tuple[int, ...],
    longest: tuple[int, ...],
    new: set[tuple[int, ...]],
    known: ReplayStyle | None,
) -> ReplayStyle:
    """The fastest style that is right on the new ones of two prompts, and was on those before."""
    samples = [torch.tensor([ids], device=model.device) for ids in new]
    expected, returns_tuple = zip(*(_plain_outputs(model, sample) for sample in samples), strict=True)
    style = known or ReplayStyle(all(returns_tuple))
    if not style.equal_lengths and len(longest) > len(shortest):
        with _every_error_a_refusal(model):
            style = replace(style, equal_lengths=_length_matters(model, shortest, longest, style))
    for frozen_context in (FrozenContext, None) if known is None or known.frozen_context else (None,):
        layer = partial(fast_layer, frozen_context=frozen_context is not None)
        shares_point = known is None or known.shares_point
        style = replace(style, frozen_context=frozen_context, shares_point=shares_point, stand_in=layer)
        try:
            with _every_error_a_refusal(model):
                agree = [_compare_replay(model, *sample, style) for sample in zip(samples, expected, strict=True)]
        except ModelError:
            if not frozen_context:
                raise
        else:
            break
    return replace(style, shares_point=all(agree))


def _plain_outputs(model: LanguageModel, tokens: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """The residual stream after each layer of the plain model, and whether layers return tuples."""
    outputs: list[Any] = []

    def noting(layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs.append(layer(*args, **kwargs))
            return outputs[-1]

        return forward

    with _every_error_a_refusal(model, f"cannot run a prompt in {model.dtype}"):
        run_model(model, tokens, noting, use_cache=False)
    if len(outputs) != model.n_layers:
        raise refusal(model, None, "does not call each of its layers once")
    return [first_output(output) for output in outputs], all(isinstance(output, tuple) for output in outputs)


def _length_matters(
    model: LanguageModel, shortest: tuple[int, ...], longest: tuple[int, ...], style: ReplayStyle
) -> bool:
    """Whether a model hands its layers something else for the shortest prompt where the longest is beside it."""
    n_tokens = len(shortest)
    padded = torch.tensor([[*shortest, *[0] * (len(longest) - n_tokens)], longest], device=model.device)
    last = torch.tensor([n_tokens - 1, len(longest) - 1], device=model.device)
    beside, alone = record(model, padded, last, style), record(model, padded[:1, :n_tokens], last[:1], style)
    return not all(_is_cut_from(*pair) for pair in zip(_tensors(alone), _tensors(beside), strict=True))


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
    model: LanguageModel, tokens: torch.Tensor, expected: list[torch.Tensor], style: ReplayStyle
) -> bool:
    """Whether products with the derivatives may share their point; raises if a replay is wrong."""
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    recording = record(model, tokens, last, style)
    hidden = recording.hidden
    shares_point = style.shares_point
    for index, (module, call) in enumerate(zip(model.layers, recording.calls, strict=True)):
        changed = hidden.clone()
        changed[:, -1] += 0.5 * hidden[:, -1].flip(-1)
        states = [hidden[:, -1], changed[:, -1], changed[:, -1]]
        candidates = torch.stack(states[: 3 if tokens.shape[1] == 2 else 2], dim=1)  # not as many as tokens
        with torch.no_grad():
            after, context = run_all_tokens(module, hidden, call, recording.cache)
            after_changed, _ = run_all_tokens(module, changed, call, recording.cache)
            if context.keys is None:
                raise refusal(model, index, "keeps no keys and values of its own in its cache")
            replayed = run_candidates(module, candidates, call, recording, context)
            beside, joined = run_together(module, hidden, candidates, call, recording.cache, last)
        for start, reference, value, what in (
            (hidden, expected[index], after, "sees something that its recorded call lacks"),
            (hidden[:, :-1], after[:, :-1], after_changed[:, :-1], "lets earlier tokens see the last one"),
            (hidden[:, -1], after[:, -1], replayed[:, 0], "gives another next state on replay"),
            (
                changed[:, -1],
                after_changed[:, -1],
                replayed[:, 1],
                "gives a changed state another next state on replay",
            ),
            (hidden, after, beside, "gives another next state beside candidates"),
            (candidates, replayed, joined, "gives candidates another next state beside all tokens"),
        ):
            if not torch.isfinite(value).all():
                raise not_finite(model, f"layer {index}")
            if not agrees(reference, value, start):
                raise refusal(model, index, what)
        shares_point = _derivatives_agree(model, index, hidden, recording, context) and shares_point
        hidden = after
    return shares_point


def _derivatives_agree(
    model: LanguageModel, index: int, hidden: torch.Tensor, recording: Recording, context: ContextCache
) -> bool:
    """Whether products at a shared point are those of the layer with all tokens; raises if the replay's own are not."""
    layer, call = model.layers[index], recording.calls[index]
    numbers = torch.arange(1, hidden.shape[-1] + 1, device=hidden.device, dtype=hidden.dtype)
    cotangent = torch.cos(numbers).view(1, 1, -1)
    cotangents = torch.cat([cotangent, 2 * cotangent], dim=1)
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
        "Known to work: GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, OPT, Phi."
    )


def not_finite(model: LanguageModel, where: str) -> NumericalError:
    """Error that tells after which layer, or of which prompts, a state is not finite."""
    return NumericalError(
        f"The residual stream of {model.name} is not finite after {where}. "
        "Check the model's weights; load it in float32 or float64."
    )
