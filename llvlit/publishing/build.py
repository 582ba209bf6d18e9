"""Execute every chapter for real, then build the book; anything wrong stops the build and names the page.

Each chapter goes through jupytext (text to notebook) and papermill, the executed notebooks are staged beside
the plain pages, and jupyter-book builds them with execution off, from clean doctrees, with every warning an
error.  Everything lies in ``_build/``: ``executed/`` what papermill wrote, ``book/`` the staged source,
``html/`` the book.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llvlit.cli.main import parser
from llvlit.errors import BuildError, InputError, unknown_name
from llvlit.publishing.command_page import COMMAND_MARK, command_page
from llvlit.publishing.directives import EXERCISE_MARK, exercise_table
from llvlit.publishing.execution import ESCAPES, execute_chapters, executed_path, is_current, run_facts, write_notebook
from llvlit.publishing.notebooks import install_cell, repository_url, runnable
from llvlit.publishing.pages import (
    STATUS_MARK,
    Page,
    cell_label,
    link_to_notebooks,
    present,
    read_notebook,
    read_pages,
    status_table,
)
from llvlit.publishing.pages_html import html_faults, trim
from llvlit.publishing.profiles import PROFILES, load_profile
from llvlit.tasks.hub import HUB_MARK, hub_table

_WARNING = re.compile(r"(WARNING|ERROR|CRITICAL|SEVERE): ")


@dataclass(frozen=True)
class BuiltBook:
    """What a build made: the page to open, the executed notebooks, and how long each chapter took."""

    index: Path
    notebooks: tuple[Path, ...]
    seconds: dict[str, float]


def build_book(
    root: str | Path = ".",
    *,
    profile: str = "embedded",
    device: str = "auto",
    chapters: Iterable[str] | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> BuiltBook:
    """Execute the chapters of the book in ``root`` and build its pages.

    Parameters
    ----------
    root : path
        Folder with ``_config.yml``, ``_toc.yml`` and ``book/``.
    profile : str
        Models and tasks the chapters use: ``"embedded"``, ``"paper"``, or a local folder of models.
    device : str
        As for :func:`llvlit.load_model`.
    chapters : iterable of str, optional
        Names (``"gains"``) of the chapters to execute; the others are taken from the last build if neither
        their text nor the settings have changed since.  Default: all are executed.
    jobs : int, optional
        Chapters executed at once, the processor's cores shared between them.  Default: 2 on a processor with
        two cores or more, 1 on a GPU.
    progress : bool
        Show a bar over chapters and cells.

    Returns
    -------
    BuiltBook

    Raises
    ------
    InputError
        If a profile or a chapter is unknown, or ``jobs`` is below 1.
    BuildError
        If a page is malformed, a cell raises, a figure has no alt text, a reference is broken, or Sphinx
        warns; the message names the page.
    """
    root = Path(root).resolve()
    pages = read_pages(root)
    chapter_pages = {page.name: page for page in pages if page.is_chapter}
    notebooks = {name: read_notebook(page) for name, page in chapter_pages.items()}
    chosen = _chosen(chapter_pages, chapters)
    run = run_facts(_profile(profile, root), device)
    if jobs is None:
        jobs = min(2, os.cpu_count() or 1) if run["device_kind"] == "cpu" else 1
    if jobs < 1:
        raise InputError(f"jobs={jobs} must be at least 1.")

    executed = root / "_build" / "executed"
    stale = [page for name, page in chapter_pages.items() if name in chosen or not is_current(page, executed, run)]
    execute_chapters(stale, notebooks, executed, run, jobs=jobs, progress=progress)
    results = {name: nbformat.read(executed_path(executed, name), as_version=4) for name in notebooks}
    stage = _stage(root, pages, results)
    if progress:
        print("Building the pages ...", flush=True)
    html = _build_pages(root, stage, pages)
    install = install_cell(repository_url(root))
    for name in results:  # what the download button gives
        notebook = runnable(nbformat.read(stage / f"{name}.ipynb", as_version=4), install)
        write_notebook(notebook, html / "_sources" / f"{name}.ipynb")
    return BuiltBook(
        index=html / "index.html",
        notebooks=tuple(stage / f"{name}.ipynb" for name in results),
        seconds={name: float(results[name].metadata["llvlit"]["seconds"]) for name in results},
    )


def _profile(profile: str, root: Path) -> str:
    """Profile as chapters get it: a folder of models relative to the book where it can be."""
    if profile in PROFILES:
        return profile
    load_profile(profile)  # a wrong one is refused before anything runs
    folder = Path(profile).resolve()
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)


def _chosen(chapter_pages: Mapping[str, Page], chapters: Iterable[str] | None) -> set[str]:
    names = {Path(name).name: name for name in chapter_pages}
    wanted = list(names) if chapters is None else list(chapters)
    for name in wanted:
        if name not in names:
            raise InputError(unknown_name("chapter", name, names))
    return {names[name] for name in wanted}


def _stage(root: Path, pages: Sequence[Page], results: dict[str, NotebookNode]) -> Path:
    """Lay out what jupyter-book reads: executed chapters, plain pages, settings, and nothing else."""
    stage = root / "_build" / "book"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(root / "book", stage / "book", ignore=shutil.ignore_patterns("*.md", "*.ipynb", "_static", ".*"))
    if (root / "book" / "_static").is_dir():
        shutil.copytree(root / "book" / "_static", stage / "_static")
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, stage / name)
    table = status_table((page, results[page.name].metadata["llvlit"]) for page in pages if page.is_chapter)
    faults = []
    for page in pages:
        if not page.is_chapter:
            path = stage / page.source
            path.parent.mkdir(parents=True, exist_ok=True)
            text = link_to_notebooks(page.text, page, results).replace(STATUS_MARK, table)
            text = text.replace(COMMAND_MARK, command_page(parser()))
            text = text.replace(HUB_MARK, hub_table())
            text = text.replace(EXERCISE_MARK, exercise_table(pages))
            path.write_text(text, encoding="utf-8")
            continue
        try:
            write_notebook(present(results[page.name], page, results), stage / f"{page.name}.ipynb")
        except BuildError as error:
            faults.append(str(error))
    if faults:
        raise BuildError("\n".join(faults))
    return stage


def _build_pages(root: Path, stage: Path, pages: Sequence[Page]) -> Path:
    """Run jupyter-book from clean doctrees, then look at the pages it made."""
    build = root / "_build"
    html = build / "html"
    for stale in (html, build / ".doctrees", build / "jupyter_execute"):
        shutil.rmtree(stale, ignore_errors=True)
    call = "from jupyter_book.cli.main import main; main()"  # the package has no __main__
    command = [sys.executable, "-c", call, "build", str(stage), "--path-output", str(root)]
    done = subprocess.run(
        [*command, "-W", "-n", "--keep-going"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "NO_COLOR": "1", "PYTHONUTF8": "1"},
    )
    lines = ESCAPES.sub("", done.stdout).splitlines()
    warnings = list(dict.fromkeys(_readable(line, stage) for line in lines if _WARNING.search(line)))
    if done.returncode != 0 or warnings:
        told = warnings or [_readable(line, stage) for line in lines[-25:]]
        raise BuildError("jupyter-book could not build the book without warnings:\n" + "\n".join(told))
    trim(html)
    faults = html_faults(html, pages)
    if faults:
        raise BuildError("\n".join(faults))
    return html


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
