"""Cells for test_runner: at the top level of a module, so that worker processes can import them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tqdm import tqdm

from llvlit.study import runner


def note(folder: Path, name: str) -> None:
    """One more line ``NAME PID`` in the folder's list of calls, in one write."""
    descriptor = os.open(folder / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{name} {os.getpid()}\n".encode())
    os.close(descriptor)


def calls(folder: Path) -> list[tuple[str, int]]:
    """Name and process of each call so far."""
    path = folder / "calls"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(name, int(pid)) for name, pid in (line.split() for line in lines)]


def times_called(folder: Path) -> dict[str, int]:
    names = [name for name, _ in calls(folder)]
    return {name: names.count(name) for name in names}


def value(folder: Path, name: str) -> dict[str, object]:
    note(folder, name)
    return {"name": name, "pid": os.getpid()}


def barred(folder: Path, name: str) -> dict[str, object]:
    """With a bar, as training and recording have: it takes a lock of the system."""
    for _ in tqdm([name], disable=None):
        return value(folder, name)
    return {}


def threads(folder: Path, name: str) -> dict[str, object]:
    import torch

    return {"torch": torch.get_num_threads(), "openmp": os.environ.get("OMP_NUM_THREADS")}


def gated(folder: Path, name: str) -> dict[str, object]:
    """Not before there is a file ``open``."""
    note(folder, name)
    while not (folder / "open").exists():
        time.sleep(0.02)
    return {"name": name}


def meeting(folder: Path, name: str, n_calls: int) -> dict[str, object]:
    """Not before so many calls in all have begun."""
    note(folder, name)
    while len(calls(folder)) < n_calls:
        time.sleep(0.02)
    return {"name": name}


def large(folder: Path, name: str) -> dict[str, object]:
    note(folder, name)
    return {"name": name * 2**21}


def slow(folder: Path, name: str) -> dict[str, object]:
    """Some tenths of a second, so that a kill meets it."""
    note(folder, name)
    time.sleep(0.3)
    return {"name": name}


def deadly(folder: Path, name: str, deaths: int) -> dict[str, object]:
    """End the process the first ``deaths`` times: by a signal, then by leaving."""
    note(folder, name)
    if times_called(folder)[name] <= deaths:
        if times_called(folder)[name] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    return {"name": name}


def aborting(folder: Path, name: str, *_: object) -> dict[str, object]:
    """End the process as a failed assertion of compiled code does."""
    note(folder, name)
    os.abort()


def raising(folder: Path, name: str) -> dict[str, object]:
    note(folder, name)
    raise ArithmeticError(f"no gain in {name}")


def raising_late(folder: Path, name: str) -> dict[str, object]:
    """Not before the bar shows."""
    time.sleep(runner.DELAY + 0.1)
    return raising(folder, name)


def greedy(folder: Path, name: str) -> dict[str, object]:
    note(folder, name)
    raise MemoryError


def interrupted(folder: Path, name: str) -> dict[str, object]:
    raise KeyboardInterrupt


def listed(folder: Path, name: str) -> list[str]:
    return [name]


def foreign(folder: Path, name: str) -> dict[str, object]:
    return {"set": {name}}
