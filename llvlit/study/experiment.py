"""One experiment: a model on the tokens of one split; how every predictor agrees, and what every schedule costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from llvlit.engine.depth import last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, usable_prompts
from llvlit.errors import ConceptNotVisibleError, InputError
from llvlit.method.agreement import agreement
from llvlit.method.concepts import Directions, directions_of_states, random_directions, separation
from llvlit.method.control import early_and_middle, energy, minimum_energy, relative_weights
from llvlit.method.gains import Gains, adjoint_gains, measured_gains
from llvlit.method.identification import Identification, Plan, identify_all
from llvlit.method.intervals import interval, resampled_medians
from llvlit.method.verification import required_energy
from llvlit.study.grid import Settings
from llvlit.tasks.splits import Splits

SAME_PROMPTS = 100
"""Held-out prompts whose own first-order gains are compared with their measured ones: linearity without transfer."""

FIRST_LAYERS = {"all": 0, "not 0": 1}
"""First of the layers that a number is about; layer 0, where the state is small, is often a case of its own."""

NULL = "null"

Row = dict[str, Any]

Prediction = tuple[str, int | None, np.ndarray]
"""Predictor, order, and gains ``(n_layers,)``."""


@dataclass(frozen=True)
class SplitTokens:
    """The three splits as one model's tokens, and how many prompts of each are left out."""

    concept: TokenizedPrompts
    operating: TokenizedPrompts
    evaluation: TokenizedPrompts
    left_out: dict[str, int]


@dataclass(frozen=True)
class Experiment:
    """Numbers of one experiment.

    Attributes
    ----------
    directions : dict of str to dict
        For each method: ``gaps``, ``borrowed`` and ``separation`` (on the operating split), one value a state.
    profiles : dict of str to dict
        For each method: ``measured`` with its interval ``low`` and ``high``, ``adjoint``, ``null``, every basis.
    agreements : list of dict
        One row for each predictor, order, amplitude, number of operating prompts, and part of the layers.
    energies : list of dict
        One row for each schedule, metric and part of the layers.
    """

    directions: dict[str, dict[str, Any]]
    profiles: dict[str, dict[str, list[float]]]
    agreements: list[Row] = field(repr=False)
    energies: list[Row] = field(repr=False)


def tokenize_splits(model: LanguageModel, splits: Splits, settings: Settings) -> SplitTokens:
    """Each split as tokens, without the prompts that are too short or equal for this tokenizer.

    Of prompts that have the same tokens in two splits, that of the earlier split stays: none is held out that a
    direction or a surrogate has seen.

    Raises
    ------
    ConceptNotVisibleError
        If nothing of a class is left of some split.
    """
    tokens, left_out = {}, {}
    seen: set[tuple[int, ...]] = set()
    for part in ("concept", "operating", "evaluation"):
        prompts = getattr(splits, part)
        try:
            usable, _ = usable_prompts(model, prompts, max_tokens=settings.max_tokens, chat=settings.chat)
        except InputError as error:
            raise ConceptNotVisibleError(f"The {part} split: {error}") from error
        unseen = [row for row, ids in enumerate(usable.ids) if ids not in seen]
        left_out[part] = len(prompts) - len(unseen)
        if len({usable.prompts.labels[row] for row in unseen}) < 2:
            raise ConceptNotVisibleError(
                f"The {part} split: of {len(prompts)} prompts, {left_out[part]} are too short for the tokenizer of "
                f"{model.name}, or equal for it to others of this split or of an earlier one, and none of one class "
                "is left. Use longer prompts or a larger max_tokens."
            )
        tokens[part] = usable.select(unseen)
        seen.update(usable.ids)
    return SplitTokens(**tokens, left_out=left_out)


def run_experiment(
    model: LanguageModel,
    tokens: SplitTokens,
    settings: Settings,
    *,
    seed: int = 0,
    jacobian: str = "jvp",
    final_norm: bool = False,
) -> Experiment:
    """Every basis, order, kind of direction and amplitude at once, since they share their passes.

    Directions from the concept split, surrogates and full-order linear gains from one sweep of the operating split,
    all of it judged by the gains measured on the evaluation split.

    Raises
    ------
    ConceptNotVisibleError
        If the concept does not show at the last token.
    """
    options: dict[str, Any] = {"max_tokens": settings.max_tokens, "final_norm": final_norm}
    first = settings.directions[0]

    states = last_token_states(model, tokens.concept, **options)
    directions = {
        method: directions_of_states(states, tokens.concept.prompts, method=method, seed=seed)
        for method in settings.directions
    }

    order = min(settings.orders[-1], model.hidden_size)
    plans = {key: Plan(directions[key[0]], key[1], order, seed=seed) for key in product(directions, settings.bases)}
    products = {**options, "jacobian": jacobian}
    identification = identify_all(model, tokens.operating, plans, **products)
    of_first = {key: plan for key, plan in plans.items() if key[0] == first}
    counts = [count for count in settings.operating_counts if count < len(tokens.operating)]
    fewer = [identify_all(model, tokens.operating.select(range(n)), of_first, **products) for n in counts]

    measured = measure(model, tokens.evaluation, directions, settings, seed, options)
    same = tokens.evaluation.select(range(min(SAME_PROMPTS, len(tokens.evaluation))))
    own = dict(zip(directions, adjoint_gains(model, same, list(directions.values()), **options), strict=True))

    agreements = agreement_rows(identification, fewer, measured, own, settings, seed)
    gains = {method: predicted_gains(method, identification, settings) for method in directions}
    energies: list[Row] = []
    if settings.energy_prompts:
        chosen = tokens.evaluation.select(range(min(2 * settings.energy_prompts, len(tokens.evaluation))))
        weights, target = relative_weights(identification.states), settings.target
        energies = schedule_energies(
            model, chosen, directions[first], gains[first], weights, target, seed=seed, **options
        )

    labels = np.array(tokens.operating.prompts.labels)
    return Experiment(
        directions={
            method: {
                "gaps": one.gaps.tolist(),
                "borrowed": one.borrowed.tolist(),
                "separation": separation(identification.states, labels, one.vectors).tolist(),
            }
            for method, one in directions.items()
        },
        profiles={method: profiles(gains[method], measured[method], settings, seed) for method in directions},
        agreements=[name_borrowed(row, directions[row["direction"]]) for row in agreements],
        energies=[name_borrowed(row, directions[first]) for row in energies],
    )


def measure(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    directions: Mapping[str, Directions],
    settings: Settings,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, dict[Any, Gains]]:
    """Measured gains of every method by amplitude, and of the null: pushes along random directions, the same output.

    Methods other than the first are measured at the reference amplitude alone.
    """
    pushes: dict[tuple[str, Any], tuple[Directions | torch.Tensor, float]] = {}
    for method, one in directions.items():
        amplitudes = settings.amplitudes if method == settings.directions[0] else settings.amplitudes[:1]
        pushes |= {(method, amplitude): (one, amplitude) for amplitude in amplitudes}
        null = random_directions(*one.vectors.shape, seed=seed)
        null[-1] = one.vectors[-1]
        pushes[method, NULL] = (null, settings.amplitudes[0])
    along, amplitudes = zip(*pushes.values(), strict=True)
    gains = measured_gains(model, tokens, along, amplitude=amplitudes, **options)
    by_push = dict(zip(pushes, gains, strict=True))
    return {method: {kind: one for (name, kind), one in by_push.items() if name == method} for method in directions}


def predicted_gains(method: str, identification: Identification, settings: Settings) -> dict[str, np.ndarray]:
    """Gains ``(n_layers,)`` of each basis at its largest order, and of the full-order adjoint."""
    gains = {basis: identification.surrogates[method, basis].gains() for basis in settings.bases}
    return {**gains, "adjoint": identification.linear[method, settings.bases[0]].mean}


def agreement_rows(
    identification: Identification,
    fewer: Sequence[Identification],
    measured: Mapping[str, Mapping[Any, Gains]],
    own: Mapping[str, Gains],
    settings: Settings,
    seed: int,
) -> list[Row]:
    """Every prediction beside what was measured: all at the first amplitude, those of largest order at the others.

    A row for each part of the layers; every number with its 95 % interval over the held-out units.
    """
    n_operating, n_largest = len(identification.states), min(settings.orders[-1], identification.states.shape[-1])
    compared: list[tuple[str, Prediction, int, Gains]] = []
    for method, gains in measured.items():
        reference, n_same = gains[settings.amplitudes[0]], len(own[method].per_prompt)
        predicted = predictions(method, identification, settings)
        compared.append((method, (NULL, None, gains[NULL].mean), n_operating, reference))
        for one in (gains for kind, gains in gains.items() if kind != NULL):
            chosen = [each for each in predicted if one is reference or each[1] in (None, n_largest)]
            compared += [(method, each, n_operating, one) for each in chosen]
            compared.append((method, ("adjoint, same prompts", None, own[method].mean), n_same, one.head(n_same)))
    first = settings.directions[0]
    for part in fewer:
        chosen = [each for each in predictions(first, part, settings) if each[1] in (None, n_largest)]
        compared += [(first, each, len(part.states), measured[first][settings.amplitudes[0]]) for each in chosen]
    rows = []
    for (method, (predictor, order, h), count, one), (layers, start) in product(compared, FIRST_LAYERS.items()):
        result = agreement(h[start:], one.select(slice(start, None)), seed=seed)
        row: Row = {"direction": method, "predictor": predictor, "order": order, "n_operating": count}
        row |= {"amplitude": one.amplitude, "layers": layers}
        for name, value in result.row().items():
            low, high = result.intervals.get(name, (np.nan, np.nan))
            row |= {name: rounded(value), f"{name}_low": rounded(low), f"{name}_high": rounded(high)}
        rows.append(row)
    return rows


def predictions(method: str, identification: Identification, settings: Settings) -> list[Prediction]:
    """Predicted gains of everything that was identified."""
    predicted: list[Prediction] = [("adjoint", None, identification.linear[method, settings.bases[0]].mean)]
    for basis in settings.bases:
        surrogate = identification.surrogates[method, basis]
        orders = sorted({min(order, surrogate.order) for order in settings.orders})
        for operators, order in product(settings.operators, orders):
            one = replace(surrogate, operators=operators).truncate(order)
            predicted.append((basis if operators == "mean" else f"{basis}, {operators}", order, one.gains()))
    return predicted


def profiles(
    gains: Mapping[str, np.ndarray], measured: Mapping[Any, Gains], settings: Settings, seed: int
) -> dict[str, list[float]]:
    """Gains over layers ``(n_layers,)`` of everything: measured with its interval, null, adjoint, every basis."""
    reference = measured[settings.amplitudes[0]]
    low, high = reference.interval(seed=seed)
    kept = {"measured": reference.mean, "low": low, "high": high, NULL: measured[NULL].mean, **gains}
    return {name: [float(f"{value:.6g}") for value in values] for name, values in kept.items()}


def schedule_energies(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    directions: Directions,
    gains: Mapping[str, np.ndarray],
    weights: np.ndarray,
    target: float,
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
    seed: int = 0,
) -> list[Row]:
    """Energy of every schedule for a target of some class gaps, absolute and relative, with and without layer 0.

    ``optimal, BASIS`` is the cheapest shape for the gains given under that name, ``uniform`` spends alike
    everywhere, ``early-only`` and ``middle-only`` in their third of these layers, ``last layer`` pushes there alone.
    Every single layer is tried: ``best layer`` is the one of the smallest median energy, known only to an oracle that
    has scanned these very prompts, and ``random layer`` the median over layers and prompts.

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
        ``schedule``, ``metric``, ``layers``, median energy with its 95 % bootstrap interval over independent units
        (None: out of reach), ``ratio`` to the first optimum in the same metric with its interval (of the median
        over prompts), ``n_prompts``, ``n_out_of_reach`` (of ``random layer``: prompts and layers), and the
        ``layer`` of a single push.  There is no ratio (None) where its median is censored: where, at half of the
        prompts or more, the schedule is out of reach (the ratio is large, nobody knows how large), or the first
        optimum is (small).
    """
    scales = {"absolute": np.ones_like(weights), "relative": weights}
    variants = list(product(scales, FIRST_LAYERS.items()))
    shapes: dict[tuple[Any, ...], np.ndarray] = {}
    shapes |= {("single", layer): shape for layer, shape in enumerate(np.eye(len(weights)))}
    for metric, (layers, first) in variants:
        inside = np.arange(len(weights)) >= first
        for name, profile in gains.items():
            shape = np.where(inside, minimum_energy(profile, 1.0, weights=scales[metric]), 0)
            shapes[f"optimal, {name}", metric, layers] = shape
        parts = {"uniform": inside, **early_and_middle(len(weights), first=first)}
        shapes |= {(name, metric, layers): part / np.sqrt(scales[metric]) for name, part in parts.items()}
    goal = target * float(directions.gaps[-1])
    required = required_energy(model, tokens, directions, shapes, goal, max_tokens=max_tokens, final_norm=final_norm)

    def costs(metric: str, *key: Any) -> np.ndarray:  # energies of single prompts, infinite where out of reach
        scale = np.nan_to_num(required[key].scale, nan=np.inf)
        return np.asarray(scale**2 * energy(shapes[key], weights=scales[metric]))

    rows = []
    for metric, (layers, first) in variants:
        single = np.array([costs(metric, "single", layer) for layer in range(first, len(weights))])
        best = int(np.argmin(np.median(single, axis=1)))
        names = [*(f"optimal, {name}" for name in gains), "uniform", "early-only", "middle-only"]
        schedules = {name: costs(metric, name, metric, layers) for name in names}
        schedules |= {"last layer": single[-1], "best layer": single[best], "random layer": single}
        for name, values in schedules.items():
            summary = energy_summary(values, schedules[names[0]], tokens.prompts.pairs, seed)
            layer = {"best layer": first + best, "last layer": len(weights) - 1}.get(name)
            rows.append({"schedule": name, "metric": metric, "layers": layers, **summary, "layer": layer})
    return rows


def energy_summary(values: np.ndarray, reference: np.ndarray, pairs: Sequence[int], seed: int) -> Row:
    """Median energy and median ratio over prompts, the last axis, with bootstrap intervals over independent units.

    A ratio is censored above (infinity) where the values are out of reach, below (minus infinity) where the reference
    is, and unknown where both are; a median that is no number is None, and so are its bounds.
    """
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isinf(reference), np.where(np.isinf(values), np.nan, -np.inf), values / reference)
    summary: Row = {"n_prompts": len(reference), "n_out_of_reach": int(np.isinf(values).sum())}
    for name, numbers in (("energy", values), ("ratio", ratios)):
        known = numbers[..., ~np.isnan(numbers).any(axis=tuple(range(numbers.ndim - 1)))]
        with np.errstate(invalid="ignore"):  # halfway between the two infinities
            middle = np.median(known) if known.size else np.nan
        bounds = np.array([np.nan, np.nan])
        if known.shape[-1] == len(reference) and (name == "energy" or np.isfinite(middle)):
            bounds = interval(resampled_medians(known, pairs, seed=seed))
        summary |= {name: rounded(middle), f"{name}_low": rounded(bounds[0]), f"{name}_high": rounded(bounds[1])}
    return summary


def name_borrowed(row: Row, directions: Directions) -> Row:
    """The row with the states whose directions were borrowed, of those that it is about: ``"0 1"``."""
    layers = range(FIRST_LAYERS[row["layers"]], len(directions.borrowed) - 1)
    if row.get("layer") is not None:
        layers = range(row["layer"], row["layer"] + 1)
    return {**row, "borrowed": " ".join(str(layer) for layer in layers if directions.borrowed[layer])}


def rounded(value: float, digits: int = 6) -> float | None:
    """A number to so many digits; None where there is none (the correlation with a constant)."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
