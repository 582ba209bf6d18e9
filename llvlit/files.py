"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llvlit.errors import FileError

FORMAT_VERSION = 1


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)``, then rename the temporary file to ``path``; an old file stays on failure.

    Raises
    ------
    FileError
        If the disk is full, the folder cannot be written, or the rename fails.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "I/O error" in str(error):
            raise FileError(
                f"Could not write {path}: {error}. Nothing was changed; free some space or choose another folder."
            ) from error
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write named arrays as safetensors, with JSON metadata in the header."""
    tensors = {
        name: (torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array)
        .detach()
        .cpu()
        .contiguous()
        for name, array in arrays.items()
    }
    header = {"llvlit": json.dumps({"format": FORMAT_VERSION, **metadata})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote with ``metadata["kind"] == kind``.

    Raises
    ------
    FileError
        If the file is absent, cut short, not ours, of another kind, or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as stored:
            header = (stored.metadata() or {}).get("llvlit")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise FileError(f"{path} is not a whole safetensors file ({error}). Compute it again.") from error
    if header is None:
        raise FileError(f"{path} holds tensors, but was not written by llvlit.")
    metadata = json.loads(header)
    if metadata.get("format") != FORMAT_VERSION:
        raise FileError(
            f"{path} has format {metadata.get('format')}; this llvlit reads {FORMAT_VERSION}. Compute it again."
        )
    if metadata.get("kind") != kind:
        raise FileError(f"{path} holds {metadata.get('kind')!r}, not {kind!r}.")
    return tensors, metadata
