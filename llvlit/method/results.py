"""What every result carries besides its numbers: what they are about, which directions were borrowed, and its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from llvlit.checks import array, choice, instance, integer, number
from llvlit.checks import path as checked_path
from llvlit.errors import FileError, InputError
from llvlit.files import load_tensors, save_tensors
from llvlit.provenance import environment

ARRAYS = ("per_prompt", "overlaps", "weights")
"""Parts that are written as tensors, unless they are None."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result, which is printed with the states whose directions it borrowed.

    Attributes
    ----------
    borrowed : tuple of int, or of several concepts a tuple of them
        Layers that were pushed, or states that were read, along the direction of a later state.
    metadata : dict
        Model and prompts, by name, fingerprint and number.
    """

    borrowed: tuple[Any, ...] = ()
    metadata: dict[str, Any] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        return self._about() + borrowing(self.borrowed)

    def _about(self) -> str:
        raise NotImplementedError


AnyResult = TypeVar("AnyResult", bound=Result)


def borrowing(borrowed: Sequence[Any]) -> str:
    """What a printed result adds where it used borrowed directions: which states had none of their own."""
    is_of_several = any(isinstance(each, tuple) for each in borrowed)
    sets = {f" of concept {i}": each for i, each in enumerate(borrowed)} if is_of_several else {"": borrowed}
    named = [", ".join(map(str, states)) + whose for whose, states in sets.items() if states]
    return f"; borrowed directions: {'; '.join(named)}" if named else ""


def numbers_of(argument: str, value: object, *, last: int | None = None) -> tuple[int, ...]:
    """Whole numbers, such as those of borrowed states or of pairs, as a tuple; with ``last``, from 0 to it."""
    entries = instance(argument, value, (tuple, list), "a tuple of whole numbers")
    return tuple(integer(argument, entry, at_least=None if last is None else 0, at_most=last) for entry in entries)


def units_of(pairs: object, n_prompts: int) -> tuple[int, ...]:
    """The independent unit of each prompt; every prompt its own where none are given."""
    units = numbers_of("pairs", pairs)
    if units and len(units) != n_prompts:
        raise InputError(f"pairs has {len(units)} entries; there are {n_prompts} prompts.")
    return units or tuple(range(n_prompts))


def measured_parts(result: Any, shape: tuple[int | str, ...], kinds: tuple[str, str]) -> dict[str, Any]:
    """Checked parts of what pushes measured, prompt by prompt, or derivatives told (the second of the kinds)."""
    per_prompt = array("per_prompt", result.per_prompt, shape)
    amplitude = number("amplitude", result.amplitude, at_least=0)
    if (amplitude == 0) != (choice("kind", result.kind, kinds) == kinds[1]):
        raise InputError(
            f"amplitude={amplitude} of {result.kind} gains: it is 0 for {kinds[1]} ones and for no others."
        )
    return {"per_prompt": per_prompt, "amplitude": amplitude, "pairs": units_of(result.pairs, len(per_prompt))}


def settle(result: Result, parts: Mapping[str, Any], *, last: int | None = None) -> None:
    """Put checked parts in the places of what was given; with ``last``, borrowed states are from 0 to it."""
    instance("metadata", result.metadata, dict, "a dict")
    if "borrowed" not in parts:
        parts = {**parts, "borrowed": numbers_of("borrowed", result.borrowed, last=last)}
    for name, value in parts.items():
        object.__setattr__(result, name, value)


def save_result(result: Result, path: str | Path, kind: str) -> None:
    """Write a result as safetensors, and what it was computed with; FileError if it cannot be written."""
    parts = {each.name: getattr(result, each.name) for each in fields(result)}
    tensors = {name: parts.pop(name) for name in ARRAYS if parts.get(name) is not None}
    own = {_own_kind(kind): parts.pop("kind")} if "kind" in parts else {}
    header = {"kind": kind, **own, **parts}
    header["metadata"] = {**environment(), **result.metadata}
    save_tensors(checked_path("path", path), tensors, header)


def load_result(form: type[AnyResult], path: str | Path, kind: str) -> AnyResult:
    """Read what :func:`save_result` wrote; FileError if it is cut short, changed, of another kind or version."""
    tensors, header = load_tensors(checked_path("path", path), kind=kind)
    with own_content(path):
        parts: dict[str, Any] = {
            each.name: tensors[each.name].numpy()
            if each.name in ARRAYS and each.name not in header
            else header[_own_kind(kind) if each.name == "kind" else each.name]
            for each in fields(form)
        }
        return form(**parts)


def _own_kind(kind: str) -> str:
    """Name under which a file of a kind holds the result's own ``kind``, measured or not."""
    return kind.split()[-1]


@contextmanager
def own_content(path: str | Path) -> Iterator[None]:
    """Inside, what a file of ours holds becomes a result; where it does not fit, the file is to blame."""
    try:
        yield
    except (InputError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} does not hold a whole result ({error}). Compute it again.") from error
