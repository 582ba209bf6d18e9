"""Labelled prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llvlit.checks import array, integer, sequence, shown, text
from llvlit.errors import InputError

ENTRIES = "a sequence with one entry per prompt"


def is_label(value: Any) -> bool:
    """Whether a value is 0 or 1 (or equal to one of them, such as True and 1.0)."""
    try:
        return not isinstance(value, str) and bool(value in (0, 1))
    except (TypeError, ValueError, RuntimeError):
        return False


@dataclass(frozen=True, init=False)
class Prompts:
    """Labelled prompts: any two sequences of equal length, kept as tuples.

    One class alone is allowed here (what needs both says so), and so is the empty string.

    Attributes
    ----------
    texts : tuple of str, length n_prompts
    labels : tuple of int, length n_prompts
        1 where the concept is present, else 0.
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt: twins, which differ in the concept alone, share a number.  Intervals
        resample units.  By default every prompt is its own.
    suffix : str
        What a task has appended to every text, told for the record; the texts end in it.

    Raises
    ------
    InputError
        If there is no prompt, the lengths differ, a text is not a string or does not end in the suffix, or a label is
        not 0 or 1.

    Examples
    --------
    >>> prompts = llvlit.Prompts(["A joy from start to finish.", "A waste."], [1, 0])
    >>> len(prompts), prompts.select([0]).texts
    (2, ('A joy from start to finish.',))
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    pairs: tuple[int, ...]
    suffix: str

    def __init__(
        self, texts: Iterable[str], labels: Iterable[Any], pairs: Iterable[int] | None = None, *, suffix: str = ""
    ) -> None:
        texts, labels = sequence("texts", texts, ENTRIES), sequence("labels", labels, ENTRIES)
        pairs = sequence("pairs", range(len(texts)) if pairs is None else pairs, ENTRIES)
        if not len(texts) == len(labels) == len(pairs):
            raise InputError(
                f"{len(texts)} texts came with {len(labels)} labels and {len(pairs)} pairs. Pass one of each per text."
            )
        if not texts:
            raise InputError("texts is empty. Pass at least one prompt.")
        for row, label in enumerate(labels):
            if not is_label(label):
                raise InputError(f"labels[{row}]={shown(label)} is neither 0 nor 1 (1: concept present).")
        object.__setattr__(self, "texts", tuple(str(text(f"texts[{row}]", entry)) for row, entry in enumerate(texts)))
        object.__setattr__(self, "suffix", text("suffix", suffix))
        for row, entry in enumerate(self.texts):
            if not entry.endswith(suffix):
                raise InputError(f"texts[{row}]={shown(entry)} does not end in suffix={suffix!r}.")
        object.__setattr__(self, "labels", tuple(int(label) for label in labels))
        object.__setattr__(self, "pairs", tuple(integer(f"pairs[{row}]", pair) for row, pair in enumerate(pairs)))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def positive(self) -> np.ndarray:
        """Mask of label 1, ``(n_prompts,)`` bool."""
        return np.array(self.labels) == 1

    @property
    def negative(self) -> np.ndarray:
        """Mask of label 0, ``(n_prompts,)`` bool."""
        return np.array(self.labels) == 0

    def select(self, indices: Sequence[int] | np.ndarray) -> Prompts:
        """Prompts at the given positions, in that order; or where a mask, (n_prompts,) bool, is true."""
        entries = sequence("indices", indices, ENTRIES)
        if entries and all(isinstance(entry, bool | np.bool_) for entry in entries):
            if len(entries) != len(self):
                raise InputError(f"indices is a mask of length {len(entries)}; there are {len(self)} prompts.")
            chosen = np.flatnonzero(entries)
        else:
            chosen = np.array([integer(f"indices[{place}]", entry) for place, entry in enumerate(entries)], dtype=int)
        if not len(chosen):
            raise InputError("indices selects no prompt. Select at least one.")
        if chosen.min() < -len(self) or chosen.max() >= len(self):
            raise InputError(f"indices must be whole numbers below {len(self)}, the number of prompts.")
        rows = [int(position) for position in chosen]
        texts, labels = [self.texts[row] for row in rows], [self.labels[row] for row in rows]
        return Prompts(texts, labels, [self.pairs[row] for row in rows], suffix=self.suffix)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of texts and labels, first 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()[:16]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the first axis, equal values at their mean rank; ``scipy.stats`` takes long to import.

    Examples
    --------
    >>> from llvlit.prompts import ranks
    >>> ranks(np.array([5.0, 2.0, 5.0, 9.0]))
    array([2.5, 1. , 2.5, 4. ])
    """
    order = np.argsort(values, axis=0)
    ordered = np.take_along_axis(values, order, axis=0)
    number = np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
    is_new = np.insert(ordered[1:] != ordered[:-1], 0, True, axis=0)
    is_last = np.append(is_new[1:], np.ones_like(is_new[:1]), axis=0)
    first = np.maximum.accumulate(np.where(is_new, number, 0), axis=0)
    last = np.minimum.accumulate(np.where(is_last, number, len(values))[::-1], axis=0)[::-1]
    result = np.empty(values.shape)
    np.put_along_axis(result, order, (first + last) / 2 + 1, axis=0)
    return result


def auc(scores: np.ndarray, labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Area under the ROC curve of scores ``(n_prompts, ...)``, along the first axis; 0.5 is chance.

    Computed from ranks (Mann and Whitney), ties counted half.
    """
    labels = array("labels", labels, ("n_prompts",))
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    if len(labels) != len(scores) or not n_positive or not n_negative:
        raise InputError(
            f"labels has {n_negative} of label 0 and {n_positive} of label 1 for {len(scores)} prompts; a ROC curve "
            "needs both, and one label per prompt."
        )
    rank_sums = ranks(np.asarray(scores))[labels == 1].sum(axis=0)
    return np.asarray((rank_sums - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def length_auc(prompts: Prompts) -> float:
    """Area under the ROC curve of a classifier that sees the length in characters alone, folded to >= 0.5.

    0.5: length says nothing about the label; 1: it gives the label away.
    """
    area = float(auc(np.array([len(text) for text in prompts.texts]), prompts.labels))
    return max(area, 1 - area)
