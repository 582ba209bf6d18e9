"""Notebooks for a class: every chapter twice, for students without the solutions, for instructors with them.

A chapter keeps a solution between two gates, ``{solution-start} LABEL`` and ``{solution-end}``.  Students get
an empty code cell in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llvlit.errors import BuildError, FileError
from llvlit.files import write_atomically
from llvlit.publishing.directives import STAR, Directive, Exercise, blocks, read_exercises
from llvlit.publishing.notebooks import install_cell, repository_url
from llvlit.publishing.pages import Page, read_notebook, read_pages
from llvlit.publishing.plain_markdown import References, collect_references, plain_markdown

GRADES = {1: "a few lines", 2: "needs the chapter's idea", 3: "a small project"}
ANSWER = "# your answer"
_GATE = re.compile("exercise|solution(-start|-end)?")
_HIDDEN = {"hide-input", "remove-input", "remove-cell"}


@dataclass(frozen=True)
class ClassNotebooks:
    """What :func:`write_exercises` wrote."""

    student: tuple[Path, ...]
    instructor: tuple[Path, ...]
    exercises: tuple[Exercise, ...]


def write_exercises(root: str | Path = ".", out: str | Path = "exercises", *, force: bool = False) -> ClassNotebooks:
    """Write ``OUT/student/NAME.ipynb`` and ``OUT/instructor/NAME.ipynb`` for every chapter of the book in ``root``.

    Nothing is executed.  A notebook that is there already and differs is somebody's work: it is kept, and
    nothing is written, unless ``force`` is true.

    Parameters
    ----------
    root : path
        Folder with ``_toc.yml`` and ``book/``.
    out : path
        Folder of the notebooks; made if it is not there.
    force : bool
        Replace notebooks that differ.

    Returns
    -------
    ClassNotebooks

    Raises
    ------
    BuildError
        If the book cannot be read, or a solution's gates do not match; the message names page and label.
    FileError
        If a notebook in ``out`` differs and ``force`` is false, or a file cannot be written.
    """
    root, out = Path(root), Path(out)
    pages = read_pages(root)
    references = collect_references(root, pages)
    chapters = [page for page in pages if page.is_chapter]
    install = install_cell(repository_url(root))
    exercises = {page.name: read_exercises(page) for page in chapters}
    texts: dict[Path, str] = {}
    for page in chapters:
        for reader in ("student", "instructor"):
            notebook = class_notebook(page, references, exercises[page.name], install, solutions=reader == "instructor")
            texts[out / reader / f"{Path(page.name).name}.ipynb"] = nbformat.writes(notebook) + "\n"
    edited = [path for path, text in texts.items() if path.is_file() and path.read_text(encoding="utf-8") != text]
    if edited and not force:
        raise FileError(
            f"{len(edited)} of {len(texts)} notebooks are in {out} already and differ: "
            f"{', '.join(str(path.relative_to(out)) for path in edited)}. Somebody may have worked in them. "
            "Nothing was written. Name another folder, or replace them with --force."
        )
    for path, text in texts.items():
        write_atomically(path, partial(_write, text=text))
    made = {reader: tuple(path for path in texts if path.parent.name == reader) for reader in ("student", "instructor")}
    return ClassNotebooks(**made, exercises=tuple(one for found in exercises.values() for one in found))


def _write(path: Path, *, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def class_notebook(
    page: Page, references: References, exercises: tuple[Exercise, ...], install: NotebookNode, *, solutions: bool
) -> NotebookNode:
    """A chapter as an unexecuted notebook (nbformat 4.5) in plain Markdown, with or without its solutions.

    The same text gives the same notebook to the byte.

    Raises
    ------
    BuildError
        If the gates of a solution do not match.
    """
    source = read_notebook(page)
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": dict(source.metadata.get("kernelspec", {}))})
    notebook.cells = [nbformat.v4.new_markdown_cell(_preface(page, references, exercises, solutions)), install]
    notebook.cells += _cells(source, page, references, {one.label: one for one in exercises}, solutions)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbformat.validate(notebook)
    return notebook


def _preface(page: Page, references: References, exercises: tuple[Exercise, ...], solutions: bool) -> str:
    reader = "Instructor's notebook, with solutions" if solutions else "Student's notebook"
    lines = [f"*{reader}.* Chapter: **{references.pages[page.name][0]}** The next cell installs what is missing."]
    if "committed(" in page.text:
        lines += ["", "It reads tables from `results/`, so keep it in a checkout of the repository."]
    if exercises:
        lines += ["", f"Exercises ({', '.join(f'{STAR * n} {what}' for n, what in GRADES.items())}):", ""]
        lines += [f"- {STAR * one.stars} {one.title} (`{one.label}`)".replace("-  ", "- ") for one in exercises]
    return "\n".join(lines)


def _cells(
    source: NotebookNode, page: Page, references: References, exercises: dict[str, Exercise], solutions: bool
) -> Iterator[NotebookNode]:
    """The cells of the class notebook, in order."""
    inside = ""  # label of the solution that is open

    def markdown(*parts: str | Directive) -> Iterator[NotebookNode]:
        text = plain_markdown(parts, page, references)
        if text and (solutions or not inside):
            yield nbformat.v4.new_markdown_cell(text)

    for cell in source.cells:
        if cell.cell_type == "code" and (solutions or not inside):
            tags = set(cell.metadata.get("tags", ()))
            hidden = {"jupyter": {"source_hidden": True}} if tags & _HIDDEN and "parameters" not in tags else {}
            yield nbformat.v4.new_code_cell(cell.source, metadata={**cell.metadata, **hidden})
        if cell.cell_type == "code":
            continue
        between: list[str | Directive] = []
        for block in blocks(cell.source):
            if not isinstance(block, Directive) or not _GATE.fullmatch(block.name):
                between.append(block)
                continue
            yield from markdown(*between)
            between = []
            now = _checked(block, page, exercises, inside)
            if block.name == "exercise":
                title = " ".join(filter(None, ("### Exercise:", STAR * now.stars, now.title)))
                yield from markdown(f"{title}\n\n`{now.label}`", *blocks(block.body))
            elif block.name == "solution-end":
                inside = ""
            else:
                if solutions:
                    yield from markdown(f"#### Solution to {now.title}", *blocks(block.body))
                else:
                    yield nbformat.v4.new_code_cell(ANSWER)
                inside = now.label if block.name == "solution-start" else ""
        yield from markdown(*between)
    if inside:
        raise BuildError(f"{page.source}: the solution of {inside!r} has no solution-end. Add it.")


def _checked(block: Directive, page: Page, exercises: dict[str, Exercise], inside: str) -> Exercise:
    """The exercise that a gate belongs to, where the gate may stand here."""
    closes = block.name == "solution-end"
    label = inside if closes else block.options["label"] if block.name == "exercise" else block.argument
    if closes and not inside:
        raise BuildError(f"{page.source}: a solution-end closes nothing. Put a solution-start above it.")
    if inside and not closes:
        raise BuildError(f"{page.source}: {label!r} begins in the solution of {inside!r}. Close that first.")
    if label not in exercises:
        raise BuildError(f"{page.source}: {label!r} has a solution, but no exercise of the page has this label.")
    return exercises[label]
