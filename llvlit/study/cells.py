"""Studies: the cells of a grid, checked before anything runs, resumed where they stopped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM

from llvlit import checks
from llvlit.engine.models import LanguageModel, load_model, local_place, torch_device, wrap_model
from llvlit.engine.tokens import tokenize
from llvlit.errors import CellError, ConceptNotVisibleError, FileError, InputError
from llvlit.files import foreign, locked, read_json, write_json
from llvlit.prompts import Prompts, length_auc
from llvlit.provenance import environment
from llvlit.study.estimate import count_operations, model_shape
from llvlit.study.experiment import Experiment, SplitTokens, run_experiment, tokenize_splits
from llvlit.study.grid import Cell, Grid
from llvlit.study.runner import Job, Outcome, check_keys, read_result, result_path, run_jobs
from llvlit.tasks.sources import find_source
from llvlit.tasks.splits import Splits
from llvlit.tasks.task import load_task

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
    match = UNTRAINED.fullmatch(checks.text("name", name))
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
"""Two threads of one worker would hold a model each in memory, and draw untrained weights from one random state.

Who may run a model is for :func:`~llvlit.engine.exclusive.exclusive` to say; this is about having one at a time.
"""

_load_subject = lru_cache(maxsize=1)(load_subject)  # a worker's cells of one model come one after another
_load_task = lru_cache(maxsize=16)(load_task)  # its models meet the same tasks, which may come from the hub


def cell_splits(cell: Cell) -> Splits:
    """Splits of a cell's task."""
    settings = cell.settings
    task = _load_task(cell.task, suffix=cell.suffix, data_dir=cell.data_dir)
    return task.split(settings.concept, settings.operating, settings.evaluation, seed=cell.seed)


def run_cell(cell: Cell, device: str = "auto", inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Content of a cell's result file: an experiment, or the reason why the model does not show the concept.

    Parameters
    ----------
    inputs
        What :func:`cell_inputs` must give here.

    Raises
    ------
    CellError
        If a name means other inputs here, or an accelerator's memory does not suffice.
    """
    with _ONE_CELL:
        began = time.perf_counter()
        model, splits = _loaded(cell, device, inputs)
        tokens: SplitTokens | None = None
        options: dict[str, Any] = {"seed": cell.seed, "jacobian": cell.jacobian, "final_norm": cell.final_norm}
        try:
            tokens = tokenize_splits(model, splits, cell.settings)
            numbers = {"kind": "experiment", **asdict(run_experiment(model, tokens, cell.settings, **options))}
        except ConceptNotVisibleError as error:
            numbers = {"kind": "not visible", "reason": str(error)}
        except torch.OutOfMemoryError as error:
            raise CellError(
                f"{cell.model} on {cell.task} does not fit in the memory that is free on {model.device} "
                f"({str(error).partition('.')[0]}). Run fewer --workers on it, or free it of other processes."
            ) from error
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # several workers may share the device
        return {
            "cell": asdict(cell),
            "inputs": cell_inputs(cell, model.identity, splits),
            "model": {
                "parameters": model.n_parameters,
                "layers": model.n_layers,
                "hidden_size": model.hidden_size,
                "fingerprint": model.fingerprint,
            },
            "data": {
                "fingerprint": splits.evaluation.fingerprint,
                "concept_fingerprint": splits.concept.fingerprint,
                "operating_fingerprint": splits.operating.fingerprint,
                "length_auc": length_auc(splits.evaluation),
                **(tokens.evaluation.metadata if tokens else {"n_cut": None}),
                "n_left_out": tokens and sum(tokens.left_out.values()),
                "n_evaluation": len(tokens.evaluation if tokens else splits.evaluation),
            },
            **numbers,
            "metadata": {
                "seconds": round(time.perf_counter() - began, 2),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                **environment(model.device),
            },
        }


def _loaded(cell: Cell, device: str, inputs: dict[str, Any] | None) -> tuple[LanguageModel, Splits]:
    """Model and splits of a cell, from memory or anew: what lies in a file may have changed since it was read."""
    for _ in range(2):
        model, splits = _load_subject(cell.model, device=device), cell_splits(cell)
        now = cell_inputs(cell, model.identity, splits)
        if inputs is None or now == inputs:
            return model, splits
        forget()
    raise CellError(f"{cell.model} on {cell.task} has another {_changed(now, inputs)} here than where the study began.")


def forget() -> None:
    """Let go of models and tasks in memory."""
    _load_subject.cache_clear()
    _load_task.cache_clear()


def _changed(now: dict[str, Any], then: dict[str, Any] | None) -> str:
    """Names of the inputs that differ, or nothing."""
    return ", another ".join(name for name, value in now.items() if (then or {}).get(name) != value)


def cell_inputs(cell: Cell, model_identity: str, splits: Splits) -> dict[str, Any]:
    """Everything that decides a cell's numbers: a finished cell is kept only where all of it is the same."""
    settings = {"seed": cell.seed, "jacobian": cell.jacobian, "final_norm": cell.final_norm, **asdict(cell.settings)}
    texts = {f"{part} texts": prompts.fingerprint for part, prompts in vars(splits).items()}
    return {"model": model_identity, **texts, "settings": json.loads(json.dumps(settings))}


def check_names(cells: Sequence[Cell]) -> None:
    """InputError or ModelError for the first name of no model or task, before the first of them is loaded."""
    check_keys([cell.key for cell in cells])
    for name in dict.fromkeys(cell.model for cell in cells):
        match = UNTRAINED.fullmatch(name)
        local_place(match[2] if match else name)
    for task, data_dir in dict.fromkeys((cell.task, cell.data_dir) for cell in cells):
        find_source(task, data_dir=data_dir)


def check_cells(cells: Sequence[Cell], folder: str | Path, *, device: str, load_on: str) -> list[Job]:
    """Load every model and split once, so that whatever cannot run is told before anything does.

    Returns
    -------
    list of Job
        One a cell; its cost is in counted operations.

    Raises
    ------
    InputError, ModelError
        Naming the model, the task or the file that cannot be had or does not fit.
    FileError
        If a finished cell is of another version, or comes from other inputs than its names mean now.
    """
    stored = {cell.key: read_result(folder, cell.key) for cell in cells}
    identities, shapes = {}, {}
    for name in dict.fromkeys(cell.model for cell in cells):
        model = _load_subject(name, device=load_on)
        identities[name], shapes[name] = model.identity, model_shape(model)
        longest = max(cell.settings.max_tokens for cell in cells if cell.model == name)
        if longest > model.max_positions:
            raise InputError(f"max_tokens={longest} is beyond the context of {name}, {model.max_positions} tokens.")
        if model.n_layers < FEWEST_LAYERS:
            raise InputError(f"{name} has {model.n_layers} layers; profiles are compared from {FEWEST_LAYERS} on.")
        for n in {cell.settings.max_tokens for cell in cells if cell.model == name and cell.settings.chat}:
            tokenize(model, Prompts(("A text",), (1,)), max_tokens=n, chat=True)  # tells of a template that fails
    splits: dict[tuple[str, int], Splits] = {}
    jobs = []
    for cell in cells:
        if (split := (cell.task, cell.seed)) not in splits:
            splits[split] = cell_splits(cell)
        inputs = cell_inputs(cell, identities[cell.model], splits[split])
        found = stored[cell.key]
        if found is not None and (changed := _changed(inputs, found.get("inputs"))):
            raise FileError(
                f"{result_path(folder, cell.key)} was computed from other inputs than {cell.model} on {cell.task} "
                f"means now: another {changed}. Choose another --out, or delete that file."
            )
        cost = count_operations(cell, shapes[cell.model], TYPICAL_TOKENS)
        jobs.append(Job(cell.key, run_cell, (cell, device, inputs), group=cell.model, cost=cost))
    return jobs


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
        Folder of files that serve tasks by name.
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
    with locked(folder):
        forget()
        jobs = check_cells(cells, folder, device=device, load_on=device if here else "cpu")
        claim_folder(grid, Path(folder), write=True)
        if not here:
            forget()  # the last model would stay in memory beside the workers'
        options: dict[str, Any] = {"scheduler": scheduler, "own_process": own_process, "progress": progress}
        return run_jobs(jobs, folder, workers=workers, **options)


def claim_folder(grid: Grid, folder: Path, *, write: bool = False) -> None:
    """Refuse a folder of another grid (FileError); with ``write``, note in it which grid it is for."""
    path = folder / "grid.json"
    content = {"fingerprint": grid.fingerprint, **asdict(grid)}
    if path.exists():
        found = read_json(path, "the grid of a study").get("fingerprint")
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
class Finished:
    """A finished cell whose model shows the concept.

    Attributes
    ----------
    cell, model, data, metadata : dict
        What was asked, of whom, on what, and what it was computed with.
    experiment : Experiment
    """

    cell: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    metadata: dict[str, Any]
    experiment: Experiment


@dataclass(frozen=True)
class Results:
    """What a folder of results holds.

    Attributes
    ----------
    finished : tuple of Finished
    not_visible : tuple of dict
        Cells whose model does not show the concept, with the reason.
    """

    finished: tuple[Finished, ...]
    not_visible: tuple[dict[str, Any], ...]


def load_results(folder: str | Path, keys: Iterable[str] | None = None) -> Results:
    """Finished cells of a folder, in the order of ``keys``; without them all, by name.

    Raises
    ------
    FileError
        If there is no result, or one is not as it was written.
    """
    paths = sorted((Path(folder) / "cells").glob("*.json"))
    if keys is not None:
        found = {path.stem: path for path in paths}
        paths = [found[key] for key in keys if key in found]
    if not paths:
        raise FileError(f"{folder} holds no results. Run `llvlit study` with --out {folder} first.")
    finished, not_visible = [], []
    for path in paths:
        remedy = "Run the same study again: it computes this cell anew."
        with foreign(path, "the result of a cell", remedy=remedy):
            content = read_result(folder, path.stem)
            if content is None:
                raise ValueError("it was cut or changed after it was written")
            if content["kind"] == "not visible":
                not_visible.append(content)
            else:
                finished.append(msgspec.convert({**content, "experiment": content}, Finished))
    return Results(tuple(finished), tuple(not_visible))
