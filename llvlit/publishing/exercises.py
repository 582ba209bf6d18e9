"""The check below an exercise: a reader puts a result into a cell and learns whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llvlit import checks
from llvlit.errors import InputError

_KINDS = {"b": "True or False", "i": "a number", "u": "a number", "f": "a number", "U": "a string"}


def check_answer(answer: object, expected: Callable[[], Any], *, tolerance: float = 0.01, hint: str = "") -> bool:
    """Whether a reader's answer is right, which it prints; it never prints the right value.

    Numbers and arrays are right where ``max(abs(answer - expected)) <= tolerance * max(abs(expected))``.  Where
    ``expected`` gives whole numbers, such as a layer or a count, or truth values, they must be the same; so must
    strings, but for capitals and spaces.

    Parameters
    ----------
    answer
        Number, truth value, string, or an array, a tensor or a list of these.  None stands where no answer is yet.
    expected
        Function without arguments that gives the right value.  It is not called while ``answer`` is None.
    tolerance
        At least 0.
    hint
        Printed after a wrong answer.

    Raises
    ------
    InputError
        If ``expected`` is no function, or gives nothing to compare with.  An answer of a wrong kind raises nothing:
        a sentence says what is asked for.

    Examples
    --------
    >>> from llvlit.publishing.exercises import check_answer
    >>> check_answer(None, lambda: 2.0)
    Put your result into `answer` and run this cell again.
    False
    >>> check_answer(2.01, lambda: 2.0)
    Right.
    True
    >>> check_answer(3, lambda: 2.0, hint="Which layer is pushed?")
    Not yet. Which layer is pushed?
    False
    """
    if not callable(expected):
        raise checks.refuse("expected", expected, "a function without arguments, such as lambda: 3 * gains.mean[5]")
    tolerance, hint = checks.number("tolerance", tolerance, at_least=0), checks.text("hint", hint)
    if answer is None:
        print("Put your result into `answer` and run this cell again.")
        return False
    right, given = _values(expected()), _values(answer)
    if right is None or not right.size or (right.dtype.kind == "f" and not np.isfinite(right).all()):
        raise InputError("expected gives no finite number, truth value or string, and no array of these.")
    if given is None or given.shape != right.shape or _KINDS[given.dtype.kind] != _KINDS[right.dtype.kind]:
        asked = _KINDS[right.dtype.kind] + (f" in each place of an array of shape {right.shape}" if right.ndim else "")
        came = f" and shape {given.shape}" if given is not None and given.ndim else ""
        print(f"Not yet: `answer` is of type {type(answer).__name__}{came}; asked for is {asked}. {hint}".rstrip())
        return False
    if right.dtype.kind == "f":
        is_right = bool(np.abs(given - right).max() <= tolerance * np.abs(right).max())
    else:
        is_right = np.array_equal(given, right)
    print("Right." if is_right else f"Not yet. {hint}".rstrip())
    return is_right


def _values(value: Any) -> np.ndarray | None:
    """Numbers, truth values or strings as an array; None for anything else."""
    try:
        values = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
        if values.dtype.kind == "U":
            values = np.array([" ".join(text.split()).casefold() for text in values.flat]).reshape(values.shape)
    except Exception:  # of a foreign object, anything
        return None
    return values if values.dtype.kind in _KINDS else None
