"""The door: what every public argument passes through, coerced or refused by name.

Each function takes an argument's name and its value, and gives the value in the kind that the code behind the door
works with.  What does not fit raises :class:`llvlit.errors.InputError`: the argument, what came, what is expected.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar

import numpy as np

from llvlit.errors import InputError, unknown_name

Kind = TypeVar("Kind")

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value as messages show it: short, on one line, whatever its own ``repr`` does."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a foreign repr may raise anything
        text = f"<{type(value).__name__}>"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def refuse(argument: str, value: object, expected: str) -> InputError:
    """Error for a value that does not fit: ``argument=value is a KIND; expected ...``."""
    return InputError(f"{argument}={shown(value)} is of type {type(value).__name__}; expected {expected}.")


def number(
    argument: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    nonzero: bool = False,
) -> float:
    """Finite number within bounds; booleans and strings are none.

    Examples
    --------
    >>> from llvlit.checks import number
    >>> number("amplitude", np.float32(0.5), above=0)
    0.5
    >>> number("amplitude", -1, above=0)
    Traceback (most recent call last):
    llvlit.errors.InputError: amplitude=-1 must be above 0.
    """
    scalar = _scalar(value)
    if isinstance(scalar, bool) or not isinstance(scalar, Real) or value is np.ma.masked:
        raise refuse(argument, value, "a number")
    try:
        result = float(scalar)
    except OverflowError:
        raise refuse(argument, value, "a finite number") from None
    if not np.isfinite(result):
        raise InputError(f"{argument}={result} must be finite.")
    _within(argument, value, result, above=above, at_least=at_least, at_most=at_most, below=below)
    if nonzero and result == 0:
        raise InputError(f"{argument}=0 must not be zero.")
    return result


def integer(argument: str, value: object, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Whole number within bounds; booleans, strings and fractions are none.

    Examples
    --------
    >>> from llvlit.checks import integer
    >>> integer("order", 0, at_least=1)
    Traceback (most recent call last):
    llvlit.errors.InputError: order=0 must be at least 1.
    """
    result = _scalar(value)
    if isinstance(result, bool) or not isinstance(result, int):
        raise refuse(argument, value, "a whole number")
    if abs(result) >= 2**63:
        raise InputError(f"{argument}={shown(value)} is beyond 64 bits; pass a smaller number.")
    _within(argument, value, result, at_least=at_least, at_most=at_most)
    return result


def _within(
    argument: str,
    value: object,
    result: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    for holds, words, bound in (
        (above is None or result > above, "above", above),
        (at_least is None or result >= at_least, "at least", at_least),
        (at_most is None or result <= at_most, "at most", at_most),
        (below is None or result < below, "below", below),
    ):
        if not holds:
            raise InputError(f"{argument}={shown(value)} must be {words} {bound}.")


def seed(argument: str, value: object) -> int:
    """Seed of a random generator: a whole number that numpy and torch both take."""
    return integer(argument, value, at_least=0, at_most=2**63 - 1)


def flag(argument: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise refuse(argument, value, "True or False")
    return bool(value)


def choice(argument: str, value: object, valid: Collection[str], *, hint: str = "") -> str:
    """One of the valid names; the error tells the nearest."""
    if not isinstance(value, str):
        raise refuse(argument, value, f"one of {', '.join(sorted(valid))}")
    if value not in valid:
        raise InputError(unknown_name(argument, value, valid, hint=hint))
    return value


def text(argument: str, value: object, *, may_be_empty: bool = True) -> str:
    """String that can be encoded in UTF-8."""
    if not isinstance(value, str):
        raise refuse(argument, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{argument}={shown(value)} holds a lone surrogate; pass text that UTF-8 can hold.") from None
    if not (value or may_be_empty):
        raise InputError(f"{argument}='' is empty; pass some text.")
    return value


def path(argument: str, value: object) -> Path:
    """Path of a file or folder, ``~`` read as the home folder."""
    if not isinstance(value, str | os.PathLike):
        raise refuse(argument, value, "a path")
    try:
        place = os.fspath(value)
    except Exception:  # whatever a foreign object raises
        raise refuse(argument, value, "a path") from None
    if not isinstance(place, str) or not place or "\0" in place:
        raise InputError(f"{argument}={shown(value)} is no path; pass the name of a file or folder.")
    try:
        os.fsencode(place)
        result = Path(place).expanduser()
        result.stat()
    except UnicodeEncodeError:
        raise InputError(f"{argument}={shown(value)} holds a lone surrogate, which no path has.") from None
    except RuntimeError as error:  # no such user
        raise InputError(f"{argument}={shown(value)} is no path here ({error}).") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise InputError(f"{argument}={shown(value)} is no path here ({error.strerror}).") from None
    return result


def iterator(argument: str, value: object, expected: str) -> Iterator[Any]:
    """Walk through a sequence, or anything else that can be walked through, once; a string or a mapping is none."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise refuse(argument, value, expected)
    try:
        return iter(value)
    except Exception:  # of a foreign object, anything; of an array of no dimension, TypeError
        raise refuse(argument, value, expected) from None


def sequence(argument: str, value: object, expected: str) -> list[Any]:
    """All that :func:`iterator` walks through."""
    entries = iterator(argument, value, expected)
    try:
        return list(entries)
    except Exception:  # of a foreign object, anything
        raise refuse(argument, value, expected) from None


def array(
    argument: str,
    value: object,
    shape: tuple[int | str, ...] | None = None,
    *,
    positive: bool = False,
    finite: bool = True,
) -> np.ndarray:
    """Real array, float64, of a shape; finite, unless told otherwise.

    Parameters
    ----------
    shape
        Sizes; a string names a size that may be any above 0, such as ``("n_prompts", 12)``.

    Examples
    --------
    >>> from llvlit.checks import array
    >>> array("weights", [1.0, 2.0], (3,))
    Traceback (most recent call last):
    llvlit.errors.InputError: weights has shape (2,); expected (3,).
    """
    try:
        values = np.asarray(_plain(value))
        if values.dtype.kind not in "iuf":
            raise TypeError
        result = values.astype(np.float64)
    except Exception:  # whatever a foreign object raises when it is asked for its numbers
        raise refuse(argument, value, "an array of numbers") from None
    if shape is not None:
        fits = len(shape) == result.ndim and all(
            have > 0 if isinstance(want, str) else have == want for have, want in zip(result.shape, shape, strict=False)
        )
        if not fits:
            expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            raise InputError(f"{argument} has shape {result.shape}; expected ({expected}).")
    if finite and not np.isfinite(result).all():
        raise InputError(f"{argument} holds a number that is not finite; pass finite numbers.")
    if positive and not (result > 0).all():
        raise InputError(f"{argument} holds a number that is not positive; pass positive numbers.")
    return result


def _scalar(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    if not isinstance(getattr(value, "ndim", None), int) or value.ndim or getattr(value, "is_meta", False):
        return value
    return value.item()


def _plain(value: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return value.float().numpy() if str(value.dtype) == "torch.bfloat16" else value.resolve_conj().numpy()
    return value


def instance(argument: str, value: object, kind: type[Kind] | tuple[type[Kind], ...], expected: str) -> Kind:
    """An object of a kind, such as ``instance("model", model, LanguageModel, "a model, as load_model gives it")``."""
    if not isinstance(value, kind):
        raise refuse(argument, value, expected)
    return value
