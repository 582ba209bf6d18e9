"""What a call may do: give a finite result, or refuse with an error of ours, soon.  Everything else is a fault.

A call is a line of source, evaluated among the names of ``fuzzing.things``, so that every fault can be pasted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import io
import math
import os
import resource
import signal
import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from llvlit.errors import LlvlitError

SECONDS_OF_CPU = 10.0
SECONDS = 40.0
"""On the wall, for a call that waits; other work on the machine must not look like a hang."""

MEMORY = 3 * 2**30
"""Bytes that one call may take; what asks for more is refused by the system in place of filling the machine."""

FOREIGN, HANG, WRONG = COLUMNS = ("foreign", "hang", "wrong")


class TooLong(BaseException):
    """No ``except Exception`` must catch it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and what it may not do.

    Attributes
    ----------
    call : str
    refused : bool
        The value is not what the documentation says, so that no result may come.
    right : str
        A call that must give the same result, if this one gives any.
    oracle : callable, optional
        What is wrong with a result, given the result; "" where nothing is.
    undefined : bool
        The documentation allows NaN or infinity in the result.
    about : str
        What faults of one kind share: the callable and the argument.
    arguments : tuple of str
        Names of which an error must tell one, if there are any.
    memory : bool
        The call asks for so much memory that the system may say so.
    """

    call: str
    about: str
    refused: bool = False
    right: str = ""
    oracle: Callable[[Any], str] | None = None
    undefined: bool = False
    arguments: tuple[str, ...] = ()
    memory: bool = False


@dataclasses.dataclass
class Tally:
    """Counts of a kind of draws, and the shortest call of each fault."""

    kind: str
    draws: int = 0
    refused: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    faults: dict[tuple[str, ...], tuple[str, str]] = dataclasses.field(default_factory=dict)
    seen: dict[tuple[str, ...], int] = dataclasses.field(default_factory=lambda: defaultdict(int))

    def add(self, case: Case, names: dict[str, Any]) -> None:
        self.draws += 1
        column, what = judged(case, names)
        self.refused += column == "refused"
        if column not in COLUMNS:
            return
        self.counts[column] += 1
        key = (case.about, column, what.partition(":")[0])
        self.seen[key] += 1
        if key not in self.faults or len(case.call) < len(self.faults[key][0]):
            self.faults[key] = (case.call, what)

    def row(self) -> str:
        numbers = " ".join(f"{self.counts[column]:>8}" for column in COLUMNS)
        return f"{self.kind:<34} {self.draws:>7} {numbers} {self.refused:>8}"

    def report(self, most: int = 10_000) -> str:
        lines = [self.row()]
        for key in sorted(self.faults, key=lambda key: (-self.seen[key], key))[:most]:
            call, what = self.faults[key]
            lines.append(f"  {key[0]}: {key[1]}, {self.seen[key]} times: {' '.join(what.split())[:220]}\n    {call}")
        return "\n".join(lines)


HEAD = f"{'kind':<34} {'draws':>7} " + " ".join(f"{column:>8}" for column in COLUMNS) + f" {'refused':>8}"


def judged(case: Case, names: dict[str, Any]) -> tuple[str, str]:
    """One of ``fine``, ``refused`` and the columns, with words."""
    try:
        result = outcome(case.call, names)
        if case.refused:
            return WRONG, f"accepted: {shown(result)}"
        if not case.undefined and (place := not_finite(result)):
            return WRONG, f"not finite: {place}"
        if case.oracle is not None and (complaint := case.oracle(result)):
            return WRONG, complaint
    except LlvlitError as error:
        message = str(error)
        if not message.strip() or not any(name in message for name in case.arguments or ("",)):
            return WRONG, f"refused without a word on any argument: {message}"
        return "refused", message
    except TooLong as error:
        return HANG, str(error)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).name == "tampering.py" or (
            isinstance(error, (NameError, AttributeError, SyntaxError)) and frames[-1].filename == "<string>"
        ):
            raise  # a mistake in the case itself
        if case.memory and (isinstance(error, MemoryError) or "allocate" in str(error)):
            return "fine", "no memory"
        return FOREIGN, f"{type(error).__name__}: {error} [{where(error)}]"
    if case.right and not same(result, right := outcome(case.right, names)):  # if the right call raises, so does this
        return WRONG, f"another result: {shown(result)} where {case.right} gives {shown(right)}"
    return "fine", ""


def where(error: BaseException) -> str:
    """Last line of ours that the error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/llvlit/" in frame.filename.replace(os.sep, "/")]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"


def outcome(call: str, names: dict[str, Any]) -> Any:
    """Result of a call; a context manager is entered and the model run inside."""
    with guarded(names["WORK"]):
        result = eval(call, names)
        if isinstance(result, AbstractContextManager) and hasattr(result, "gen"):
            with result:
                return eval("logits()", names)
        return list(result) if isinstance(result, Generator) else result


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Within seconds, within memory, in a folder, with standard output aside."""

    def stop(number: int, _frame: Any) -> None:
        raise TooLong(f"over {SECONDS_OF_CPU if number == signal.SIGPROF else SECONDS:g} s")

    old = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    place = Path.cwd()
    os.chdir(folder)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_CPU, 1.0)
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
        faulthandler.dump_traceback_later(5 * SECONDS, exit=True)  # in C code that does not return
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (MemoryError, TooLong):
        gc.collect()
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.chdir(place)


def shown(value: Any) -> str:
    try:
        return " ".join(repr(value).split())[:160]
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Named parts of a value, metadata aside."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hidden = ("metadata", "provenance", "module", "tokenizer", "batches", "after", "after_layers", "_memo")
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in hidden)
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", one) for key, one in value.items() if key not in ("metadata", "seconds"))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", one) for index, one in enumerate(value))


def not_finite(value: Any, place: str = "result", depth: int = 0) -> str:
    """Where a value holds NaN or infinity; "" if nowhere."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else np.zeros(0)
    if isinstance(value, (pd.DataFrame, pd.Series)) or depth > 8:
        return ""
    if isinstance(value, np.ndarray):
        return "" if value.dtype.kind not in "fc" or np.isfinite(value).all() else f"{place} {shown(value)}"
    if isinstance(value, Number) and not isinstance(value, (int, bool)):
        return "" if math.isfinite(float(value)) else f"{place} = {value}"  # type: ignore[arg-type]
    return next(filter(None, (not_finite(one, f"{place}.{name}", depth + 1) for name, one in parts(value))), "")


def same(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether two results say the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.detach().cpu().double().numpy(), b.detach().cpu().double().numpy()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.dtype.kind not in "fciub" or b.dtype.kind not in "fciub":
            return a.shape == b.shape and bool((a == b).all())
        scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0)) if b.dtype.kind in "fc" else 0.0
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=2e-3, atol=2e-4 * scale, equal_nan=True))
    if isinstance(a, (pd.DataFrame, pd.Series)):
        return isinstance(b, type(a)) and a.astype(str).equals(b.astype(str))
    if isinstance(a, Number) and isinstance(b, Number):
        x, y = complex(a), complex(b)  # type: ignore[call-overload]
        return bool(np.isclose(x, y, rtol=2e-3, atol=1e-9, equal_nan=True))
    left, right = list(parts(a)), list(parts(b))
    if left or right:
        return depth > 8 or (
            [name for name, _ in left] == [name for name, _ in right]
            and all(same(one, two, depth + 1) for (_, one), (_, two) in zip(left, right, strict=True))
        )
    if isinstance(a, (str, bytes, type(None), Path)) or isinstance(b, (str, bytes, type(None), Path)):
        return bool(a == b)
    return type(a) is type(b)
