"""The pages of the book: which there are, what each must hold, how an executed one is made fit for readers.

A page is a MyST file named in ``_toc.yml``.  One that opens with jupytext front matter is a *chapter*: a
notebook kept as text.  Every check here names the page, and the cell where there is one.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode

from llvlit.errors import BuildError
from llvlit.files import foreign, read_text

_LINK = re.compile(r"\]\(([\w./-]+)\.md(#[^)\s]*)?\)")
WIDE = 500  # points; a figure of one panel is narrower
STATUS_MARK = "<!-- status-table -->"
INDEX = "genindex"
"""Name of the page that Sphinx fills with the index; the table of contents may list it, and no file holds it."""


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
    text = read_text(path, what)
    with foreign(path, what):
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
        If ``_toc.yml`` is absent or lists no root, a page does not exist, or a page has code cells but no
        front matter (it would be shown, never executed).
    """
    try:
        contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
        names = [contents["root"], *_files(contents)]
    except FileNotFoundError:
        raise BuildError(
            f"There is no book in {root.resolve()}: it has no _toc.yml. Call it in the repository's folder."
        ) from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise BuildError(f"_toc.yml cannot be read: {error}. It must name `root` and its `chapters`.") from error
    return tuple(_read_page(root, name) for name in names)


def _files(contents: Any) -> Iterator[str]:
    if isinstance(contents, dict):
        if "file" in contents:
            yield contents["file"]
        contents = [value for value in contents.values() if isinstance(value, list)]
    if isinstance(contents, list):
        for part in contents:
            yield from _files(part)


def _read_page(root: Path, name: str) -> Page:
    path = root / f"{name}.md"
    if name == INDEX:
        return Page(name=name, path=path, text="# Index\n", is_chapter=False)
    if not path.is_file():
        raise BuildError(f"_toc.yml lists {name}, but there is no file {name}.md.")
    text = path.read_text(encoding="utf-8")
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
    """
    notebook = jupytext.reads(page.text, fmt="md:myst")
    if "```{code-cell}" in page.text and not any(cell.cell_type == "code" for cell in notebook.cells):
        raise BuildError(f"{page.source}: its code cells are not read as such. Check the front matter.")
    tags = [set(cell.metadata.get("tags", ())) for cell in notebook.cells if cell.cell_type == "code"]
    parameters = [found for found in tags if "parameters" in found]
    if len(parameters) != 1 or "remove-cell" not in parameters[0]:
        raise BuildError(
            f"{page.source} needs exactly one parameter cell: "
            "`:tags: [parameters, remove-cell]` with `profile` and `device`."
        )
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    absent = [name for name in ("profile", "device") if not re.search(rf"^{name} *=", cell.source, re.MULTILINE)]
    if absent:
        raise BuildError(f"{page.source}: its parameter cell does not set {' and '.join(absent)}.")
    return notebook


def cell_label(notebook: NotebookNode, index: int) -> str:
    """How a message names a cell: its number among the code cells, and its first line of code."""
    cell = notebook.cells[index]
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if cell.cell_type != "code":
        return f"below {lines[0]!r}" if lines else f"block {index + 1}"
    injected = "injected-parameters"
    earlier = [c for c in notebook.cells[: index + 1] if c.cell_type == "code"]
    number = sum(injected not in c.metadata.get("tags", ()) for c in earlier)
    return f"code cell {number} ({lines[0] if lines else 'empty'})"


def present(notebook: NotebookNode, page: Page, chapters: Iterable[str]) -> NotebookNode:
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
            cell.source = link_to_notebooks(cell.source, page, chapters)
            continue
        tags = cell.metadata.setdefault("tags", [])
        if {"parameters", "injected-parameters"} & set(tags) and "remove-cell" not in tags:
            tags.append("remove-cell")
        if "remove-cell" not in tags and "remove-output" not in tags:
            _lift_figure(cell, f"{page.source}, {cell_label(notebook, index)}")
    return notebook


def link_to_notebooks(text: str, page: Page, chapters: Iterable[str]) -> str:
    """Markdown whose relative links to a chapter's ``.md`` lead to its executed ``.ipynb``."""
    folder = PurePosixPath(page.name).parent
    names = set(chapters)

    def replace(found: re.Match[str]) -> str:
        target = posixpath.normpath(str(folder / found[1]))
        return f"]({found[1]}.ipynb{found[2] or ''})" if target in names else found[0]

    return _LINK.sub(replace, text)


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
        "image": {"alt": stated["alt"], **({"classes": "wide"} if _is_wide(images[0].data) else {})},
    }


def _is_wide(data: Mapping[str, Any]) -> bool:
    """Whether an SVG has panels side by side, which a phone shows in part, to be scrolled."""
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', str(data.get("image/svg+xml", "")))
    return width is not None and float(width[1]) > WIDE


def status_table(rows: Iterable[tuple[Page, Mapping[str, Any]]]) -> str:
    """Markdown of how each chapter was executed, from its notebook's metadata: a table, then the versions."""
    lines = ["| Chapter | Seconds | Profile | Device | Commit | Date (UTC) |", "|---|---:|---|---|---|---|"]
    versions: dict[str, list[str]] = {}
    for page, run in rows:
        threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device_kind"] == "cpu" else ""
        cells = (run["profile"], run["device"] + threads, run["commit"], run["date"])
        lines.append(f"| {{doc}}`/{page.name}` | {run['seconds']:.1f} | {' | '.join(map(str, cells))} |")
        packages = ("python", "torch", "transformers", "numpy", "scipy", "llvlit")
        used = ", ".join(f"{package} {run[package]}" for package in packages)
        versions.setdefault(used, []).append(f"{{doc}}`/{page.name}`")
    for used, names in versions.items():
        lines += ["", f"Versions{'' if len(versions) == 1 else ' of ' + ', '.join(names)}: {used}."]
    return "\n".join(lines)
