"""Errors that explain themselves: what came in, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LlvlitError(Exception):
    """Base of every error that llvlit raises on purpose."""


class InputError(LlvlitError, ValueError):
    """An argument has the wrong value, shape or content."""


class ModelError(LlvlitError):
    """A model cannot be found, loaded, or used as a depth system."""


class NumericalError(LlvlitError):
    """A computation broke down: NaN, lost orthogonality, or a target out of reach."""


class ConceptNotVisibleError(NumericalError):
    """No state separates the classes better than permuted labels do: there is no direction to take."""


class FileError(LlvlitError):
    """A file is missing, cut short, of another version, or cannot be written."""


class CellError(LlvlitError):
    """Some cells of a study failed; the others are whole."""


class BuildError(LlvlitError):
    """A page of the book failed to execute or to build."""


def unknown_name(argument: str, value: object, valid: Iterable[str], *, hint: str = "") -> str:
    """Sentence for an unknown name: the argument, what came, the nearest valid names, all of them."""
    names = sorted(valid)
    near = get_close_matches(str(value), names, n=3, cutoff=0.5)
    sentence = f"{argument}={value!r} is not known."
    if near:
        sentence += f" Did you mean {' or '.join(repr(name) for name in near)}?"
    sentence += f" Valid: {', '.join(names)}."
    return f"{sentence} {hint}".rstrip()
