"""Trust radius: how far a shape of inputs can be scaled before a gain no longer tells the shift of the output."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llvlit.checks import array, number
from llvlit.engine.depth import depth_system
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.gains import check_resolution, in_parts
from llvlit.method.outputs import Output, reading
from llvlit.method.results import Result, settle, units_of
from llvlit.method.routing import RARE, has_routes, rerouted
from llvlit.method.verification import output_shifts
from llvlit.progress import progress
from llvlit.prompts import Prompts

STEP = 0.02
"""Of the four pushes that the curve is taken from, the smaller two: their largest input, relative to its state."""


@dataclass(frozen=True)
class TrustRadius(Result):
    """How the output bends along shapes of inputs, prompt by prompt, and how far a straight line can be trusted.

    Scaled by s, a shape u shifts a prompt's output by ``slope s + second s^2 + third s^3 + ...``.  The linear
    prediction ``slope s`` holds to the tolerance, for s of either sign, as long as
    ``|second| |s| + |third| s^2 <= tolerance |slope|``.

    Attributes
    ----------
    slope, second, third : (n_prompts, ...) float64 array
        Of each shape; without the second axis where a single one was asked for.
    tolerance : float
        Relative error of the linear prediction that is allowed.
    coverage : float
        Share of new prompts at which it is to hold.
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt; by default every prompt its own.
    borrowed : tuple of int
        Layers that some shape pushes along a borrowed direction.
    metadata : dict
        Model and prompts, by name, fingerprint and number.  Of a mixture of experts, ``rerouted`` holds for each
        shape the share of prompts that its pushes sent to other experts.

    Raises
    ------
    InputError
        If the parts do not fit each other, or there are too few independent prompts for the coverage.

    Examples
    --------
    >>> from llvlit.method.trust import TrustRadius
    >>> bent = TrustRadius(slope=[2.0, 2.0], second=[0.4, 0.1], third=[0.0, 0.0], tolerance=0.1, coverage=0.5)
    >>> bent.per_prompt, float(bent.radius), float(bent.of_mean)
    (array([0.5, 2. ]), 0.5, 0.8)
    """

    slope: np.ndarray
    second: np.ndarray
    third: np.ndarray
    tolerance: float = 0.1
    coverage: float = 0.95
    pairs: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        slope = array("slope", self.slope)
        if not slope.ndim or not len(slope):
            raise InputError(f"slope has shape {slope.shape}; expected (n_prompts,) or (n_prompts, n_shapes).")
        parts: dict[str, Any] = {}
        for name in ("slope", "second", "third"):
            parts[name] = array(name, getattr(self, name), slope.shape)
        parts["tolerance"] = number("tolerance", self.tolerance, above=0)
        parts["coverage"] = number("coverage", self.coverage, above=0, at_most=1 - 1e-12)
        parts["pairs"] = units_of(self.pairs, len(slope))
        settle(self, parts)
        check_coverage(self.coverage, self.pairs)

    def _about(self) -> str:
        radii = ", ".join(f"{radius:.3g}" for radius in np.ravel(self.radius))
        return (
            f"trust radius {radii} ({100 * self.tolerance:g} % off at the most for {100 * self.coverage:g} % of new "
            f"prompts), from {len(self.slope)} prompts"
        )

    @property
    def per_prompt(self) -> np.ndarray:
        """Radius at each prompt, ``(n_prompts, ...)``; infinite where nothing bends."""
        return radius(self.slope, self.second, self.third, self.tolerance)

    @property
    def radius(self) -> np.ndarray:
        """The largest scale of each shape ``(...)`` that can be trusted at new prompts.

        Of n independent units, each with the smallest radius of its prompts, it is the k-th smallest, k the whole
        part of ``(1 - coverage) (n + 1)``.  A new unit's place among them is as likely to be any, so its prompts'
        radii are no smaller with a probability of at least the coverage, whatever they are distributed like.
        """
        _, unit = np.unique(self.pairs, return_inverse=True)
        smallest = np.full((unit.max() + 1, *self.slope.shape[1:]), np.inf)
        np.minimum.at(smallest, unit, self.per_prompt)
        return np.asarray(np.sort(smallest, axis=0)[_rank(self.coverage, len(smallest)) - 1])

    @property
    def of_mean(self) -> np.ndarray:
        """The same of the mean shift over the prompts, ``(...)``, which is straighter than single ones."""
        slope, second, third = (each.mean(axis=0) for each in (self.slope, self.second, self.third))
        return radius(slope, second, third, self.tolerance)


def radius(slope: np.ndarray, second: np.ndarray, third: np.ndarray, tolerance: float) -> np.ndarray:
    """Positive root of ``|third| s^2 + |second| s = tolerance |slope|``."""
    bend, allowed = np.abs(second), tolerance * np.abs(slope)
    slowest = bend + np.sqrt(bend**2 + 4 * np.abs(third) * allowed)
    return np.divide(2 * allowed, slowest, out=np.where(allowed > 0, np.inf, 0.0), where=slowest > 0)


def _rank(coverage: float, n_units: int) -> int:
    return int((1 - coverage) * (n_units + 1) + 1e-9)


def check_coverage(coverage: float, pairs: tuple[int, ...]) -> None:
    """Refuse a coverage that so few independent prompts cannot promise."""
    n_units = len(set(pairs))
    if not _rank(coverage, n_units):
        needed = int(np.ceil(coverage / (1 - coverage) - 1e-9))
        raise InputError(
            f"coverage={coverage:g} needs {needed} independent prompts or more; there are {n_units} (twins count "
            "once). Pass more prompts, or ask for less."
        )


def trust_radius(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    inputs: np.ndarray,
    *,
    tolerance: float = 0.1,
    coverage: float = 0.95,
    output: Output | None = None,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> TrustRadius:
    """How far shapes of inputs can be scaled until the output leaves its linear prediction by a tolerance.

    Four pushes along each shape, of the scales a, 2a and both signs, whose largest input is 2 and 4 % of its state,
    give slope, second and third coefficient of every prompt's shift.  What the linear prediction is of: each prompt's
    shift, by that prompt's own slope.  How well one prompt's slope stands for another's is another question; see
    :meth:`llvlit.Gains.interval`.

    Parameters
    ----------
    inputs : (n_layers,) or (n_shapes, n_layers) array
        Shapes u, such as one or all of :func:`schedules`; ``np.eye(n_layers)`` for single layers.
    tolerance
        Relative error of the shift, above 0.
    coverage
        Share of new prompts at which the prediction is to hold, below 1.  0.95 needs 19 independent prompts.
    output
        What is to move in place of the concept along its last direction; see :func:`llvlit.measured_gains`.

    Raises
    ------
    InputError
        If the inputs do not fit or are zero, or there are too few independent prompts for the coverage.
    NumericalError
        If the inputs are so large or small that the coefficients are beyond the range of numbers.

    Examples
    --------
    >>> shape = llvlit.minimum_energy(llvlit.adjoint_gains(model, splits.operating, directions), 1.0)
    >>> trust = llvlit.trust_radius(model, splits.operating, directions, shape, coverage=0.8)
    >>> trust.per_prompt.shape, bool(0 < trust.radius <= np.median(trust.per_prompt))
    ((8,), True)
    """
    along = as_directions(directions)
    vectors = along.on(model)
    shapes = array("inputs", inputs)
    if shapes.ndim not in (1, 2) or shapes.shape[-1] != model.n_layers or not shapes.size:
        raise InputError(f"inputs has shape {shapes.shape}; expected ({model.n_layers},) or (k, {model.n_layers}).")
    rows = shapes.reshape(-1, model.n_layers)
    if not np.abs(rows).max(axis=1).all():
        raise InputError("inputs holds a shape that is zero, which moves nothing at any scale.")
    tolerance = number("tolerance", tolerance, above=0)
    coverage = number("coverage", coverage, above=0, at_most=1 - 1e-12)
    tokens = tokens_of(model, prompts, max_tokens)
    check_coverage(coverage, tokens.prompts.pairs)
    check_resolution(f"a push of {STEP:g} of the state, inputs", STEP, 1.0, model.dtype)
    source = reading(model, tokens, vectors[-1], output, final_norm=final_norm)
    parts, jumps = [], []
    for _, part in progress(list(in_parts(tokens)), "trust radius"):
        system = depth_system(model, part, max_tokens=max_tokens, final_norm=final_norm)
        sizes = system.states[:, :-1].to("cpu", system.states.dtype).norm(dim=-1).double().numpy()
        steps = STEP / (np.abs(rows) / sizes[:, None]).max(axis=-1)  # (n_prompts, n_shapes)
        scales = steps[..., None] * np.array([1.0, -1.0, 2.0, -2.0])
        pushed = scales[..., None] * rows[:, None]  # (n_prompts, n_shapes, 4, n_layers)
        shifts = output_shifts(system, vectors, pushed.reshape(len(part), -1, model.n_layers), source=source)
        parts.append(coefficients(steps, shifts.reshape(scales.shape)))
        if has_routes(model):
            jumps.append(np.stack([rerouted(system, vectors, each) for each in pushed.swapaxes(0, 1)], axis=1))
    slope, second, third = (np.concatenate(each).reshape(-1, *shapes.shape[:-1]) for each in zip(*parts, strict=True))
    if not np.isfinite([slope, second, third]).all():
        raise NumericalError(f"inputs of up to {np.abs(rows).max():.3g} bend beyond the range of numbers; scale them.")
    metadata = {**origin(model, tokens, final_norm=final_norm), **source.metadata}
    if jumps:
        metadata["rerouted"] = shares = np.concatenate(jumps).mean(axis=0).tolist()
        if max(shares) > RARE:
            warnings.warn(
                f"The router of {model.name} sends {max(shares):.0%} of the prompts, pushed along shape "
                f"{int(np.argmax(shares))} of inputs by 2 to 4 % of their states, to other experts. The output jumps "
                "there: its radius is that of no curve. Look at output_shifts instead.",
                stacklevel=2,
            )
    borrowed, pairs = borrowed_of(along, (rows != 0).any(axis=0)), tokens.prompts.pairs
    return TrustRadius(slope, second, third, tolerance, coverage, pairs, borrowed=borrowed, metadata=metadata)


def coefficients(steps: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First three of the series, from shifts ``(..., 4)`` at steps a, -a, 2a, -2a; the next of two drop out."""
    odd, even = (shifts[..., ::2] - shifts[..., 1::2]) / 2, (shifts[..., ::2] + shifts[..., 1::2]) / 2
    with np.errstate(all="ignore"):
        slope = (8 * odd[..., 0] - odd[..., 1]) / (6 * steps)
        second = (16 * even[..., 0] - even[..., 1]) / (12 * steps**2)
        third = (odd[..., 1] - 2 * odd[..., 0]) / (6 * steps**3)
    return slope, second, third
