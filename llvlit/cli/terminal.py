"""Text in a terminal: the one writer, bars, sparklines, columns side by side; plain ASCII where it must be."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, TextIO

from llvlit.errors import FileError

LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.-:=+*#"
EIGHTHS = "▏▎▍▌▋▊▉█"
NARROWEST_COLUMN = 24
GAP = "  "


def show(options: argparse.Namespace, data: Any, text: str) -> None:
    """Print a command's result: the text, or under ``--json`` the data, with null for what is no finite number."""
    write(json.dumps(_finite(data), indent=1, allow_nan=False) if options.json else text)


def write(text: str) -> None:
    """Print a text and what was printed before it, with ``?`` for every character that the encoding lacks.

    Raises
    ------
    FileError
        If standard output is closed, or takes no more, as on a full disk.
    BrokenPipeError
        If whoever reads has left.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise FileError("Standard output is closed: nothing was printed. What was written to files is whole.")
    encoding = sys.stdout.encoding or "utf-8"
    with printing() as stream:
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")


@contextmanager
def printing() -> Iterator[TextIO]:
    """Standard output, flushed at the end; errors as :func:`write` raises them."""
    try:
        try:
            yield sys.stdout
        finally:  # on the way out of --help, too
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # a stream without a file; else what is left is not tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise FileError(
            f"Standard output could not be written ({error.strerror}). What was written to files is whole."
        ) from error


def complain(text: str) -> None:
    """Print a line on standard error, if there is one that takes it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def terminal_width() -> int:
    """Columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def encodes_blocks(stream: TextIO | None = None) -> bool:
    """Whether the encoding of a stream (standard output unless given) has block characters."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    try:
        (LEVELS + EIGHTHS).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(
    values: Sequence[float], low: float | None = None, high: float | None = None, *, blocks: bool = True
) -> str:
    """One character a value, from the lowest level at ``low`` to the highest at ``high`` (default: of the values).

    Examples
    --------
    >>> from llvlit.cli.terminal import sparkline
    >>> sparkline([0, 1, 2, 7])
    '▁▂▃█'
    """
    levels = LEVELS if blocks else ASCII_LEVELS
    bottom = min(values) if low is None else low
    span = ((max(values) if high is None else high) - bottom) or 1.0
    places = (round((value - bottom) / span * (len(levels) - 1)) for value in values)
    return "".join(levels[min(max(place, 0), len(levels) - 1)] for place in places)


def bar(value: float, largest: float, width: int, *, blocks: bool = True) -> str:
    """A bar as long as |value| in units of ``largest`` (positive) over ``width``.

    A minus leads a negative one; one that would be longer than ``width`` ends in an arrow.

    Examples
    --------
    >>> from llvlit.cli.terminal import bar
    >>> bar(3.0, 4.0, 8)
    '██████'
    >>> bar(-9.0, 4.0, 8, blocks=False)
    '-########>'
    """
    eighths = round(8 * width * min(abs(value) / largest, 1.0))
    whole, rest = divmod(eighths, 8)
    drawn = "█" * whole + (EIGHTHS[rest - 1] if rest else "") if blocks else "#" * round(eighths / 8)
    return ("-" if value < 0 else "") + drawn + (">" if abs(value) > largest else "")


def side_by_side(texts: Mapping[str, str], width: int) -> str:
    """Titled texts in columns of equal width; one below the other where columns would be too narrow.

    No line is wider than ``width``, as long as that is 8 or more.
    """
    room = (width - len(GAP) * (len(texts) - 1)) // len(texts)
    if room < NARROWEST_COLUMN:
        parts = [
            "\n".join([title[:width], "-" * min(len(title), width), *_wrapped(text, width)])
            for title, text in texts.items()
        ]
        return "\n\n".join(parts)
    columns = [[title[:room], "-" * room, *_wrapped(text, room)] for title, text in texts.items()]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(GAP.join(cell.ljust(room) for cell in row).rstrip() for row in rows)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, its own line breaks kept, at least one."""
    return [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]]
