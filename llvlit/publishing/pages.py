"""The pages of the book: which there are, what each must hold, how an executed one is made fit for readers.

A page is a MyST file named in ``_toc.yml``.  One that opens with jupytext front matter is a *chapter*: a
notebook kept as text.  Every check here names the page, and the cell where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode

from llvlit.checks import shown
from llvlit.errors import BuildError
from llvlit.files import foreign, read_text

CONTENTS = "_toc.yml"
INDEX = "genindex"
"""Name of the page that Sphinx fills with the index; the table of contents may list it, and no file holds it."""

MOST_YAML = 100_000  # bytes
MOST_BRACKETS = 1000
WIDE = 500  # points; a figure of one panel is narrower
NARROW = 320  # points; so wide can a figure be on a phone

_BAR = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class Page:
    """One page: its name in ``_toc.yml``, its source file and text, and whether it is to be executed."""

    name: str
    path: Path
    text: str
    is_chapter: bool

    @property
    def source(self) -> str:
        """Path of the source below the root, as messages and links name it."""
        return f"{self.name}.md"


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises
    ------
    FileError
        If it is not YAML, holds something else, or an alias, by which a few lines can stand for billions.
    """
    text = read_text(path, what, most=MOST_YAML)
    with foreign(path, what):
        if text.count("[") + text.count("{") > MOST_BRACKETS:  # nested, they take the square of their number to read
            raise ValueError(f"it has more than {MOST_BRACKETS} brackets; put lists and keys on lines of their own")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has an alias, such as *name; write out what that stands for")
        content = yaml.safe_load(text)
        if not isinstance(content, dict | None):
            raise TypeError(f"it holds a {type(content).__name__}, not keys with values")
    return content or {}


def read_pages(root: Path) -> tuple[Page, ...]:
    """Every page of ``_toc.yml``, in reading order.

    Raises
    ------
    BuildError
        If ``_toc.yml`` is absent or lists what cannot be a page, a page does not exist, or a page has code cells
        but no front matter (it would be shown, never executed).
    FileError
        If ``_toc.yml`` or a page cannot be read.
    """
    return tuple(_read_page(root, name) for name in read_contents(root))


def read_contents(root: Path) -> tuple[str, ...]:
    """Names of the pages in ``_toc.yml``, in reading order; no two have the same last part, which names notebooks.

    Raises
    ------
    BuildError, FileError
        As for :func:`read_pages`.
    """
    if not (root / CONTENTS).is_file():
        raise BuildError(
            f"There is no book in {root.resolve()}: it has no {CONTENTS}. Call it in the repository's folder."
        )
    contents = read_yaml(root / CONTENTS, "the book's contents")
    names: dict[str, str] = {}  # by what they are called without their folder, on any file system
    for name in (contents.get("root"), *listed(contents)):
        parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name else ()
        if not parts or parts[0] == "/" or ".." in parts:
            raise BuildError(
                f"{CONTENTS} lists {shown(name)} as a page. It must name `root` and its `chapters`, each a file "
                "below the book's folder, without `.md`."
            )
        twin = names.setdefault(parts[-1].casefold(), name)
        if twin is not name:
            raise BuildError(f"{CONTENTS} lists {twin} and {name}, whose notebooks would have one name. Rename one.")
    return tuple(names.values())


def listed(contents: Any) -> Iterator[Any]:
    """What stands under ``file``, at any depth."""
    if isinstance(contents, dict):
        if "file" in contents:
            yield contents["file"]
        contents = [value for value in contents.values() if isinstance(value, list)]
    if isinstance(contents, list):
        for part in contents:
            yield from listed(part)


def _read_page(root: Path, name: str) -> Page:
    path = root / f"{name}.md"
    if name == INDEX:
        return Page(name=name, path=path, text="# Index\n", is_chapter=False)
    if not path.is_file():
        raise BuildError(f"{CONTENTS} lists {name}, but there is no file {name}.md.")
    text = read_text(path, "a page of the book")
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    is_chapter = "jupytext:" in front and "kernelspec:" in front
    if "```{code-cell}" in text and not is_chapter:
        raise BuildError(
            f"{name}.md has code cells that would never be executed. "
            "Give it the front matter of a chapter: `jupytext:` and `kernelspec:`."
        )
    return Page(name=name, path=path, text=text, is_chapter=is_chapter)


def read_notebook(page: Page) -> NotebookNode:
    """Unexecuted notebook of a chapter.

    Raises
    ------
    BuildError
        If it has no cell tagged ``parameters``, or that cell would be shown to readers.
    FileError
        If the text is no notebook.
    """
    with foreign(page.path, "a notebook kept as text", remedy="Mend its front matter and the options of its cells."):
        notebook = jupytext.reads(page.text, fmt="md:myst")
        nbformat.validate(notebook)
        cells = [(cell, _tags(cell)) for cell in notebook.cells if cell.cell_type == "code"]
    if "```{code-cell}" in page.text and not cells:
        raise BuildError(f"{page.source}: its code cells are not read as such. Check the front matter.")
    parameters = [(cell, tags) for cell, tags in cells if "parameters" in tags]
    if len(parameters) != 1 or "remove-cell" not in parameters[0][1]:
        raise BuildError(
            f"{page.source} needs exactly one parameter cell: "
            "`:tags: [parameters, remove-cell]` with `profile` and `device`."
        )
    source = parameters[0][0].source
    absent = [name for name in ("profile", "device") if not re.search(rf"^{name} *=", source, re.MULTILINE)]
    if absent:
        raise BuildError(f"{page.source}: its parameter cell does not set {' and '.join(absent)}.")
    return notebook


def _tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", ()))


def cell_label(notebook: NotebookNode, index: int) -> str:
    """How a message names a cell: its number among the code cells, and its first line of code."""
    cell = notebook.cells[index]
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if cell.cell_type != "code":
        return f"below {lines[0]!r}" if lines else f"block {index + 1}"
    earlier = [other for other in notebook.cells[: index + 1] if other.cell_type == "code"]
    number = sum("injected-parameters" not in _tags(other) for other in earlier)
    return f"code cell {number} ({lines[0] if lines else 'empty'})"


def escaped(text: str) -> str:
    """Plain text as Markdown in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>$|~^#])", r"\\\1", " ".join(text.split()))


def markdown_table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown of a table whose cells are Markdown too; a bar in a cell begins no other."""
    cells = ([_BAR.sub(r"\\|", cell) for cell in row] for row in rows)
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in cells)])


def present(notebook: NotebookNode, page: Page) -> NotebookNode:
    """An executed chapter as readers get it: set-up cells hidden, figures with name, alt text and caption.

    ``llvlit.plots.figures.show`` puts ``{"name", "alt", "caption"}`` under ``"llvlit"`` in the output's metadata;
    here it becomes the cell metadata that MyST-NB reads.

    Raises
    ------
    BuildError
        If a cell shows an image without alt text, caption or name, or more than one image.
    """
    notebook = nbformat.from_dict(notebook)
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.setdefault("tags", [])
        if {"parameters", "injected-parameters"} & set(tags) and "remove-cell" not in tags:
            tags.append("remove-cell")
        if "remove-cell" not in tags and "remove-output" not in tags:
            _lift_figure(cell, f"{page.source}, {cell_label(notebook, index)}")
    return notebook


def _lift_figure(cell: NotebookNode, place: str) -> None:
    images = [output for output in cell.outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]
    if not images:
        return
    options = cell.metadata.get("mystnb", {})
    stated = {**options.get("figure", {}), **options.get("image", {}), **images[0].metadata.get("llvlit", {})}
    missing = [key for key in ("alt", "caption", "name") if not str(stated.get(key, "")).strip()]
    if missing:
        raise BuildError(
            f"{place}: a figure has no {' and no '.join(missing)}. "
            "Show it with llvlit.plots.figures.show(fig, name=..., alt=..., caption=...)."
        )
    if len(images) > 1:
        raise BuildError(f"{place}: {len(images)} figures in one cell. Give each a cell of its own.")
    cell.metadata["mystnb"] = {
        "figure": {"name": stated["name"], "caption": stated["caption"]},
        "image": {"alt": stated["alt"], **_class_of(images[0].data)},
    }


def _class_of(data: Mapping[str, Any]) -> dict[str, str]:
    """``wide`` if an SVG has panels side by side, of which a phone shows a part at a time; ``narrow`` if it fits."""
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', str(data.get("image/svg+xml", "")))
    size = float(width[1]) if width else (NARROW + WIDE) / 2
    return {"classes": "wide"} if size > WIDE else {"classes": "narrow"} if size < NARROW else {}
