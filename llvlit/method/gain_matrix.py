"""The gain matrix: every push read at every later state, the order of depth in it, and a surrogate from it alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, choice, flag, integer, number
from llvlit.checks import seed as checked_seed
from llvlit.engine.depth import last_token_states, propagate_beside, sweep
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.gains import KINDS, Gains, adjoint_gains, check_resolution, measured_gains, smallest_step
from llvlit.method.hankel import balance, misses, most_orders, smallest_orders
from llvlit.method.intervals import interval, mean_interval, resampled_means
from llvlit.method.outputs import Output, reading
from llvlit.method.results import Result, load_result, measured_parts, save_result, settle
from llvlit.method.routing import RouteWatch, has_routes, tell_routes
from llvlit.method.surrogate import LLV
from llvlit.prompts import Prompts

METHODS = ("measured", "linear")
N_ORDER_DRAWS = 200
"""Draws of prompts that an interval of an order rests on."""


@dataclass(frozen=True)
class GainMatrix(Result):
    """How a push before each layer moves the concept at every later state, prompt by prompt.

    Attributes
    ----------
    per_prompt : (n_prompts, n_layers, n_layers + 1) float64 array
        ``G[l, k] = v_k^T dx_k`` per unit of input before layer l, for l < k; zero elsewhere.  Its last column is the
        gain profile.
    kind : str
        ``measured`` (central differences of the full model) or ``linear`` (products with Jacobians).
    amplitude : float
        Length of the pushes, in the residual stream's units; 0 for linear ones.
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt, which intervals resample.
    borrowed : tuple of int
        States whose direction is that of a later one: the sign of such a row or column means nothing.
    metadata : dict
        Model and prompts, by name, fingerprint and number.

    Raises
    ------
    InputError
        If a number is not finite, one at k <= l is not zero, or the parts do not fit each other.

    Examples
    --------
    >>> matrix = llvlit.gain_matrix(model, splits.evaluation, directions)
    >>> matrix.mean.shape
    (12, 13)
    >>> [values.shape for values in matrix.hankel_singular_values()[:3]]
    [(0,), (1,), (2,)]
    >>> matrix.order(0.5) <= matrix.order(0.01)
    True
    """

    per_prompt: np.ndarray
    kind: str
    amplitude: float
    pairs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        parts = measured_parts(self, ("n_prompts", "n_layers", "n_layers + 1"), METHODS)
        per_prompt = parts["per_prompt"]
        _, n_layers, n_states = per_prompt.shape
        if n_states != n_layers + 1:
            raise InputError(f"per_prompt has shape {per_prompt.shape}; expected (n_prompts, n_layers, n_layers + 1).")
        if np.tril(per_prompt).any():
            raise InputError("per_prompt is not zero at a state k <= l, which no push before layer l can have moved.")
        settle(self, parts, last=n_layers)

    def _about(self) -> str:
        n_prompts, n_layers, _ = self.per_prompt.shape
        pushed = f", pushes of {self.amplitude:g}" if self.amplitude else ""
        return f"{self.kind} gain matrix of {n_layers} layers, {n_prompts} prompts{pushed}"

    @property
    def n_layers(self) -> int:
        """Horizon L."""
        return self.per_prompt.shape[1]

    @property
    def mean(self) -> np.ndarray:
        """Mean over the prompts ``(n_layers, n_layers + 1)``."""
        return self.per_prompt.mean(axis=0)

    def interval(self, *, level: float = 0.95, seed: int = 0) -> np.ndarray:
        """Bootstrap interval of the mean over independent units, ``(2, n_layers, n_layers + 1)``."""
        return mean_interval(self.per_prompt, self.pairs, level=level, seed=seed)

    def gains(self) -> Gains:
        """The gain profile: the last column, prompt by prompt."""
        borrowed = tuple(state for state in self.borrowed if state < self.n_layers)
        values, kind = self.per_prompt[:, :, -1], KINDS[METHODS.index(self.kind)]
        return Gains(values, kind, self.amplitude, self.pairs, borrowed=borrowed, metadata=self.metadata)

    def from_state(self, first: int) -> GainMatrix:
        """Pushes and readings from a state on, as of a model that begins there: ``(n_layers - first)`` layers.

        Of use where earlier states have no direction of their own (:attr:`~llvlit.Directions.first_own`).

        Examples
        --------
        >>> matrix = llvlit.gain_matrix(model, splits.evaluation, directions)
        >>> matrix.from_state(2).mean.shape
        (10, 11)
        """
        first = integer("first", first, at_least=0, at_most=self.n_layers - 1)
        borrowed = tuple(state - first for state in self.borrowed if state >= first)
        metadata = {**self.metadata, "first_state": first}
        return replace(self, per_prompt=self.per_prompt[:, first:, first:], borrowed=borrowed, metadata=metadata)

    def hankel_singular_values(self) -> tuple[np.ndarray, ...]:
        """Singular values, falling, of the Hankel block ``G[:k, k:]`` of the mean at every state k; empty at state 0.

        What a state of smaller order must miss (time-varying Ho and Kalman: Dewilde and van der Veen 1998).
        """
        values = balance(self.mean).singular_values
        ranks = (min(state, self.n_layers - state + 1) for state in range(self.n_layers + 1))
        return tuple(values[state, :rank] for state, rank in enumerate(ranks))

    def shares_missed(self) -> np.ndarray:
        """Share of the mean that its balanced realizations of order 1, 2, ... miss, up to the largest order."""
        balanced = balance(_moving(self.mean))
        orders = range(1, most_orders(self.n_layers) + 1)
        return np.array([misses(self.mean, balanced.matrix(order)) for order in orders])

    def order(self, tolerance: float = 0.01) -> int:
        """The smallest order whose balanced realization misses at most a share of the mean matrix.

        The share is ``|G - G_d| / |G|`` in Frobenius' norm.

        Raises
        ------
        InputError
            If the tolerance is not between 0 and 1, or no push moves some state.
        """
        return int(smallest_orders(_moving(self.mean), _tolerance(tolerance)))

    def order_interval(self, tolerance: float = 0.01, *, level: float = 0.95, seed: int = 0) -> tuple[int, int]:
        """Bootstrap interval of :meth:`order` over independent units.

        Drawn means are noisier than the mean itself, so the interval tends to lie high.
        """
        level = number("level", level, at_least=1e-12, at_most=1 - 1e-12)
        _moving(self.mean)
        if len(set(self.pairs)) < 2:
            raise InputError("An interval needs two independent prompts or more; this matrix is of one.")
        values = self.per_prompt.reshape(len(self.pairs), -1)
        draws = resampled_means(values, self.pairs, seed=checked_seed("seed", seed))[:N_ORDER_DRAWS]
        orders = smallest_orders(draws.reshape(-1, *self.mean.shape), _tolerance(tolerance))
        low, high = interval(orders, level=level).astype(int).tolist()
        return low, high

    def missed_by(self, other: LLV | GainMatrix | np.ndarray) -> float:
        """Share of this matrix's mean that another one, or a surrogate's, misses, ``|G - G'| / |G|``.

        Raises
        ------
        InputError
            If the other is of another model or number of layers.
        """
        if isinstance(other, LLV | GainMatrix):
            ours, theirs = self.metadata, other.metadata
            if isinstance(other, GainMatrix) and ours.get("output") != theirs.get("output"):
                raise InputError(f"other reads {theirs.get('output')}; this matrix reads {ours.get('output')}.")
            for key, name in (("model_fingerprint", "model"), ("final_norm", "final_norm")):
                if key in ours and key in theirs and ours[key] != theirs[key]:
                    raise InputError(f"other is of {name} {theirs.get(name)}; this matrix is of {ours.get(name)}.")
        matrix = other.mean if isinstance(other, GainMatrix) else other.matrix() if isinstance(other, LLV) else other
        return float(misses(self.mean, array("other", matrix, self.mean.shape)))

    def save(self, path: str | Path) -> None:
        """Write the matrix as safetensors, and what it was computed with; FileError if it cannot be written."""
        save_result(self, path, "gain matrix")

    @classmethod
    def load(cls, path: str | Path) -> GainMatrix:
        """Read what :meth:`save` wrote; FileError if it is cut short, changed, of another kind or version."""
        return load_result(cls, path, "gain matrix")


def _tolerance(tolerance: float) -> float:
    return number("tolerance", tolerance, above=0, below=1)


def _moving(matrix: np.ndarray) -> np.ndarray:
    """The same matrix, where every state is moved by some push."""
    still = np.flatnonzero(~matrix[:, 1:].any(axis=0)) + 1
    if len(still):
        raise InputError(
            f"No push moves the output at state {still[0]}: its column is zero. Check the directions there."
        )
    return matrix


def gain_matrix(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    amplitude: float = 0.1,
    method: str = "measured",
    output: Output | None = None,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> GainMatrix:
    """The pushes of the gain profile, read along the concept at every later state.

    Parameters
    ----------
    amplitude
        a > 0, the length of the push in the residual stream's units; of no use where the method is linear.
    method
        ``measured``: the pushed states pass all later states on their way to the output, so reading them there costs
        next to nothing beside :func:`measured_gains`.  ``linear``: products with the Jacobians of every prompt carry
        each push through depth, ``n_layers / 2`` products a layer.
    output
        What the last column reads in place of the concept along its last direction; see :func:`measured_gains`, of
        which it costs one call more.  Its units are other ones than those of the columns before, and an order of depth
        weighs them as they are.

    Raises
    ------
    InputError
        If the directions do not fit, or the amplitude is not positive or drowns in rounding.
    NumericalError
        If a gain is not finite.

    Examples
    --------
    >>> matrix = llvlit.gain_matrix(model, splits.evaluation, directions)
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> bool(np.allclose(matrix.gains().mean, measured.mean))
    True
    """
    amplitude = number("amplitude", amplitude, above=0)
    flag("final_norm", final_norm)
    options: dict[str, Any] = {"output": output, "max_tokens": max_tokens, "final_norm": final_norm}
    along = as_directions(directions)
    vectors, tokens = along.on(model), tokens_of(model, prompts, max_tokens)
    choice("method", method, METHODS)
    source = reading(model, tokens, vectors[-1], output, final_norm=final_norm)  # before anything is computed
    if method == "linear":
        told: dict[str, Any] = {}
        amplitude, per_prompt = 0.0, _linear(model, tokens, vectors, max_tokens, final_norm)
    else:
        per_prompt, told = _measured(model, tokens, vectors, amplitude, final_norm)
    if output is not None:
        gains = (
            adjoint_gains(model, tokens, along, **options)
            if method == "linear"
            else measured_gains(model, tokens, along, amplitude=amplitude, **options)
        )
        per_prompt[:, :, -1] = gains.per_prompt
    if not np.isfinite(per_prompt).all():
        raise NumericalError(f"The gain matrix of {model.name} is not finite. Check the model's weights.")
    metadata = {**origin(model, tokens, final_norm=final_norm), **source.metadata, **told}
    pairs, borrowed = tokens.prompts.pairs, borrowed_of(along)
    return GainMatrix(per_prompt, method, amplitude, pairs, borrowed=borrowed, metadata=metadata)


def _measured(
    model: LanguageModel, tokens: TokenizedPrompts, vectors: torch.Tensor, amplitude: float, final_norm: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """The matrix of each prompt, and what is told of changed routes."""
    routes, smallest = RouteWatch() if has_routes(model) else None, 0.0

    def push(layer: int, states: torch.Tensor) -> torch.Tensor:
        nonlocal smallest
        size = states.norm(dim=-1).mean().item()
        check_resolution("amplitude", amplitude, size, model.dtype)
        smallest = max(smallest, smallest_step(size, model.dtype))
        joining = [states + sign * amplitude * vectors[layer] for sign in (1, -1)]
        if routes:
            routes.enter(layer, len(states), 1 + 2 * (layer + 1))
            joining = joining if layer else [states, *joining]
        return torch.stack(joining, dim=1)

    with routes or nullcontext():
        readings = propagate_beside(
            model, tokens, push, outputs=vectors, final_norm=final_norm, description="gain matrix"
        )
    told: dict[str, Any] = {}
    if routes:
        readings, (told,) = readings[:, 1:], tell_routes(model.name, routes.shares(1), [amplitude], smallest)
    pairs = readings.reshape(len(tokens), model.n_layers, 2, -1)
    return ((pairs[:, :, 0] - pairs[:, :, 1]) / (2 * amplitude)).cpu().numpy(), told


def _linear(
    model: LanguageModel, tokens: TokenizedPrompts, vectors: torch.Tensor, max_tokens: int, final_norm: bool
) -> np.ndarray:
    matrix = np.zeros((len(tokens), model.n_layers, model.n_layers + 1))
    reached = vectors.new_zeros(len(tokens), 0, vectors.shape[-1])
    layers = sweep(model, tokens, max_tokens=max_tokens, final_norm=final_norm, description="gain matrix")
    for layer in layers:
        new = vectors[layer.index].expand(len(tokens), 1, -1)
        reached = layer.jvp(torch.cat([reached, new], dim=1))
        outputs = reached.to(torch.float64) @ vectors[layer.index + 1].to(torch.float64)
        matrix[:, : layer.index + 1, layer.index + 1] = outputs.cpu().numpy()
    return matrix


def realize(matrix: GainMatrix | np.ndarray, *, order: int | None = None, tolerance: float = 0.01) -> LLV:
    """A surrogate from experiments alone: the balanced time-varying Ho-Kalman realization of a gain matrix.

    No Jacobian is taken and no basis chosen: the matrix's Hankel blocks ``H_k = U S V^T`` give the state its
    coordinates (``llvlit.method.hankel``).  Cut to an order, the map from inputs to outputs errs by at most
    twice the sum of the singular values that are cut, those of all states (Sandberg and Rantzer 2004).

    Parameters
    ----------
    matrix
        Of :func:`gain_matrix`, or ``(n_layers, n_layers + 1)`` numbers.
    order
        Number of dimensions, from 1 to ``(n_layers + 1) // 2``; unless given, the smallest that misses at most
        ``tolerance`` of the matrix.

    Returns
    -------
    LLV
        Its bases have no rows, since it knows nothing of the residual stream, and its one set of operators is that of
        the mean matrix.

    Raises
    ------
    InputError
        If the order is more than the Hankel blocks allow, the tolerance is not between 0 and 1, a number is not
        finite, or no push moves some state.

    Examples
    --------
    >>> matrix = llvlit.gain_matrix(model, splits.evaluation, directions)
    >>> surrogate = llvlit.realize(matrix, tolerance=0.05)
    >>> surrogate.order == matrix.order(0.05), matrix.missed_by(surrogate) <= 0.05
    (True, True)
    """
    if not isinstance(matrix, GainMatrix):
        values = array("matrix", matrix, ("n_layers", "n_layers + 1"))
        matrix = GainMatrix(values[None], "linear", 0.0)
    mean, n_layers, share = _moving(matrix.mean), matrix.n_layers, _tolerance(tolerance)
    order = matrix.order(share) if order is None else integer("order", order, at_least=1, at_most=most_orders(n_layers))
    balanced = balance(mean)
    A, B, states = balanced.A[:, :order, :order], balanced.B[:, :order], np.arange(n_layers + 1)
    return LLV(
        A=A,
        B=B,
        C=balanced.C[-1, :order],
        outputs=balanced.C[:, :order],
        bases=np.zeros((n_layers + 1, 0, order)),
        orders=np.minimum(np.minimum(states, n_layers - states + 1), order),
        per_prompt=A[None].astype(np.float32),
        per_prompt_inputs=B[None].astype(np.float32),
        metadata={**matrix.metadata, "basis": "realized", "order": order, "amplitude": matrix.amplitude},
        borrowed=matrix.borrowed,
    )


def noise_floor(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    amplitude: float = 0.1,
    max_tokens: int = MAX_TOKENS,
) -> np.ndarray:
    """Hankel singular values that rounding makes at the least, at every state ``(n_layers + 1,)``.

    A matrix of known order is measured in the same way: the same states are pushed by the same amplitude, along the
    last direction throughout, and pass layers that do no more than add what the model's layers added.  Its entries
    are all one, its order is one, and its second singular values are what rounding of the stream makes of zero: smaller
    ones of a model mean nothing.  Rounding inside of layers comes on top: in float32, some ten times as much.

    Examples
    --------
    >>> floor = llvlit.noise_floor(model, splits.evaluation, directions)
    >>> matrix = llvlit.gain_matrix(model, splits.evaluation, directions)
    >>> bool(floor[6] < 0.01 * matrix.hankel_singular_values()[6][0])
    True
    """
    amplitude = number("amplitude", amplitude, above=0)
    direction = as_directions(directions).on(model)[-1]
    tokens = tokens_of(model, prompts, max_tokens)
    states = last_token_states(model, tokens, max_tokens=max_tokens)
    check_resolution("amplitude", amplitude, states[:, :-1].norm(dim=-1).mean(dim=0).max().item(), model.dtype)
    matrix = np.zeros((model.n_layers, model.n_layers + 1))
    pushed = states.new_zeros(len(tokens), 2, 0, states.shape[-1])
    for layer in range(model.n_layers):
        before = states[:, layer]
        new = torch.stack([before + sign * amplitude * direction for sign in (1, -1)], dim=1)
        added = (states[:, layer + 1] - before)[:, None, None]
        pushed = torch.cat([pushed, new.unsqueeze(2)], dim=2) + added
        outputs = pushed.to(torch.float64) @ direction.to(torch.float64)
        gains = (outputs[:, 0] - outputs[:, 1]).mean(dim=0) / (2 * amplitude)
        matrix[: layer + 1, layer + 1] = gains.cpu().numpy()
    values = balance(matrix).singular_values
    return values[:, 1] if values.shape[1] > 1 else np.zeros(len(values))
