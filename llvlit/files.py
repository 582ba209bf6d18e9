"""Files and folders: whole or absent when we write them, never trusted when we read them, removed only if ours.

Writing goes to a temporary name beside the target, then renames.  Reading a file that may not be ours turns every
error of a library into one of ours.  A folder that llvlit writes as a whole carries a mark (:func:`own`) that says of
what kind it is and, written last (:func:`finish`), that it is complete; only marked folders are ever removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from llvlit.errors import FileError, LlvlitError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 2
MOST_BYTES = 256 * 2**20
"""Largest text file that is read: more is none of ours, and may have no end."""

MARK = ".llvlit.json"
"""File in a folder that llvlit writes as a whole: its kind, and whether it is complete."""

LOCK, HOLDER = ".lock", ".lock.json"
"""Files in a folder that one process has to itself: the lock, and who holds it."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)``, then rename the temporary file to ``path``; an old file stays on failure.

    Raises
    ------
    FileError
        If ``path`` is no regular file, the disk is full, the folder cannot be written, or the rename fails.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a rename would put a file in the place of a device
        raise FileError(f"Could not write {path}: it is a folder, a device or a pipe. Name a file.")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.")
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
                f"Could not write {path}: {error}. The file is as it was; free some space or choose another folder."
            ) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all; a lone surrogate is written as an escape."""
    write_atomically(
        path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    )


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


@contextmanager
def foreign(path: str | Path, what: str, *, remedy: str = "Write it again, or name another file.") -> Iterator[None]:
    """Inside, a file that may be anything is read: whatever a library raises becomes a :class:`FileError`.

    Examples
    --------
    >>> from llvlit.files import foreign
    >>> with foreign("grid.toml", "a grid"):
    ...     raise KeyError("models")
    Traceback (most recent call last):
    llvlit.errors.FileError: grid.toml cannot be read as a grid (KeyError: 'models'). Write it again, or ...
    """
    try:
        yield
    except (LlvlitError, MemoryError):
        raise
    except Exception as error:  # any library, any error: the file is not what it should be
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
        raise FileError(f"{path} cannot be read as {what} ({reason}). {remedy}") from error


def read_bytes(path: str | Path, what: str, *, most: int = MOST_BYTES) -> bytes:
    """Content of a regular file of bounded size; a folder, device or pipe is an error, not a wait.

    Raises
    ------
    FileError
        If there is no such file, it is not a regular one, or larger than ``most`` bytes.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as {what} ({error}).") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is no regular file; {what} was expected.")
    if status.st_size > most:
        raise FileError(f"{path} has {status.st_size} bytes; {what} has at most {most}.")
    with foreign(path, what):
        return path.read_bytes()


def read_text(path: str | Path, what: str, *, most: int = MOST_BYTES) -> str:
    """Text of a file in UTF-8, lines ended by one newline; see :func:`read_bytes` for what is refused."""
    content = read_bytes(path, what, most=most)
    with foreign(path, f"{what} in UTF-8"):
        return content.decode("utf-8-sig").replace("\r\n", "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; FileError if it is not JSON, or no object."""
    text = read_text(path, what)
    with foreign(path, what):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise FileError(f"{path} holds {type(content).__name__}; {what} is a JSON object.")
    return content


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The table in a TOML file; FileError if it is not TOML."""
    text = read_text(path, what)
    with foreign(path, what):
        return tomllib.loads(text)


def save_tensors(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write named arrays as safetensors, with JSON metadata and a checksum of both in the header."""
    import torch  # here: files are read and written without it, too
    from safetensors.torch import save_file

    tensors = {
        name: (torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array)
        .detach()
        .cpu()
        .contiguous()
        for name, array in arrays.items()
    }
    content = {"format": FORMAT_VERSION, **metadata}
    header = {"llvlit": json.dumps(content), "sha256": _checksum(tensors, content)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote with ``metadata["kind"] == kind``.

    Raises
    ------
    FileError
        If the file is absent, cut short, changed by a single bit, not ours, of another kind, or of another format
        version.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    with foreign(path, "a whole safetensors file", remedy="Compute it again."):
        with safe_open(path, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        if "llvlit" not in header:
            raise FileError(f"{path} holds tensors, but was not written by llvlit.")
        metadata = json.loads(header["llvlit"])
        version = metadata.get("format")
    if version != FORMAT_VERSION:
        raise FileError(f"{path} has format {version}; this llvlit reads {FORMAT_VERSION}. Compute it again.")
    if header.get("sha256") != _checksum(tensors, metadata):
        raise FileError(f"{path} was changed after it was written: its checksum is another. Compute it again.")
    if metadata.get("kind") != kind:
        raise FileError(f"{path} holds {metadata.get('kind')!r}, not {kind!r}.")
    return tensors, metadata


def _checksum(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes, numbers and metadata."""
    import torch

    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # one without numbers has no bytes to view
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def own(folder: str | Path, kind: str) -> None:
    """Make a folder ours: create it if need be, and mark it as one that llvlit writes as a whole.

    Raises
    ------
    FileError
        If it holds files and no mark of this kind: they are somebody else's, and stay untouched.
    """
    check_ours(folder, kind)
    write_json(Path(folder) / MARK, {"kind": kind, "whole": False})


def check_ours(folder: str | Path, kind: str) -> None:
    """FileError unless a folder is absent, empty, or marked as ours; nothing is touched.

    A folder with a repository in it, or a link to a folder, is not ours.
    """
    folder = Path(folder)
    if is_owned(folder, kind):
        return
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileError(f"{folder} is no folder of its own. Name a new or empty folder.")
    names = _names(folder)
    if MARK in names:
        reason = "holds a repository, or its mark is damaged or of another kind"
    else:
        reason = f"holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}, which llvlit did not write"
    if names:
        raise FileError(
            f"{folder} is not a {kind} of llvlit's: it {reason}. Nothing was touched; name a new or empty folder, or "
            "remove this one yourself."
        )


def _names(folder: Path) -> list[str]:
    """What lies in a folder, but for its lock and for what a kill can leave of a mark."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name not in (LOCK, HOLDER) and not name.startswith(f".{MARK}.")]


def is_owned(folder: str | Path, kind: str) -> bool:
    """Whether a folder is marked as one that llvlit writes as a whole, and no repository is in it, however deep.

    A link to such a folder is not such a folder.
    """
    folder = Path(folder)
    return not folder.is_symlink() and bool(_mark(folder, kind)) and not any(folder.rglob(".git"))


def _mark(folder: Path, kind: str) -> dict[str, Any]:
    """What a folder's mark of this kind says; nothing if there is none."""
    with suppress(FileError):
        facts = read_json(folder / MARK, "a mark of llvlit")
        if facts.get("kind") == kind:
            return facts
    return {}


def finish(folder: str | Path, kind: str, **facts: Any) -> None:
    """Say, last of all, that a folder of ours is complete, with some facts about it."""
    write_json(Path(folder) / MARK, {**facts, "kind": kind, "whole": True})


def finished(folder: str | Path, kind: str) -> dict[str, Any] | None:
    """Facts about a complete folder of ours; None where there is none, or where its writing broke off.

    Reading does no harm: the folder may lie behind a link, and hold what is not ours.
    """
    facts = _mark(Path(folder), kind)
    return facts if facts.get("whole") is True else None


def remove_owned(folder: str | Path, kind: str) -> None:
    """Remove a folder of ours with all in it; one that is not there is fine.

    Raises
    ------
    FileError
        If it is not marked as ours, is a link, or holds a repository: nothing is removed.
    """
    folder = Path(folder)
    if not folder.is_symlink() and not folder.exists():
        return
    check_ours(folder, kind)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise FileError(f"Could not remove {folder}: {error}.") from error


def check_replaced(folder: str | Path, kind: str) -> None:
    """FileError if a folder holds what llvlit did not write as a ``kind``, or this process is in it."""
    if Path.cwd().is_relative_to(Path(folder).resolve()):
        raise FileError(f"{folder} is the folder you are in, or holds it, and would be replaced. Name a folder in it.")
    check_ours(folder, kind)


@contextmanager
def replaced(folder: str | Path, kind: str) -> Iterator[Path]:
    """A fresh folder beside ``folder`` to write into, which takes its place when all went well.

    On any failure the old folder stays as it was.  Remnants of killed runs are removed.

    Raises
    ------
    FileError
        See :func:`check_replaced`.
    """
    folder = Path(folder)
    check_replaced(folder, kind)
    fresh, old = (folder.with_name(f".{folder.name}.{role}") for role in ("fresh", "old"))
    if is_owned(old, kind) and not folder.exists():
        old.rename(folder)  # a run was killed between the two renames below
    for remnant in (fresh, old):
        remove_owned(remnant, kind)
    own(fresh, kind)
    try:
        yield fresh
        if folder.exists():
            if is_owned(folder, kind):
                folder.rename(old)
            else:
                folder.rmdir()  # empty, as asked above
        fresh.rename(folder)
    except OSError as error:
        raise FileError(f"Could not write {folder}: {error}. It is as it was.") from error
    finally:
        for remnant in (fresh, old):
            with suppress(FileError):
                remove_owned(remnant, kind)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """The folder as this process's own; the system gives it back also where the process is killed.

    Claims may be nested. A folder that was not there before and has nothing in it after is removed.

    Raises
    ------
    FileError
        If another process has it, or it cannot be written.
    """
    folder = Path(folder)
    holder = folder / HOLDER
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    if lock.is_locked:
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        try:
            content = read_json(holder, "a note of who holds a folder")
            who = f"process {content['pid']} on {content['host']}, since {content['since']}"
        except (FileError, KeyError):
            who = "another process"
        raise FileError(f"{folder} is in use by {who}. Wait until that run ends, or choose another folder.") from None
    except OSError as error:
        raise FileError(f"Could not lock {folder}: {error}. Choose a folder that can be written.") from error
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
        if is_new and folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}:
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
