"""What every schedule costs on the full model until the output has moved by the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llvlit.engine.depth import MAX_TOKENS
from llvlit.engine.models import LanguageModel
from llvlit.method.concepts import Directions
from llvlit.method.control import energy, minimum_energy
from llvlit.method.intervals import interval, resampled_medians
from llvlit.method.verification import required_energy
from llvlit.tasks.task import Prompts

METRICS = ("absolute", "relative")
FIRST_LAYERS = {"all": 0, "not 0": 1}


def schedule_energies(
    model: LanguageModel,
    prompts: Prompts,
    directions: Directions,
    gains: Mapping[str, np.ndarray],
    weights: np.ndarray,
    target: float,
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Energy of every schedule for a target of some class gaps, absolute and relative, with and without layer 0.

    ``optimal, BASIS`` is the cheapest shape for the gains given under that name, ``uniform`` spends alike
    everywhere, ``last layer`` pushes there alone.  Every single layer is tried: ``best layer`` is the one of
    the smallest median energy, known only to an oracle that has scanned these very prompts, and ``random layer``
    the median over layers and prompts.

    Parameters
    ----------
    gains
        Profiles ``(n_layers,)`` by name; the first is what ratios are taken to.
    weights : (n_layers,) array
        Of the relative energy.
    target : float
        In units of the class gap at the last state.

    Returns
    -------
    list of dict
        ``schedule``, ``metric``, ``layers``, median energy with its 95 % bootstrap interval over prompts
        (None: out of reach), ``ratio`` to the first optimum in the same metric with its interval (of the median
        over prompts), ``n_prompts``, ``n_out_of_reach`` (of ``random layer``: prompts and layers), and the
        ``layer`` of a single push.  There is no ratio (None) where its median is censored: where, at half of the
        prompts or more, the schedule is out of reach (the ratio is large, nobody knows how large), or the first
        optimum is (small).
    """
    scales = {"absolute": np.ones_like(weights), "relative": weights}
    shapes: dict[tuple[Any, ...], np.ndarray] = {}
    shapes |= {("single", layer): shape for layer, shape in enumerate(np.eye(len(weights)))}
    for metric, weight in scales.items():
        for layers, first in FIRST_LAYERS.items():
            inside = np.arange(len(weights)) >= first
            for name, profile in gains.items():
                shape = np.where(inside, minimum_energy(profile, 1.0, weights=weight), 0)
                shapes[f"optimal, {name}", metric, layers] = shape
            shapes["uniform", metric, layers] = inside / np.sqrt(weight)
    costs_of = required_energy(
        model,
        prompts,
        directions,
        shapes,
        target * float(directions.gaps[-1]),
        max_tokens=max_tokens,
        final_norm=final_norm,
    )
    costs = {  # energies of single prompts, infinite where out of reach
        (key, metric): np.where(
            np.isnan(costs_of[key].scale), np.inf, costs_of[key].scale ** 2 * energy(shape, weights=weight)
        )
        for key, shape in shapes.items()
        for metric, weight in scales.items()
    }
    rows = []
    for metric in METRICS:
        for layers, first in FIRST_LAYERS.items():
            single = np.array([costs[("single", layer), metric] for layer in range(first, len(weights))])
            best = int(np.argmin(np.median(single, axis=1)))
            schedules = {f"optimal, {name}": costs[(f"optimal, {name}", metric, layers), metric] for name in gains}
            schedules["uniform"] = costs[("uniform", metric, layers), metric]
            schedules |= {"last layer": single[-1], "best layer": single[best], "random layer": single}
            reference = schedules[f"optimal, {next(iter(gains))}"]
            for name, values in schedules.items():
                row: dict[str, Any] = {"schedule": name, "metric": metric, "layers": layers}
                row |= _summary(values, reference, prompts.pairs, seed)
                row["layer"] = {"best layer": first + best, "last layer": len(weights) - 1}.get(name)
                rows.append(row)
    return rows


def _summary(values: np.ndarray, reference: np.ndarray, pairs: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Median energy and median ratio over prompts, the last axis, with bootstrap intervals over independent units.

    A ratio is censored above (infinity) where the values are out of reach, below (minus infinity) where the reference
    is, and unknown where both are; a median that is no number is None, and so are its bounds.
    """
    n_prompts = len(reference)
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isinf(reference), np.where(np.isinf(values), np.nan, -np.inf), values / reference)
    summary: dict[str, Any] = {"n_prompts": n_prompts, "n_out_of_reach": int(np.isinf(values).sum())}
    for name, one in (("energy", values), ("ratio", ratios)):
        known = one[..., ~np.isnan(one).any(axis=tuple(range(one.ndim - 1)))] if name == "ratio" else one
        with np.errstate(invalid="ignore"):  # halfway between the two infinities
            middle = np.median(known) if known.size else np.nan
            bounds = [np.nan, np.nan]
            if known.shape[-1] == n_prompts and (name == "energy" or np.isfinite(middle)):
                bounds = interval(resampled_medians(known, pairs, seed=seed)).tolist()
        summary |= {name: _number(middle), f"{name}_low": _number(bounds[0]), f"{name}_high": _number(bounds[1])}
    return summary


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
