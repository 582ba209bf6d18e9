"""Notebooks of the chapters for readers elsewhere: executed ones that run on any machine, and two for a class.

The notebook that papermill wrote holds a cell with the settings of that run, such as a GPU that a reader may not
have.  In a reader's copy the chapter's own settings, which run anywhere, come back, with a note on what was computed.

A class gets every chapter twice, unexecuted and in plain Markdown.  A chapter keeps a solution between two gates,
``{solution-start} LABEL`` and ``{solution-end}``: instructors get it, students an empty code cell below the exercise,
and below that what both get: the hint, and the cell tagged ``check`` that tells whether a result is right.
Each notebook begins with a cell that fetches its version of the package.
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
from llvlit.publishing.pages import Page, markdown_table, read_notebook, read_pages, read_yaml
from llvlit.publishing.plain_markdown import STAR, Directive, Writer, collect_references, split

SOURCE_FOLDER = "llvlit-source"
GRADES = {1: "a few lines", 2: "needs the chapter's idea", 3: "a small project"}
ANSWER = "# your answer"
CHECK = "check"
"""Tag of a cell below an exercise in which :func:`llvlit.publishing.exercises.check_answer` judges a result."""

READERS = {"student": "Student's notebook", "instructor": "Instructor's notebook, with solutions"}
_GATES = ("exercise", "solution", "solution-start", "solution-end")
_HIDDEN = {"hide-input", "remove-input", "remove-cell"}
_INSTALL = """\
# Does nothing where llvlit is installed. Elsewhere, as on Colab, it installs the version of this notebook.
import importlib.util
import pathlib
import subprocess

if importlib.util.find_spec("llvlit") is None:
    pathlib.Path("{folder}").mkdir(exist_ok=True)
    for command in (
        ["init", "--quiet"],
        ["fetch", "--quiet", "--depth", "1", "--", {repository!r}, {revision!r}],
        ["checkout", "--quiet", "FETCH_HEAD"],
    ):
        subprocess.run(["git", *command], cwd="{folder}", check=True)
    %pip install --quiet ./{folder}
if pathlib.Path("{folder}").is_dir():
    %cd -q {folder}
"""


def repository_url(root: Path) -> str:
    """Address of the repository that the book's configuration names, or ours."""
    path = root / "_config.yml"
    config = read_yaml(path, "the book's settings")
    with foreign(path, "the book's settings"):
        return str(config.get("repository", {}).get("url", "https://github.com/llvlit/llvlit"))


def install_cell(repository: str, revision: str = "HEAD") -> NotebookNode:
    """Code cell that fetches a revision of the repository and installs it, if llvlit is missing.

    The folder that it fetches also holds the tables in ``results/`` that some chapters read.  Address and revision
    stand in it as Python strings and reach git without a shell, whatever they hold.

    Parameters
    ----------
    repository : str
        Address that ``git fetch`` takes.
    revision : str
        Commit (all 40 digits), tag or branch.

    Returns
    -------
    NotebookNode
    """
    source = _INSTALL.format(folder=SOURCE_FOLDER, repository=repository, revision=revision)
    return new_code_cell(source, id="install")


def runnable(notebook: NotebookNode, install: NotebookNode) -> NotebookNode:
    """Copy of an executed notebook whose first cell is ``install`` and whose settings run on any machine.

    Parameters
    ----------
    notebook : NotebookNode
        Executed chapter, with or without an older cell ``install`` of the same id.
    install : NotebookNode
        From :func:`install_cell`.

    Returns
    -------
    NotebookNode
    """
    copy = nbformat.from_dict(notebook)
    injected = [cell for cell in copy.cells if "injected-parameters" in cell.metadata.get("tags", ())]
    copy.cells = [install, *(cell for cell in copy.cells if cell not in injected and cell.id != install.id)]
    lines = [line for cell in injected for line in cell.source.splitlines() if "=" in line]
    if lines:
        note = "# The outputs below were computed with: " + "; ".join(lines) + "\n"
        for cell in copy.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source = note + cell.source
    return copy


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
    place = writer.page.source
    inside = ""  # label of the exercise whose solution is open
    for cell in source.cells:
        if cell.cell_type == "code":
            tags = set(cell.metadata.get("tags", ()))
            if CHECK in tags and inside:
                raise BuildError(f"{place}: the cell that checks {inside!r} lies in its solution. Put it above that.")
            hidden = {"jupyter": {"source_hidden": True}} if tags & _HIDDEN and "parameters" not in tags else {}
            code = new_code_cell(cell.source, metadata={**cell.metadata, **hidden})
            yield code, ["instructor"] if inside else READERS
            continue
        for part in split(cell.source, _GATES):
            if isinstance(part, str):
                if text := writer.text(part):
                    yield new_markdown_cell(text), ["instructor"] if inside else READERS
                continue
            if part.name == "solution-end":
                if not inside:
                    raise BuildError(f"{place}: a solution-end closes nothing. Put a solution-start above it.")
                inside = ""
                continue
            label = part.options.get("label", "") if part.name == "exercise" else part.argument
            if inside:
                raise BuildError(f"{place}: {label!r} begins in the solution of {inside!r}. Close that first.")
            if label not in exercises:
                raise BuildError(f"{place}: {label!r} has a solution, but no exercise of the page has this label.")
            exercise, body = exercises[label], writer.text(part.body)
            if part.name == "exercise":
                text = f"### Exercise: {exercise.heading}\n\n`{label}`\n\n{body}"
                yield new_markdown_cell(text.strip()), READERS
                yield new_code_cell(ANSWER), ["student"]
            else:
                inside = label if part.name == "solution-start" else ""
                yield new_markdown_cell(f"#### Solution to {exercise.title}\n\n{body}".strip()), ["instructor"]
    if inside:
        raise BuildError(f"{place}: the solution of {inside!r} has no solution-end. Add it.")
