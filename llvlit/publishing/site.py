"""A site of the book with a folder for every version, an archive with checksums, and nothing lost of older versions.

The site is what GitHub Pages serves.  ``latest/`` is the book of the main branch, ``v0.1.0/`` that of a tag; each
holds the pages, the executed notebooks that the launch buttons open, the tables these read, the PDF if it was built,
and ``SHA256SUMS``.  Above them stand ``versions.json``, a redirect to the newest release, what Binder needs, and
``runs.json``, which the daily builds fill.

A site grows beside the old one and takes its place at the end; a folder that llvlit did not write is never replaced.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
from packaging.version import Version

from llvlit import checks
from llvlit.errors import BuildError, FileError, InputError
from llvlit.files import MARK, finish, finished, foreign, is_owned, locked, read_text, replaced, write_text
from llvlit.publishing.build import CONFIG, HTML, PDF
from llvlit.publishing.daily import RUNS, read_runs, with_runs
from llvlit.publishing.execution import read_executed
from llvlit.publishing.notebooks import install_cell, runnable
from llvlit.publishing.pages import read_pages, read_yaml

LATEST = "latest"
_TAG = re.compile(r"v\d+\.\d+\.\d+(rc\d+)?", re.ASCII)
_REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
_MOMENT = 315532800  # 1980-01-01: the time of every packed file, so that the time of packing leaves no trace
_PLACEHOLDER = 'const version = "";'
_REDIRECT = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={version}/"><title>llvlit</title></head>
<body><p><a href="{version}/">Open the book</a></p></body>
</html>
"""


@dataclass(frozen=True)
class PublishedBook:
    """What was laid out: the site, the folder of this version, its archive, and every version, newest first."""

    site: Path
    folder: Path
    archive: Path
    notebooks: tuple[Path, ...]
    versions: tuple[str, ...]


def publish_book(
    root: str | Path = ".",
    *,
    version: str = LATEST,
    site: str | Path | None = None,
    previous: str | Path | None = None,
    revision: str | None = None,
) -> PublishedBook:
    """Lay out the site from the last build of the book in ``root``, beside the versions it already has.

    Parameters
    ----------
    root : path
        Folder of the book, built before by :func:`llvlit.publishing.build.build_book`.
    version : str
        ``"latest"``, or a tag such as ``"v0.1.0"``; its folder alone is replaced.
    site : path, optional
        Folder to write: a new or empty one, or a site that llvlit wrote, whose other versions and files are
        kept.  Default: ``_build/site``.  What a release attaches is written beside it, with ``-release`` in its name.
    previous : path, optional
        Site whose other versions are kept, such as a checkout of the published branch; an empty folder will do.
        Its history (``.git``) is not copied.  Default: ``site``, if llvlit wrote it.
    revision : str, optional
        Commit or tag that the notebooks install.  Default: the tag, or the commit of ``root``.

    Returns
    -------
    PublishedBook

    Raises
    ------
    InputError
        If an argument is of the wrong kind, or ``site`` lies in a folder that is copied.
    FileError
        If ``site`` holds what llvlit did not write, or a version or file that ``previous`` lacks, ``previous`` is
        neither empty nor a site, a folder that is copied holds a symbolic link, or a file cannot be read or written.
    BuildError
        If no whole book is built, the commit that notebooks install cannot be told, or a launch button leads to a
        notebook that the site does not hold.
    """
    root = checks.path("root", root).resolve()
    build = root / "_build"
    site = Path(os.path.abspath(build / "site" if site is None else checks.path("site", site)))
    previous = None if previous is None else checks.path("previous", previous).resolve()
    if checks.text("version", version) != LATEST and not _TAG.fullmatch(version):
        raise InputError(f"version={checks.shown(version)} is neither 'latest' nor a tag such as 'v0.1.0'.")
    if revision is not None and not _REVISION.fullmatch(checks.text("revision", revision)):
        raise InputError(f"revision={checks.shown(revision)} is no name of a commit, a tag or a branch.")
    for copied in (build / "html", root / "results", root / ".binder", *filter(None, [previous])):
        if site != previous and site.resolve().is_relative_to(copied):
            raise InputError(f"site={str(site)!r} lies in {copied}, which is copied. Name a folder outside.")
    if not is_owned(build / "html", HTML) or finished(build / "html", HTML) is None:
        raise BuildError(f"There is no whole book in {build / 'html'}. Run `llvlit book` first, to its end.")

    name = f"llvlit-book-{version}"
    release = site.with_name(f"{site.name}-release")
    with locked(build), replaced(site, "site") as draft, replaced(release, "release") as package:
        kept = site if previous is None and is_owned(site, "site") else previous
        if kept is not None:
            _take_over(kept, draft)
        shutil.rmtree(draft / version, ignore_errors=True)
        notebooks = _lay_out(root, draft / version, revision or (version if version != LATEST else _commit(root)))
        versions = _write_root(root, draft, version)
        _refuse_loss(site, draft)
        _pack(draft / version, package / f"{name}.tar.gz", name)
        if (draft / version / PDF).is_file():
            shutil.copy(draft / version / PDF, package / f"{name}.pdf")
        _write_sums(package)
        finish(package, "release")
        finish(draft, "site")
    places = tuple(site / version / "notebooks" / name for name in notebooks)
    return PublishedBook(site, site / version, release / f"{name}.tar.gz", places, versions)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder without repositories in it and without llvlit's mark; refuse what is no file and no folder."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        out = {".git", MARK} & set(names)
        for path in (Path(folder, name) for name in names if name not in out):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise FileError(
                    f"{path} is a symbolic link or no regular file, and would publish what it stands for. "
                    "Nothing was published; remove it, or put the file itself there."
                )
        return out

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)


def _take_over(previous: Path, draft: Path) -> None:
    """Copy a published site, or an empty folder, into the new one."""
    listed = previous / "versions.json"
    if not previous.is_dir() or (not listed.is_file() and {path.name for path in previous.iterdir()} - {".git"}):
        raise FileError(f"{str(previous)!r} is no published site: it has no versions.json, and is not empty.")
    _copy(previous, draft)
    if listed.is_file():
        text = read_text(listed, "the list of versions")
        with foreign(listed, "the list of versions of a site"):
            names = [str(row["version"]) for row in json.loads(text)]
            absent = [name for name in names if not (draft / name / "index.html").is_file()]
            if absent or not names:
                raise ValueError(f"the folders of {', '.join(absent) or 'all versions'} are not there")


def _refuse_loss(site: Path, draft: Path) -> None:
    """Refuse to put in the place of a site one that lacks some of its versions or files."""
    there, kept = ({path.name for path in folder.glob("*")} for folder in (site, draft))
    if lost := sorted(there - kept):
        raise FileError(
            f"{site} holds {', '.join(lost)}, which would be lost: the previous site has no such thing. "
            "Nothing was published; leave out --previous to keep all that the site has, or name another site."
        )


def _commit(root: Path) -> str:
    """The full commit of the checkout: nothing shorter can be fetched."""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:  # no git, no commit, or no answer in time
        raise BuildError(
            f"llvlit cannot tell the commit of {root}, which the notebooks are to install ({error}). "
            "Pass --revision with a commit or a tag."
        ) from error


def _lay_out(root: Path, folder: Path, revision: str) -> list[str]:
    """Write the folder of this version; return the names of its notebooks."""
    settings = root / CONFIG
    config = read_yaml(settings, "the book's settings")
    with foreign(settings, "the book's settings"):
        address, branch, place = (str(config["repository"][key]) for key in ("url", "branch", "path_to_book"))
    build = root / "_build"
    _copy(build / "html", folder)
    install = install_cell(address, revision)
    notebooks = [f"{page.name}.ipynb" for page in read_pages(root) if page.is_chapter]
    for name in notebooks:
        downloaded = folder / "_sources" / name  # the download button opens it, the launch buttons its copy
        text = nbformat.writes(runnable(read_executed(downloaded), install))
        for path in (downloaded, folder / "notebooks" / name):
            write_text(path, text)
    if (root / "results").is_dir():
        _copy(root / "results", folder / "results")
    if (build / PDF).is_file() and not (build / PDF).is_symlink():
        shutil.copy(build / PDF, folder / PDF)
    switcher = folder / "_static" / "versions.js"
    if switcher.is_file():
        text = read_text(switcher, "the menu of versions")
        write_text(switcher, text.replace(_PLACEHOLDER, f"const version = {json.dumps(folder.name)};"))
    # the launch buttons open this version's notebooks, each of which must be there
    link = re.compile(rf"(/{re.escape(branch)}(?:\?urlpath=lab/tree)?)/{re.escape(place)}/([^\"?#]+\.ipynb)")
    told = folder.parent / RUNS
    if not told.exists():
        write_text(told, "[]\n")
    runs = read_runs(told)
    for path in sorted(folder.rglob("*.html")):
        text = read_text(path, "a page of the book")
        if lost := {found[2] for found in link.finditer(text)} - set(notebooks):
            name = path.relative_to(folder.parent).as_posix()
            raise BuildError(f"{name}: its launch button opens {' and '.join(sorted(lost))}, which is no chapter.")
        write_text(path, with_runs(link.sub(rf"\g<1>/{folder.name}/notebooks/\g<2>", text), runs))
    _write_sums(folder)
    return notebooks


def _write_root(root: Path, site: Path, version: str) -> tuple[str, ...]:
    """Write what stands above the versions; return these, ``latest`` first, then from new to old."""
    tags = sorted((path.name for path in site.glob("*/") if _TAG.fullmatch(path.name)), key=Version, reverse=True)
    versions = tuple(name for name in (LATEST, *tags) if (site / name).is_dir())
    preferred = next((tag for tag in tags if not Version(tag).is_prerelease), versions[0])
    rows = [
        {"version": name, "url": f"{name}/", "preferred": name == preferred, "pdf": (site / name / PDF).is_file()}
        for name in versions
    ]
    write_text(site / "versions.json", json.dumps(rows, indent=1) + "\n")
    write_text(site / "index.html", _REDIRECT.format(version=preferred))
    write_text(site / ".nojekyll", "")  # Pages would drop folders whose names begin with an underscore
    if (root / ".binder").is_dir() and (version == LATEST or not (site / ".binder").is_dir()):
        _copy(root / ".binder", site / ".binder")
        write_text(site / "constraints.txt", read_text(root / "constraints.txt", "the versions that Binder installs"))
    return versions


def _pack(folder: Path, archive: Path, name: str) -> None:
    """Pack a folder under a name into a ``.tar.gz``, all of nobody and of one time: the same for the same files."""

    def of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime, entry.mode = _MOMENT, 0o755 if entry.isdir() else 0o644
        return entry

    with gzip.GzipFile(archive, "wb", mtime=_MOMENT) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(folder, name, filter=of_nobody)


def _write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS``, a line for every file below a folder, in the form that ``sha256sum --check`` reads."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    sums = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    lines = [f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in sums.items()]
    write_text(folder / "SHA256SUMS", "".join(lines))
