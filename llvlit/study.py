"""One experiment: a model, a task, a split; every predictor's agreement with the measured gains."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llvlit.bases import BASES
from llvlit.concepts import concept_directions, random_directions, separation
from llvlit.depth import MAX_TOKENS, last_token_states
from llvlit.errors import FileError, InputError, NumericalError
from llvlit.files import FORMAT_VERSION, write_json
from llvlit.gains import Agreement, adjoint_gains, agreement, measured_gains
from llvlit.models import LanguageModel, load_model
from llvlit.progress import progress
from llvlit.provenance import environment
from llvlit.surrogate import identify
from llvlit.tasks import Splits, load_task


@dataclass(frozen=True)
class Settings:
    """Everything that decides an experiment besides model and task; counts are per class."""

    order: int = 32
    amplitude: float = 0.1
    concept: int = 200
    operating: int = 100
    evaluation: int = 100
    seed: int = 0
    bases: tuple[str, ...] = BASES
    max_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class Experiment:
    """Result of one experiment.

    Attributes
    ----------
    profiles : dict of str to (n_layers,) list
        ``measured``; predictions by ``adjoint`` (on the operating split, like every surrogate) and each basis;
        ``null``: measured gains of pushes along random directions.
    bounds : (2, n_layers) list
        95 % bootstrap interval of the measured profile over prompts.
    agreements : dict of str to Agreement
        Of each prediction, and of the null, with the measured profile.
    separation : (n_layers + 1,) list
        Area under the ROC curve along each direction, on the evaluation split.
    borrowed : (n_layers + 1,) list of bool
        States whose direction is borrowed.
    """

    model: str
    task: str
    settings: Settings
    n_parameters: int
    profiles: dict[str, list[float]]
    bounds: list[list[float]]
    agreements: dict[str, Agreement]
    separation: list[float]
    borrowed: list[bool]
    metadata: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all."""
        write_json(path, {"format": FORMAT_VERSION, "kind": "experiment", **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read what :meth:`save` wrote; FileError if it is cut short or of another version."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if (content.pop("kind"), content.pop("format")) != ("experiment", FORMAT_VERSION):
                raise FileError(f"{path} is of another kind or version. Compute it again.")
            content["settings"]["bases"] = tuple(content["settings"]["bases"])
            content["settings"] = Settings(**content["settings"])
            for name, found in content["agreements"].items():
                found["intervals"] = {key: tuple(bounds) for key, bounds in found["intervals"].items()}
                content["agreements"][name] = Agreement(**found)
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is not a whole result ({error}). Compute it again.") from error


def run_experiment(model: LanguageModel, task: str, settings: Settings, *, splits: Splits | None = None) -> Experiment:
    """Directions from the concept split, surrogates from the operating split, gains from the evaluation split.

    Parameters
    ----------
    task
        A name that :func:`llvlit.tasks.load_task` knows; only recorded where ``splits`` are given.
    """
    began = time.perf_counter()
    if splits is None:
        splits = load_task(task).split(
            concept=settings.concept,
            operating=settings.operating,
            evaluation=settings.evaluation,
            seed=settings.seed,
        )
    max_tokens = settings.max_tokens
    directions = concept_directions(model, splits.concept, seed=settings.seed, max_tokens=max_tokens)
    measured = measured_gains(model, splits.evaluation, directions, amplitude=settings.amplitude, max_tokens=max_tokens)
    vectors = random_directions(model.n_layers + 1, model.hidden_size, seed=settings.seed)
    vectors[-1] = directions.vectors[-1]
    null = measured_gains(model, splits.evaluation, vectors, amplitude=settings.amplitude, max_tokens=max_tokens)
    predicted = {"adjoint": adjoint_gains(model, splits.operating, directions, max_tokens=max_tokens).mean}
    for basis in settings.bases:
        surrogate = identify(
            model,
            splits.operating,
            directions,
            order=min(settings.order, model.hidden_size),
            basis=basis,
            seed=settings.seed,
            max_tokens=max_tokens,
        )
        predicted[basis] = surrogate.gains()
    states = last_token_states(model, splits.evaluation, max_tokens=max_tokens)
    readable = separation(states, np.array(splits.evaluation.labels), directions.vectors)
    compared = {**predicted, "null": null.mean}
    return Experiment(
        model=model.name,
        task=task,
        settings=settings,
        n_parameters=model.n_parameters,
        profiles={"measured": measured.mean.tolist(), **{k: v.tolist() for k, v in compared.items()}},
        bounds=measured.interval(seed=settings.seed).tolist(),
        agreements={k: agreement(v, measured, seed=settings.seed) for k, v in compared.items()},
        separation=readable.tolist(),
        borrowed=directions.borrowed.tolist(),
        metadata={
            "model_fingerprint": model.fingerprint,
            "prompts_fingerprint": splits.evaluation.fingerprint,
            "n_cut": measured.metadata["n_cut"],
            "seconds": round(time.perf_counter() - began, 2),
            **environment(model.device),
        },
    )


def run_study(
    models: Iterable[str],
    tasks: Iterable[str],
    settings: Settings,
    folder: str | Path,
    *,
    device: str = "auto",
    on_failure: Callable[[str, str, NumericalError], None] | None = None,
) -> list[Experiment]:
    """Grid of experiments, one result file each; those already in the folder are loaded, not run again.

    Parameters
    ----------
    on_failure
        Called with model, task and error where a model does not show a concept; the rest of the grid goes on.
        Without it, such an error ends the study.

    Raises
    ------
    InputError
        If there is no model or no task.
    FileError
        If a result in the folder cannot be read.
    """
    models, tasks = tuple(models), tuple(tasks)
    if not models or not tasks:
        raise InputError("A study needs at least one model and one task.")
    paths = {
        (model, task): Path(folder) / f"{_slug(model)}--{_slug(task)}--{_digest(settings)}.json"
        for model in models
        for task in tasks
    }
    loaded: dict[str, LanguageModel] = {}
    results = []
    for (name, task), path in progress(paths.items(), "study", total=len(paths)):
        if not path.is_file():
            if name not in loaded:
                loaded = {name: load_model(name, device=device)}
            try:
                run_experiment(loaded[name], task, settings).save(path)
            except NumericalError as error:
                if on_failure is None:
                    raise
                on_failure(name, task, error)
                continue
        results.append(Experiment.load(path))
    return results


def _digest(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:8]


def _slug(name: str) -> str:
    tail = hashlib.sha256(name.encode()).hexdigest()[:6] if Path(name).is_absolute() else ""
    return "-".join(filter(None, [*Path(name).parts[-2:], tail])).replace("/", "-").replace("\\", "-")
