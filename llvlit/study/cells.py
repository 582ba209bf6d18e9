"""Studies: a grid of experiments, checked before anything runs, resumed where it stopped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llvlit.engine.models import LanguageModel, load_model, local_folder, torch_device, wrap_model
from llvlit.errors import CellError, ConceptNotVisibleError, FileError, InputError
from llvlit.files import locked, write_json
from llvlit.study.estimate import count_operations, model_shape
from llvlit.study.experiment import RESULT_VERSION, Experiment, describe, run_experiment, run_metadata
from llvlit.study.grid import Cell, Grid
from llvlit.study.runner import Job, Outcome, read_result, result_path, run_jobs
from llvlit.tasks.task import Splits, load_task, task_kind

FEWEST_LAYERS = 4
"""Three are needed for a correlation, besides layer 0."""

TYPICAL_TOKENS = 64
"""Of a prompt, for the relative cost of cells."""

UNTRAINED = re.compile(r"untrained(?:-(\d+))?:(.+)")


def load_subject(name: str, *, device: str = "auto") -> LanguageModel:
    """Model of a study: as :func:`llvlit.load_model` knows it, or ``untrained:NAME``, or ``untrained-SEED:NAME``.

    The weights of an untrained model are drawn as the architecture draws them before training: the control that
    tells what training adds.

    Examples
    --------
    >>> from llvlit.study.cells import load_subject
    >>> untrained = load_subject("untrained:embedded/small", device="cpu")
    >>> untrained.n_layers, untrained.fingerprint == model.fingerprint
    (12, False)
    """
    match = UNTRAINED.fullmatch(name)
    if match is None:
        return load_model(name, device=device)
    trained = load_model(match[2], device=device)
    with torch.random.fork_rng():
        torch.manual_seed(int(match[1] or 0))
        module = AutoModelForCausalLM.from_config(
            trained.module.config, attn_implementation="eager", dtype=trained.dtype
        )
    return wrap_model(module.to(trained.device), trained.tokenizer, name=name)


_ONE_CELL = Lock()
"""A recording takes over the layers of the model in memory: two threads of a worker must not share it."""

_load_subject = lru_cache(maxsize=1)(load_subject)  # a worker's cells of one model come one after another
_load_task = lru_cache(maxsize=16)(load_task)  # its models meet the same tasks, which may come from the hub


def cell_splits(cell: Cell) -> Splits:
    """Splits of a cell's task."""
    settings = cell.settings
    task = _load_task(cell.task, suffix=cell.suffix, data_dir=cell.data_dir)
    return task.split(settings.concept, settings.operating, settings.evaluation, seed=cell.seed)


def run_cell(cell: Cell, device: str = "auto") -> dict[str, Any]:
    """Content of a cell's result file: an experiment, or the reason why the model does not show the concept.

    Raises
    ------
    CellError
        If an accelerator's memory does not suffice.
    """
    asked = json.loads(json.dumps(asdict(cell)))
    with _ONE_CELL:
        began = time.perf_counter()
        model, splits = _load_subject(cell.model, device=device), cell_splits(cell)
        options: dict[str, Any] = {"seed": cell.seed, "jacobian": cell.jacobian, "final_norm": cell.final_norm}
        try:
            return run_experiment(model, splits, cell.settings, **options, cell=asked).content()
        except ConceptNotVisibleError as error:
            return {
                "format": RESULT_VERSION,
                "kind": "not visible",
                "cell": asked,
                **describe(model, splits, cell.settings),
                "reason": str(error),
                "metadata": run_metadata(model, began),
            }
        except torch.OutOfMemoryError as error:
            raise CellError(
                f"{cell.model} on {cell.task} does not fit in the memory that is free on {model.device} "
                f"({str(error).partition('.')[0]}). Run fewer --workers on it, or free it of other processes."
            ) from error
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # several workers may share the device


def check_names(cells: Sequence[Cell]) -> None:
    """InputError or ModelError for the first name of no model or task, before the first of them is loaded."""
    for name in dict.fromkeys(cell.model for cell in cells):
        match = UNTRAINED.fullmatch(name)
        local_folder(match[2] if match else name)
    for task, data_dir in dict.fromkeys((cell.task, cell.data_dir) for cell in cells):
        task_kind(task, data_dir)


def check_cells(cells: Sequence[Cell], folder: str | Path, *, device: str = "auto") -> dict[str, float]:
    """Load every model and split once, so that whatever cannot run is told before anything does.

    Returns
    -------
    dict of str to float
        Counted operations of each cell, by key, for the time left.

    Raises
    ------
    InputError, ModelError
        Naming the model, the task or the file that cannot be had or does not fit.
    FileError
        If a finished cell comes from another model or other data than its names mean now.
    """
    fingerprints, shapes = {}, {}
    for name in dict.fromkeys(cell.model for cell in cells):
        model = _load_subject(name, device=device)
        fingerprints[name], shapes[name] = model.fingerprint, model_shape(model)
        longest = max(cell.settings.max_tokens for cell in cells if cell.model == name)
        if longest > model.max_positions:
            raise InputError(f"max_tokens={longest} is beyond the context of {name}, {model.max_positions} tokens.")
        if model.n_layers < FEWEST_LAYERS:
            raise InputError(f"{name} has {model.n_layers} layers; profiles are compared from {FEWEST_LAYERS} on.")
    texts = {}
    for cell in cells:
        if (split := (cell.task, cell.seed)) not in texts:
            texts[split] = cell_splits(cell).evaluation.fingerprint
        stored = read_result(folder, cell.key)
        if stored is not None and not _is_current(stored):
            result_path(folder, cell.key).unlink()
        elif stored is not None:
            for kind, now in (("model", fingerprints[cell.model]), ("data", texts[split])):
                found = stored.get(kind, {}).get("fingerprint", now)
                if found != now:
                    raise FileError(
                        f"{result_path(folder, cell.key)} comes from another {kind} ({found}) than {cell.model} on "
                        f"{cell.task} is now ({now}). Choose another --out, or delete that file."
                    )
    return {cell.key: count_operations(cell, shapes[cell.model], TYPICAL_TOKENS) for cell in cells}


def _is_current(content: dict[str, Any]) -> bool:
    return content.get("format") == RESULT_VERSION and content.get("kind") in ("experiment", "not visible")


def run_study(
    grid: Grid,
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    workers: int = 1,
    scheduler: str | None = None,
    own_process: bool = False,
    progress: bool = True,
) -> Outcome:
    """Every cell of a grid that has no result yet; killed at any moment, it goes on where it stopped.

    Parameters
    ----------
    folder
        Gets ``grid.json``, ``cells/KEY.json`` for every finished cell, ``failed/KEY.txt`` for every failed one.
    data_dir
        Folder of parquet files that serve tasks by name.
    workers, scheduler, own_process
        See :func:`llvlit.study.runner.run_jobs`.

    Raises
    ------
    InputError, ModelError
        If a model or a task of the grid cannot be had; nothing has run then.
    FileError
        If the folder holds another grid's results or is in use, or a result cannot be written.
    """
    cells = grid.cells(data_dir=None if data_dir is None else str(Path(data_dir).resolve()))
    here = workers == 1 and scheduler is None and not own_process
    check_names(cells)
    claim_folder(grid, Path(folder))
    if scheduler is None:
        torch_device(device)
    with locked(Path(folder)):
        costs = check_cells(cells, folder, device=device if here else "cpu")
        claim_folder(grid, Path(folder), write=True)
        if not here:
            _load_subject.cache_clear()  # the last one would stay in memory beside the workers'
        jobs = [Job(cell.key, run_cell, (cell, device), group=cell.model, cost=costs[cell.key]) for cell in cells]
        options: dict[str, Any] = {"scheduler": scheduler, "own_process": own_process, "progress": progress}
        return run_jobs(jobs, folder, workers=workers, **options)


def claim_folder(grid: Grid, folder: Path, *, write: bool = False) -> None:
    """Refuse a folder of another grid (FileError); with ``write``, note in it which grid it is for."""
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
