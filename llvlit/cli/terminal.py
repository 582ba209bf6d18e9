"""Text in a terminal: the one writer, columns, bars and sparklines; plain ASCII where it must be."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from types import MappingProxyType
from typing import Any, TextIO

from llvlit.errors import FileError

LEVELS = "▁▂▃▄▅▆▇█"
EIGHTHS = "▏▎▍▌▋▊▉█"
PLAIN = str.maketrans(LEVELS[:-1] + EIGHTHS[3:], "_.-:=+*" + "#####", EIGHTHS[:3])
"""Block characters in ASCII, for an encoding that has none."""

NARROWEST_COLUMN = 24
UNWRAPPED = 10_000


def show(options: argparse.Namespace, data: Any, text: str) -> None:
    """Print a command's result: the text, or under ``--json`` the data, with null for what is no finite number.

    Data may hold dataclasses, arrays and paths.
    """
    if options.json:
        from msgspec.json import encode

        plain = encode(data, enc_hook=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        text = json.dumps(json.loads(plain), indent=1)  # in ASCII
    write(text)


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
    if "?" in LEVELS.encode(encoding, "replace").decode(encoding):
        text = text.translate(PLAIN)
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


def terminal_width() -> int:
    """Columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def columns(
    rows: Sequence[Mapping[str, object]], formats: Mapping[str, str] = MappingProxyType({}), width: int | None = None
) -> str:
    """Rows in columns under their titles; given a width, all equally wide, and what does not fit is wrapped.

    Examples
    --------
    >>> from llvlit.cli.terminal import columns
    >>> print(columns([{"model": "small", "size": 2}, {"model": "medium", "size": 3}], {"size": "{:.1f}"}))
    model   size
    small   2.0
    medium  3.0
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=width is not None)
    for title in next(iter(rows), {}):
        table.add_column(Text(title), overflow="fold", ratio=1)
    for row in rows:
        table.add_row(*(Text(formats.get(title, "{}").format(cell)) for title, cell in row.items()))
    drawn = StringIO()
    Console(file=drawn, width=width or UNWRAPPED, color_system=None, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())


def side_by_side(texts: Mapping[str, str], width: int) -> str:
    """Titled texts in columns of equal width; one below the other where columns would be too narrow."""
    if width < NARROWEST_COLUMN * len(texts):
        return "\n\n".join(columns([{title: text}], width=width) for title, text in texts.items())
    return columns([texts], width=width)


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """One character a value, from the lowest level at ``low`` to the highest at ``high`` (default: of the values).

    Examples
    --------
    >>> from llvlit.cli.terminal import sparkline
    >>> sparkline([0, 1, 2, 7])
    '▁▂▃█'
    """
    bottom = min(values) if low is None else low
    span = ((max(values) if high is None else high) - bottom) or 1.0
    places = (round((value - bottom) / span * (len(LEVELS) - 1)) for value in values)
    return "".join(LEVELS[min(max(place, 0), len(LEVELS) - 1)] for place in places)


def bar(value: float, largest: float, width: int) -> str:
    """A bar as long as |value| in units of ``largest`` (positive) over ``width``.

    A minus leads a negative one; one that would be longer than ``width`` ends in an arrow.

    Examples
    --------
    >>> from llvlit.cli.terminal import bar
    >>> bar(3.0, 4.0, 8)
    '██████'
    >>> bar(-9.0, 4.0, 8)
    '-████████>'
    """
    whole, rest = divmod(round(8 * width * min(abs(value) / largest, 1.0)), 8)
    eighths = EIGHTHS[rest - 1] if rest else ""
    return ("-" if value < 0 else "") + "█" * whole + eighths + (">" if abs(value) > largest else "")
