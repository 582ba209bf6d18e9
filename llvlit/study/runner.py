"""The cells of a study: each computed once, here or by Dask's workers, and written to one file."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llvlit import checks
from llvlit.errors import FileError, InputError, LlvlitError
from llvlit.files import locked, own, read_bytes, remove_owned, write_json, write_text

if TYPE_CHECKING:
    from distributed import Client, Future

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=@-]{0,199}")
RESULT_VERSION = 3
"""Of result files; files of another version are not touched."""

ATTEMPTS = 3
"""Deaths of workers on one cell after which it fails, unless the scheduler's ``allowed-failures`` end it before."""

DELAY = 2.0
"""Seconds without a bar."""

CONNECT_SECONDS = 10.0
"""For a Dask scheduler to answer, and for a worker to hand over a result that it has."""

START_SECONDS = 120.0
"""For one of our own workers to start."""

SCRATCH = ".scratch"
SCRATCH_KIND = "scratch folder of a study"
ABOVE_ALL_LEVELS = logging.CRITICAL + 1
SILENT = "It left no traceback, as a process that is killed (was memory short?) or ends itself."

Answer = tuple[str | None, str]
"""What comes of a cell: ``(None, result as JSON)``, or ``(reason, whole traceback)`` of a failure."""


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
    """Result of a finished cell; None where there is none, or where its file is not as it was written.

    Raises
    ------
    FileError
        If the file is there, but cannot be read, or is of another version.
    """
    path = result_path(folder, key)
    if not path.exists():
        return None
    text = read_bytes(path, "the result of a cell")
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        content = json.loads(text)
        checksum, version = content.pop("checksum", None), content.get("format", RESULT_VERSION)
        if version != RESULT_VERSION:
            raise FileError(
                f"{path} has format {version}; this llvlit reads and writes {RESULT_VERSION}. Choose another --out, "
                "or use the llvlit that wrote it. Nothing was touched."
            )
        if checksum == _checksum(content):
            del content["format"]
            return content
    return None


def write_result(folder: str | Path, key: str, content: dict[str, Any]) -> None:
    """Write the result of a cell with its version and checksum, whole or not at all."""
    content = {**content, "format": RESULT_VERSION}
    write_json(result_path(folder, key), {**content, "checksum": _checksum(content)})


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(eq=False)
class Run:
    """Jobs that wait, keys that ended and how, and the bar; the one place from which results are written."""

    folder: Path
    pending: dict[str, Job]
    packed: dict[str, bytes]
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
            write_result(self.folder, job.key, json.loads(text))
            self.done.add(job.key)
        else:
            write_text(failure_path(self.folder, job.key), text)
            self.failed[job.key] = reason
        self.bar.update(job.cost)

    def show(self, running: Iterable[Job]) -> None:
        """Say in the bar how many cells ended and failed, and which are being computed."""
        parts = [f"{len(self.failed)} failed"] if self.failed else []
        self.bar.set_description_str(f"{len(self.done) + len(self.failed)}/{self.n_cells} cells", refresh=False)
        self.bar.set_postfix_str(", ".join(parts + [job.key for job in running]), refresh=False)
        if self.bar.format_dict["elapsed"] > DELAY:
            self.bar.refresh()


def run_jobs(
    jobs: Iterable[Job],
    folder: str | Path,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    own_process: bool = False,
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
        1: in this process. More: a Dask cluster of that many processes, on this machine and for this run alone, which
        share its processors. A script that asks for processes must guard its own statements with
        ``if __name__ == "__main__":``.
    scheduler
        Address of a running Dask scheduler, such as ``"tcp://host:8786"``; its workers compute then. A cluster is as
        trusted as its network: whoever reaches the scheduler can run code on the workers and in this process.
    own_process
        Give also a single worker a process of its own: a cell that ends its process then fails alone.
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
    if checks.integer("workers", workers, at_least=1) > 1 and scheduler is not None:
        raise InputError(f"workers={workers}, but the Dask scheduler {scheduler} has its own; give one or the other.")
    check_keys([job.key for job in jobs])
    packed = {job.key: _pack(job) for job in jobs}
    with locked(folder):
        kept = [job.key for job in jobs if read_result(folder, job.key) is not None]
        for job in jobs:
            failure_path(folder, job.key).unlink(missing_ok=True)
        for remnant in (*(folder / "cells").glob(".*.json.*"), *(folder / "failed").glob(".*.txt.*")):
            remnant.unlink(missing_ok=True)  # of a killed run
        scratch = folder / SCRATCH
        own_process = own_process or workers > 1
        workers = min(workers, max(1, len(jobs) - len(kept)))  # a worker for each cell is as many as can work
        remove_owned(scratch, SCRATCH_KIND)
        finished = set(kept)
        run = Run(folder, {job.key: job for job in jobs if job.key not in finished}, packed, show_bar=progress)
        with run.bar:
            if not run.pending or (scheduler is None and workers == 1 and not own_process):
                group = None
                while taken := run.take(group, ()):
                    group = taken.group
                    run.show([taken])
                    run.record(taken, attempt_cell(packed[taken.key]))
            else:
                with _running_cluster(scheduler) if scheduler else _own_cluster(workers, scratch) as client:
                    _run_on_workers(run, client, None if scheduler else scratch)
    keys = [job.key for job in jobs]
    return Outcome(
        done=tuple(key for key in keys if key in run.done),
        kept=tuple(kept),
        failed={key: run.failed[key] for key in keys if key in run.failed},
    )


def _pack(job: Job) -> bytes:
    """Function and arguments of a job, as a worker gets them."""
    checks.number(f"cost of the job {job.key}", job.cost, above=0)
    try:
        return pickle.dumps((job.function, job.arguments))
    except Exception as error:
        raise InputError(
            f"The job {job.key!r} cannot be sent to a worker: {error}. "
            "Its function must be importable by name, its arguments plain values or dataclasses."
        ) from error


def check_keys(keys: Iterable[str]) -> None:
    """InputError for the first key that cannot name a file, or comes twice."""
    seen: set[str] = set()
    for key in keys:
        if not KEY.fullmatch(key):
            raise InputError(f"key={key!r} cannot name a file: up to 200 letters, digits and any of _.+=@- are.")
        if key.casefold() in seen:
            raise InputError(f"key={key!r} names two jobs (capitals do not tell files apart everywhere).")
        seen.add(key.casefold())


def attempt_cell(packed: bytes, trace: Path | None = None) -> Answer:
    """Answer of one cell; only what is no ordinary exception (a crash, an interrupt) passes through.

    A crash leaves the traceback in the file ``trace``.
    """
    try:
        if trace is not None:
            faulthandler.enable(trace.open("w", encoding="utf-8"))
        function, arguments = pickle.loads(packed)
        result = function(*arguments)
        if not isinstance(result, dict):
            raise TypeError(f"{function.__qualname__} returned {type(result).__name__}; a cell's result is a dict.")
        return None, json.dumps(result, sort_keys=True)
    except Exception as error:
        return _reason(error), traceback.format_exc()


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def dask_setup(worker: Any) -> None:
    """Make a process of our own a quiet worker: Dask calls this by its name, before the first cell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # a cell's own bars would cover the parent's
    tqdm.set_lock(threading.RLock())  # a lock of the system would outlive a killed worker


@contextmanager
def _own_cluster(workers: int, scratch: Path) -> Iterator[Client]:
    """A cluster of processes on this machine, which end with this process, however it ends.

    It listens on the loopback alone; whatever it writes lies in ``scratch``.
    """
    import dask
    import distributed
    from dask.system import CPU_COUNT
    from distributed.utils import silence_logging_cmgr

    before = dict(os.environ)
    if workers > 1:  # inherited, for they count only before torch is imported
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        os.environ.update(dict.fromkeys(variables, str(max(1, CPU_COUNT // workers))))
    settings = {
        "distributed.nanny.pre-spawn-environ": {},
        "temporary-directory": str(scratch),
        "distributed.worker.profile.enabled": False,
        "distributed.scheduler.worker-ttl": None,  # a cell may keep its worker busy for hours
        "distributed.deploy.lost-worker-timeout": f"{START_SECONDS:.0f}s",
    }
    own(scratch, SCRATCH_KIND)
    cluster = None
    with silence_logging_cmgr(ABOVE_ALL_LEVELS):  # longer than the cluster's own, which ends before its last messages
        try:
            with dask.config.set(settings):
                cluster = distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address=None,
                    memory_limit=0,
                    silence_logs=ABOVE_ALL_LEVELS,
                    scheduler_kwargs={
                        "allowed_failures": 10**6,
                        "dashboard": False,
                        "dashboard_address": "127.0.0.1:0",
                    },
                    preload=[__name__],
                )
                with distributed.Client(cluster, set_as_default=False) as client, client.as_current():
                    yield client
        except (RuntimeError, OSError, TimeoutError) as error:
            if cluster is not None:
                raise
            raise LlvlitError(
                f"Worker processes die while they start ({_reason(error)}). A script must guard its statements with "
                'if __name__ == "__main__": before it asks for workers; else try fewer of them.'
            ) from error
        finally:
            for nanny in cluster.workers.values() if cluster else ():
                nanny.close_gracefully()  # no worker comes after this one
                with suppress(OSError, TypeError):
                    os.kill(nanny.pid, signal.SIGKILL)  # only this process writes results: a busy worker need not end
            if cluster:
                cluster.close()
            os.environ.clear()
            os.environ.update(before)
            with suppress(FileError):  # the next run tries again
                remove_owned(scratch, SCRATCH_KIND)


@contextmanager
def _running_cluster(scheduler: str) -> Iterator[Client]:
    """A cluster that somebody else has started.

    Raises
    ------
    InputError
        If the scheduler cannot be reached.
    """
    import distributed

    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a scheme that needs more than an address
        raise InputError(
            f"No Dask scheduler answers at scheduler={scheduler!r} ({error}). Is it running, and is its port open?"
        ) from error
    with client, client.as_current():
        yield client


def _run_on_workers(run: Run, client: Client, scratch: Path | None = None) -> None:
    """Cells on the workers of a cluster, one at a time on each; workers may come and go on the way.

    More than one would hold a model each in the worker's memory, whatever the number of its threads. A cell
    whose worker died is tried again, on whichever worker is free, until ``ATTEMPTS`` have died on it: they had no
    other cell, so no other cell is blamed. ``scratch`` is a folder that this process shares with all workers.

    Raises
    ------
    LlvlitError
        If the scheduler is lost, or none of our own workers starts again.
    """
    import distributed

    flight: dict[Future, tuple[Job, str, Path | None]] = {}  # with the address of the worker, and its last words
    latest: dict[str, str] = {}  # address of a worker: group of its latest job
    deaths: dict[str, list[str]] = defaultdict(list)
    busy_at, warned = time.monotonic(), False
    try:
        while run.pending or flight:
            addresses = set(client.nthreads())
            for future, (job, address, trace) in list(flight.items()):
                if future.done() or address not in addresses:
                    del flight[future]
                    answer = _answer(future)
                    if answer is None:
                        deaths[job.key].append(_last_words(trace))
                        if len(deaths[job.key]) < ATTEMPTS:
                            run.pending[job.key] = job
                            continue
                        answer = _killed(deaths[job.key])
                    run.record(job, answer)
            for address in addresses - {busy for _, busy, _ in flight.values()}:
                if taken := run.take(latest.get(address), [job.group for job, _, _ in flight.values()]):
                    name = f"{taken.key}-{uuid.uuid4().hex}"
                    trace = scratch and scratch / name
                    packed = run.packed[taken.key]
                    future = client.submit(attempt_cell, packed, trace, key=name, pure=False, workers=[address])
                    flight[future], latest[address] = (taken, address, trace), taken.group
            run.show([job for job, _, _ in flight.values()])
            if flight:
                busy_at = time.monotonic()
                with suppress(TimeoutError):
                    distributed.wait(list(flight), timeout=0.5, return_when="FIRST_COMPLETED")
            elif run.pending:
                if scratch is not None and time.monotonic() > busy_at + START_SECONDS:
                    raise LlvlitError("Worker processes do not start again. Finished cells stay; try fewer workers.")
                if scratch is None and not warned:
                    warnings.warn("The Dask scheduler has no workers; waiting for some.", stacklevel=3)
                    warned = True
                time.sleep(0.1)
    except (OSError, distributed.CancelledError) as error:
        raise LlvlitError(
            f"The Dask scheduler was lost ({_reason(error)}). Finished cells stay; run again for the rest."
        ) from error
    finally:
        with suppress(Exception):
            client.cancel(list(flight))


def _answer(future: Future) -> Answer | None:
    """Answer of a cell, or None if its worker died."""
    import distributed

    with suppress(TimeoutError):
        if future.done():
            try:
                return future.result(timeout=CONNECT_SECONDS)
            except (OSError, distributed.CancelledError):
                raise  # the worker died with the result (a TimeoutError), or the scheduler is lost
            except Exception as error:
                return _reason(error), traceback.format_exc()
    future.cancel()
    return None


def _last_words(trace: Path | None) -> str:
    """Traceback that a fatal signal left; a kill leaves none."""
    with suppress(OSError):
        return (trace.read_text(encoding="utf-8", errors="replace") if trace else "") or SILENT
    return SILENT


def _killed(deaths: list[str]) -> Answer:
    """Why a cell failed whose workers died."""
    last = deaths[-1].strip().partition("\n")[0]
    text = "".join(f"Attempt {number}: the worker died. {words}\n" for number, words in enumerate(deaths, start=1))
    return f"KilledWorker: the worker died in each of {len(deaths)} attempts. {last}", text
