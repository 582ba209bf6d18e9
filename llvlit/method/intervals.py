"""Intervals: how far a number moves with what it was computed on.  Every bootstrap here resamples independent units.

Twins share their words but for the concept, so their numbers move together: the unit of prompts is the pair.  Above
prompts stand seeds (which draw the prompts), above seeds tasks; :func:`mean_over_tasks` draws from the top down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from llvlit.checks import number
from llvlit.checks import seed as checked_seed

N_DRAWS = 1000
N_NESTED_DRAWS = 2000


@lru_cache(maxsize=2)  # many profiles of the same prompts stand in one table
def unit_weights(pairs: tuple[int, ...], seed: int) -> np.ndarray:
    """How often each draw of units with replacement holds each prompt, ``(1000, n_prompts)``.

    Parameters
    ----------
    pairs
        The independent unit of each prompt, as in :class:`llvlit.Prompts`.
    """
    _, unit = np.unique(pairs, return_inverse=True)
    n_units = int(unit.max()) + 1
    counts = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=N_DRAWS)
    return counts[:, unit]


def resampled_means(values: np.ndarray, pairs: Sequence[int], *, seed: int) -> np.ndarray:
    """Means ``(1000, n)`` of values ``(n_prompts, n)`` over drawn units.

    Examples
    --------
    >>> from llvlit.method.intervals import interval, resampled_means
    >>> twins = np.array([[1.0], [-1.0], [2.0], [-2.0]])  # what one twin gains, the other loses
    >>> interval(resampled_means(twins, [0, 0, 1, 1], seed=0)).ravel().tolist()
    [0.0, 0.0]
    """
    weights = unit_weights(tuple(pairs), seed)
    return np.asarray(weights @ values / weights.sum(axis=1, keepdims=True))


def resampled_medians(values: np.ndarray, pairs: Sequence[int], *, seed: int) -> np.ndarray:
    """Medians ``(1000,)`` of values ``(..., n_prompts)`` over drawn units and all leading axes; infinite values may be.

    Halfway between the two infinities there is none: NaN.

    Examples
    --------
    >>> from llvlit.method.intervals import resampled_medians
    >>> np.unique(resampled_medians(np.array([1.0, 3.0]), [0, 1], seed=0)).tolist()
    [1.0, 2.0, 3.0]
    """
    order = np.argsort(values, axis=None)
    held = unit_weights(tuple(pairs), seed)[:, order % values.shape[-1]].cumsum(axis=1)  # sorted values up to each
    total = held[:, -1:]
    middles = [(held > count).argmax(axis=1) for count in ((total - 1) // 2, total // 2)]
    with np.errstate(invalid="ignore"):
        return np.asarray(values.ravel()[order][np.stack(middles)].mean(axis=0))


def interval(draws: np.ndarray, *, level: float = 0.95) -> np.ndarray:
    """Lower and upper bound ``(2, ...)`` of the middle draws along the first axis; NaN where a draw is no number."""
    last = len(draws) - 1
    bounds = np.sort(draws, axis=0)[[round((1 - level) / 2 * last), round((1 + level) / 2 * last)]]
    return np.where(np.isnan(draws).any(axis=0), np.nan, bounds)


def mean_interval(values: np.ndarray, pairs: Sequence[int], *, level: float, seed: int) -> np.ndarray:
    """Bootstrap interval ``(2, ...)`` of the mean of values ``(n_prompts, ...)`` over independent units."""
    level = number("level", level, at_least=1e-12, at_most=1 - 1e-12)
    draws = resampled_means(values.reshape(len(values), -1), pairs, seed=checked_seed("seed", seed))
    return interval(draws, level=level).reshape(2, *values.shape[1:])


def mean_over_tasks(
    values: np.ndarray, tasks: np.ndarray, cells: np.ndarray, *, generator: np.random.Generator
) -> np.ndarray:
    """Mean over tasks of means over seeds, and its 95 % bounds over tasks, seeds and prompts, ``(3,)``.

    Tasks are drawn with replacement, then seeds within every drawn task, anew also where a task is drawn twice; every
    drawn seed gets a normal error as wide as the intervals over its prompts say.

    Parameters
    ----------
    values : (3, n_rows) array
        Values, and their own 95 % bounds over prompts; NaN: unknown, taken as no error.
    tasks, cells : (n_rows,) int array
        Number of each row's task, and of its task and seed together; cells of one task have neighbouring numbers.
        Rows of one cell are averaged first, and so are their errors.

    Returns
    -------
    (3,) array
        Bounds lie within those of the rows; NaN where there is a single cell, or no row.
    """
    x, low, high = values
    if not len(x):
        return np.full(3, np.nan)
    _, first, cell = np.unique(cells, return_index=True, return_inverse=True)
    n_rows = np.bincount(cell)
    means = np.bincount(cell, x) / n_rows
    widths = np.where(np.isfinite(high - low), high - low, 0)
    deviations = np.bincount(cell, widths / (2 * 1.96)) / n_rows
    _, starts, n_seeds = np.unique(tasks[first], return_index=True, return_counts=True)
    middle = (np.add.reduceat(means, starts) / n_seeds).mean()
    if len(means) == 1:
        return np.array([middle, np.nan, np.nan])
    chosen = generator.integers(len(starts), size=(N_NESTED_DRAWS, len(starts), 1))  # tasks
    shape = (N_NESTED_DRAWS, len(starts), n_seeds.max())
    drawn = starts[chosen] + (generator.random(shape) * n_seeds[chosen]).astype(int)  # more seeds than some tasks have
    draws = means[drawn]
    if deviations.any():
        draws += deviations[drawn] * generator.standard_normal(shape)
    draws[np.arange(shape[-1]) >= n_seeds[chosen]] = 0.0
    bounds = interval((draws.sum(axis=2) / n_seeds[chosen[..., 0]]).mean(axis=1))
    return np.array([middle, *np.clip(bounds, np.nanmin([x, low]), np.nanmax([x, high]))])
