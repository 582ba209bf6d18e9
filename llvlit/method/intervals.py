"""Numbers that compare profiles over layers, and how far they move with the prompts."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

N_BOOTSTRAP = 1000


def bootstrap_means(per_prompt: np.ndarray, *, seed: int) -> np.ndarray:
    """Means over prompts drawn with replacement, ``(1000, n_layers)``."""
    n_prompts = len(per_prompt)
    counts = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_BOOTSTRAP)
    return counts @ per_prompt / n_prompts


def compare(predicted: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spearman, Pearson and relative error ``(n,)`` of rows ``(n, n_layers)``; NaN where a row is constant."""
    size = np.maximum(np.linalg.norm(measured, axis=-1), np.finfo(float).tiny)
    error = np.linalg.norm(predicted - measured, axis=-1) / size
    ranks = [rankdata(rows, axis=-1) for rows in (predicted, measured)]
    return _correlation(*ranks), _correlation(predicted, measured), error


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation ``(n,)`` of rows ``(n, n_layers)``."""
    constant = (np.ptp(a, axis=-1) == 0) | (np.ptp(b, axis=-1) == 0)
    a, b = (rows - rows.mean(axis=-1, keepdims=True) for rows in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(constant, np.nan, np.clip((a * b).sum(axis=-1) / np.where(constant, 1, norms), -1, 1))
