"""The runner: every cell once, whatever dies on the way."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import runner_jobs as cells
import torch

from llvlit.errors import FileError, InputError, LlvlitError
from llvlit.files import locked
from llvlit.study import runner
from llvlit.study.cells import run_cell, run_study
from llvlit.study.grid import Grid, Settings
from llvlit.study.runner import Job, Outcome, failure_path, read_result, result_path, run_jobs

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])),
}
PATIENCE = 120.0
"""Seconds after which a test gives up; nothing here should take a tenth of it."""

SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may ignore it
import sys
from pathlib import Path
import runner_jobs as cells
from llvlit.study.runner import Job, run_jobs

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    names = {"a": cells.value, "b": cells.value, "c": cells.gated, "d": cells.gated, "e": cells.value}
    run_jobs([Job(k, f, (folder, k), group="") for k, f in names.items()], folder, workers=int(sys.argv[2]))
"""
SCRIPT_KEYS = ["a", "b", "c", "d", "e"]
SLOW_SCRIPT = """
from pathlib import Path
import runner_jobs as cells
from llvlit.study.runner import Job, run_jobs

if __name__ == "__main__":
    folder = Path.cwd()
    run_jobs([Job(f"k{i}", cells.slow, (folder, f"k{i}"), group="") for i in range(6)], folder, workers=2)
"""


def environment(folder: Path) -> dict[str, str]:
    """With a temporary directory of its own, where a test has made one."""
    return ENVIRONMENT | ({"TMPDIR": str(folder / "tmp")} if (folder / "tmp").exists() else {})


def job(folder: Path, key: str, function: Callable = cells.value, *more: object, group: str = "", **options) -> Job:
    return Job(key, function, (folder, key, *more), group=group, **options)


def stored(folder: Path) -> list[str]:
    """Names of all files in the folder of results, hidden ones included."""
    return sorted(path.name for path in (folder / "cells").glob("*"))


def files(*keys: str) -> list[str]:
    return [f"{key}.json" for key in keys]


def wait_until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < limit, "gave up waiting"
        time.sleep(0.02)


@contextmanager
def script(folder: Path, workers: int, *, waits: bool = True, **options: object) -> Iterator[subprocess.Popen]:
    """The script above in a process of its own, which waits within its gated cells."""
    command = [sys.executable, "script.py", str(folder), str(workers)]
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    options |= {"cwd": folder, "env": environment(folder), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options)
    try:
        if waits:
            wait_until(lambda: process.poll() is not None or len(cells.times_called(folder)) >= 2 + workers)
            assert process.poll() is None
        yield process
    finally:
        (folder / "open").touch()
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_cells_here_keep_groups_together_and_the_order_otherwise(tmp_path):
    jobs = [job(tmp_path, key, group=key[0]) for key in ("a1", "b1", "a2", "b2")]
    outcome = run_jobs(jobs, tmp_path)
    assert outcome == Outcome(done=("a1", "b1", "a2", "b2"), kept=(), failed={})
    assert cells.calls(tmp_path) == [(key, os.getpid()) for key in ("a1", "a2", "b1", "b2")]
    assert read_result(tmp_path, "b1") == {"name": "b1", "pid": os.getpid()}


def test_finished_cells_are_kept_and_damaged_ones_computed_again(tmp_path):
    jobs = [job(tmp_path, key) for key in "abcd"]
    run_jobs(jobs[:3], tmp_path)
    result_path(tmp_path, "b").write_text('{"name": "b", ', encoding="utf-8")
    result_path(tmp_path, "c").write_text("[]", encoding="utf-8")
    assert read_result(tmp_path, "b") is None
    assert run_jobs(jobs, tmp_path) == Outcome(done=("b", "c", "d"), kept=("a",), failed={})
    assert cells.times_called(tmp_path) == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert read_result(tmp_path, "b")["name"] == "b"


def test_result_that_cannot_be_read_is_an_error_not_a_reason_to_compute(tmp_path):
    result_path(tmp_path, "a").mkdir(parents=True)
    with pytest.raises(FileError, match=r"a\.json"):
        run_jobs([job(tmp_path, "a")], tmp_path)
    assert cells.calls(tmp_path) == []


def test_cells_of_one_group_go_to_one_worker(tmp_path):
    turns = {"a1": 2, "b1": 2, "a2": 4, "b2": 4, "a3": 6, "b3": 6}  # each worker computes one cell of each turn
    jobs = [job(tmp_path, key, cells.meeting, n_calls, group=key[0]) for key, n_calls in turns.items()]
    assert len(run_jobs(jobs, tmp_path, workers=2).done) == 6
    pids = dict(cells.calls(tmp_path))
    assert len({pids[key] for key in ("a1", "a2", "a3")}) == len({pids[key] for key in ("b1", "b2", "b3")}) == 1


def test_workers_share_the_cells_and_the_processors(tmp_path, monkeypatch):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    jobs = [job(tmp_path, "t", cells.threads), job(tmp_path, "a"), job(tmp_path, "b"), job(tmp_path, "c")]
    before = dict(os.environ)
    outcome = run_jobs(jobs, tmp_path, workers=2)
    assert outcome == Outcome(done=("t", "a", "b", "c"), kept=(), failed={})
    each = max(1, len(psutil.Process().cpu_affinity()) // 2)
    assert read_result(tmp_path, "t") == {"torch": each, "openmp": str(each)}
    assert dict(os.environ) == before
    assert os.getpid() not in {pid for _, pid in cells.calls(tmp_path)}
    assert stored(tmp_path) == files("a", "b", "c", "t")
    assert multiprocessing.active_children() == []


def test_run_killed_on_the_way_goes_on_where_it_was(tmp_path):
    """No cell is lost or computed in vain, no process stays behind, none listens but on the loopback."""
    (tmp_path / "tmp").mkdir()
    with script(tmp_path, workers=2) as process:  # both workers are within a cell
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        ports = {at.laddr.ip for one in family for at in one.net_connections("inet") if at.status == "LISTEN"}
        assert ports == {"127.0.0.1"}
        process.kill()
        assert not psutil.wait_procs(family, timeout=PATIENCE)[1]
        assert stored(tmp_path) == files("a", "b")
        (tmp_path / "cells" / ".c.json.x7").write_text("{", encoding="utf-8")  # as if killed while it wrote
    assert list((tmp_path / "tmp").iterdir()) == []
    jobs = [job(tmp_path, key) for key in SCRIPT_KEYS]
    assert run_jobs(jobs, tmp_path) == Outcome(done=("c", "d", "e"), kept=("a", "b"), failed={})
    assert cells.times_called(tmp_path) == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 1}
    assert stored(tmp_path) == files(*SCRIPT_KEYS)
    assert not list(tmp_path.glob(".scratch"))


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_kills_at_random_moments_lose_no_cell(tmp_path, victim):
    """Whatever is killed, at whatever moment: every result is whole, none is computed twice once it is there."""
    keys, rng = [f"k{number}" for number in range(6)], random.Random(victim)
    for turn in range(3):
        folder = tmp_path / ("the same" if victim == "parent" else str(turn))
        folder.mkdir(exist_ok=True)
        (folder / "script.py").write_text(SLOW_SCRIPT, encoding="utf-8")
        n_calls = len(cells.calls(folder))
        process = subprocess.Popen([sys.executable, "script.py"], cwd=folder, env=ENVIRONMENT)
        while process.poll() is None and len(cells.calls(folder)) == n_calls:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        whole = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
        if victim == "parent":
            process.kill()
            process.wait(PATIENCE)
            assert not psutil.wait_procs(family, timeout=PATIENCE)[1]
        else:
            with suppress(ProcessLookupError):
                os.kill(rng.choice([pid for _, pid in cells.calls(folder)]), signal.SIGKILL)
            assert process.wait(PATIENCE) == 0 and stored(folder) == files(*keys)
        assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert not run_jobs([job(folder, key) for key in keys], folder).failed
    assert [read_result(folder, key)["name"] for key in keys] == keys and stored(folder) == files(*keys)


def test_folder_belongs_to_one_run_until_it_ends_or_is_killed(tmp_path):
    with script(tmp_path, workers=1) as process:
        with pytest.raises(FileError, match=rf"in use by process {process.pid} on .*[Ww]ait.*another folder"):
            run_jobs([job(tmp_path, "z")], tmp_path)
        assert "z" not in cells.times_called(tmp_path)
        process.kill()
        process.communicate(timeout=PATIENCE)
        assert run_jobs([job(tmp_path, "z")], tmp_path).done == ("z",)
    assert run_jobs([job(tmp_path, "z")], tmp_path).kept == ("z",)


def test_claims_nest_and_leave_no_empty_folder(tmp_path):
    folder = tmp_path / "out"
    with locked(folder):
        assert run_jobs([], folder).done == ()
        with locked(folder):
            pass
        with script(folder, workers=1, waits=False) as process:
            assert process.wait(PATIENCE) == 1 and b"in use by process" in process.stderr.read()
        for path in folder.glob("[!.]*"):
            path.unlink()
    assert not folder.exists()
    with locked(folder):
        (folder / "kept").touch()
    assert (folder / "kept").exists()


def test_cell_on_which_workers_die_fails_after_three_attempts(tmp_path):
    jobs = [
        job(tmp_path, "k", cells.deadly, 99),
        job(tmp_path, "once", cells.deadly, 1),
        *(job(tmp_path, key) for key in "abcd"),
    ]
    outcome = run_jobs(jobs, tmp_path, workers=2)
    assert outcome.done == ("once", "a", "b", "c", "d")
    assert cells.times_called(tmp_path) == {"k": 3, "once": 2, "a": 1, "b": 1, "c": 1, "d": 1}
    assert "KilledWorker" in outcome.failed["k"] and "3 attempts" in outcome.failed["k"]
    assert failure_path(tmp_path, "k").read_text(encoding="utf-8").count("Attempt") == 3
    assert stored(tmp_path) == sorted(files("a", "b", "c", "d", "once"))


@pytest.mark.parametrize("workers", [1, 2])
def test_cell_that_aborts_fails_alone_with_its_traceback(tmp_path, workers):
    jobs = [job(tmp_path, "k", cells.aborting), job(tmp_path, "a"), job(tmp_path, "t", cells.threads)]
    outcome = run_jobs(jobs, tmp_path, workers=workers, own_process=True)
    assert outcome.done == ("a", "t") and "Aborted" in outcome.failed["k"]
    assert cells.times_called(tmp_path) == {"k": 3, "a": 1}
    text = failure_path(tmp_path, "k").read_text(encoding="utf-8")
    assert text.count("Attempt") == text.count("in aborting") == 3 and "runner_jobs.py" in text
    if workers == 1:
        assert read_result(tmp_path, "t")["torch"] == torch.get_num_threads()


def test_a_folder_of_somebody_elses_is_not_taken_for_scratch(tmp_path):
    (tmp_path / ".scratch").mkdir()
    (tmp_path / ".scratch" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(FileError, match=r"\.scratch"):
        run_jobs([job(tmp_path, "a")], tmp_path)
    assert (tmp_path / ".scratch" / "thesis.txt").exists()


def test_no_more_workers_than_cells_are_started(tmp_path, monkeypatch):
    asked = []

    def cluster(n_workers: int, **_: object) -> None:
        asked.append(n_workers)
        raise RuntimeError

    monkeypatch.setattr("distributed.LocalCluster", cluster)
    for names in ("abc", "a"):
        with pytest.raises(LlvlitError, match="while they start"):
            run_jobs([job(tmp_path, name) for name in names], tmp_path, workers=10**18)
    assert asked == [3, 1]


def told_on_standard_error(folder: Path, text: str) -> str:
    """What a script that ends well prints there, with two workers."""
    (folder / "open").touch()
    (folder / "script.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "script.py", str(folder), "2"]
    options = {"cwd": folder, "env": environment(folder), "capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, **options)
    assert done.returncode == 0
    return done.stderr


def test_workers_leave_nothing_behind(tmp_path):
    """Neither semaphores, of which Python would tell on standard error, nor files."""
    (tmp_path / "tmp").mkdir()
    assert told_on_standard_error(tmp_path, SCRIPT.replace("cells.value", "cells.barred")) == ""
    assert stored(tmp_path) == files(*SCRIPT_KEYS) and list((tmp_path / "tmp").iterdir()) == []


def test_nothing_is_told_of_connections_that_close_late(tmp_path):
    late = """
import logging
from distributed.deploy.cluster import Cluster

close = Cluster._close
async def closed_late(self):
    await close(self)
    logging.getLogger("distributed.batched").error("Batched Comm Closed")
Cluster._close = closed_late
"""
    assert told_on_standard_error(tmp_path, SCRIPT.replace("\nif __name__", late + "\nif __name__")) == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_exception_fails_its_cell_at_once_and_only_in_this_run(tmp_path, workers):
    bad = {"r": cells.raising, "m": cells.greedy, "list": cells.listed, "set": cells.foreign}
    jobs = [*(job(tmp_path, key, function) for key, function in bad.items()), job(tmp_path, "a")]
    outcome = run_jobs(jobs, tmp_path, workers=workers)
    assert outcome.done == ("a",)
    assert list(outcome.failed) == ["r", "m", "list", "set"]
    assert outcome.failed["r"] == "ArithmeticError: no gain in r"
    assert outcome.failed["m"].startswith("MemoryError")
    assert "listed returned list" in outcome.failed["list"]
    assert "not JSON serializable" in outcome.failed["set"]
    text = failure_path(tmp_path, "r").read_text(encoding="utf-8")
    assert "Traceback" in text
    assert 'raise ArithmeticError(f"no gain in {name}")' in text
    assert cells.times_called(tmp_path) == {"r": 1, "m": 1, "a": 1}
    assert run_jobs([job(tmp_path, "r"), jobs[-1]], tmp_path) == Outcome(done=("r",), kept=("a",), failed={})
    assert not failure_path(tmp_path, "r").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_ends_the_run_and_leaves_what_is_finished(tmp_path, workers):
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", cells.large), job(tmp_path, "c", cells.gated)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(FileError, match=r"Could not write .*b\.json"):
            run_jobs(jobs, tmp_path, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert multiprocessing.active_children() == []
    assert set(stored(tmp_path)) <= {"a.json"}
    (tmp_path / "open").touch()
    outcome = run_jobs(jobs, tmp_path)
    assert set(outcome.done) | set(outcome.kept) == {"a", "b", "c"}
    if workers == 1:
        assert outcome.kept == ("a",)


def test_interrupt_stops_the_workers_and_passes_on(tmp_path):
    with script(tmp_path, workers=2, start_new_session=True) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        _, error = process.communicate(timeout=PATIENCE)
        assert not psutil.wait_procs(family, timeout=PATIENCE)[1]
    assert error.count(b"KeyboardInterrupt") == 1 and b"distributed" not in error.splitlines()[-1]
    assert stored(tmp_path) == files("a", "b") and not (tmp_path / "failed").exists()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(tmp_path, "i", cells.interrupted)], tmp_path)
    assert run_jobs([job(tmp_path, "a"), job(tmp_path, "i")], tmp_path).done == ("i",)


def test_workers_that_cannot_start_end_the_run_with_advice(tmp_path):
    spawn = multiprocessing.spawn
    before = spawn.get_executable()
    spawn.set_executable("/bin/false")
    try:
        with pytest.raises(LlvlitError, match=r"die while they start.*__main__"):
            run_jobs([job(tmp_path, "a"), job(tmp_path, "b")], tmp_path, workers=2)
    finally:
        spawn.set_executable(before)
    assert multiprocessing.active_children() == []


def test_bar_shows_the_share_of_the_cost_the_cell_and_the_failures(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(runner, "DELAY", 0.1)
    jobs = [job(tmp_path, "big", cells.raising_late, cost=3e12), job(tmp_path, "small", cost=1e12)]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run_jobs(jobs, tmp_path)
    (last,) = [line for line in terminal.getvalue().split("\r") if "small" in line][-1:]
    assert "1/2 cells:  75%" in last
    assert "1 failed, small" in last
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run_jobs(jobs, tmp_path, progress=False)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "../a"}, "cannot name a file"),
        ({"key": ".a"}, "cannot name a file"),
        ({"key": "k" * 201}, "cannot name a file"),
        ({"key": "B"}, "two jobs"),
        ({"cost": 0.0}, "cost"),
        ({"cost": float("nan")}, "cost"),
        ({"function": lambda folder, key: {}}, "importable"),
    ],
)
def test_jobs_that_cannot_run_are_refused_before_any_does(tmp_path, change, message):
    wrong = {"key": "a", "function": cells.value, "arguments": (tmp_path, "a"), "group": "", **change}
    with pytest.raises(InputError, match=message):
        run_jobs([job(tmp_path, "b"), Job(**wrong)], tmp_path)
    assert cells.calls(tmp_path) == []


def test_there_is_at_least_one_worker(tmp_path):
    with pytest.raises(InputError, match="workers=0"):
        run_jobs([], tmp_path, workers=0)


may_wait_for_workers = pytest.mark.filterwarnings("ignore:.*has no workers")


@contextmanager
def dask_cluster(
    folder: Path, n_workers: int, allowed_failures: int, n_threads: int = 1
) -> Iterator[tuple[str, list[subprocess.Popen], subprocess.Popen]]:
    """Address of a real scheduler, its workers, and itself, each a process of its own."""
    contact = folder / "scheduler.json"
    surroundings = {**ENVIRONMENT, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures)}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        "--nthreads",
        str(n_threads),
        "--no-nanny",
        "--no-dashboard",
    ]
    with ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(command, cwd=folder, env=surroundings, **quiet)
            stack.callback(process.wait, PATIENCE)
            stack.callback(process.kill)
            return process

        scheduler = start(*command, "--no-dashboard", "--scheduler-file", str(contact))
        workers = [start(*worker, "--scheduler-file", str(contact)) for _ in range(n_workers)]
        wait_until(lambda: contact.exists() and contact.read_text(encoding="utf-8").endswith("}"))
        yield json.loads(contact.read_text(encoding="utf-8"))["address"], workers, scheduler


@may_wait_for_workers
def test_dask_worker_killed_on_the_way_loses_no_cell(tmp_path):
    def kill_one() -> None:
        wait_until(lambda: len({pid for key, pid in cells.calls(tmp_path) if key in gated}) == 2)
        wait_until(result_path(tmp_path, "a").exists)  # what is not fetched yet would be computed again
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait(PATIENCE)
        (tmp_path / "open").touch()

    gated = [f"g{i}" for i in range(4)]
    jobs = [
        job(tmp_path, "a"),
        *(job(tmp_path, key, cells.gated) for key in gated),
        job(tmp_path, "r", cells.raising),
    ]
    with dask_cluster(tmp_path, n_workers=2, allowed_failures=3) as (scheduler, workers, _):
        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        outcome = run_jobs(jobs, tmp_path, scheduler=scheduler)
        killer.join()
        pids = [worker.pid for worker in workers]
        assert [worker.poll() for worker in workers] == [-signal.SIGKILL, None]
    assert outcome == Outcome(done=("a", *gated), kept=(), failed={"r": "ArithmeticError: no gain in r"})
    assert "Traceback" in failure_path(tmp_path, "r").read_text(encoding="utf-8")
    assert stored(tmp_path) == files("a", *gated)
    assert [read_result(tmp_path, key) for key in gated] == [{"name": key} for key in gated]
    by_killed = {key for key, pid in cells.calls(tmp_path) if pid == pids[0] and key in gated}
    assert by_killed
    assert by_killed <= {key for key, n in cells.times_called(tmp_path).items() if n > 1}  # Dask may repeat others


@may_wait_for_workers
def test_a_study_on_a_cluster_loses_no_cell_when_a_worker_is_killed(tmp_path):
    """Real cells, so that what a worker imports and sends back is the real thing."""

    def kill_one() -> None:
        wait_until(lambda: any((tmp_path / "results" / "cells").glob("*.json")))
        workers[0].send_signal(signal.SIGKILL)

    settings = Settings(concept=20, operating=2, evaluation=2, orders=(4,), bases=("krylov",))
    grid = Grid("toy", "", ("embedded/small",), ("film-sentiment", "food-sentiment"), (0, 1), settings=settings)
    with dask_cluster(tmp_path, n_workers=2, allowed_failures=3, n_threads=4) as (scheduler, workers, _):
        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        outcome = run_study(grid, tmp_path / "results", device="cpu", scheduler=scheduler)
        killer.join()
    assert len(outcome.done) == 4 and not outcome.failed
    assert stored(tmp_path / "results") == sorted(files(*(cell.key for cell in grid.cells())))
    content = [read_result(tmp_path / "results", cell.key) for cell in grid.cells()]
    assert {one["kind"] for one in content} <= {"experiment", "not visible"}
    for cell, one in zip(grid.cells(), content, strict=True):  # a worker of four threads, too, runs one at a time
        assert one["cell"]["seed"] == cell.seed
        if one["kind"] == "experiment" and cell.seed == 0:
            alone = run_cell(cell, "cpu")["profiles"]["mean_difference"]["measured"]
            assert one["profiles"]["mean_difference"]["measured"] == pytest.approx(alone, rel=1e-3)


@may_wait_for_workers
def test_dask_gives_up_on_a_cell_that_kills_its_workers(tmp_path):
    jobs = [job(tmp_path, "k", cells.deadly, 99), *(job(tmp_path, key) for key in "abc")]
    with dask_cluster(tmp_path, n_workers=2, allowed_failures=0) as (scheduler, *_):
        outcome = run_jobs(jobs, tmp_path, scheduler=scheduler)
    assert outcome.done == ("a", "b", "c")
    assert outcome.failed["k"].startswith("KilledWorker")
    assert "died" in failure_path(tmp_path, "k").read_text(encoding="utf-8")


@may_wait_for_workers
def test_dask_scheduler_killed_on_the_way_ends_the_run_and_leaves_what_is_finished(tmp_path, monkeypatch):
    def kill() -> None:
        wait_until(lambda: result_path(tmp_path, "a").exists() and "g" in cells.times_called(tmp_path))
        process.kill()

    monkeypatch.setattr(runner, "CONNECT_SECONDS", 2.0)
    jobs = [job(tmp_path, "a"), job(tmp_path, "g", cells.gated)]
    with dask_cluster(tmp_path, n_workers=1, allowed_failures=3) as (scheduler, _, process):
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(LlvlitError, match=r"scheduler was lost.*run again for the rest"):
            run_jobs(jobs, tmp_path, scheduler=scheduler)
        killer.join()
        (tmp_path / "open").touch()
    assert run_jobs(jobs, tmp_path) == Outcome(done=("g",), kept=("a",), failed={})


def test_dask_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CONNECT_SECONDS", 0.5)
    jobs = [job(tmp_path, "a")]
    with pytest.raises(InputError, match=r"answers at scheduler=.tcp://127\.0\.0\.1:1"):
        run_jobs(jobs, tmp_path, scheduler="tcp://127.0.0.1:1")
    for address in ("nonsense://x", "tls://127.0.0.1:1"):
        with pytest.raises(InputError, match="No Dask scheduler answers"):
            run_jobs(jobs, tmp_path, scheduler=address)
    with pytest.raises(InputError, match="one or the other"):
        run_jobs(jobs, tmp_path, scheduler="tcp://127.0.0.1:1", workers=2)
