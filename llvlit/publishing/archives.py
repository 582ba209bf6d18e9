"""Archives that are the same for the same files, and checksums in the form that ``sha256sum --check`` reads."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from llvlit.files import write_atomically

SUMS = "SHA256SUMS"
_MOMENT = 315532800  # 1980-01-01: the time of every file, so that the time of packing leaves no trace


def write_archive(folder: Path, archive: Path, *, name: str) -> Path:
    """Pack every file below ``folder`` into a ``.tar.gz`` under the folder ``name``: sorted, of nobody, of one time.

    Raises
    ------
    FileError
        If the archive cannot be written.
    """

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as stream,
            gzip.GzipFile("", "wb", fileobj=stream, mtime=_MOMENT) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in _files(folder):
                entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
                entry.size, entry.mtime, entry.mode = path.stat().st_size, _MOMENT, 0o644
                with path.open("rb") as content:
                    tar.addfile(entry, content)

    write_atomically(archive, write)
    return archive


def write_sums(folder: Path) -> Path:
    """Write ``SHA256SUMS``, a line for every file below ``folder`` but itself."""
    sums = folder / SUMS
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in _files(folder)
        if path != sums
    ]
    write_atomically(sums, lambda temporary: _write(temporary, "".join(lines)))
    return sums


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in an order that no file system decides."""
    yield from sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
