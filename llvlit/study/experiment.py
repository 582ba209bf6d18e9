"""One experiment: a model on one split of a task; how every predictor agrees, and what every schedule costs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.engine.depth import last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import tokenize
from llvlit.errors import FileError
from llvlit.files import write_json
from llvlit.method.concepts import Directions, directions_of_states, random_directions, separation
from llvlit.method.control import relative_weights
from llvlit.method.gains import Gains, adjoint_gains, measured_gains
from llvlit.method.identification import Plan, identify_all
from llvlit.prompts import Prompts, length_auc
from llvlit.provenance import environment
from llvlit.study.energies import schedule_energies
from llvlit.study.grid import Settings
from llvlit.study.predictions import agreement_rows, compare_all, predictions, profiles_of
from llvlit.tasks.task import Splits

RESULT_VERSION = 2
"""Of result files; finished cells of another version are computed again."""

SAME_PROMPTS = 100
"""Held-out prompts whose own first-order gains are compared with their measured ones: linearity without transfer."""


@dataclass(frozen=True)
class Experiment:
    """Result of one experiment.

    Attributes
    ----------
    cell : dict
        Model, task, seed, settings: what was asked.
    model : dict
        ``parameters``, ``layers``, ``hidden_size``, ``fingerprint``.
    data : dict
        ``fingerprint`` (of the held-out prompts), those of the other splits, ``length_auc``, ``n_cut``.
    directions : dict of str to dict
        For each method: ``gaps``, ``borrowed`` and ``separation`` (on the operating split), one value a state.
    profiles : dict of str to dict
        For each method: ``measured`` with its interval ``low`` and ``high``, ``adjoint``, ``null``, every basis.
    agreements : list of dict
        One row for each predictor, order, amplitude, number of operating prompts, and part of the layers.
    energies : list of dict
        One row for each schedule, metric and part of the layers.
    """

    cell: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    directions: dict[str, dict[str, Any]]
    profiles: dict[str, dict[str, list[float]]]
    agreements: list[dict[str, Any]] = field(repr=False)
    energies: list[dict[str, Any]] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)

    def content(self) -> dict[str, Any]:
        """The result as it stands in a file."""
        return {"format": RESULT_VERSION, "kind": "experiment", **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all."""
        write_json(path, self.content())

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read what :meth:`save` wrote; FileError if it is cut short or of another version."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if (content.pop("kind"), content.pop("format")) != ("experiment", RESULT_VERSION):
                raise FileError(f"{path} is of another kind or version. Compute it again.")
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is not a whole result ({error}). Compute it again.") from error


def run_experiment(
    model: LanguageModel,
    splits: Splits,
    settings: Settings,
    *,
    seed: int = 0,
    jacobian: str = "jvp",
    final_norm: bool = False,
    cell: Mapping[str, Any] | None = None,
) -> Experiment:
    """Directions from the concept split, surrogates from the operating split, gains from the evaluation split.

    Parameters
    ----------
    seed
        Of everything drawn, together with the held-out prompts: tasks and splits do not share a draw.
    cell
        What was asked, for the record.

    Raises
    ------
    ConceptNotVisibleError
        If no state separates the classes of the concept split better than permuted labels do.
    """
    began = time.perf_counter()
    seed += int(splits.evaluation.fingerprint[:8], 16)
    options: dict[str, Any] = {"max_tokens": settings.max_tokens, "final_norm": final_norm}
    states = last_token_states(model, splits.concept, **options)
    directions = {
        method: directions_of_states(states, splits.concept, method=method, seed=seed) for method in settings.directions
    }
    order = min(settings.orders[-1], model.hidden_size)
    plans = {
        (method, basis): Plan(directions[method], basis, order, seed=seed)
        for method in settings.directions
        for basis in settings.bases
    }
    found = identify_all(model, splits.operating, plans, jacobian=jacobian, **options)
    first = settings.directions[0]
    fewer = [
        identify_all(model, splits.operating.select(range(count)), _of(first, plans), jacobian=jacobian, **options)
        for count in settings.operating_counts
        if count < len(splits.operating)
    ]
    measured = _measure(model, splits.evaluation, directions, settings, seed, options)
    rows: list[dict[str, Any]] = []
    profiles = {}
    n_same = min(SAME_PROMPTS, len(splits.evaluation))
    own = adjoint_gains(model, splits.evaluation.select(range(n_same)), list(directions.values()), **options)
    same = {method: one.mean for method, one in zip(directions, own, strict=True)}
    for method in settings.directions:
        gains = {kind: one for (name, kind), one in measured.items() if name == method}
        rows += compare_all(method, found, gains, settings, seed)
        profiles[method] = profiles_of(method, found, gains, settings, seed)
        for amplitude, one in gains.items():
            if amplitude != "null":
                rows += agreement_rows(
                    method, "adjoint, same prompts", None, n_same, same[method], one.head(n_same), seed
                )
    for part in fewer:
        for name, at, h in predictions(first, part, settings):
            if at in (None, order):
                reference = measured[first, settings.amplitudes[0]]
                rows += agreement_rows(first, name, at, len(part.states), h, reference, seed)
    energies: list[dict[str, Any]] = []
    if settings.energy_prompts:
        energies = schedule_energies(
            model,
            splits.evaluation.select(range(min(2 * settings.energy_prompts, len(splits.evaluation)))),
            directions[first],
            {basis: found.surrogates[first, basis].gains() for basis in settings.bases}
            | {"adjoint": found.linear[first, settings.bases[0]].mean},
            relative_weights(found.states),
            settings.target,
            seed=seed,
            **options,
        )
    return Experiment(
        cell=dict(cell or {}),
        **describe(model, splits, settings),
        directions={
            method: {
                "gaps": one.gaps.tolist(),
                "borrowed": one.borrowed.tolist(),
                "separation": separation(found.states, np.array(splits.operating.labels), one.vectors).tolist(),
            }
            for method, one in directions.items()
        },
        profiles=profiles,
        agreements=rows,
        energies=energies,
        metadata=run_metadata(model, began),
    )


def describe(model: LanguageModel, splits: Splits, settings: Settings) -> dict[str, dict[str, Any]]:
    """``model`` and ``data`` of a result: sizes, fingerprints, and what length alone tells of the class."""
    held_out = splits.evaluation
    return {
        "model": {
            "parameters": model.n_parameters,
            "layers": model.n_layers,
            "hidden_size": model.hidden_size,
            "fingerprint": model.fingerprint,
        },
        "data": {
            "fingerprint": held_out.fingerprint,
            "concept_fingerprint": splits.concept.fingerprint,
            "operating_fingerprint": splits.operating.fingerprint,
            "length_auc": length_auc(held_out),
            "n_cut": tokenize(model, held_out, max_tokens=settings.max_tokens).n_cut,
            "n_evaluation": len(held_out),
        },
    }


def run_metadata(model: LanguageModel, began: float) -> dict[str, Any]:
    """Seconds since ``began``, when it ended, versions, device, commit."""
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(model.device),
    }


def _of(method: str, plans: Mapping[tuple[str, str], Plan]) -> dict[tuple[str, str], Plan]:
    return {key: plan for key, plan in plans.items() if key[0] == method}


def _measure(
    model: LanguageModel,
    prompts: Prompts,
    directions: Mapping[str, Directions],
    settings: Settings,
    seed: int,
    options: Mapping[str, Any],
) -> dict[tuple[str, Any], Gains]:
    """Measured gains by method and amplitude, and of the null: pushes along random directions, the same output.

    Methods other than the first are measured at the reference amplitude alone.
    """
    pushes: dict[tuple[str, Any], tuple[Directions | torch.Tensor, float]] = {}
    for method, one in directions.items():
        amplitudes = settings.amplitudes if method == settings.directions[0] else settings.amplitudes[:1]
        pushes |= {(method, amplitude): (one, amplitude) for amplitude in amplitudes}
        null = random_directions(*one.vectors.shape, seed=seed)
        null[-1] = one.vectors[-1]
        pushes[method, "null"] = (null, settings.amplitudes[0])
    sets, amplitudes = zip(*pushes.values(), strict=True)
    found = measured_gains(model, prompts, sets, amplitude=amplitudes, **options)
    return dict(zip(pushes, found, strict=True))
