"""Shapes of inputs that compete for a budget: made from some prompts, pushed at the others in the full model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from llvlit.errors import InputError
from llvlit.method.intervals import interval, resampled_means

REGULARIZATION = (0.001, 0.01, 0.1, 1.0)
"""Of the metric: shares of the relative energy's that are added to it."""
N_FOLDS = 4
SCALES = (0.5, 0.8, 1.25, 2.0)
"""Of the strength that the second order asks for, tried at the prompts that a shape was not made from."""
WITH_LIMIT = (3.2, 5.0, 8.0)
"""More of them where a limit holds some layers back, so that the others have to do more."""
CLOSE = 0.2
"""How far, in relative size, a plan may be read beyond what was tried, and miss its aim."""
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


@dataclass(frozen=True)
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
    for held_out in folds:
        shapes = local.shapes(~held_out)
        for place, name in enumerate(names):
            shape = shapes.get(name, final[name])
            unit = local.strength(shape, ~held_out, aim, target) * shape
            tried[held_out, place] = np.clip(scales[:, None] * unit, -most, most)
    shifts, costs = effects(tried.reshape(len(pairs), -1, tried.shape[-1]))
    shifts, costs = (each.reshape(len(pairs), len(names), len(scales)) for each in (shifts, costs))
    found = []
    for place, name in enumerate(names):
        curves = shifts[:, place], costs[:, place]
        factor = _factor(curves, scales, aim, target)
        if factor is None:
            continue
        inputs = factor * local.strength(final[name], everything, aim, target) * final[name]
        inputs = np.clip(inputs, -most, most)
        moved, cost = (_at(curve, scales, factor, power) for power, curve in enumerate(curves, start=1))
        reached = abs(float((cost if aim == "kl" else moved).mean()) / target)
        if abs(reached - 1) > CLOSE:  # single prompts bend too much between the scales that were tried
            continue
        found.append(Plan(name, inputs, expected(moved, pairs), expected(cost, pairs)))
    if not found:
        within = f" within limit={limit:g}" if np.isfinite(limit) else ""
        told = f"a budget of {target:g} nats" if aim == "kl" else f"a shift of {target:g}"
        raise InputError(f"No plan meets {told}{within}. Ask for less, raise the limit, or allow other layers.")
    order = (lambda plan: -plan.shift.value * local.sign) if aim == "kl" else (lambda plan: plan.kl.value)
    return sorted(found, key=order)


def _factor(curves: tuple[np.ndarray, np.ndarray], scales: np.ndarray, aim: str, target: float) -> float | None:
    """Where the mean curve meets the aim, by a straight line in the logarithms; None if it is nowhere near."""
    mean = curves[aim == "kl"].mean(axis=0) * (1.0 if aim == "kl" else np.sign(target))
    if (mean <= 0).any():
        return None
    heights, places, wanted = np.log(mean), np.log(scales), np.log(abs(target))
    if (np.diff(heights) <= 0).any() or not heights[0] - CLOSE <= wanted <= heights[-1] + CLOSE:
        return None
    inside = int(np.clip(np.searchsorted(heights, wanted), 1, len(scales) - 1))
    slope = (places[inside] - places[inside - 1]) / (heights[inside] - heights[inside - 1])
    return float(np.exp(places[inside - 1] + slope * (wanted - heights[inside - 1])))


def _at(curve: np.ndarray, scales: np.ndarray, factor: float, power: int) -> np.ndarray:
    """Each prompt's curve ``(n_prompts, n_scales)`` at a factor, by straight lines of the value over a power of it."""
    values = np.array([np.interp(factor, scales, each / scales**power) for each in curve])
    return values * factor**power


def expected(values: np.ndarray, pairs: tuple[int, ...]) -> Prediction:
    """The mean, and where the mean over as many new units will be: Student's interval, since both means vary."""
    _, unit, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    means = np.bincount(unit, values) / counts
    half = stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) * np.sqrt(2 / len(means))
    mean = float(values.mean())
    return Prediction(mean, mean - float(half), mean + float(half))


def measured(values: np.ndarray, pairs: tuple[int, ...]) -> Prediction:
    """A mean, and its bootstrap interval over independent units."""
    low, high = interval(resampled_means(values[:, None], pairs, seed=0))[:, 0]
    return Prediction(float(values.mean()), float(low), float(high))


def scaled_plan(plan: Plan, factor: float) -> Plan:
    """A plan some times as strong: its shift in proportion, its divergence with the square."""
    low, high = sorted((plan.shift.low * factor, plan.shift.high * factor))
    shift = Prediction(plan.shift.value * factor, low, high)
    kl = Prediction(*(value * factor**2 for value in (plan.kl.value, plan.kl.low, plan.kl.high)))
    return replace(plan, inputs=plan.inputs * factor, shift=shift, kl=kl)
