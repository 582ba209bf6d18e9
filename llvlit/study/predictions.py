"""How every prediction of an experiment agrees with what was measured: rows of a table, and profiles to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llvlit.method.agreement import agreement
from llvlit.method.gains import Gains
from llvlit.method.identification import Identification
from llvlit.study.grid import Settings

PARTS = {"all": slice(None), "not 0": slice(1, None)}
"""Layers that a number is about; layer 0, where the state is small, is often a case of its own."""


def predictions(method: str, found: Identification, settings: Settings) -> list[tuple[str, int | None, np.ndarray]]:
    """Predictor, order and predicted gains ``(n_layers,)`` of everything that was identified."""
    predicted: list[tuple[str, int | None, np.ndarray]] = []
    predicted.append(("adjoint", None, found.linear[method, settings.bases[0]].mean))
    for basis in settings.bases:
        surrogate = found.surrogates[method, basis]
        orders = sorted({min(order, surrogate.order) for order in settings.orders})
        predicted += [(basis, order, surrogate.truncate(order).gains()) for order in orders]
        predicted.append((f"{basis}, per prompt", surrogate.order, surrogate.per_prompt_gains().mean(axis=0)))
    return predicted


def compare_all(
    method: str, found: Identification, gains: Mapping[Any, Gains], settings: Settings, seed: int
) -> list[dict[str, Any]]:
    """Rows of every prediction at the first amplitude, and of those of full or largest order at the others."""
    n_operating, largest = len(found.states), min(settings.orders[-1], found.states.shape[-1])
    predicted = predictions(method, found, settings)
    reference = gains[settings.amplitudes[0]]
    rows = agreement_rows(method, "null", None, n_operating, gains["null"].mean, reference, seed)
    for amplitude in (amplitude for amplitude in gains if amplitude != "null"):
        for name, order, h in predicted:
            if amplitude == reference.amplitude or order in (None, largest):
                rows += agreement_rows(method, name, order, n_operating, h, gains[amplitude], seed)
    return rows


def agreement_rows(
    method: str, predictor: str, order: int | None, n_operating: int, h: np.ndarray, measured: Gains, seed: int
) -> list[dict[str, Any]]:
    """A row for each part of the layers; every number with its 95 % interval over the held-out prompts."""
    rows = []
    for layers, part in PARTS.items():
        result = agreement(h[part], measured.select(part), seed=seed)
        row: dict[str, Any] = {
            "direction": method,
            "predictor": predictor,
            "order": order,
            "n_operating": n_operating,
            "amplitude": measured.amplitude,
            "layers": layers,
        }
        for name, value in result.row().items():
            low, high = result.intervals[name]
            row |= {name: _rounded(value), f"{name}_low": _rounded(low), f"{name}_high": _rounded(high)}
        rows.append(row)
    return rows


def profiles_of(
    method: str, found: Identification, gains: Mapping[Any, Gains], settings: Settings, seed: int
) -> dict[str, list[float]]:
    """Gains over layers ``(n_layers,)`` of everything: measured with its interval, null, adjoint, every basis."""
    reference = gains[settings.amplitudes[0]]
    low, high = reference.interval(seed=seed)
    kept = {"measured": reference.mean, "low": low, "high": high, "null": gains["null"].mean}
    kept["adjoint"] = found.linear[method, settings.bases[0]].mean
    kept |= {basis: found.surrogates[method, basis].gains() for basis in settings.bases}
    return {name: [float(f"{value:.6g}") for value in values] for name, values in kept.items()}


def _rounded(value: float) -> float | None:
    """Six digits; None where there is no number (the correlation with a constant)."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
