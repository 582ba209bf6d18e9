"""Labelled prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from llvlit.errors import InputError


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

    Raises
    ------
    InputError
        If there is no prompt, the lengths differ, a text is not a string, or a label is not 0 or 1.

    Examples
    --------
    >>> prompts = llvlit.Prompts(["A joy from start to finish.", "A waste."], [1, 0])
    >>> len(prompts), prompts.select([0]).texts
    (2, ('A joy from start to finish.',))
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __init__(self, texts: Iterable[str], labels: Iterable[Any]) -> None:
        for argument, value in (("texts", texts), ("labels", labels)):
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise InputError(f"{argument}={value!r} is not a sequence. Pass one entry per prompt.")
        texts, labels = tuple(texts), tuple(labels)
        if len(texts) != len(labels):
            raise InputError(f"{len(texts)} texts came with {len(labels)} labels. Pass one label per text.")
        if not texts:
            raise InputError("texts is empty. Pass at least one prompt.")
        for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
            if not isinstance(text, str):
                raise InputError(f"texts[{row}]={text!r} is not a string. Every text must be one.")
            if not is_label(label):
                raise InputError(f"labels[{row}]={label!r} is neither 0 nor 1 (1: concept present).")
        object.__setattr__(self, "texts", tuple(str(text) for text in texts))
        object.__setattr__(self, "labels", tuple(int(label) for label in labels))

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
        chosen = np.asarray(indices)
        if chosen.dtype == bool and chosen.shape != (len(self),):
            raise InputError(f"indices is a mask of shape {chosen.shape}; there are {len(self)} prompts.")
        positions = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        if not len(positions):
            raise InputError("indices selects no prompt. Select at least one.")
        if positions.dtype.kind not in "iu" or positions.min() < -len(self) or positions.max() >= len(self):
            raise InputError(f"indices must be whole numbers below {len(self)}, the number of prompts.")
        return Prompts([self.texts[i] for i in positions], [self.labels[i] for i in positions])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of texts and labels, first 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()[:16]


def length_auc(prompts: Prompts) -> float:
    """Area under the ROC curve of a classifier that sees the length in characters alone, folded to >= 0.5.

    0.5: length says nothing about the label; 1: it gives the label away.
    """
    lengths = rankdata([len(text) for text in prompts.texts])
    n_positive, n_negative = int(prompts.positive.sum()), int(prompts.negative.sum())
    if not n_positive or not n_negative:
        raise InputError(f"prompts has {n_negative} of label 0 and {n_positive} of label 1; both are needed.")
    auc = (lengths[prompts.positive].mean() - (n_positive + 1) / 2) / n_negative
    return float(max(auc, 1 - auc))
