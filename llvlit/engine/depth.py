"""Depth as time: the last token's residual stream, stepped from layer to layer with its context frozen.

In a causal decoder no earlier token sees the last one, so freezing the context is exact: an input at the last
token, run through these steps, gives what the full model with a hook gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llvlit import checks
from llvlit.engine.check import agrees, check_replay, not_finite, refusal
from llvlit.engine.exclusive import exclusive
from llvlit.engine.layer import FrozenBatch, FrozenLayer, all_finite, apply_modules, real_tensor, rows_per_call
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import Recording, ReplayStyle, record, run_all_tokens, run_together
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError
from llvlit.progress import progress
from llvlit.prompts import Prompts


def sweep(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
    description: str = "layers",
) -> Iterator[FrozenLayer]:
    """The frozen layers of all prompts, one after the other, in one pass through depth.

    Only one layer's context is held at a time: memory grows with prompts x tokens x hidden size, not with
    the number of layers.

    Raises
    ------
    InputError, ModelError
        See :func:`depth_system`.
    NumericalError
        If a state is not finite; the message names the layer.
    """
    tokenized = tokens_of(model, prompts, max_tokens)
    checks.flag("final_norm", final_norm)
    with exclusive(model):
        style = check_replay(model, tokenized)
        batches = [
            (members, record(model, tokens, last, style)) for members, tokens, last in _batches(model, tokenized, style)
        ]
    hidden = [recording.hidden for _, recording in batches]
    states = _last_states(tokenized, batches, hidden)
    _check_finite(model, states, "the embedding")
    for index, module in progress(enumerate(model.layers), description, total=model.n_layers):
        frozen = []
        after = model.after_layers if final_norm and index + 1 == model.n_layers else ()
        with exclusive(model, module), torch.no_grad():
            for position, (members, recording) in enumerate(batches):
                hidden[position], context = run_all_tokens(
                    module, hidden[position], recording.calls[index], recording.cache
                )
                frozen.append(FrozenBatch(members, recording.calls[index], recording, context))
            next_states = apply_modules(after, _last_states(tokenized, batches, hidden))
        _check_finite(model, next_states, f"layer {index}")
        yield FrozenLayer(index, model, states, next_states, tuple(frozen), after)
        states = next_states


def _batches(
    model: LanguageModel, tokenized: TokenizedPrompts, style: ReplayStyle
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    n_rows = rows_per_call(model.device, model.hidden_size)
    return tokenized.batches(n_rows, model.device, equal_lengths=style.equal_lengths)


def _last_states(
    tokenized: TokenizedPrompts, batches: list[tuple[torch.Tensor, Recording]], hidden: list[torch.Tensor]
) -> torch.Tensor:
    out = hidden[0].new_empty(len(tokenized.ids), hidden[0].shape[-1])
    for (members, recording), value in zip(batches, hidden, strict=True):
        out[members] = value[torch.arange(len(members), device=value.device), recording.last]
    return out


def _check_finite(model: LanguageModel, states: torch.Tensor, where: str) -> None:
    broken = (~torch.isfinite(states).all(dim=-1)).nonzero().flatten().tolist()
    if broken:
        raise not_finite(model, f"{where} (prompts {broken[:5]})")


def propagate_beside(
    model: LanguageModel,
    tokenized: TokenizedPrompts,
    join: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    outputs: torch.Tensor | None = None,
    final_norm: bool = False,
    description: str = "layers",
) -> torch.Tensor:
    """Final states ``(n_prompts, k, hidden_size)`` of candidates that join the prompts on their way through depth.

    Parameters
    ----------
    join
        Given a layer and the prompts' states ``(n, hidden_size)`` before it, the candidates
        ``(n, j, hidden_size)`` that join there; those of earlier layers go on.
    outputs : (n_layers + 1, hidden_size) tensor, optional
        Read the candidates along these at every state on their way instead: float64
        ``(n_prompts, k, n_layers + 1)``, zero where a candidate has not yet passed a layer.

    Notes
    -----
    Tokens and candidates share every matrix product, and one batch is held at a time: the cheapest way to
    the outputs where no derivative and no context is needed.  Where layers are read from files, all batches pass
    a layer before the next is read.
    """
    with exclusive(model), torch.no_grad():
        style = check_replay(model, tokenized)
        batches = list(_batches(model, tokenized, style))
        after = model.after_layers if final_norm else ()
        if model.stream:
            layers = progress(range(model.n_layers), description)
            finals = _beside(model, batches, style, join, layers, after, outputs)
        else:
            single = ([batch] for batch in progress(batches, description))
            every = range(model.n_layers)
            finals = [each for one in single for each in _beside(model, one, style, join, every, after, outputs)]
        out = finals[0].new_empty(len(tokenized.ids), *finals[0].shape[1:])
        for (members, *_), candidates in zip(batches, finals, strict=True):
            if not all_finite(candidates):  # of readings, the first state tells the layer
                of_states = [candidates] if outputs is None else candidates.unbind(dim=-1)
                for state, values in enumerate(of_states, start=model.n_layers + 1 - len(of_states)):
                    _check_finite(model, values.flatten(1), f"layer {state - 1}")
            out[members] = candidates
    return out


def _beside(
    model: LanguageModel,
    batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    style: ReplayStyle,
    join: Callable[[int, torch.Tensor], torch.Tensor],
    layers: Iterable[int],
    after: tuple[nn.Module, ...],
    outputs: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Candidates of batches that pass each layer together, as they leave the last one; or what is read on the way."""
    recordings = [record(model, tokens, last, style) for _, tokens, last in batches]
    tracks = [(recording.hidden, recording.hidden[:, :0]) for recording in recordings]
    readings: list[list[torch.Tensor]] = [[] for _ in batches]
    for index in layers:
        for number, (recording, (hidden, candidates)) in enumerate(zip(recordings, tracks, strict=True)):
            last, call = recording.last, recording.calls[index]
            states = hidden[torch.arange(len(last), device=hidden.device), last]
            _check_finite(model, states, f"layer {index - 1}" if index else "the embedding")
            candidates = torch.cat([candidates, join(index, states)], dim=1)
            hidden, candidates = run_together(model.layers[index], hidden, candidates, call, recording.cache, last)
            candidates = apply_modules(after if index + 1 == model.n_layers else (), candidates)
            tracks[number] = hidden, candidates
            if outputs is not None:
                readings[number].append(candidates.to(torch.float64) @ outputs[index + 1].to(torch.float64))
    if outputs is None:
        return [candidates for _, candidates in tracks]
    return [_side_by_side(each) for each in readings]


def _side_by_side(readings: list[torch.Tensor]) -> torch.Tensor:
    """Readings ``(n, k_1), (n, k_2), ...`` at states 1, 2, ... as ``(n, k_L, L + 1)``, zero where there is none."""
    together = readings[-1].new_zeros(*readings[-1].shape, len(readings) + 1)
    for state, read in enumerate(readings, start=1):
        together[:, : read.shape[1], state] = read
    return together


Seeds = Callable[[torch.Tensor], torch.Tensor]
"""Of final states ``(n, hidden_size)`` the gradients there of k outputs, ``(n, k, hidden_size)``."""


def seeds_of(outputs: torch.Tensor | Seeds, states: torch.Tensor) -> torch.Tensor:
    """Gradients ``(n, k, hidden_size)`` of outputs at final states ``(n, hidden_size)``."""
    return outputs.expand(len(states), -1, -1) if isinstance(outputs, torch.Tensor) else outputs(states)


def all_token_adjoints(
    model: LanguageModel, tokenized: TokenizedPrompts, outputs: torch.Tensor | Seeds, *, final_norm: bool = False
) -> torch.Tensor:
    """Adjoints ``dy / dx_l`` before every layer, summed over the tokens of a prompt.

    Each layer runs once more, on all tokens of a batch, when the backward pass comes to it, so that the graph of one
    layer is held at a time.  Where layers are read from files, all batches pass a layer before the next is read, on
    the way there and on the way back.

    Parameters
    ----------
    outputs : (k, hidden_size) tensor, or a function
        What y reads of the last token's final state; or its gradients there, of those states.

    Returns
    -------
    (n_prompts, n_layers, k, hidden_size) tensor
    """
    sums: list[list[torch.Tensor]] = [[] for _ in model.layers]  # of the batches, in their order
    with exclusive(model):
        style = check_replay(model, tokenized)
        batches = list(_batches(model, tokenized, style))
        single = [[batch] for batch in batches]
        for together in [batches] if model.stream else progress(single, "gains at all tokens"):
            recordings = [record(model, tokens, last, style) for _, tokens, last in together]
            hidden = [[recording.hidden for recording in recordings]]
            for index, module in enumerate(model.layers[:-1]):
                with torch.no_grad():
                    hidden.append(
                        [
                            run_all_tokens(module, before, each.calls[index], each.cache)[0]
                            for before, each in zip(hidden[-1], recordings, strict=True)
                        ]
                    )
            adjoints: list[list[torch.Tensor]] = [[] for _ in together]
            after = model.after_layers if final_norm else ()
            way_back = list(reversed(range(model.n_layers)))
            for index in progress(way_back, "gains at all tokens") if model.stream else way_back:
                states = hidden.pop()
                for number, (_, _, last) in enumerate(together):
                    behind = outputs if index + 1 == model.n_layers else adjoints[number]
                    adjoints[number] = _pulled_back(
                        model, index, states[number], recordings[number], behind, last, after
                    )
                    sums[index].append(torch.stack([each.sum(dim=1) for each in adjoints[number]], dim=1))
    members = torch.cat([members for members, *_ in batches])
    ordered = torch.stack([torch.cat(of_layer) for of_layer in sums], dim=1)
    return ordered[members.argsort()]


def _pulled_back(
    model: LanguageModel,
    index: int,
    states: torch.Tensor,
    recording: Recording,
    behind: list[torch.Tensor] | torch.Tensor | Seeds,
    last: torch.Tensor,
    after: tuple[nn.Module, ...],
) -> list[torch.Tensor]:
    """Cotangents of all tokens before a layer, from those behind it; from outputs, where it is the last."""
    with torch.enable_grad():
        before = states.detach().requires_grad_()
        out = run_all_tokens(model.layers[index], before, recording.calls[index], recording.cache)[0]
        if index + 1 == model.n_layers:
            out = apply_modules(after, out[torch.arange(len(last), device=last.device), last])
    cotangents = behind if isinstance(behind, list) else list(seeds_of(behind, out.detach()).unbind(dim=1))
    return [torch.autograd.grad(out, before, each, retain_graph=True)[0] for each in cotangents]


def last_token_states(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> torch.Tensor:
    """States from x_0 to x_L of every prompt's last token, ``(n_prompts, n_layers + 1, hidden_size)``.

    Examples
    --------
    >>> from llvlit.engine.depth import last_token_states
    >>> tuple(last_token_states(model, splits.evaluation).shape)
    (8, 13, 64)
    """
    states: list[torch.Tensor] = []
    for layer in sweep(model, prompts, max_tokens=max_tokens, final_norm=final_norm, description="states"):
        if not states:
            states.append(layer.states)
        states.append(layer.next_states)
    return torch.stack(states, dim=1)


@dataclass(frozen=True)
class DepthSystem:
    """The frozen-context system of a few prompts, all layers held.

    Attributes
    ----------
    states : (n_prompts, n_layers + 1, hidden_size) tensor
        Residual stream of the last token before each layer, and after the last.
    layers : tuple of FrozenLayer
    n_cut : int
        Number of prompts cut on the left to ``max_tokens``.
    metadata : dict
        Model and prompts, by name, fingerprint and number.

    Examples
    --------
    One push of length 5 before layer 3 of every prompt, followed to the end:

    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> pushed = system.states[:, 3:4] + 5.0 * directions.vectors[3].float()
    >>> tuple(system.propagate(pushed, start=3).shape)
    (8, 1, 64)
    """

    states: torch.Tensor = field(repr=False)
    layers: tuple[FrozenLayer, ...] = field(repr=False)
    n_cut: int
    metadata: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number of layers L, the horizon."""
        return len(self.layers)

    def layer(self, index: int) -> FrozenLayer:
        """One layer's map; InputError if there is no such layer."""
        return self.layers[checks.integer("layer", index, at_least=0, at_most=self.n_layers - 1)]

    def step(self, layer: int, candidates: torch.Tensor) -> torch.Tensor:
        """Next states of candidates, ``(n_prompts, k, hidden_size)``.

        See :meth:`~llvlit.engine.layer.FrozenLayer.step`.
        """
        return self.layer(layer).step(candidates)

    def propagate(
        self,
        candidates: torch.Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States before layer ``stop`` (default: after the last) of candidate states before layer ``start``.

        Parameters
        ----------
        candidates : (n_prompts, k, hidden_size) tensor
        inputs : (n_layers, hidden_size) or (n_prompts, k, n_layers, hidden_size) tensor, optional
            Added to the state before each layer acts.
        """
        stop = self.n_layers if stop is None else checks.integer("stop", stop, at_least=0, at_most=self.n_layers)
        start = checks.integer("start", start, at_least=0, at_most=stop)
        given, candidates = candidates, self.layers[0]._fitting("candidates", candidates)
        if inputs is not None:
            inputs = real_tensor("inputs", inputs).to(candidates)
            shape = (self.n_layers, candidates.shape[-1])
            if inputs.shape not in (shape, (*candidates.shape[:2], *shape)):
                raise InputError(
                    f"inputs has shape {tuple(inputs.shape)}; expected {shape} or {(*candidates.shape[:2], *shape)}."
                )
        for index in range(start, stop):
            if inputs is not None:
                candidates = candidates + inputs[..., index, :]
            candidates = self.layers[index].advance(candidates)
        return self.layers[min(start, self.n_layers - 1)]._finite("candidates", given, candidates)

    def jvp(self, layer: int, tangents: torch.Tensor, *, method: str = "jvp") -> torch.Tensor:
        """Jacobian-vector products; see :meth:`~llvlit.engine.layer.FrozenLayer.jvp`."""
        return self.layer(layer).jvp(tangents, method=method)

    def vjp(self, layer: int, cotangents: torch.Tensor) -> torch.Tensor:
        """Vector-Jacobian products; see :meth:`~llvlit.engine.layer.FrozenLayer.vjp`."""
        return self.layer(layer).vjp(cotangents)

    def jacobian(self, layer: int) -> torch.Tensor:
        """Jacobians A_l ``(n_prompts, hidden_size, hidden_size)``; costs H products and H^2 numbers a prompt."""
        return self.layer(layer).dense().jacobians


def depth_system(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> DepthSystem:
    """Frozen-context system of the prompts, checked by a replay of its own states.

    All layers' contexts are held (2 x prompts x tokens x hidden size x layers numbers): use it for some
    dozens of prompts; the package's own methods sweep instead.

    Parameters
    ----------
    max_tokens
        Longer prompts are cut on the left; ``n_cut`` tells how many were.
    final_norm
        Take the model's final norm in as part of the last step.

    Raises
    ------
    InputError
        If ``max_tokens`` is beyond the model's context, or a prompt has fewer than two tokens.
    ModelError
        If the architecture's replay is wrong.
    NumericalError
        If a state is not finite.

    Examples
    --------
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> tuple(system.states.shape), system.n_cut
    ((8, 13, 64), 0)
    """
    tokenized = tokens_of(model, prompts, max_tokens)
    layers = tuple(sweep(model, tokenized, max_tokens=max_tokens, final_norm=final_norm, description="depth system"))
    states = torch.stack([layers[0].states, *(layer.next_states for layer in layers)], dim=1)
    for layer in layers:
        if not agrees(layer.next_states, layer.step(layer.states.unsqueeze(1))[:, 0], layer.states):
            raise refusal(model, layer.index, "gives another next state on replay")
    return DepthSystem(states, layers, tokenized.n_cut, origin(model, tokenized, final_norm=final_norm))
