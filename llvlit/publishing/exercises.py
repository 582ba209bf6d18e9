"""Notebooks for a class: every chapter twice, for students without the solutions, for instructors with them.

A chapter keeps a solution between two gates, ``{solution-start} LABEL`` and ``{solution-end}``.  Students get
an empty code cell in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llvlit import checks
from llvlit.errors import BuildError, FileError
from llvlit.files import foreign
from llvlit.publishing.notebooks import install_cell, repository_url
from llvlit.publishing.pages import Page, markdown_table, read_notebook, read_pages
from llvlit.publishing.plain_markdown import STAR, Directive, Writer, collect_references, split

GRADES = {1: "a few lines", 2: "needs the chapter's idea", 3: "a small project"}
ANSWER = "# your answer"
READERS = {"student": "Student's notebook", "instructor": "Instructor's notebook, with solutions"}
_GATES = ("exercise", "solution", "solution-start", "solution-end")
_HIDDEN = {"hide-input", "remove-input", "remove-cell"}


@dataclass(frozen=True)
class Exercise:
    """An exercise: its label, its title without the stars, how many those are (0 if none), its page."""

    label: str
    title: str
    stars: int
    page: str

    @property
    def heading(self) -> str:
        """Its stars and its title."""
        return f"{STAR * self.stars} {self.title}".strip()


def read_exercises(page: Page) -> tuple[Exercise, ...]:
    """The exercises of a chapter in their order.

    Raises
    ------
    BuildError
        If one has no label, or shares it with another of the page.
    """
    exercises: dict[str, Exercise] = {}
    for block in split(page.text, ["exercise"]):
        if isinstance(block, Directive):
            label = block.options.get("label", "")
            if not label or label in exercises:
                raise BuildError(
                    f"{page.source}: the exercise {block.argument!r} needs a `:label:` of its own, not {label!r}."
                )
            title = block.argument.replace(STAR, "").strip()
            exercises[label] = Exercise(label, title or label, block.argument.count(STAR), page.name)
    return tuple(exercises.values())


def exercise_table(pages: Iterable[Page]) -> str:
    """Every exercise of the chapters among these pages, as a MyST table: chapter, number, name, stars."""
    exercises = (exercise for page in pages if page.is_chapter for exercise in read_exercises(page))
    rows = [
        (f"{{doc}}`/{exercise.page}`", f"{{ref}}`{exercise.label}`", exercise.title, STAR * exercise.stars)
        for exercise in exercises
    ]
    return markdown_table("| Chapter | Exercise | Name | Grade |\n|---|---|---|---|", rows)


@dataclass(frozen=True)
class ClassNotebooks:
    """What :func:`write_exercises` wrote."""

    student: tuple[Path, ...]
    instructor: tuple[Path, ...]
    exercises: tuple[Exercise, ...]


def write_exercises(root: str | Path = ".", out: str | Path = "exercises", *, force: bool = False) -> ClassNotebooks:
    """Write ``OUT/student/NAME.ipynb`` and ``OUT/instructor/NAME.ipynb`` for every chapter of the book in ``root``.

    Nothing is executed, and the same text gives the same notebooks to the byte.  A notebook that is there already
    and differs is somebody's work: it is kept, and nothing is written, unless ``force`` is true.

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
    InputError
        If an argument is of the wrong kind.
    BuildError
        If the book cannot be read, or a solution's gates do not match; the message names page and label.
    FileError
        If a notebook in ``out`` differs and ``force`` is false, or a file cannot be read or written.
    """
    root, out, force = checks.path("root", root), checks.path("out", out), checks.flag("force", force)
    pages = read_pages(root)
    references = collect_references(root, pages)
    install = install_cell(repository_url(root))
    exercises: list[Exercise] = []
    notebooks: dict[str, str] = {}
    for page in (page for page in pages if page.is_chapter):
        of_page, source, writer = read_exercises(page), read_notebook(page), Writer(page, references)
        exercises += of_page
        body = list(_cells(source, writer, {exercise.label: exercise for exercise in of_page}))
        for reader in READERS:
            cells = [new_markdown_cell(_preface(writer, of_page, reader)), install]
            cells += [cell for cell, readers in body if reader in readers]
            cells = [NotebookNode({**cell, "id": f"cell-{number}"}) for number, cell in enumerate(cells)]
            notebook = new_notebook(cells=cells, metadata={"kernelspec": dict(source.metadata.kernelspec)})
            nbformat.validate(notebook)
            notebooks[f"{reader}/{PurePosixPath(page.name).name}.ipynb"] = nbformat.writes(notebook) + "\n"
    with foreign(out, "a folder of notebooks", remedy="Name another folder."):
        there = {name: out / name for name in notebooks if (out / name).exists()}
        edited = [
            name for name, path in there.items() if not path.is_file() or path.read_bytes() != notebooks[name].encode()
        ]
    if edited and not force:
        raise FileError(
            f"{len(edited)} of {len(notebooks)} notebooks are in {out} already and differ: {', '.join(edited)}. "
            "Somebody may have worked in them. Nothing was written. Name another folder, or replace them with --force."
        )
    _write_all(out, notebooks)
    made = {reader: tuple(out / name for name in notebooks if name.startswith(reader)) for reader in READERS}
    return ClassNotebooks(**made, exercises=tuple(exercises))


def _write_all(out: Path, notebooks: Mapping[str, str]) -> None:
    """Write every notebook beside its place, then move all of them there: a full disk leaves all as it was."""
    n_written = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=".exercises.") as folder:
            for name, text in notebooks.items():
                for place in (out, Path(folder)):
                    (place / name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
            for name in notebooks:
                Path(folder, name).replace(out / name)
                n_written += 1
    except OSError as error:
        raise FileError(
            f"Could not write {out}: {error}. {n_written} of {len(notebooks)} notebooks were written; the others are "
            "as they were. Free some space or choose another folder."
        ) from error


def _preface(writer: Writer, exercises: tuple[Exercise, ...], reader: str) -> str:
    title = writer.references.pages[writer.page.name][0]
    lines = [f"*{READERS[reader]}.* Chapter: **{title}** The next cell installs what is missing."]
    if "committed(" in writer.page.text:
        lines += ["", "It reads tables from `results/`, so keep it in a checkout of the repository."]
    if exercises:
        lines += ["", f"Exercises ({', '.join(f'{STAR * stars} {what}' for stars, what in GRADES.items())}):", ""]
        lines += [f"- {each.heading} (`{each.label}`)" for each in exercises]
    return "\n".join(lines)


def _cells(
    source: NotebookNode, writer: Writer, exercises: Mapping[str, Exercise]
) -> Iterator[tuple[NotebookNode, Collection[str]]]:
    """The cells of the class notebooks in order, each with the readers who get it."""
    label = ""  # of the solution that is open
    for cell in source.cells:
        if cell.cell_type == "code":
            tags = set(cell.metadata.get("tags", ()))
            hidden = {"jupyter": {"source_hidden": True}} if tags & _HIDDEN and "parameters" not in tags else {}
            code = new_code_cell(cell.source, metadata={**cell.metadata, **hidden})
            yield code, ["instructor"] if label else READERS
            continue
        for part in split(cell.source, _GATES):
            if isinstance(part, str):
                if text := writer.text(part):
                    yield new_markdown_cell(text), ["instructor"] if label else READERS
                continue
            exercise = _checked(part, writer.page, exercises, label)
            label = exercise.label if part.name == "solution-start" else ""
            body = writer.text(part.body)
            if part.name == "exercise":
                text = f"### Exercise: {exercise.heading}\n\n`{exercise.label}`\n\n{body}"
                yield new_markdown_cell(text.strip()), READERS
            elif part.name != "solution-end":
                yield new_markdown_cell(f"#### Solution to {exercise.title}\n\n{body}".strip()), ["instructor"]
                yield new_code_cell(ANSWER), ["student"]
    if label:
        raise BuildError(f"{writer.page.source}: the solution of {label!r} has no solution-end. Add it.")


def _checked(gate: Directive, page: Page, exercises: Mapping[str, Exercise], inside: str) -> Exercise:
    """The exercise that a gate belongs to, where the gate may stand here."""
    closes = gate.name == "solution-end"
    label = inside if closes else gate.options.get("label", "") if gate.name == "exercise" else gate.argument
    if closes and not inside:
        raise BuildError(f"{page.source}: a solution-end closes nothing. Put a solution-start above it.")
    if inside and not closes:
        raise BuildError(f"{page.source}: {label!r} begins in the solution of {inside!r}. Close that first.")
    if label not in exercises:
        raise BuildError(f"{page.source}: {label!r} has a solution, but no exercise of the page has this label.")
    return exercises[label]
