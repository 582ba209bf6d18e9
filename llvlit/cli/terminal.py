"""Results as text in a terminal: bars, sparklines, columns side by side; plain ASCII where it must be."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TextIO

import numpy as np

LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.-:=+*#"
EIGHTHS = "▏▎▍▌▋▊▉█"
NARROWEST_COLUMN = 24
GAP = "  "


def terminal_width() -> int:
    """Columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def takes_blocks(stream: TextIO | None = None) -> bool:
    """Whether the encoding of a stream (standard output unless given) has block characters."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    try:
        (LEVELS + EIGHTHS).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(
    values: Sequence[float] | np.ndarray, low: float | None = None, high: float | None = None, *, blocks: bool = True
) -> str:
    """One character a value, from the lowest level at ``low`` to the highest at ``high`` (default: of the values).

    Examples
    --------
    >>> from llvlit.cli.terminal import sparkline
    >>> sparkline([0, 1, 2, 7])
    '▁▂▃█'
    """
    levels = LEVELS if blocks else ASCII_LEVELS
    numbers = np.asarray(values, dtype=np.float64)
    bottom = numbers.min() if low is None else low
    span = (numbers.max() if high is None else high) - bottom
    places = np.rint((numbers - bottom) / (span or 1) * (len(levels) - 1)).clip(0, len(levels) - 1).astype(int)
    return "".join(levels[place] for place in places)


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
