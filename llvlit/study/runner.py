"""The cells of a study: each computed once, here, by worker processes, or on a Dask cluster; one file per cell."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from llvlit.errors import FileError, InputError
from llvlit.files import write_atomically, write_json
from llvlit.study.workers import Answer, run_here, run_in_processes, run_on_dask

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=@-]{0,199}")
DELAY = 2.0
"""Seconds without a bar."""


@dataclass(frozen=True)
class Job:
    """One cell.

    Attributes
    ----------
    key : str
        Names the result file; whatever decides the result must show in it, for a finished key is never computed again.
    function : callable
        Importable by name; returns a dict that JSON can hold.
    arguments : tuple
        Of the function; sent to workers by pickle, in memory only.
    group : str
        Jobs of one group (of one model, say) go to the same worker one after another where that costs no waiting.
    cost : float
        Predicted cost in any unit, for the time left.
    """

    key: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    group: str
    cost: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """Keys computed in this run, keys found finished, and the reason of each failure, all in the order of the jobs."""

    done: tuple[str, ...]
    kept: tuple[str, ...]
    failed: dict[str, str]


def result_path(folder: str | Path, key: str) -> Path:
    """File of the result of one cell."""
    return Path(folder) / "cells" / f"{key}.json"


def failure_path(folder: str | Path, key: str) -> Path:
    """File of the whole traceback, or of the exit codes, of a cell that failed in the latest run."""
    return Path(folder) / "failed" / f"{key}.txt"


def read_result(folder: str | Path, key: str) -> dict[str, Any] | None:
    """Result of a finished cell; None where there is none, or where its file is damaged (it is computed again).

    Raises
    ------
    FileError
        If the file is there, but cannot be read.
    """
    path = result_path(folder, key)
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise FileError(f"Could not read {path}: {error}. Make it readable, or choose another folder.") from error
    return content if isinstance(content, dict) else None


@dataclass(eq=False)
class Run:
    """Jobs that wait, keys that ended and how, and the bar; the one place from which results are written."""

    folder: Path
    pending: dict[str, Job]
    show_bar: bool
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_cells = len(self.pending)
        self.bar = tqdm(
            total=sum(job.cost for job in self.pending.values()),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
            delay=DELAY,
            smoothing=0,
            leave=False,
            disable=None if self.show_bar else True,
        )

    def take(self, group: str | None, others: Iterable[str]) -> Job | None:
        """Next job of ``group``, else of a group that is not among the ``others`` now computed, else any."""
        if not self.pending:
            return None
        claimed = set(others)
        chosen = min(self.pending.values(), key=lambda job: (job.group != group, job.group in claimed))
        return self.pending.pop(chosen.key)

    def record(self, job: Job, answer: Answer) -> None:
        """Write the result of a job, or why there is none."""
        reason, text = answer
        if reason is None:
            write_json(result_path(self.folder, job.key), json.loads(text))
            self.done.add(job.key)
        else:
            write_atomically(failure_path(self.folder, job.key), lambda temporary: _write_text(temporary, text))
            self.failed[job.key] = reason
        self.bar.update(job.cost)

    def show(self, running: Iterable[Job]) -> None:
        """Say in the bar how many cells ended and failed, and which are being computed."""
        parts = [f"{len(self.failed)} failed"] if self.failed else []
        self.bar.set_description_str(f"{len(self.done) + len(self.failed)}/{self.n_cells} cells", refresh=False)
        self.bar.set_postfix_str(", ".join(parts + [job.key for job in running]), refresh=False)
        if self.bar.format_dict["elapsed"] > DELAY:
            self.bar.refresh()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def run_jobs(
    jobs: Iterable[Job],
    folder: str | Path,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    own_process: bool = False,
    threads: int | None = None,
    attempts: int = 3,
    progress: bool = True,
) -> Outcome:
    """Every job that has no result file yet, computed and written to ``folder/cells/KEY.json``, whole or not at all.

    The run may be killed at any moment; the next one computes the rest. A cell that raises fails at once, a cell
    whose worker dies is tried again; either way ``folder/failed/KEY.txt`` says why, the other cells go on, and the
    next run tries again.

    >>> from tempfile import TemporaryDirectory
    >>> from llvlit.study.runner import Job, read_result, run_jobs
    >>> with TemporaryDirectory() as folder:
    ...     outcome = run_jobs([Job("one", dict, ([("gain", 0.5)],), group="")], folder)
    ...     outcome.done, read_result(folder, "one")
    (('one',), {'gain': 0.5})

    Parameters
    ----------
    workers
        1: in this process. More: that many processes. A script that asks for processes must guard its own
        statements with ``if __name__ == "__main__":``.
    scheduler
        Address of a running Dask scheduler, such as ``"tcp://host:8786"``; its workers compute then.
    own_process
        Give also a single worker a process of its own: a cell that ends its process then fails alone.
    threads
        Of each worker; by default the processors over ``workers``. With one worker and on Dask: left as they are.
    attempts
        Deaths of workers on one cell after which it fails. Dask has its own: ``allowed-failures`` of its scheduler.
    progress
        Show the cells and the time left, which follows the costs, in a terminal.

    Raises
    ------
    InputError
        If a key cannot name a file or comes twice, a number is not positive, a function cannot be imported by name,
        or the Dask scheduler cannot be reached.
    FileError
        If another process runs in the folder, or a result cannot be written; finished ones stay.
    LlvlitError
        If workers cannot start, or the Dask scheduler is lost on the way; finished results stay.
    """
    jobs, folder = tuple(jobs), Path(folder)
    _check(jobs, workers=workers, scheduler=scheduler, threads=threads, attempts=attempts)
    with claimed(folder):
        kept = [job.key for job in jobs if read_result(folder, job.key) is not None]
        for job in jobs:
            failure_path(folder, job.key).unlink(missing_ok=True)
        for remnant in (*(folder / "cells").glob(".*.json.*"), *(folder / "failed").glob(".*.txt.*")):
            remnant.unlink(missing_ok=True)  # of a killed run
        finished = set(kept)
        run = Run(folder, {job.key: job for job in jobs if job.key not in finished}, show_bar=progress)
        packed = {key: _pack(job) for key, job in run.pending.items()}
        with run.bar:
            if packed and scheduler is not None:
                run_on_dask(run, packed, scheduler, threads)
            elif packed and (workers > 1 or own_process):
                run_in_processes(run, packed, workers, threads, attempts)
            else:
                run_here(run, packed, threads)
    keys = [job.key for job in jobs]
    return Outcome(
        done=tuple(key for key in keys if key in run.done),
        kept=tuple(kept),
        failed={key: run.failed[key] for key in keys if key in run.failed},
    )


def _pack(job: Job) -> bytes:
    try:
        return pickle.dumps((job.function, job.arguments))
    except Exception as error:
        raise InputError(
            f"The job {job.key!r} cannot be sent to a worker: {error}. "
            "Its function must be importable by name, its arguments plain values or dataclasses."
        ) from error


def _check(jobs: Sequence[Job], *, workers: int, scheduler: str | None, threads: int | None, attempts: int) -> None:
    for name, number in (("workers", workers), ("threads", 1 if threads is None else threads), ("attempts", attempts)):
        if number < 1:
            raise InputError(f"{name}={number}, but at least 1 is needed.")
    if scheduler is not None and workers != 1:
        raise InputError(f"workers={workers}, but the Dask scheduler {scheduler} has its own; give one or the other.")
    seen: set[str] = set()
    for job in jobs:
        if not KEY.fullmatch(job.key):
            raise InputError(f"key={job.key!r} cannot name a file: up to 200 letters, digits and any of _.+=@- are.")
        if job.key.casefold() in seen:
            raise InputError(f"key={job.key!r} names two jobs (capitals do not tell files apart everywhere).")
        if not (math.isfinite(job.cost) and job.cost > 0):
            raise InputError(f"cost={job.cost} of the job {job.key!r} is not a positive number.")
        seen.add(job.key.casefold())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder as this process's own; the system gives it back also where the process is killed.

    Claims may be nested. A folder that was not there before and has nothing in it after is removed.

    Raises
    ------
    FileError
        If another process has it, or it cannot be written.
    """
    holder = folder / ".lock.json"
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    if lock.is_locked:
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        try:
            content = json.loads(holder.read_bytes())
            who = f"process {content['pid']} on {content['host']}, since {content['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        raise FileError(f"{folder} is in use by {who}. Wait until that run ends, or choose another folder.") from None
    except OSError as error:
        raise FileError(f"Could not lock {folder}: {error}. Choose a folder that can be written.") from error
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
        if is_new and {path.name for path in folder.iterdir()} <= {".lock"}:
            with suppress(OSError):
                (folder / ".lock").unlink(missing_ok=True)
                folder.rmdir()
