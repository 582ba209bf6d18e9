"""Gain profiles: how strongly a push before each layer moves the concept at the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, choice, flag, instance, integer
from llvlit.engine.depth import Seeds, all_token_adjoints, propagate_beside, seeds_of, sweep
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import Directions, DirectionsLike, borrowed_of, sets_of
from llvlit.method.intervals import mean_interval
from llvlit.method.outputs import Output, reading
from llvlit.method.results import Result, load_result, measured_parts, save_result, settle
from llvlit.method.routing import RouteWatch, has_routes, tell_routes
from llvlit.prompts import Prompts

PROMPTS_AT_ONCE = 32
"""Whose layers' contexts are held together."""
KINDS = ("measured", "adjoint")
POSITIONS = ("last", "all")
"""Which of a prompt's tokens are pushed."""


@dataclass(frozen=True)
class Gains(Result):
    """Gain profiles of single prompts.

    Attributes
    ----------
    per_prompt : (n_prompts, n_layers) float64 array
        Output units per unit of input: ``g_l = (y(+a) - y(-a)) / 2a`` for measured gains, ``λ_l^T v_l`` for adjoint.
    kind : str
        ``measured`` or ``adjoint``.
    amplitude : float
        a, in the residual stream's units; 0 for adjoint gains (the limit of small amplitudes).
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt, which intervals resample; by default every prompt its own.
    weights : (n_layers,) float64 array, optional
        Of the relative energy at the prompts, ``1 / mean |x_l|^2``: a push in units of the state that it joins.  None
        where the states are not known, as of pushes at all tokens.
    borrowed : tuple of int
        Layers whose push went along a borrowed direction: the sign of such a gain means nothing.
    metadata : dict
        Model and prompts, by name, fingerprint and number.

    Raises
    ------
    InputError
        If a gain is not finite, or the parts do not fit each other.

    Examples
    --------
    >>> gains = llvlit.adjoint_gains(model, splits.evaluation, directions)
    >>> gains.mean.shape, gains.interval().shape
    ((12,), (2, 12))
    >>> print(gains)
    adjoint gains of 12 layers, 8 prompts; borrowed directions: 0, 1, 2
    """

    per_prompt: np.ndarray
    kind: str
    amplitude: float
    pairs: tuple[int, ...] = ()
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        parts = measured_parts(self, ("n_prompts", "n_layers"), KINDS)
        if self.weights is not None:
            parts["weights"] = array("weights", self.weights, parts["per_prompt"].shape[1:], positive=True)
        settle(self, parts, last=parts["per_prompt"].shape[1] - 1)

    def _about(self) -> str:
        n_prompts, n_layers = self.per_prompt.shape
        pushed = f", pushes of {self.amplitude:g}" if self.amplitude else ""
        return f"{self.kind} gains of {n_layers} layers, {n_prompts} prompts{pushed}"

    @property
    def mean(self) -> np.ndarray:
        """Gain profile, the mean over prompts ``(n_layers,)``."""
        return self.per_prompt.mean(axis=0)

    def interval(self, *, level: float = 0.95, seed: int = 0) -> np.ndarray:
        """Bootstrap interval of the mean over independent units: lower and upper bound, ``(2, n_layers)``."""
        return mean_interval(self.per_prompt, self.pairs, level=level, seed=seed)

    def select(self, layers: slice) -> Gains:
        """The same gains at some layers only, such as ``slice(1, None)`` for all but layer 0, counted anew from 0."""
        kept = np.arange(self.per_prompt.shape[1])[instance("layers", layers, slice, "a slice")].tolist()
        borrowed = tuple(kept.index(layer) for layer in self.borrowed if layer in kept)
        weights = None if self.weights is None else self.weights[layers]
        return replace(self, per_prompt=self.per_prompt[:, layers], weights=weights, borrowed=borrowed)

    def head(self, n_prompts: int) -> Gains:
        """The same gains of the first prompts only; the weights stay those of all."""
        n_prompts = integer("n_prompts", n_prompts, at_least=1, at_most=len(self.pairs))
        return replace(self, per_prompt=self.per_prompt[:n_prompts], pairs=self.pairs[:n_prompts])

    def save(self, path: str | Path) -> None:
        """Write the gains as safetensors, and what they were computed with; FileError if they cannot be written."""
        save_result(self, path, "gains")

    @classmethod
    def load(cls, path: str | Path) -> Gains:
        """Read what :meth:`save` wrote; FileError if it is cut short, changed, of another kind or version."""
        return load_result(cls, path, "gains")


def profile(argument: str, gains: Gains | np.ndarray) -> np.ndarray:
    """Gain profile ``(n_layers,)`` of gains, or as it was given."""
    return gains.mean if isinstance(gains, Gains) else array(argument, gains, ("n_layers",))


def measured_gains(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike | Sequence[DirectionsLike],
    *,
    amplitude: float | Sequence[float] = 0.1,
    output: Output | None = None,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Any:
    """Gains of the full model: central differences of the output over an input before one layer at a time.

    Every prompt's 2 L pushed states travel through depth behind its tokens, joining at the layer where they
    are pushed, so that the whole profile costs about one forward pass of the prompts and a fifth.

    Parameters
    ----------
    directions
        One set, or a list of several, which are measured in one pass of the prompts.
    amplitude
        a > 0, the length of the push in the residual stream's units; with several sets also a list, one for each.
        Rounding adds an error in inverse proportion to it.  At the smallest amplitude that is accepted (the embedded
        models, 100 prompts) it is some 0.05 of a single prompt's gain of one, at worst 0.2, and at most 0.03 of a
        mean; 32 times as large a push has 0.01 and 0.001.  Small gains of single prompts drown first.
    output
        What is read in place of the concept along its last direction: a :class:`~llvlit.TokenContrast` or
        :class:`~llvlit.LogitReadout`.

    Returns
    -------
    Gains, or where a list was given a list of them.  Of a mixture of experts, ``metadata["rerouted"]`` holds for each
    layer the share of prompts whose route the push changed; where it is not rare, a warning suggests an amplitude, and
    so does ``metadata["suggested_amplitude"]``.

    Raises
    ------
    InputError
        If the directions do not fit, or an amplitude is not positive and finite, or so small that the difference
        drowns in the rounding of the states, which shows after the first batch of prompts.

    Examples
    --------
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> measured.per_prompt.shape
    (8, 12)
    >>> small, large = llvlit.measured_gains(model, splits.evaluation, [directions] * 2, amplitude=[0.1, 10.0])
    >>> small.amplitude, large.amplitude
    (0.1, 10.0)
    """
    several = sets_of(directions)
    amplitudes = array("amplitude", amplitude, positive=True)
    if amplitudes.shape not in ((), (len(several),)):
        raise InputError(f"{len(several)} sets of directions came with {amplitudes.size} amplitudes; pass one each.")
    steps = np.broadcast_to(amplitudes, len(several)).tolist()
    flag("final_norm", final_norm)
    vectors = torch.stack([one.on(model) for one in several])  # (n_sets, n_layers + 1, hidden_size)
    distinct, place_of = _distinct([step * along for step, along in zip(steps, vectors[:, :-1], strict=True)])
    tokens = tokens_of(model, prompts, max_tokens)
    norms: list[list[torch.Tensor]] = [[] for _ in model.layers]  # of each layer's states, batch by batch
    routes = RouteWatch() if has_routes(model) else None

    def push(layer: int, states: torch.Tensor) -> torch.Tensor:
        norms[layer].append(states.norm(dim=-1))
        if layer == model.n_layers - 1:  # all sizes are known after the first batch: refuse no later
            size = torch.stack([torch.cat(norm).mean() for norm in norms]).max().item()
            check_resolution("amplitude", min(steps), size, model.dtype)
        joining = [states + sign * push[layer] for push in distinct for sign in (1, -1)]
        if routes:
            routes.enter(layer, len(states), 1 + len(joining) * (layer + 1))
            joining = joining if layer else [states, *joining]
        return torch.stack(joining, dim=1)

    source = reading(model, tokens, vectors[0, -1], output, final_norm=final_norm)
    with routes or nullcontext():
        pushed = propagate_beside(model, tokens, push, final_norm=final_norm, description="measured gains")
    if routes:
        pushed, shares = pushed[:, 1:], routes.shares(len(distinct))[place_of]
        smallest = smallest_step(torch.stack([torch.cat(norm).mean() for norm in norms]).max().item(), model.dtype)
        told = tell_routes(model.name, shares, steps, smallest)
    finals = pushed.view(len(tokens), model.n_layers, len(distinct), 2, -1)
    weights = weights_of([torch.cat(norm) for norm in norms])
    results = []
    for place, (one, step) in enumerate(zip(several, steps, strict=True)):
        readouts = replace(source, readout=vectors[place, -1]).values(finals[:, :, place_of[place]])
        per_prompt = ((readouts[..., 0] - readouts[..., 1]) / (2 * step)).cpu().numpy()
        gains = make_gains(model, tokens, per_prompt, one, weights=weights, amplitude=step, final_norm=final_norm)
        gains.metadata.update(source.metadata)
        if routes:
            gains.metadata.update(told[place])
        results.append(gains)
    return results if isinstance(directions, list | tuple) else results[0]


def _distinct(values: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Of equal tensors one each, and which of them each is: what is equal is computed once."""
    distinct: list[torch.Tensor] = []
    places = []
    for value in values:
        places.append(next((i for i, other in enumerate(distinct) if torch.equal(other, value)), len(distinct)))
        distinct += [value] if places[-1] == len(distinct) else []
    return distinct, places


def checked_positions(positions: str) -> bool:
    """Whether all of a prompt's tokens are pushed, or the last alone."""
    return choice("positions", positions, POSITIONS) == "all"


def check_resolution(argument: str, value: float, size: float, dtype: torch.dtype) -> None:
    """Refuse a step, target or tolerance that drowns in the rounding of numbers of this size.

    Rounding moves the output by some 0.2 epsilon of the state's norm; :func:`measured_gains` says what that makes of
    gains at the smallest step.
    """
    smallest = smallest_step(size, dtype)
    if abs(value) < smallest:
        raise InputError(
            f"{argument}={value:g} drowns in rounding: in {str(dtype).removeprefix('torch.')}, with numbers of size "
            f"{size:.3g}, the smallest usable is {float(f'{smallest * 1.05:.1e}'):g}. Take a larger one, or float64."
        )


def smallest_step(size: float, dtype: torch.dtype) -> float:
    """Smallest step that does not drown in the rounding of numbers of some size."""
    return 4 * torch.finfo(dtype).eps * size


def make_gains(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    per_prompt: np.ndarray,
    directions: Directions,
    *,
    weights: np.ndarray | None = None,
    amplitude: float = 0.0,
    final_norm: bool = False,
) -> Gains:
    """Gains with the facts that they carry: kind, units, borrowed directions, origin."""
    kind = KINDS[0] if amplitude else KINDS[1]
    if not np.isfinite(per_prompt).all():
        raise NumericalError(f"The {kind} gains of {model.name} are not finite. Check the model's weights.")
    metadata = origin(model, tokens, final_norm=final_norm)
    borrowed = borrowed_of(directions, True)
    return Gains(per_prompt, kind, amplitude, tokens.prompts.pairs, weights, borrowed=borrowed, metadata=metadata)


def weights_of(norms: Sequence[torch.Tensor]) -> np.ndarray | None:
    """Weights of the relative energy from each layer's norms of states; None where a layer's states are all zero."""
    squares = np.array([float(norm.to(torch.float64).square().mean()) for norm in norms])
    return 1 / squares if (squares > 0).all() else None


def in_parts(tokens: TokenizedPrompts) -> Iterator[tuple[np.ndarray, TokenizedPrompts]]:
    """Prompts, and their rows, in even parts whose layers' contexts fit into memory together."""
    for rows in np.array_split(np.arange(len(tokens)), -(-len(tokens) // PROMPTS_AT_ONCE)):
        yield rows, tokens.select(rows)


def adjoint_gains(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike | Sequence[DirectionsLike],
    *,
    positions: str = "last",
    output: Output | None = None,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Any:
    """First-order gains of the full model, all layers from one backward pass.

    The adjoint ``λ_L = c``, ``λ_l = A_l^T λ_{l+1}`` gives ``g_l = λ_l^T v_l``: the full-order linear
    reference that every surrogate is judged against.

    Parameters
    ----------
    directions
        One set, or a list of several, whose outputs share the backward pass.
    positions
        ``last``: pushes at the last token.  ``all``: the same push at every token of the prompt, as
        ``steer(..., positions="all")`` makes it; the gain is the sum over the tokens, start token and massive
        activations included, of ``(dy / dx_l)^T v_l``, from one backward pass through the whole prompt.
    output
        What is read in place of the concept along its last direction; see :func:`measured_gains`.

    Returns
    -------
    Gains, or where a list was given a list of them

    Raises
    ------
    InputError
        If the directions do not fit.

    Examples
    --------
    >>> linear = llvlit.adjoint_gains(model, splits.evaluation, directions)
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> bool(np.allclose(linear.mean, measured.mean, rtol=0.05))
    True
    """
    several = sets_of(directions)
    vectors = torch.stack([one.on(model) for one in several], dim=1)  # (n_layers + 1, n_sets, hidden_size)
    outputs, place_of = _distinct(list(vectors[-1]))
    tokens = tokens_of(model, prompts, max_tokens)
    flag("final_norm", final_norm)
    source = reading(model, tokens, vectors[-1, 0], output, final_norm=final_norm)
    seeds: torch.Tensor | Seeds = torch.stack(outputs)
    if output is not None:
        seeds, place_of = lambda states: source.gradients(states).unsqueeze(1), [0] * len(several)
    way = _adjoints_at_all if checked_positions(positions) else adjoints_of
    gains = np.empty((len(several), len(tokens), model.n_layers))
    norms: list[list[torch.Tensor]] = [[] for _ in model.layers]
    for members, layer, states, adjoints in way(model, tokens, seeds, final_norm=final_norm):
        norms[layer] += [] if states is None else [states.norm(dim=-1)]
        along = vectors[layer].to(torch.float64)
        gains[:, members, layer] = torch.einsum("nkh,kh->kn", adjoints[:, place_of].to(along), along).cpu().numpy()
    weights = weights_of([torch.cat(norm) for norm in norms]) if norms[0] else None
    results = [
        make_gains(model, tokens, each, one, weights=weights, final_norm=final_norm)
        for each, one in zip(gains, several, strict=True)
    ]
    for result in results:
        result.metadata.update({**source.metadata, **({"positions": positions} if positions == "all" else {})})
    return results if isinstance(directions, list | tuple) else results[0]


Adjoints = Iterator[tuple[np.ndarray, int, torch.Tensor | None, torch.Tensor]]
"""Rows of some prompts, a layer, their states before it ``(n, hidden_size)`` (None: all tokens' states), and their
adjoints there ``(n, k, hidden_size)``; the last layer comes first.
"""


def adjoints_of(
    model: LanguageModel, tokens: TokenizedPrompts, outputs: torch.Tensor | Seeds, *, final_norm: bool = False
) -> Adjoints:
    """Adjoints ``λ_l = A_l^T λ_{l+1}`` of outputs ``(k, hidden_size)`` of the last token's final state; or of what is
    made of those states, ``(n, hidden_size)``: ``(n, k, hidden_size)``.
    """
    for members, part in in_parts(tokens):
        swept = sweep(model, part, max_tokens=part.max_tokens, final_norm=final_norm, description="adjoint gains")
        layers = tuple(swept)
        adjoints = seeds_of(outputs, layers[-1].next_states)
        for layer in reversed(layers):
            adjoints = layer.vjp(adjoints)
            yield members, layer.index, layer.states, adjoints


def _adjoints_at_all(
    model: LanguageModel, tokens: TokenizedPrompts, outputs: torch.Tensor | Seeds, *, final_norm: bool = False
) -> Adjoints:
    """The same, summed over the tokens."""
    for members, part in in_parts(tokens):
        sums = all_token_adjoints(model, part, outputs, final_norm=final_norm)
        for layer in reversed(range(model.n_layers)):
            yield members, layer, None, sums[:, layer]
