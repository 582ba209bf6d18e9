"""Splits that do not leak: which texts count as the same, which must stay together, and a balanced draw."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from string import punctuation

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from llvlit.checks import instance
from llvlit.prompts import Prompts


@dataclass(frozen=True)
class Splits:
    """Disjoint, balanced prompts for directions, for surrogates, and for judging them.

    Labels alternate 0, 1, 0, 1, ... (twins stand side by side), so every even-sized head is balanced too.
    Twins share a number in ``pairs``, and no number is in two splits.

    Examples
    --------
    >>> len(splits.concept), len(splits.operating), len(splits.evaluation)
    (40, 8, 8)
    """

    concept: Prompts
    operating: Prompts
    evaluation: Prompts

    def __post_init__(self) -> None:
        for part in ("concept", "operating", "evaluation"):
            instance(part, getattr(self, part), Prompts, "prompts")


def normalized(text: str) -> str:
    """Identity of a text for duplicates: letter case, punctuation and whitespace are ignored.

    A text of punctuation alone keeps it, so that ``"!"`` and ``"?"`` stay different.

    >>> from llvlit.tasks.splits import normalized
    >>> normalized("A joy,  from start to finish!") == normalized("a joy from start to finish")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    ignored = {ord(letter): None for letter in set(folded) if _is_ignored(letter)}
    return folded.translate(ignored) or "".join(folded.split())


def _is_ignored(letter: str) -> bool:
    """Whether a letter is punctuation, a separator, or a control or format character."""
    category = unicodedata.category(letter)
    return category[0] in "PZ" or category in ("Cc", "Cf") or letter in punctuation


@dataclass(frozen=True)
class Unit:
    """Texts that must stay in one split, such as twins.

    Attributes
    ----------
    number : int
        The unit that statistics draw: prompts of one unit are not independent.
    rows : tuple of two lists of int
        Rows of label 0, and of label 1.
    """

    number: int
    rows: tuple[list[int], list[int]]


def distinct_units(texts: Sequence[str], labels: Sequence[int], groups: Sequence[int] | None = None) -> list[Unit]:
    """Units of a task's distinct texts; groups that share a text are one unit.

    Of texts that :func:`normalized` takes for the same the first stays, or none if their labels disagree.
    ``groups=None``: every text is a group of its own.

    >>> from llvlit.tasks.splits import distinct_units
    >>> [unit.rows for unit in distinct_units(["Good!", "bad", "good", "fine"], [1, 0, 1, 1], [0, 0, 1, 1])]
    [([1], [0, 3])]
    """
    first: dict[str, int] = {}
    same = [first.setdefault(normalized(text), row) for row, text in enumerate(texts)]
    conflicting = {kept for row, kept in enumerate(same) if labels[row] != labels[kept]}
    group_of = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(texts))
    links = coo_array((np.ones(len(texts), bool), (group_of, group_of[same])), shape=(len(texts), len(texts)))
    unit_of = connected_components(links, directed=False)[1][group_of]
    units: dict[int, Unit] = {}
    for row in first.values():
        if row not in conflicting:
            number = int(unit_of[row])
            units.setdefault(number, Unit(number, ([], []))).rows[labels[row]].append(row)
    return list(units.values())


def draw(units: Sequence[Unit], count: int) -> tuple[list[Unit], list[Unit]]:
    """Up to ``count`` rows of each label, by unit, and the units left untouched."""
    chosen, untouched = [], []
    missing = [count, count]
    for unit in units:
        rows = (unit.rows[0][: missing[0]], unit.rows[1][: missing[1]])
        if any(rows):
            chosen.append(Unit(unit.number, rows))
            missing = [missing[label] - len(rows[label]) for label in (0, 1)]
        else:
            untouched.append(unit)
    return chosen, untouched
