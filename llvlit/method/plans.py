"""Shapes of inputs that compete for a budget: made from some prompts, pushed at the others in the full model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from llvlit.checks import array
from llvlit.errors import InputError, NumericalError
from llvlit.method.intervals import interval, resampled_means

REGULARIZATION = (0.001, 0.01, 0.1, 1.0)
"""Of the metric: shares of the relative energy's that are added to it."""
N_FOLDS = 4
SCALES = (0.5, 0.8, 1.25, 2.0)
"""Of the strength that the second order asks for, tried at the prompts that a shape was not made from."""
WITH_LIMIT = (3.2, 5.0, 8.0)
"""More of them where a limit holds some layers back, so that the others have to do more."""
CLOSE = 0.2
"""How far, in relative size, a strength may lie beyond those that were tried."""
N_HALVINGS = 80
"""Of the bracket of a factor."""
N_FACTORS = 24
"""Strengths among which that of a plan is sought."""
FEWEST_UNITS = 4


@dataclass(frozen=True)
class Prediction:
    """A mean over prompts, and where the mean over as many new ones is expected, at a level of 95 %.

    Examples
    --------
    >>> from llvlit.method.plans import Prediction
    >>> print(Prediction(0.2, 0.17, 0.24))
    0.2 (0.17 to 0.24)
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def in_units(prediction: Prediction, size: float) -> Prediction:
    """A prediction in units of a size above zero."""
    return Prediction(prediction.value / size, prediction.low / size, prediction.high / size)


@dataclass(frozen=True, eq=False)
class Plan:
    """A shape of inputs at the strength that meets the aim, and what it is expected to do at new prompts.

    Attributes
    ----------
    name : str
    inputs : (n_layers,) float64 array
    shift : Prediction
        Of the output, in its units.
    kl : Prediction
        Of the next token's distribution, in nats.

    Examples
    --------
    >>> advice = llvlit.recommend(model, splits.evaluation, directions, budget=0.05)
    >>> names = {plan.name for plan in (advice.plan, *advice.alternatives)}
    >>> {"best single layer", "uniform"} <= names
    True
    """

    name: str
    inputs: np.ndarray
    shift: Prediction
    kl: Prediction

    def __post_init__(self) -> None:
        inputs = array("inputs", self.inputs, ("n_layers",)).copy()
        inputs.flags.writeable = False
        object.__setattr__(self, "inputs", inputs)


@dataclass(frozen=True)
class SecondOrder:
    """What is known to second order: gains, metric, weights of the relative energy, and what may be pushed."""

    gains: np.ndarray
    metric: np.ndarray
    weights: np.ndarray
    allowed: np.ndarray
    sign: float

    def shapes(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Shapes of inputs ``(n_layers,)``, made from some prompts, each pushing the output the right way."""
        h, F = self.gains[rows].mean(axis=0), self.metric[rows].mean(axis=0)
        n_layers, may = len(h), np.flatnonzero(self.allowed)
        cost = np.diag(F)
        uniform = np.where(self.allowed, 1 / np.sqrt(self.weights), 0.0)
        efficiency = np.where(self.allowed, np.abs(h) / np.sqrt(np.maximum(cost, np.finfo(float).tiny)), 0.0)
        diagonal = np.where(self.allowed, h / np.maximum(cost, np.finfo(float).tiny), 0.0)
        best = np.argsort(-efficiency, kind="stable")
        late = np.arange(n_layers) >= n_layers - n_layers // 3
        unit = np.eye(n_layers)
        shapes = {}
        inner = F[np.ix_(may, may)]
        if not inner.trace() > 0:
            raise NumericalError(
                "No push changes the next token's distribution, which may be sure of one token: no budget tells how "
                "strong one may be. Take other prompts or layers."
            )
        ridge = np.diag(self.weights[may]) * (inner / self.weights[may, None]).trace() / len(may)
        for strength in REGULARIZATION:
            solved = np.zeros(n_layers)
            solved[may] = np.linalg.solve(inner + strength * ridge, h[may])
            shapes[f"optimum, regularized by {strength:g}"] = solved
        shapes |= {
            "least relative energy": np.where(self.allowed, h / self.weights, 0.0),
            "efficiency-weighted": diagonal,
            "best single layer": unit[best[0]],
            "best three layers": np.where(np.isin(np.arange(n_layers), best[:3]), diagonal, 0.0),
            "uniform": uniform,
            "depth 0.4": unit[round(0.4 * n_layers)] * self.allowed,
            "late third": np.where(late, uniform, 0.0),
        }
        return {name: u * (np.sign(h @ u) or 1.0) * self.sign for name, u in shapes.items() if np.abs(u).any()}

    def length(self, inputs: np.ndarray) -> np.ndarray:
        """Root of the relative energy, ``(...)`` of inputs ``(..., n_layers)``."""
        return np.asarray(np.sqrt((inputs**2 * self.weights).sum(axis=-1)))

    def of_length(self, factor: float, unit: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """A shape some times as long as it is, no input beyond the most; None where it cannot be."""
        wanted, low, high = factor * self.length(unit), 0.0, 1e6 * factor
        if self.length(np.clip(high * unit, -most, most)) < wanted * (1 - 1e-6):
            return None
        for _ in range(N_HALVINGS):
            middle = (low + high) / 2
            short = self.length(np.clip(middle * unit, -most, most)) < wanted
            low, high = (middle, high) if short else (low, middle)
        return np.clip(high * unit, -most, most)

    def strength(self, shape: np.ndarray, rows: np.ndarray, aim: str, target: float) -> float:
        """Factor at which a shape meets the aim, by the second order at some prompts."""
        if aim == "shift":
            return abs(target) / max(abs(float(self.gains[rows].mean(axis=0) @ shape)), np.finfo(float).tiny)
        return float(np.sqrt(2 * target / max(shape @ self.metric[rows].mean(axis=0) @ shape, np.finfo(float).tiny)))


def held_out_in_turn(pairs: tuple[int, ...]) -> list[np.ndarray]:
    """Masks of the prompts that are held out together, whole units each."""
    units, unit = np.unique(pairs, return_inverse=True)
    if len(units) < FEWEST_UNITS:
        raise InputError(
            f"prompts are {len(units)} independent ones (twins count once); a recommendation needs {FEWEST_UNITS}, to "
            "be tested on those it was not made from. Pass more."
        )
    return [unit % min(N_FOLDS, len(units)) == fold for fold in range(min(N_FOLDS, len(units)))]


def competing_plans(
    local: SecondOrder,
    folds: list[np.ndarray],
    aim: str,
    target: float,
    limit: float,
    pairs: tuple[int, ...],
    effects: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> list[Plan]:
    """All plans that meet the aim within the limit, the best first."""
    everything = np.ones(len(pairs), dtype=bool)
    final = local.shapes(everything)
    names, scales = list(final), np.array(SCALES if np.isinf(limit) else (*SCALES, *WITH_LIMIT))
    most = limit / np.sqrt(local.weights)
    tried = np.zeros((len(pairs), len(names), len(scales), len(local.weights)))
    lengths = np.zeros(tried.shape[:-1])  # of what was tried, in that of the shape at its full strength
    for held_out in folds:
        shapes = local.shapes(~held_out)
        for place, name in enumerate(names):
            shape = shapes.get(name, final[name])
            unit = local.strength(shape, ~held_out, aim, target) * shape
            tried[held_out, place] = clipped = np.clip(scales[:, None] * unit, -most, most)
            lengths[held_out, place] = local.length(clipped) / local.length(unit)
    shifts, costs = effects(tried.reshape(len(pairs), -1, tried.shape[-1]))
    shifts, costs = (each.reshape(len(pairs), len(names), len(scales)) for each in (shifts, costs))
    found, held = [], []
    for place, name in enumerate(names):
        curves = shifts[:, place], costs[:, place]
        factor = _factor(curves, lengths[:, place], aim, target)
        unit = local.strength(final[name], everything, aim, target) * final[name]
        inputs = None if factor is None else local.of_length(factor, unit, most)
        if factor is None or inputs is None:
            continue
        moved, cost = (_at(curve, lengths[:, place], factor, power) for power, curve in enumerate(curves, start=1))
        found.append(Plan(name, inputs, expected(moved, pairs), positive(cost, pairs)))
        held.append((moved, cost))
    if not found:
        within = f" within limit={limit:g}" if np.isfinite(limit) else ""
        told = f"a budget of {target:g} nats" if aim == "kl" else f"a shift of {target:g}"
        raise InputError(f"No plan meets {told}{within}. Ask for less, raise the limit, or allow other layers.")
    merits = np.array([cost if aim == "shift" else -moved * local.sign for moved, cost in held])  # the less, the better
    order = np.argsort(merits.mean(axis=1), kind="stable")
    best = found[order[0]]
    moved, cost = np.empty((2, len(pairs)))
    for held_out in folds:  # the best of the other prompts, so that the choice does not flatter what it foretells
        chosen = held[int(merits[:, ~held_out].mean(axis=1).argmin())]
        moved[held_out], cost[held_out] = chosen[0][held_out], chosen[1][held_out]
    first = replace(best, shift=expected(moved, pairs), kl=positive(cost, pairs))
    return [first, *(found[place] for place in order[1:])]


def _factor(curves: tuple[np.ndarray, np.ndarray], lengths: np.ndarray, aim: str, target: float) -> float | None:
    """The smallest factor at which the mean meets the aim, no farther than a fifth beyond what was tried; else None."""
    curve, power = curves[aim == "kl"], 1 + (aim == "kl")

    def share(factor: float) -> float:
        return float(_at(curve, lengths, factor, power).mean() / target)

    if not lengths.min() > 0:  # a limit that leaves nothing
        return None
    grid = np.geomspace(lengths.min() * (1 - CLOSE), lengths.max() * (1 + CLOSE), N_FACTORS)
    shares = [share(factor) for factor in grid]
    place = next((place for place, value in enumerate(shares) if value >= 1), 0)
    if not place:
        return None
    return float(brentq(lambda factor: share(factor) - 1, grid[place - 1], grid[place], rtol=1e-6))


def _at(curve: np.ndarray, lengths: np.ndarray, factor: float, power: int) -> np.ndarray:
    """Each prompt's curve ``(n_prompts, n_scales)`` at a factor, by straight lines of the value over a power of it."""
    values = np.empty(len(curve))
    for row, (each, at) in enumerate(zip(curve, lengths, strict=True)):
        first = np.insert(np.diff(at) > 1e-9 * at[:-1], 0, True)  # a limit may have made equal what was longer
        values[row] = np.interp(factor, at[first], (each / at**power)[first])
    return values * factor**power


def expected(values: np.ndarray, pairs: tuple[int, ...]) -> Prediction:
    """The mean over prompts, and where that of as many new units will be: Student's interval, since both vary."""
    means = _parts(values, pairs)
    half = float(stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) * np.sqrt(2 / len(means)))
    mean = float(means.mean())
    return Prediction(mean, mean - half, mean + half)


def positive(values: np.ndarray, pairs: tuple[int, ...]) -> Prediction:
    """The same of what cannot be negative and is skewed: an interval of the mean's logarithm.

    The error is that of the jackknife.  A variance of heavy tails is known worse than one of a normal distribution, so
    Student's quantile has ``1 / (1 / (n - 1) + k / 2n)`` degrees of freedom, with the excess kurtosis k of the n units
    (Satterthwaite's).  That a strength was set by the same units is in it: the mean that was set varies as they do.

    In simulations of 4 to 24 units the interval holds 94 to 96 % of new means where the logarithm of single values has
    a standard deviation of 0.3 or 0.6, 92 to 95 % where it has 1, and 88 to 90 % with Pareto's tails of exponent 2.5:
    units that hold no outlier know of none.
    """
    means = _parts(values, pairs)
    n, value = len(means), float(means.mean())
    others = np.log(np.maximum((n * value - means) / (n - 1), max(1e-3 * value, np.finfo(float).tiny)))
    error = np.sqrt((n - 1) / n * ((others - others.mean()) ** 2).sum())
    squares = (means - value) ** 2
    kurtosis = (squares**2).mean() / max(squares.mean() ** 2, np.finfo(float).tiny)
    excess = ((n + 1) * (kurtosis - 3) + 6) * (n - 1) / ((n - 2) * (n - 3))
    freedom = max(2.0, 1 / (1 / (n - 1) + max(excess, 0.0) / (2 * n)))
    ratio = float(np.exp(stdtrit(freedom, 0.975) * error * np.sqrt(2)))
    return Prediction(value, value / ratio, value * ratio)


def _parts(values: np.ndarray, pairs: tuple[int, ...]) -> np.ndarray:
    """Values of the independent units whose mean is the mean m over prompts: ``m + (m_u - m) n_u / n``.

    m_u is a unit's mean, n_u its size and n the mean size; of units of one size the value is m_u.
    """
    _, unit, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    mean = values.mean()
    return np.asarray(mean + np.bincount(unit, values - mean) * len(counts) / len(values))


def measured(values: np.ndarray, pairs: tuple[int, ...]) -> Prediction:
    """A mean, and its bootstrap interval over independent units."""
    low, high = interval(resampled_means(values[:, None], pairs, seed=0))[:, 0]
    return Prediction(float(values.mean()), float(low), float(high))


def scaled_plan(plan: Plan, factor: float) -> Plan:
    """A plan some times as strong: its shift in proportion, its divergence with the square."""
    low, high = sorted((plan.shift.low * factor, plan.shift.high * factor))
    shift = Prediction(plan.shift.value * factor, low, high)
    kl = Prediction(*(value * factor * factor for value in (plan.kl.value, plan.kl.low, plan.kl.high)))
    if not np.isfinite([low, high, kl.high]).all():
        raise NumericalError(f"factor={factor:g} makes a plan beyond the largest number. Take a smaller one.")
    return replace(plan, inputs=plan.inputs * factor, shift=shift, kl=kl)
