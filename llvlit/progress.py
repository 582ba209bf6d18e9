"""Progress bars: shown in a terminal, and only for what takes longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import RLock
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Bar(tqdm):
    """A bar of tqdm with one lock; tqdm's own are two, and an interrupt between them leaves one taken for good."""


Bar.set_lock(RLock())


def progress(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """The same items, with a bar on standard error while they take longer than two seconds."""
    return iter(Bar(items, desc=description, total=total, delay=2.0, leave=False, disable=None))
