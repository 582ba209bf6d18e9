"""Shapes of inputs that compete for a budget: made from some prompts, pushed at the others in the full model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
WEAKER = (0.36, 0.6)
"""Of the weakest strength that was tried, those that are tried next where it is more than the aim."""
N_WEAKER = 6
CLOSE = 0.2
"""How far, in relative size, a strength may lie beyond those that were tried."""
N_HALVINGS = 80
"""Of the bracket of a factor."""
N_FACTORS = 24
"""Strengths among which that of a plan is sought."""
OFF = 0.25
"""How far a plan may be off its aim at the prompts themselves, relative to it, before its strength is corrected.

A plan costs less at the prompts that it was made from than at others, some 10 % with two dozen; to correct that would
push too hard.  What misses by more lies between strengths where the curve bends.
"""
NEAR = 0.05
"""How near is near enough for one that is corrected."""
N_CORRECTIONS = 2
"""Of three strengths each, pushed together."""
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


@dataclass(frozen=True, eq=False)
class Entry:
    """A shape at a strength, which is a factor of what the second order asks for, and what it does at each prompt."""

    name: str
    unit: np.ndarray
    factor: float
    inputs: np.ndarray
    moved: np.ndarray = field(default_factory=lambda: np.empty(0))
    cost: np.ndarray = field(default_factory=lambda: np.empty(0))


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
    """All plans that meet the aim within the limit, the best first.

    Each shape is pushed at prompts that it was not made from.  Between the strengths that are tried there lies that of
    its plan; there the plans compete, and what is expected of them is read.  Then the plans themselves are pushed at
    all prompts: one that misses the aim by more than 25 % gets another strength, and what is expected of it changes in
    the proportion in which that changed what it does there.  Every mean is one over prompts, every interval one over
    independent units.
    """
    everything = np.ones(len(pairs), dtype=bool)
    final, most = local.shapes(everything), limit / np.sqrt(local.weights)
    units = np.zeros((len(pairs), len(final), len(local.weights)))  # of each prompt, at the second order's strength
    for held_out in folds:
        shapes = local.shapes(~held_out)
        for place, name in enumerate(final):
            shape = shapes.get(name, final[name])
            units[held_out, place] = local.strength(shape, ~held_out, aim, target) * shape
    curves = _curves(local, units, most, aim, target, effects)
    entries, held = [], []
    for (name, shape), curve in zip(final.items(), curves, strict=True):
        factor = _factor(curve, aim, target)
        unit = local.strength(shape, everything, aim, target) * shape
        inputs = None if factor is None else local.of_length(factor, unit, most)
        if factor is not None and inputs is not None:
            entries.append(Entry(name, unit, factor, inputs))
            held.append([_at(values, curve[0], factor, power) for power, values in enumerate(curve[1:], start=1)])
    if not entries:
        within = f" within limit={limit:g}" if np.isfinite(limit) else ""
        told = f"a budget of {target:g} nats" if aim == "kl" else f"a shift of {target:g}"
        raise InputError(f"No plan meets {told}{within}. Ask for less, raise the limit, or allow other layers.")

    def merits(values: Sequence[Any]) -> np.ndarray:  # of each prompt; the less, the better
        return np.array([cost if aim == "shift" else -moved * local.sign for moved, cost in values])

    known = merits(held)
    for place, path in enumerate(_corrected(local, entries, most, aim, target, effects)):
        if path is not None:
            first, entries[place] = path
            now = entries[place].moved.mean(), entries[place].cost.mean()
            was = (first.moved.mean(), target) if aim == "kl" else (target, first.cost.mean())
            held[place] = [values * new / old for values, new, old in zip(held[place], now, was, strict=True)]
    plans = [
        Plan(entry.name, entry.inputs, expected(moved, pairs), positive(cost, pairs))
        for entry, (moved, cost) in zip(entries, held, strict=True)
    ]
    best = int(known.mean(axis=1).argmin())
    moved, cost = np.empty((2, len(pairs)))
    for held_out in folds:  # the best of the other prompts, so that the choice does not flatter what it foretells
        chosen = held[int(known[:, ~held_out].mean(axis=1).argmin())]
        moved[held_out], cost[held_out] = chosen[0][held_out], chosen[1][held_out]
    winner = replace(plans[best], shift=expected(moved, pairs), kl=positive(cost, pairs))
    order = np.argsort(merits(held).mean(axis=1), kind="stable")
    return [winner, *(plans[place] for place in order if place != best)]


def _curves(
    local: SecondOrder,
    units: np.ndarray,
    most: np.ndarray,
    aim: str,
    target: float,
    effects: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> list[np.ndarray]:
    """Of each shape what its strengths do at each prompt: length, in the unit's, shift and divergence.

    Each ``(3, n_prompts, n_strengths)``, from units ``(n_prompts, n_shapes, n_layers)``.
    """

    def tried(places: list[int], scales: Sequence[float]) -> list[np.ndarray]:
        some = units[:, places, None]
        pushes = np.clip(np.array(scales)[:, None] * some, -most, most)
        found = effects(pushes.reshape(len(units), -1, units.shape[-1]))
        lengths = local.length(pushes) / local.length(some)
        return list(np.stack([lengths, *(each.reshape(lengths.shape) for each in found)]).transpose(2, 0, 1, 3))

    scales = SCALES if np.isinf(most).all() else (*SCALES, *WITH_LIMIT)
    curves = tried(list(range(units.shape[1])), scales)
    for weaker in range(N_WEAKER):
        strong = [
            place
            for place, curve in enumerate(curves)
            if curve[0].min() > 0 and _share(curve, _weakest(curve), aim, target) >= 1
        ]
        if not strong:
            break
        more = tried(strong, [SCALES[0] * WEAKER[0] ** weaker * scale for scale in WEAKER])
        for place, curve in zip(strong, more, strict=True):
            curves[place] = np.concatenate([curve, curves[place]], axis=-1)
    return curves


def _weakest(curve: np.ndarray) -> float:
    return float(curve[0].min()) * (1 - CLOSE)


def _share(curve: np.ndarray, factor: float, aim: str, target: float) -> float:
    """What a factor makes of the aim, in its target."""
    power = 1 + (aim == "kl")
    return float(_at(curve[power], curve[0], factor, power).mean() / target)


def _factor(curve: np.ndarray, aim: str, target: float) -> float | None:
    """The smallest factor at which the mean meets the aim, no farther than a fifth beyond what was tried; else None."""
    if not curve[0].min() > 0:  # a limit that leaves nothing
        return None
    grid = np.geomspace(_weakest(curve), curve[0].max() * (1 + CLOSE), N_FACTORS)
    shares = [_share(curve, factor, aim, target) for factor in grid]
    place = next((place for place, value in enumerate(shares) if value >= 1), 0)
    if not place:
        return None
    low, high = grid[place - 1], grid[place]
    return float(brentq(lambda factor: _share(curve, factor, aim, target) - 1, low, high, rtol=1e-6))


def _corrected(
    local: SecondOrder,
    entries: list[Entry],
    most: np.ndarray,
    aim: str,
    target: float,
    effects: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> list[tuple[Entry, Entry] | None]:
    """Entries that miss the aim at the prompts, and at the one of some strengths that comes closest; else None."""

    def pushed(some: list[Entry]) -> list[Entry]:
        inputs = np.stack([each.inputs for each in some])
        moved, cost = effects(np.broadcast_to(inputs, (len(local.gains), *inputs.shape)))
        return [replace(each, moved=moved[:, place], cost=cost[:, place]) for place, each in enumerate(some)]

    def share(entry: Entry) -> float:
        return float((entry.cost if aim == "kl" else entry.moved).mean() / target)

    paths = [[entry] for entry in pushed(entries)]
    off = [place for place, path in enumerate(paths) if abs(share(path[0]) - 1) > OFF]
    for _ in range(N_CORRECTIONS):
        again: list[Entry] = []
        places: list[int] = []
        for place in off:
            path = paths[place]
            if min(abs(share(entry) - 1) for entry in path) > min(OFF, NEAR) and min(map(share, path)) > 0:
                factors = _closer([(entry.factor, share(entry)) for entry in path], 1 + (aim == "kl"))
                found = [(factor, local.of_length(factor, path[0].unit, most)) for factor in factors]
                again += [replace(path[0], factor=at, inputs=inputs) for at, inputs in found if inputs is not None]
                places += [place] * (len(again) - len(places))
        for place, entry in zip(places, pushed(again) if again else [], strict=True):
            paths[place].append(entry)
    closest = [(path[0], min(path, key=lambda entry: abs(share(entry) - 1))) for path in paths]
    return [both if place in off else None for place, both in enumerate(closest)]


def _closer(known: list[tuple[float, float]], power: int) -> list[float]:
    """Three factors that should come closer to a share of one, from factors and their shares, all in logarithms."""
    at, shares = np.log(sorted(known)).T
    above = next((place for place, value in enumerate(shares) if value > 0), len(shares))
    if not 0 < above < len(shares):  # by a power law, and where the curve is steeper or flatter
        slope = max(power / 10, np.ptp(shares) / np.ptp(at)) if len(at) > 1 else power
        nearest = np.abs(shares).argmin()
        steps = np.clip(-shares[nearest] / slope * np.array([0.3, 1.0, 3.0]), -1, 1)
        return [float(each) for each in np.exp(at[nearest] + steps)]
    low, high = at[above - 1 : above + 1]
    between = np.interp(0.0, shares[above - 1 : above + 1], (low, high))
    return [float(np.exp(each)) for each in ((low + between) / 2, between, (between + high) / 2)]


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
