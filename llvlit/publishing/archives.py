"""Archives that are the same for the same files, and checksums in the form that ``sha256sum --check`` reads."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from llvlit.files import MARK, write_text

SUMS = "SHA256SUMS"
_MOMENT = 315532800  # 1980-01-01: the time of every file, so that the time of packing leaves no trace


def write_archive(folder: Path, archive: Path, *, name: str) -> None:
    """Pack every file below ``folder`` into a ``.tar.gz`` under the folder ``name``: sorted, of nobody, of one time."""
    with (
        archive.open("wb") as stream,
        gzip.GzipFile("", "wb", fileobj=stream, mtime=_MOMENT) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in _files(folder):
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            entry.size, entry.mtime, entry.mode = path.stat().st_size, _MOMENT, 0o644
            with path.open("rb") as content:
                tar.addfile(entry, content)


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS``, a line for every file below ``folder`` but itself."""
    lines = []
    for path in _files(folder):
        if path != folder / SUMS:
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    write_text(folder / SUMS, "".join(lines))


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder but llvlit's mark, in an order that no file system decides."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / MARK)
    yield from sorted(paths, key=lambda path: path.as_posix())
