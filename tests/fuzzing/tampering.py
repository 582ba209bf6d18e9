"""Files changed: cut, flipped, overwritten, one key of a document changed; each change is a call that can be pasted."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st


def cut(data: bytes, at: int) -> bytes:
    """The first bytes."""
    return data[:at]


def flip(data: bytes, bit: int) -> bytes:
    """One bit turned."""
    at, shift = divmod(bit % (8 * len(data)), 8)
    return data[:at] + bytes([data[at] ^ (1 << shift)]) + data[at + 1 :]


def over(data: bytes, at: int, new: bytes) -> bytes:
    """Some bytes overwritten."""
    return data[:at] + new + data[at + len(new) :]


def insert(data: bytes, at: int, new: bytes) -> bytes:
    """Some bytes more."""
    return data[:at] + new + data[at:]


def put(document: Any, place: Sequence[str | int], value: Any) -> Any:
    """A document with another value at a place."""
    changed = copy.deepcopy(document)
    if not place:
        return value
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


def drop(document: Any, place: Sequence[str | int]) -> Any:
    """A document without one place."""
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    del parent[place[-1]]
    return changed


def header(data: bytes, place: Sequence[str | int], value: Any) -> bytes:
    """A safetensors file with another value in its header; below ``llvlit`` in the JSON that it holds."""
    size = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + size])
    if place[:2] == ["__metadata__", "llvlit"] and len(place) > 2:
        inner = put(json.loads(document["__metadata__"]["llvlit"]), place[2:], value)
        document["__metadata__"]["llvlit"] = json.dumps(inner)
    else:
        document = put(document, place, value)
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def places(document: Any, place: tuple[str | int, ...] = (), depth: int = 6) -> Iterator[tuple[str | int, ...]]:
    """Every place of a document; of a long list the first and last entries alone."""
    if place:
        yield place
    if depth and isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*place, key), depth - 1)
    elif depth and isinstance(document, list):
        for index in sorted({0, 1, len(document) - 1} & set(range(len(document)))):
            yield from places(document[index], (*place, index), depth - 1)


ODD_JSON = (
    *("None", "True", "False", "0", "1", "-1", "3", "7", "2**63", "10**30", "0.5", "-0.5", "1e-30", "1e300"),
    *("float('nan')", "float('inf')", "''", "'abc'", "'../../x'", "'/dev/zero'", "'a' * 10_000", "'\\0'", "'gelu'"),
    *("[]", "[1]", "[None]", "['a', 'b']", "{}", "{'a': 1}", "[[[]]]", "'\\ud800'", "'0'"),
)
BYTES = (b"\0", b"\xff", b"\xfe\xff", b"\n", b'"', b"{", b"}}", b",", b"NaN", b"-", b"9", b"e308", b"\xef\xbb\xbf")

WHOLE = (
    *("{} * 2", "b''", "b'\\xff' * 100", "{}[::-1]", "b'[' * 100_000", "b'\\xef\\xbb\\xbf' + {}", "{} + b'\\0'"),
    *("{}.replace(b'0', b'1')", "{}.replace(b'1', b'NaN')", "b'{{\"a\":' * 9999"),
)


@st.composite
def document_changes(draw: st.DrawFn, name: str, document: Any) -> str:
    """Source of a document ``name`` with one place changed, dropped, or a key more."""
    place = list(draw(st.sampled_from(list(places(document)))))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return f"drop({name}, {place})"
    if kind == 1:
        return f"put({name}, {[*place[:-1], 'other'] if isinstance(place[-1], str) else place}, 1)"
    return f"put({name}, {place}, {draw(st.sampled_from(ODD_JSON))})"


@st.composite
def byte_changes(draw: st.DrawFn, name: str, size: int) -> str:
    """Source of the bytes ``name``, ``size`` of them, with one change."""
    at = draw(st.one_of(st.integers(0, size - 1), st.integers(0, min(size - 1, 400))))
    kind = draw(st.sampled_from(("cut", "flip", "over", "insert", "whole")))
    if kind == "cut":
        return f"cut({name}, {at})"
    if kind == "flip":
        return f"flip({name}, {8 * at + draw(st.integers(0, 7))})"
    if kind == "whole":
        return draw(st.sampled_from(WHOLE)).format(name)
    return f"{kind}({name}, {at}, {draw(st.sampled_from(BYTES))!r})"
