"""Agreement of a predicted gain profile with a measured one: ranks, shape and scale, each with its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llvlit.checks import seed as checked_seed
from llvlit.errors import InputError
from llvlit.method.gains import Gains, profile
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.results import borrowing
from llvlit.prompts import ranks

MEASURES = ("spearman", "pearson", "relative_error")


@dataclass(frozen=True)
class Agreement:
    """How well a predicted profile fits a measured one.

    Attributes
    ----------
    spearman, pearson : float
        Rank and linear correlation over layers; NaN if a profile is constant.
    relative_error : float
        ``|h - g| / |g|``: unlike the correlations, it sees a wrong scale.
    intervals : dict
        95 % bootstrap interval over independent units of each of the three, if single prompts' gains were given.
        Spearman's holds the truth as often or more where the means of layers differ by two standard errors or more.
        Where they differ by less, resampled ranks are noisier than the true ones, and the interval may lie too near
        zero: at one standard error it misses a true rank correlation of one more often than not.
    borrowed : tuple of int
        Layers, counted within the profiles, whose push went along a borrowed direction.

    Examples
    --------
    >>> found = llvlit.agreement(np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0]))
    >>> print(found)
    spearman 1, pearson 1, relative error 0.5
    """

    spearman: float
    pearson: float
    relative_error: float
    intervals: dict[str, tuple[float, float]]
    borrowed: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The three numbers with their intervals, to three digits; and which directions were borrowed."""
        parts = []
        for name, value in self.row().items():
            bounds = "[{:.3g}, {:.3g}]".format(*self.intervals[name]) if name in self.intervals else ""
            parts.append(f"{name.replace('_', ' ')} {value:.3g} {bounds}".rstrip())
        return ", ".join(parts) + borrowing(self.borrowed)

    def row(self) -> dict[str, float]:
        """The three numbers."""
        return {name: getattr(self, name) for name in MEASURES}


def agreement(predicted: Gains | np.ndarray, measured: Gains | np.ndarray, *, seed: int = 0) -> Agreement:
    """Agreement of two gain profiles over layers.

    Parameters
    ----------
    predicted, measured : Gains or (n_layers,) array
        Gains with single prompts give intervals: the independent units of ``measured`` are resampled.

    Raises
    ------
    InputError
        If the profiles differ in length, have fewer than three layers, or are not finite.

    Examples
    --------
    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=16)
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> llvlit.agreement(surrogate.gains(), measured).spearman > 0.5
    True
    """
    h, g = profile("predicted", predicted), profile("measured", measured)
    if h.shape != g.shape or len(h) < 3:
        raise InputError(f"predicted {h.shape} and measured {g.shape} must be profiles of one length, at least 3.")
    seed = checked_seed("seed", seed)
    intervals = {}
    if isinstance(measured, Gains) and len(set(measured.pairs)) > 1:
        means = resampled_means(measured.per_prompt, measured.pairs, seed=seed)
        bounds = interval(np.stack(compare(h[None], means), axis=-1))
        intervals = {name: (float(low), float(high)) for name, low, high in zip(MEASURES, *bounds, strict=True)}
    spearman, pearson, error = (float(value[0]) for value in compare(h[None], g[None]))
    layers = {layer for gains in (predicted, measured) if isinstance(gains, Gains) for layer in gains.borrowed}
    return Agreement(spearman, pearson, error, intervals, tuple(sorted(layers)))


def compare(predicted: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spearman, Pearson and relative error ``(n,)`` of rows ``(n or 1, n_layers)``; NaN where a row is constant."""
    size = np.maximum(np.linalg.norm(measured, axis=-1), np.finfo(float).tiny)
    error = np.linalg.norm(predicted - measured, axis=-1) / size
    spearman = _correlation(ranks(predicted.T).T, ranks(measured.T).T)
    return spearman, _correlation(predicted, measured), error


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation ``(n,)`` of rows ``(n or 1, n_layers)``."""
    constant = (np.ptp(a, axis=-1) == 0) | (np.ptp(b, axis=-1) == 0)
    a, b = (rows - rows.mean(axis=-1, keepdims=True) for rows in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(constant, np.nan, np.clip((a * b).sum(axis=-1) / np.where(constant, 1, norms), -1, 1))
