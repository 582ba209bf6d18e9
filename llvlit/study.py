"""Studies: a grid of experiments, checked before anything runs, resumed where it stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llvlit.errors import ConceptNotVisibleError, FileError
from llvlit.experiment import Experiment, run_experiment
from llvlit.files import FORMAT_VERSION, write_json
from llvlit.grid import Cell, Grid
from llvlit.models import LanguageModel, load_model, wrap_model
from llvlit.runner import Job, Outcome, read_result, run_jobs
from llvlit.tasks import Splits, load_task

UNTRAINED = "untrained:"
"""Before a model's name: the same architecture and tokenizer, its weights drawn anew."""


def load_subject(name: str, *, device: str = "auto") -> LanguageModel:
    """Model of a study: as :func:`load_model` knows it, or ``untrained:NAME``, or ``untrained-SEED:NAME``.

    The weights of an untrained model are drawn as the architecture draws them before training: the control that
    tells what training adds.
    """
    match = re.fullmatch(r"untrained(?:-(\d+))?:(.+)", name)
    if match is None:
        return load_model(name, device=device)
    trained = load_model(match[2], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(int(match[1] or 0))
        module = AutoModelForCausalLM.from_config(
            trained.module.config, attn_implementation="eager", dtype=trained.dtype
        )
    return wrap_model(module.to(trained.device), trained.tokenizer, name=name)


_load_subject = lru_cache(maxsize=1)(load_subject)  # a worker's cells of one model come one after another
_load_task = lru_cache(maxsize=16)(load_task)  # its models meet the same tasks, which may come from the hub


def cell_splits(cell: Cell) -> Splits:
    """Splits of a cell's task."""
    settings = cell.settings
    task = _load_task(cell.task, suffix=cell.suffix, data_dir=cell.data_dir)
    return task.split(settings.concept, settings.operating, settings.evaluation, seed=cell.seed)


def run_cell(cell: Cell, device: str = "auto") -> dict[str, Any]:
    """Content of a cell's result file: an experiment, or the reason why the model does not show the concept."""
    asked = json.loads(json.dumps(asdict(cell)))
    model = _load_subject(cell.model, device=device)
    try:
        return run_experiment(
            model,
            cell_splits(cell),
            cell.settings,
            seed=cell.seed,
            jacobian=cell.jacobian,
            final_norm=cell.final_norm,
            cell=asked,
        ).content()
    except ConceptNotVisibleError as error:
        return {"format": FORMAT_VERSION, "kind": "not visible", "cell": asked, "reason": str(error)}


def check_cells(cells: Sequence[Cell], *, device: str = "auto") -> None:
    """Load every model and split once, so that a wrong name or a short file is told before anything runs.

    Raises
    ------
    InputError, ModelError
        Naming the model, the task or the file.
    """
    for name in dict.fromkeys(cell.model for cell in cells):
        _load_subject(name, device=device)
    seen = set()
    for cell in cells:
        if (key := (cell.task, cell.seed)) not in seen:
            seen.add(key)
            cell_splits(cell)


def run_study(
    grid: Grid,
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> Outcome:
    """Every cell of a grid that has no result yet; killed at any moment, it goes on where it stopped.

    Parameters
    ----------
    folder
        Gets ``grid.json``, ``cells/KEY.json`` for every finished cell, ``failed/KEY.txt`` for every failed one.
    data_dir
        Folder of parquet files that serve tasks by name.
    workers, scheduler
        See :func:`llvlit.runner.run_jobs`.

    Raises
    ------
    InputError, ModelError
        If a model or a task of the grid cannot be had; nothing has run then.
    FileError
        If the folder holds another grid's results or is in use, or a result cannot be written.
    """
    cells = grid.cells(data_dir=None if data_dir is None else str(Path(data_dir).resolve()))
    _claim(grid, Path(folder))
    waiting = [cell for cell in cells if read_result(folder, cell.key) is None]
    check_cells(waiting, device=device)
    _claim(grid, Path(folder), write=True)
    jobs = [Job(cell.key, run_cell, (cell, device), group=cell.model, cost=_weight(cell)) for cell in cells]
    return run_jobs(jobs, folder, workers=workers, scheduler=scheduler, progress=progress)


def _weight(cell: Cell) -> float:
    """Relative cost of a cell, for the time left."""
    return float(cell.settings.concept + cell.settings.operating + cell.settings.evaluation)


def _claim(grid: Grid, folder: Path, *, write: bool = False) -> None:
    """Refuse a folder of another grid; with ``write``, note in it which grid it is for."""
    path = folder / "grid.json"
    content = {"fingerprint": grid.fingerprint, **asdict(grid)}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path} cannot be read ({error}). Choose another folder.") from error
        if found != grid.fingerprint:
            raise FileError(
                f"{folder} holds the results of another grid ({found}; this one is {grid.fingerprint}), and the two "
                "must not be mixed. Choose another --out, or the grid of that folder."
            )
    elif (folder / "cells").is_dir() and any((folder / "cells").iterdir()):
        raise FileError(f"{folder} holds results, but not of which grid (no grid.json). Choose another --out.")
    elif write:
        write_json(path, content)


@dataclass(frozen=True)
class Results:
    """What a folder of results holds.

    Attributes
    ----------
    experiments : tuple of Experiment
    not_visible : tuple of dict
        Cells whose model does not show the concept, with the reason.
    """

    experiments: tuple[Experiment, ...]
    not_visible: tuple[dict[str, Any], ...]


def load_results(folder: str | Path, keys: Iterable[str] | None = None) -> Results:
    """Finished cells of a folder, in the order of ``keys``; without them all, by name.

    Raises
    ------
    FileError
        If there is no result, or one cannot be read.
    """
    paths = sorted((Path(folder) / "cells").glob("*.json"))
    if keys is not None:
        found = {path.stem: path for path in paths}
        paths = [found[key] for key in keys if key in found]
    if not paths:
        raise FileError(f"{folder} holds no results. Run `llvlit study` with --out {folder} first.")
    experiments, not_visible = [], []
    for path in paths:
        content = read_result(folder, path.stem) or {}
        if content.get("kind") == "not visible":
            not_visible.append(content)
        else:
            experiments.append(Experiment.load(path))
    return Results(tuple(experiments), tuple(not_visible))
