"""Where the cells of :mod:`llvlit.study.runner` are computed: in this process, in worker processes, on a Dask cluster."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llvlit.errors import InputError, LlvlitError

if TYPE_CHECKING:
    from llvlit.study.runner import Job, Run

Answer = tuple[str | None, str]
"""What comes back of a cell: ``(None, result as JSON)``, or ``(reason, whole traceback)`` of a failure."""

CONNECT_SECONDS = 10.0
"""For a Dask scheduler to answer."""

LEAVE_SECONDS = 3.0
"""For workers that have nothing left to do."""


def attempt_cell(packed: bytes, threads: int | None) -> Answer:
    """Answer of one cell; only what is no ordinary exception (a crash, an interrupt) passes through."""
    before = torch.get_num_threads()
    try:
        function, arguments = pickle.loads(packed)
        if threads is not None:
            torch.set_num_threads(threads)
        result = function(*arguments)
        if not isinstance(result, dict):
            raise TypeError(f"{function.__qualname__} returned {type(result).__name__}; a cell's result is a dict.")
        return None, json.dumps(result, sort_keys=True)
    except Exception as error:
        return _reason(error), traceback.format_exc()
    finally:
        torch.set_num_threads(before)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def run_here(run: Run, packed: Mapping[str, bytes], threads: int | None) -> None:
    """One cell after another in this process."""
    group = None
    while (job := run.take(group, ())) is not None:
        group = job.group
        run.show([job])
        run.record(job, attempt_cell(packed[job.key], threads))


@dataclass(eq=False)
class _Worker:
    """A process, our end of its pipe, where it writes its last words, its job, and the group of its latest job."""

    process: BaseProcess
    pipe: Connection
    trace: Path
    ready: bool = False
    job: Job | None = None
    group: str | None = None


def run_in_processes(run: Run, packed: Mapping[str, bytes], workers: int, threads: int | None, attempts: int) -> None:
    """Cells on that many processes; one that dies is replaced, and its cell tried again, ``attempts`` times in all.

    Raises
    ------
    LlvlitError
        If ``attempts`` processes in a row die before they are ready for a cell.
    """
    if threads is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, processors // workers) if workers > 1 else torch.get_num_threads()
    traces = tempfile.TemporaryDirectory(prefix="llvlit-", ignore_cleanup_errors=True)
    crew: list[_Worker] = []
    deaths: dict[str, list[str]] = {}
    failed_starts = 0
    try:
        while run.pending or any(worker.job for worker in crew):
            while len(crew) < min(workers, len(run.pending) + sum(worker.job is not None for worker in crew)):
                crew.append(_start(threads, Path(traces.name)))
            for worker in crew:
                if worker.ready and worker.job is None:
                    _give(worker, run.take(worker.group, [other.job.group for other in crew if other.job]), packed)
            run.show([worker.job for worker in crew if worker.job])
            owners: dict[Any, _Worker] = {
                end: worker for worker in crew for end in (worker.pipe, worker.process.sentinel)
            }
            for worker in {owners[end] for end in wait(list(owners), timeout=1.0)}:
                job, message = worker.job, _receive(worker)
                if message is not None:
                    failed_starts, worker.ready, worker.job = 0, True, None
                    if job is not None:
                        run.record(job, message)
                    continue
                crew.remove(worker)
                end = _end(worker)
                if not worker.ready:
                    failed_starts += 1
                    if failed_starts >= attempts:
                        raise LlvlitError(
                            f"Worker processes die while they start ({end}). A script must guard its statements with "
                            'if __name__ == "__main__": before it asks for workers; else try fewer of them.'
                        )
                elif job is not None:
                    told = deaths.setdefault(job.key, [])
                    told.append(f"Attempt {len(told) + 1}: the worker died with {end}.\n{_last_words(worker)}")
                    if len(told) < attempts:
                        run.pending[job.key] = job
                    else:
                        reason = f"The worker died in each of {attempts} attempts, at last with {end}."
                        run.record(job, (reason, "".join(told)))
    finally:
        _dismiss(crew)
        traces.cleanup()


def _dismiss(crew: list[_Worker]) -> None:
    """End workers: busy ones at once, for only this process writes files; idle ones leave by themselves."""
    for worker in crew:
        worker.pipe.close()
        if worker.job is not None:
            worker.process.kill()
    end = time.monotonic() + LEAVE_SECONDS
    for worker in crew:
        worker.process.join(timeout=max(0.0, end - time.monotonic()))
        worker.process.kill()
        worker.process.join()


def _start(threads: int, folder: Path) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    trace = folder / uuid.uuid4().hex
    process = context.Process(target=_serve, args=(theirs, threads, trace), daemon=True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, str(threads)))  # inherited, for they count only before torch is imported
    try:
        process.start()
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)
        theirs.close()  # so that the worker's death shows as the end of the pipe
    return _Worker(process, ours, trace)


def _serve(pipe: Connection, threads: int, trace: Path) -> None:
    """Answer cells until the pipe closes; a fatal signal leaves the traceback in a file."""
    faulthandler.enable(trace.open("w", encoding="utf-8"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # a cell's own bars would cover the parent's
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        pipe.send(True)
        while True:
            pipe.send(attempt_cell(pipe.recv_bytes(), threads))


def _leave_with_parent() -> None:
    """Wait for the end of the parent, by whatever cause, and leave at once, even in the middle of a cell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _give(worker: _Worker, job: Job | None, packed: Mapping[str, bytes]) -> None:
    if job is not None:
        worker.job, worker.group = job, job.group
        with suppress(OSError):  # it died while idle: the pipe's end tells
            worker.pipe.send_bytes(packed[job.key])


def _receive(worker: _Worker) -> Any:
    """Answer, True once a new worker is ready, or None if it died."""
    with suppress(EOFError, OSError):
        if worker.pipe.poll():
            return worker.pipe.recv()
    return None


def _end(worker: _Worker) -> str:
    """Exit code or signal of a worker that died."""
    worker.process.join(timeout=5.0)
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
    code = worker.process.exitcode or 0
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"signal {name}" + (" (was memory short?)" if name == "SIGKILL" else "")


def _last_words(worker: _Worker) -> str:
    """Traceback that a fatal signal left (a kill leaves none)."""
    with suppress(OSError):
        return worker.trace.read_text(encoding="utf-8", errors="replace")
    return ""


def run_on_dask(run: Run, packed: Mapping[str, bytes], scheduler: str, threads: int | None) -> None:
    """Cells on the workers of a Dask cluster, one at a time on each; workers may come and go on the way.

    A worker's threads would share one model in memory, whose layers a recording takes over while it runs.

    Raises
    ------
    InputError
        If Dask is not installed here, or the scheduler cannot be reached.
    LlvlitError
        If the scheduler is lost.
    """
    try:
        import distributed
    except ImportError as error:
        raise InputError(f"scheduler={scheduler!r} needs Dask: pip install 'llvlit[dask]'.") from error
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No Dask scheduler answers at scheduler={scheduler!r} ({error}). Is it running, and is its port open?"
        ) from error
    flight: dict[Any, tuple[Job, str]] = {}  # future: its job, and the worker that it was meant for
    latest: dict[str, str] = {}  # address of a worker: group of its latest job
    warned = False
    with client, client.as_current():
        try:
            while run.pending or flight:
                slots = client.nthreads()
                if not slots and not warned:
                    warnings.warn(f"The Dask scheduler {scheduler} has no workers; waiting for some.", stacklevel=3)
                    warned = True
                for address in set(slots) - {meant for _, meant in flight.values()}:
                    job = run.take(latest.get(address), [other.group for other, _ in flight.values()])
                    if job is None:
                        break
                    future = client.submit(
                        attempt_cell,
                        packed[job.key],
                        threads,
                        key=f"{job.key}-{uuid.uuid4().hex}",
                        pure=False,
                        workers=[address],
                        allow_other_workers=True,
                    )
                    flight[future], latest[address] = (job, address), job.group
                run.show([job for job, _ in flight.values()])
                for future in _ended(list(flight)):
                    job, _ = flight.pop(future)
                    lost = future.exception()  # of the cluster; the cell's own come as answers
                    run.record(job, future.result() if lost is None else (_reason(lost), f"{lost}\n"))
        except (OSError, distributed.CancelledError) as error:
            raise LlvlitError(
                f"The Dask scheduler {scheduler} was lost ({_reason(error)}). "
                "Finished cells stay; run again for the rest."
            ) from error
        finally:
            with suppress(Exception):
                client.cancel(list(flight))


def _ended(futures: list[Any]) -> set[Any]:
    """Futures that ended within a second."""
    import distributed

    if not futures:
        time.sleep(1.0)
        return set()
    try:
        return distributed.wait(futures, timeout=1.0, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        return set()
