"""Errors that explain themselves: what came in, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LlvlitError(Exception):
    """Base of every error that llvlit raises on purpose.

    Examples
    --------
    >>> from llvlit.errors import LlvlitError
    >>> try:
    ...     llvlit.load_task("film-sentimant")
    ... except LlvlitError as error:
    ...     print(str(error).partition(" Valid:")[0])
    name='film-sentimant' is not known. Did you mean 'film-sentiment' or 'food-sentiment'?
    """


class InputError(LlvlitError, ValueError):
    """An argument has the wrong value, shape or content.

    Examples
    --------
    >>> llvlit.minimum_energy(np.ones(3), float("nan"))
    Traceback (most recent call last):
    llvlit.errors.InputError: target=nan must be finite.
    """


class ModelError(LlvlitError):
    """A model cannot be found, loaded, or used as a depth system.

    Examples
    --------
    >>> llvlit.load_model("./no-such-folder")
    Traceback (most recent call last):
    llvlit.errors.ModelError: There is no model folder './no-such-folder'.
    """


class NumericalError(LlvlitError):
    """A computation broke down: NaN, lost orthogonality, or a target out of reach.

    Examples
    --------
    >>> llvlit.minimum_energy(np.zeros(3), 1.0)
    Traceback (most recent call last):
    llvlit.errors.NumericalError: All gains are zero: no input moves the output, ...
    """


class ConceptNotVisibleError(NumericalError):
    """No state separates the classes better than permuted labels do: there is no direction to take.

    Examples
    --------
    >>> from llvlit.method.concepts import directions_of_states
    >>> directions_of_states(torch.ones(4, 1, 2), llvlit.Prompts(["a", "b", "c", "d"], [0, 0, 1, 1]))
    Traceback (most recent call last):
    llvlit.errors.ConceptNotVisibleError: No state separates the classes better than permuted labels do: ...
    """


class FileError(LlvlitError):
    """A file is missing, cut short, of another version, or cannot be written.

    Examples
    --------
    >>> llvlit.LLV.load("no-such-file.safetensors")
    Traceback (most recent call last):
    llvlit.errors.FileError: ...
    """


class CellError(LlvlitError):
    """A cell of a study failed, or some did; the others are whole."""


class BuildError(LlvlitError):
    """A page of the book failed to execute or to build."""


def unknown_name(argument: str, value: object, valid: Iterable[str], *, hint: str = "") -> str:
    """Sentence for an unknown name: the argument, what came, the nearest valid names, all of them."""
    names = sorted(valid)
    came = str(value)[:80]
    near = get_close_matches(came, names, n=3, cutoff=0.5)
    sentence = f"{argument}={came!r} is not known."
    if near:
        sentence += f" Did you mean {' or '.join(repr(name) for name in near)}?"
    sentence += f" Valid: {', '.join(names)}."
    return f"{sentence} {hint}".rstrip()
