"""Whether an architecture can be replayed: tried on one prompt before its first use, refused by name if not."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import (
    ContextCache,
    LayerCall,
    Recording,
    ReplayStyle,
    first_output,
    record,
    run_all_tokens,
    run_candidates,
)
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.errors import ModelError, NumericalError

REPLAY_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-5}
"""Relative to the largest number; in float64 too, most architectures take norms and softmax in float32."""

_CANNOT_RUN = (RuntimeError, TypeError, IndexError, AttributeError, AssertionError, KeyError, ValueError)
"""What a layer raises that is handed what it does not expect."""

_STYLES: WeakKeyDictionary[nn.Module, ReplayStyle] = WeakKeyDictionary()
"""Modules already checked, and how they are run (a memo of :func:`check_replay`)."""


def check_replay(model: LanguageModel, tokenized: TokenizedPrompts) -> ReplayStyle:
    """How the model's layers are run, after a check that recording and replaying them is exact.

    One prompt runs through the plain model; its recorded states, a replay of each state, and a replay of a
    changed state beside it must agree with the model's own layers: with attention to a frozen context, or else with
    the layers' own kernel.  Products with a derivative share what they have in common where that gives the same numbers
    as differentiating row by row.  The answer is kept per module: change a model, by a hook or otherwise, before.

    Raises
    ------
    ModelError
        If they do not: the architecture masks, positions or caches in a way that a replay does not see.
    """
    known = _STYLES.get(model.module)
    if known is not None:
        return known
    for index, module in enumerate(model.layers):
        for name, buffer in module.named_buffers():
            if buffer.dtype == torch.bool and buffer.ndim >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1:
                raise refusal(model, index, f"masks inside its attention (buffer {name!r})")
    tokens = torch.tensor([max(tokenized.ids, key=len)], device=model.device)
    outputs: list[tuple[torch.Tensor, bool]] = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append((first_output(out), isinstance(out, tuple))))
        for layer in model.layers
    ]
    try:
        with torch.no_grad():
            model.module.base_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    returns_tuple = all(is_tuple for _, is_tuple in outputs)
    expected = [out for out, _ in outputs]
    for frozen_attention in (True, False):
        style = ReplayStyle(returns_tuple, frozen_attention, shared_point=False)
        try:
            shared_point = _compare_replay(model, tokens, expected, style)
        except torch.OutOfMemoryError:
            raise
        except ModelError:
            if not frozen_attention:
                raise
        except _CANNOT_RUN as error:
            if not frozen_attention:
                raise refusal(model, None, f"cannot be replayed ({str(error).splitlines()[0]})") from error
        else:
            break
    style = replace(style, shared_point=shared_point)
    _STYLES[model.module] = style
    return style


def _compare_replay(
    model: LanguageModel, tokens: torch.Tensor, expected: list[torch.Tensor], style: ReplayStyle
) -> bool:
    """Whether products with the derivatives may share their point; raises if a replay is wrong."""
    tolerance = REPLAY_TOLERANCE.get(model.dtype, 1e-2)
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    recording = record(model, tokens, last, style)
    if len(recording.calls) != model.n_layers:
        raise refusal(model, None, "does not call each of its layers once")
    hidden = recording.hidden
    shared_point = True
    for index, (module, call) in enumerate(zip(model.layers, recording.calls, strict=True)):
        changed = hidden.clone()
        changed[:, -1] += 0.5 * hidden[:, -1].flip(-1)
        with torch.no_grad():
            after, context = run_all_tokens(module, hidden, call, recording.cache)
            after_changed, _ = run_all_tokens(module, changed, call, recording.cache)
            pair = torch.stack([hidden[:, -1], changed[:, -1]], dim=1)
            replayed = run_candidates(module, pair, call, recording, context)
        scale = tolerance * (1 + after.abs().max().item())
        for reference, value, what in (
            (expected[index], after, "sees something that its recorded call lacks"),
            (after[:, :-1], after_changed[:, :-1], "lets earlier tokens see the last one"),
            (after[:, -1], replayed[:, 0], "gives another next state on replay"),
            (after_changed[:, -1], replayed[:, 1], "gives another next state on replay of a changed state"),
        ):
            if not torch.isfinite(value).all():
                raise NumericalError(
                    f"The residual stream of {model.name} is not finite after layer {index}. "
                    "Check the model's weights; load it in float32 or float64."
                )
            if differ(reference, value, scale):
                raise refusal(model, index, what)
        if shared_point:
            shared_point = _derivatives_agree(module, hidden[:, -1], after[:, -1], call, recording, context, tolerance)
        hidden = after
    return shared_point


def _derivatives_agree(
    layer: nn.Module,
    state: torch.Tensor,
    cotangent: torch.Tensor,
    call: LayerCall,
    recording: Recording,
    context: ContextCache,
    tolerance: float,
) -> bool:
    """Whether products at a shared point are those that the layer's own modules give, row by row."""
    try:
        expected, found = (
            _product(layer, state, cotangent, call, recording, context, shared=shared) for shared in (False, True)
        )
    except torch.OutOfMemoryError:
        raise
    except _CANNOT_RUN:
        return False
    return not differ(expected, found, tolerance * (1 + expected.abs().max().item()))


def _product(
    layer: nn.Module,
    state: torch.Tensor,
    cotangent: torch.Tensor,
    call: LayerCall,
    recording: Recording,
    context: ContextCache,
    *,
    shared: bool,
) -> torch.Tensor:
    """Cotangents, one twice the other, times the layer's derivative at a state ``(1, hidden_size)``."""
    with torch.enable_grad():
        point = state.repeat(1, 2, 1).requires_grad_()
        value = run_candidates(layer, point, call, recording, context, shared=shared)
        return torch.autograd.grad(value, point, torch.stack([cotangent, 2 * cotangent], dim=1))[0]


def differ(reference: torch.Tensor, value: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by more than ``tolerance`` somewhere, or are not finite."""
    return bool(reference.numel()) and not (reference - value).abs().max().item() <= tolerance


def refusal(model: LanguageModel, layer: int | None, reason: str) -> ModelError:
    """Error that refuses an architecture by name, with the reason."""
    where = "its layers" if layer is None else f"layer {layer}"
    verb = "" if layer is None else "it "
    return ModelError(
        f"{model.name}: the architecture {type(model.module).__name__} is refused, since {where}: {verb}{reason}. "
        "Known to work: GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, OPT, Phi."
    )
