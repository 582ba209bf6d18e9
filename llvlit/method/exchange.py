"""Steering vectors in the formats of other runtimes: llama.cpp's GGUF, repeng's object, EasySteer's JSON.

All three add a vector to the *output of a block*, and count blocks from 0: what is pushed before layer l is theirs at
block l - 1.  Nothing can be told to them of a push before layer 0.  llama.cpp takes no vector for block 0 either, and
it and repeng push every token; EasySteer can push the last one alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llvlit import checks
from llvlit.checks import array, choice, flag, instance, integer, number, shown, text
from llvlit.engine.gguf import read_header
from llvlit.errors import FileError, InputError, ModelError
from llvlit.files import foreign, read_json, write_atomically, write_json
from llvlit.method.gains import POSITIONS

FORMATS = ("gguf", "repeng", "easysteer")

FIRST_LAYER = {"gguf": 2, "repeng": 1, "easysteer": 1}
"""The lowest layer before which each format can push."""

ARCHITECTURE, UNKNOWN = "controlvector", "unknown"
"""What a GGUF file calls itself; its model's name where none is known, since repeng reads no file without one."""

CLAUSES: dict[str, dict[str, object]] = {
    "all": {"prompt": "all", "generation": "all"},
    "last": {"prompt_positions": [-1], "generation": "all"},
}
"""How EasySteer names the tokens that :func:`llvlit.steer` pushes."""

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class SteeringVectors:
    """What is added to the residual stream before each layer, ready to be written for another runtime or steered with.

    Attributes
    ----------
    pushes : (n_layers, hidden_size) float64 array
        u_l v_l; a row of zeros where nothing is pushed.
    positions : str
        ``last`` real token of each pass, or ``all``, as :func:`llvlit.steer` takes them.
    model : str
        The model's type, such as ``llama``, which formats carry as a hint.
    metadata : dict
        Whatever JSON holds; of the formats, GGUF alone has a place for it.

    Raises
    ------
    InputError
        If an entry is not finite, or the metadata are no JSON.

    Examples
    --------
    >>> pushes = np.zeros((model.n_layers, model.hidden_size))
    >>> pushes[2, 0] = -3.0
    >>> vectors = llvlit.SteeringVectors(pushes, positions="all")
    >>> float(vectors.inputs[2]), float(vectors.directions[2, 0])
    (3.0, -1.0)
    >>> with llvlit.steer(model, vectors.directions, vectors.inputs, positions=vectors.positions):
    ...     pass
    """

    pushes: np.ndarray
    positions: str = "all"
    model: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pushes", array("pushes", self.pushes, ("n_layers", "hidden_size")))
        choice("positions", self.positions, POSITIONS)
        text("model", self.model)
        instance("metadata", self.metadata, dict, "a dictionary")
        try:
            json.dumps(self.metadata, allow_nan=False)
        except Exception as error:  # of a foreign object, anything
            raise InputError(f"metadata={shown(self.metadata)} cannot be written as JSON ({error}).") from None

    @property
    def inputs(self) -> np.ndarray:
        """Length of each push, ``(n_layers,)``: the inputs that :func:`llvlit.steer` takes."""
        largest = np.abs(self.pushes).max(axis=1)  # so that squares neither vanish nor overflow
        scaled = self.pushes / np.where(largest > 0, largest, 1.0)[:, None]
        return np.asarray(largest * np.linalg.norm(scaled, axis=1))

    @property
    def directions(self) -> np.ndarray:
        """Unit vectors ``(n_layers + 1, hidden_size)`` along the pushes; any will do where there is none."""
        unit = np.eye(1, self.pushes.shape[1]).repeat(len(self.pushes) + 1, axis=0)
        pushed, lengths = self.pushes.any(axis=1), self.inputs
        unit[:-1][pushed] = self.pushes[pushed] / lengths[pushed, None]
        return unit

    def control_vector(self) -> dict[str, Any]:
        """The two arguments of ``repeng.ControlVector``, with which repeng pushes as these do; numbers in float32.

        repeng acts on the blocks that its ``ControlModel`` was given, which must be those pushed here, or all.

        Raises
        ------
        InputError
            If there is a push before layer 0, or the last token alone is pushed: repeng knows neither.
        """
        return {"model_type": self.model or UNKNOWN, "directions": _blocks(self, "repeng")}


def export_vectors(vectors: SteeringVectors, path: str | Path, *, format: str = "gguf") -> None:
    """Write steering vectors for another runtime, whole or not at all; a file of such vectors is replaced.

    Parameters
    ----------
    format
        ``gguf``: a control vector for llama.cpp, which repeng and EasySteer read too.  Tensors ``direction.N``, N
        from 1 to n_layers - 1, in float32, zeros among them.  ``repeng``: the same with ``direction.0``, which
        llama.cpp refuses, where there is a push before layer 1.  ``easysteer``: a steering spec of EasySteer 2 in
        JSON, its numbers within it; the only one that can say ``positions="last"``.

    Raises
    ------
    InputError
        If the format cannot say a push, or nothing is pushed, or a number is beyond float32, or a push below it.
    FileError
        If the file cannot be written, or is there already and holds something else than steering vectors.

    Examples
    --------
    >>> pushes = np.zeros((model.n_layers, model.hidden_size))
    >>> pushes[2, 0] = -3.0
    >>> vectors = llvlit.SteeringVectors(pushes, positions="last")
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     llvlit.export_vectors(vectors, f"{folder}/push.json", format="easysteer")
    ...     print(llvlit.import_vectors(f"{folder}/push.json").positions)
    last
    >>> llvlit.export_vectors(vectors, "push.gguf")
    Traceback (most recent call last):
    llvlit.errors.InputError: positions='last' cannot be told in the format gguf, which pushes every token. ...
    """
    instance("vectors", vectors, SteeringVectors, "steering vectors; to write a recommendation, use plan.export(path)")
    blocks = _blocks(vectors, choice("format", format, FORMATS))
    path = checks.path("path", path)
    check_replaceable(path)
    if format == "easysteer":
        write_json(path, _spec(vectors, blocks))
    else:
        write_atomically(path, lambda temporary: _write_gguf(temporary, vectors, blocks))


def check_replaceable(path: Path) -> None:
    """FileError if steering vectors cannot be written there: something else is there, or a file is in the way."""
    there = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    if not (os.path.isfile(there) if there == path else os.path.isdir(there)):
        kind = "file" if there == path else "folder"
        raise FileError(f"{path} cannot be written: {there} is no {kind}. Name another file.")
    if path.is_file() and path.stat().st_size:
        try:
            _read(path)
        except FileError as error:
            raise FileError(f"{path} is there already, and holds no steering vectors. Name another file.") from error


def import_vectors(
    source: str | Path | object, *, n_layers: int | None = None, shifted: bool = False
) -> SteeringVectors:
    """Steering vectors from a file of one of the formats, which is recognized, or from repeng's object.

    A vector at the output of the last block has no place here, before which there is no layer: it is left out, with a
    warning.

    Parameters
    ----------
    source
        A GGUF control vector, a steering spec of EasySteer 2 with its numbers within it, or an object that holds
        ``model_type`` and ``directions``, as repeng's ``ControlVector`` does.
    n_layers
        Of the model; by default one more than the last block, if there is a vector for every block but the first.
    shifted
        Lower all numbers by one.  llama.cpp's own generator of control vectors numbers them one too high: what it
        measured at the output of block N - 1 is its ``direction.N``, which llama.cpp adds to the output of block N.
        A file that is written as it writes them is told by a warning.

    Raises
    ------
    FileError
        If it is cut short, holds something else, a number that is not finite, or what no inputs of
        :func:`llvlit.steer` can do.
    InputError
        If the number of layers cannot be told, or does not fit.

    Examples
    --------
    >>> directions = {layer: np.ones(model.hidden_size) for layer in range(1, 3)}
    >>> vectors = llvlit.import_vectors({"model_type": "gpt2", "directions": directions}, n_layers=4)
    >>> [layer for layer in range(4) if vectors.pushes[layer].any()]
    [2, 3]
    """
    shifted = flag("shifted", shifted)
    if n_layers is not None:
        n_layers = integer("n_layers", n_layers, at_least=1, at_most=MOST_LAYERS)
    if isinstance(source, str | os.PathLike):
        name, found = str(source), _read(checks.path("source", source))
    else:
        name, found = "source", _held(source)
    if found.from_generator and not shifted:
        warnings.warn(
            f"{name} is written as llama.cpp's own generator writes: each of its numbers is one higher than that of "
            "the block whose output was measured. It is read as llama.cpp acts. Pass shifted=True to push where it "
            "was measured.",
            stacklevel=2,
        )
    last = max(found.blocks)
    if n_layers is None:
        if not last or sum(block > 0 for block in found.blocks) < last:
            raise InputError(
                f"n_layers=None: {name} has vectors for some blocks alone, up to {last}, which does not tell how many "
                "layers the model has. Pass n_layers."
            )
        n_layers = last + 1
    if last >= n_layers:
        raise InputError(f"n_layers={n_layers}, but {name} has a vector for block {last}, counted from 0.")
    states = np.zeros((n_layers + 1, len(found.blocks[last])))
    for block, vector in found.blocks.items():
        states[block + (0 if shifted else 1)] = vector
    if states[-1].any():
        warnings.warn(
            f"{name} pushes after the last of {n_layers} layers, where nothing is pushed here: that is left out. Pass "
            "n_layers if the model has more.",
            stacklevel=2,
        )
    return SteeringVectors(states[:-1], found.positions, found.model, found.metadata)


def _blocks(vectors: SteeringVectors, format: str) -> dict[int, np.ndarray]:
    """A float32 vector for each block from the first that is pushed, or from 1, to the last."""
    first, positions = FIRST_LAYER[format], vectors.positions if format == "easysteer" else "all"
    again = f"Plan again: recommend(..., layers=({first}, {len(vectors.pushes) - 1}), positions={positions!r})."
    if vectors.positions != positions:
        raise InputError(
            f"positions={vectors.positions!r} cannot be told in the format {format}, which pushes every token. {again}"
        )
    pushed = np.flatnonzero(vectors.pushes.any(axis=1))
    if not len(pushed):
        raise InputError("pushes holds zeros alone: there is nothing to export.")
    if pushed[0] < first:
        early = ", ".join(str(layer) for layer in pushed if layer < first)
        raise InputError(
            f"pushes before layer {early} cannot be told in the format {format}, which begins at layer {first}. {again}"
        )
    with np.errstate(over="ignore"):
        rows = vectors.pushes.astype(np.float32)
    if not np.isfinite(rows).all():
        raise InputError(f"pushes reaches {np.abs(vectors.pushes).max():.3g}, which is beyond float32. Lower it.")
    largest = np.abs(vectors.pushes).max(axis=1)
    if faint := [layer for layer in pushed.tolist() if largest[layer] < np.finfo(np.float32).tiny]:
        raise InputError(
            f"pushes before layer {faint[0]} reaches {largest[faint[0]]:.3g}, which is below float32. Raise it, or "
            "leave it out."
        )
    none = np.zeros_like(rows[0])  # after the last layer
    return {layer - 1: row for layer, row in enumerate([*rows, none]) if layer >= min(2, pushed[0])}


@dataclass(frozen=True)
class _Found:
    """What was read: a vector by the block at whose output it is added, and what was told of it."""

    blocks: dict[int, np.ndarray]
    positions: str = "all"
    model: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    from_generator: bool = False


def _read(path: Path) -> _Found:
    """What a file holds; FileError if that is no steering vector."""
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    with foreign(path, "steering vectors"), path.open("rb") as file:
        start = file.read(4)
    try:
        found = _read_gguf(path) if start == b"GGUF" else _read_spec(path)
    except (InputError, ModelError) as error:
        raise FileError(f"{path} holds no steering vectors. {error}") from error
    widths = {len(vector) for vector in found.blocks.values()}
    if len(widths) != 1 or widths == {0}:
        raise FileError(f"{path} holds no vectors of one width: {sorted(widths) or 'it is empty'}.")
    for block, vector in found.blocks.items():
        if not np.isfinite(vector).all():
            raise FileError(f"{path} holds a number that is not finite, in the vector of block {block}.")
    return found


def _held(source: object) -> _Found:
    """What an object holds that has, or a dictionary with, a model's type and vectors by block."""
    try:
        parts = source if isinstance(source, Mapping) else vars(source)
        model, blocks = parts["model_type"], dict(parts["directions"])
    except Exception:  # of a foreign object, anything
        raise checks.refuse("source", source, "a path, or an object with model_type and directions") from None
    width = "hidden_size"
    held: dict[int, np.ndarray] = {}
    for block, vector in blocks.items():
        at = integer("a block of source.directions", block, at_least=0, at_most=MOST_LAYERS)
        held[at] = array(f"source.directions[{at}]", vector, (width,))
        width = held[at].shape[0]
    if not held:
        raise InputError("source.directions is empty; pass a vector for each block.")
    return _Found(held, model=text("source.model_type", model))


def _write_gguf(path: Path, vectors: SteeringVectors, blocks: dict[int, np.ndarray]) -> None:
    writer = _gguf().GGUFWriter(path, ARCHITECTURE)
    hint = vectors.model.removesuffix("_text")  # llama.cpp calls gemma3 what transformers calls gemma3_text
    writer.add_string(f"{ARCHITECTURE}.model_hint", hint or UNKNOWN)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(blocks))
    if vectors.metadata:
        writer.add_string("llvlit.metadata", json.dumps(vectors.metadata, sort_keys=True))
    for block, vector in blocks.items():
        writer.add_tensor(f"direction.{block}", vector)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _read_gguf(path: Path) -> _Found:
    gguf = _gguf()
    with foreign(path, "a GGUF file"):
        header = read_header(path)
    architecture = header.values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise FileError(f"{path} is no control vector: its architecture is {shown(architecture)}.")
    with foreign(path, "a control vector"):
        reader = gguf.GGUFReader(path)
        told = reader.fields.get(f"{ARCHITECTURE}.layer_count")
        metadata = json.loads(header.values.get("llvlit.metadata", "{}"))
        json.dumps(metadata, allow_nan=False)
        blocks: dict[int, np.ndarray] = {}
        for tensor in reader.tensors:
            named = re.fullmatch(r"direction\.(0|[1-9]\d{0,3})", tensor.name)
            if not named or header.types[tensor.name] != "F32" or len(header.shapes[tensor.name]) != 1:
                raise FileError(
                    f"{path} holds {shown(tensor.name)}, {header.types[tensor.name]} of shape "
                    f"{header.shapes[tensor.name]}; a control vector holds direction.N, one-dimensional, in F32."
                )
            blocks[int(named[1])] = tensor.data.astype(np.float64)
        is_signed = told is not None and told.types == [gguf.GGUFValueType.INT32]
        model = text("model_hint", header.values.get(f"{ARCHITECTURE}.model_hint", ""))
    return _Found(
        blocks, model=model, metadata=metadata if isinstance(metadata, dict) else {}, from_generator=is_signed
    )


def _spec(vectors: SteeringVectors, blocks: dict[int, np.ndarray]) -> dict[str, Any]:
    """A steering spec, all blocks within it, which it names those of that are pushed."""
    tensors = {f"layer.{block}": vector.astype("<f4") for block, vector in blocks.items()}
    payload = {
        "version": 1,
        "kind": "direction",
        "tensors": {
            name: {"shape": list(vector.shape), "data": base64.b64encode(vector.tobytes()).decode()}
            for name, vector in tensors.items()
        },
        "extra": {},
        "sha256": _digest(tensors),
    }
    vector = {
        "algorithm": "direct",
        "apply": CLAUSES[vectors.positions],
        "data": payload,
        "layers": [block for block, vector in blocks.items() if vector.any()],
        "name": vectors.model or UNKNOWN,
        "normalize": False,
        "scale": 1.0,
    }
    return {"vectors": [vector]}


def _read_spec(path: Path) -> _Found:
    content = read_json(path, "steering vectors: a GGUF control vector, or a steering spec of EasySteer")
    with foreign(path, "a steering spec of EasySteer"):
        if len(content["vectors"]) != 1:
            raise FileError(f"{path} holds {len(content['vectors'])} vectors; a spec with one can be read.")
        (vector,) = content["vectors"]
        if vector.get("source") is not None:
            raise FileError(f"{path} names {shown(vector['source'])}, where the numbers lie. Import that file.")
        kind, normalize = vector.get("algorithm", "direct"), vector.get("normalize", False)
        if kind != "direct" or normalize:
            raise FileError(f"{path} steers by {shown(kind)}, normalize={shown(normalize)}: that is no push.")
        apply = {key: value for key, value in vector["apply"].items() if value is not None}
        positions = next((name for name, clause in CLAUSES.items() if clause == apply), None)
        if positions is None:
            raise FileError(f"{path} pushes tokens that steer does not: {shown(apply)}.")
        data, scale, tensors = vector["data"], number("scale", vector.get("scale", 1.0)), {}
        if (data["version"], data["kind"]) != (1, "direction"):
            raise FileError(f"{path} holds {shown(data['kind'])} of version {shown(data['version'])}, no directions.")
        for name, stored in data["tensors"].items():
            numbers = np.frombuffer(base64.b64decode(stored["data"], validate=True), "<f4")
            if not re.fullmatch(r"layer\.(0|[1-9]\d{0,3})", name) or stored["shape"] != [len(numbers)]:
                raise FileError(f"{path} holds {shown(name)} of {len(numbers)} numbers and {shown(stored['shape'])}.")
            tensors[name] = numbers
        if data["sha256"] != _digest(tensors):
            raise FileError(f"{path} was changed after it was written: its checksum is another.")
        all_blocks = {int(name.partition(".")[2]): numbers.astype(np.float64) for name, numbers in tensors.items()}
        chosen = vector.get("layers") or list(all_blocks)
        blocks = {block: scale * (block in chosen) * numbers for block, numbers in all_blocks.items()}
        model = text("name", vector.get("name") or "")
    return _Found(blocks, positions, model)


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """The checksum that EasySteer knows a set of directions by: SHA-256 of names, shapes and numbers, by name."""
    digest = hashlib.sha256(b"direction:1")
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise FileError(f'GGUF files need another package: pip install "llvlit[gguf]" ({error}).') from error
    return gguf
