"""A site of the book with a folder for every version, an archive with checksums, and nothing lost of older versions.

The site is what GitHub Pages serves.  ``latest/`` is the book of the main branch, ``v0.1.0/`` that of a tag; each
holds the pages, the executed notebooks that the launch buttons open, the tables these read, the PDF if it was built,
and ``SHA256SUMS``.  Above them stand ``versions.json``, a redirect to the newest release, and what Binder needs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from packaging.version import Version

from llvlit.errors import BuildError, FileError, InputError
from llvlit.publishing.archives import SUMS, write_archive, write_sums
from llvlit.publishing.execution import write_notebook
from llvlit.publishing.notebooks import install_cell, runnable
from llvlit.publishing.pages import read_pages

LATEST = "latest"
PDF = "llvlit.pdf"
_TAG = re.compile(r"v\d+\.\d+\.\d+(rc\d+)?")
_PLACEHOLDER = 'const version = "";'
_REDIRECT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url={version}/">
<title>llvlit</title>
</head>
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
        Folder to write; an older site in it is replaced.  Default: ``_build/site``.
    previous : path, optional
        Site whose other versions are kept, such as a checkout of the published branch; an empty folder will do.
    revision : str, optional
        Commit or tag that the notebooks install.  Default: the tag, or the commit of ``root``.

    Returns
    -------
    PublishedBook

    Raises
    ------
    InputError
        If the version has no such form, or ``site`` is a folder that holds something else.
    FileError
        If ``previous`` is neither empty nor a site.
    BuildError
        If the book is not built, or a launch button leads to a notebook that the site does not hold.
    """
    root = Path(root).resolve()
    site = Path(site or root / "_build" / "site").resolve()
    if version != LATEST and not _TAG.fullmatch(version):
        raise InputError(f"version={version!r} is neither 'latest' nor a tag such as 'v0.1.0'.")
    if not (root / "_build" / "html" / "index.html").is_file():
        raise BuildError(f"There is no built book in {root}. Run `llvlit book` first.")
    if site.exists() and not _is_site(site):
        raise InputError(f"site={str(site)!r} holds something that is no site. Name a folder that is new or empty.")
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent, prefix=".site.") as name:
        draft = Path(name) / "site"
        _copy_previous(previous, draft)
        shutil.rmtree(draft / version, ignore_errors=True)
        notebooks = _lay_out(root, draft, version, revision or _revision(root, version))
        versions = _write_root(root, draft, version)
        shutil.rmtree(site, ignore_errors=True)
        draft.rename(site)
    archive = _write_release(site / version, site.with_name(f"{site.name}-release"), version)
    return PublishedBook(site, site / version, archive, tuple(site / path for path in notebooks), versions)


def _is_site(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "versions.json").is_file() or not any(folder.iterdir()))


def _copy_previous(previous: str | Path | None, draft: Path) -> None:
    if previous is None:
        draft.mkdir()
        return
    if not _is_site(Path(previous)):
        raise FileError(f"previous={str(previous)!r} is no published site: it has no versions.json, and is not empty.")
    shutil.copytree(previous, draft, ignore=shutil.ignore_patterns(".git"))


def _revision(root: Path, version: str) -> str:
    """Tag, or the full commit of the checkout: nothing shorter can be fetched."""
    if version != LATEST:
        return version
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "HEAD"


def _lay_out(root: Path, site: Path, version: str, revision: str) -> list[Path]:
    """Write the folder of this version; return its notebooks, relative to the site."""
    build, folder = root / "_build", site / version
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    shutil.copytree(build / "html", folder)
    install = install_cell(repository["url"], revision)
    notebooks = []
    for page in (page for page in read_pages(root) if page.is_chapter):
        notebook = runnable(nbformat.read(build / "book" / f"{page.name}.ipynb", as_version=4), install)
        for place in ("notebooks", "_sources"):  # the launch buttons open the one, the download button the other
            write_notebook(notebook, folder / place / f"{page.name}.ipynb")
        notebooks.append(Path(version, "notebooks", f"{page.name}.ipynb"))
    if (root / "results").is_dir():
        shutil.copytree(root / "results", folder / "results")
    if (build / PDF).is_file():
        shutil.copy(build / PDF, folder / PDF)
    switcher = folder / "_static" / "versions.js"
    text = switcher.read_text(encoding="utf-8")
    switcher.write_text(text.replace(_PLACEHOLDER, f"const version = {json.dumps(version)};"), encoding="utf-8")
    _point_buttons(site, folder, repository)
    write_sums(folder)
    return notebooks


def _point_buttons(site: Path, folder: Path, repository: dict[str, str]) -> None:
    """Let the launch buttons open this version's notebooks, each of which must be there."""
    branch, built_for = (re.escape(repository[key]) for key in ("branch", "path_to_book"))
    link = re.compile(rf"(/{branch}(?:\?urlpath=lab/tree)?)/{built_for}/([^\"?#]+\.ipynb)")
    for page in sorted(folder.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        for found in link.finditer(text):
            if not (folder / "notebooks" / found[2]).is_file():
                raise BuildError(f"{page.relative_to(site)}: its launch button opens {found[2]}, which is no chapter.")
        page.write_text(link.sub(rf"\g<1>/{folder.name}/notebooks/\g<2>", text), encoding="utf-8")


def _write_root(root: Path, site: Path, version: str) -> tuple[str, ...]:
    """Write what stands above the versions; return these, ``latest`` first, then from new to old."""
    tags = [path.name for path in site.iterdir() if _TAG.fullmatch(path.name)]
    tags.sort(key=Version, reverse=True)
    versions = [LATEST] * (site / LATEST).is_dir() + tags
    released = [tag for tag in tags if not Version(tag).is_prerelease]
    preferred = (released or versions)[0]
    rows = [{"version": name, "url": f"{name}/", "preferred": name == preferred} for name in versions]
    for row in rows:
        row["pdf"] = (site / str(row["version"]) / PDF).is_file()
    (site / "versions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (site / "index.html").write_text(_REDIRECT.format(version=preferred), encoding="utf-8")
    (site / ".nojekyll").touch()  # Pages would drop folders whose names begin with an underscore
    if (root / ".binder").is_dir() and (version == LATEST or not (site / ".binder").is_dir()):
        shutil.copytree(root / ".binder", site / ".binder", dirs_exist_ok=True)
        shutil.copy(root / "constraints.txt", site / "constraints.txt")
    return tuple(versions)


def _write_release(folder: Path, release: Path, version: str) -> Path:
    """Write what a release attaches: an archive of a version's folder, its PDF, and the checksums of both."""
    release.mkdir(exist_ok=True)
    for old in [*release.glob("llvlit-book-*"), release / SUMS]:
        old.unlink(missing_ok=True)
    name = f"llvlit-book-{version}"
    archive = write_archive(folder, release / f"{name}.tar.gz", name=name)
    if (folder / PDF).is_file():
        shutil.copy(folder / PDF, release / f"{name}.pdf")
    write_sums(release)
    return archive
