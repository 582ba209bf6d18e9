"""The rules of a page: how much a chapter may show and must ask, counted from its executed notebook.

They bind the chapters, which ``_toc.yml`` numbers, and the page ``hook``.  Of a chapter that has not been executed
since its text changed, the text is counted, which does not tell the rows of tables that code makes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from bs4 import BeautifulSoup
from nbformat import NotebookNode

from llvlit.files import foreign
from llvlit.publishing.execution import executed_path, read_current
from llvlit.publishing.notebooks import CHECK
from llvlit.publishing.pages import CONTENTS, Page, listed, read_notebook, read_yaml
from llvlit.publishing.plain_markdown import Directive, split, walk

RULED: tuple[str, ...] = (
    *("hook", "depth_as_time", "linearization", "reduction", "gains", "order"),
    *("control", "explorer", "steering", "scaling", "ablations", "own_model"),
)
"""Names of the pages whose broken rules fail a build; the others' are counted only."""

AT_MOST = {
    "figures": 4,
    "tables": 2,
    "rows": 8,
    "lines": 120,
    "longest": 12,
    "cells": 24,
    "caption": 40,
    "hidden": 150,
    "without_hint": 0,
    "without_check": 0,
}
AT_LEAST = {"exercises": 4}
MEANING = {
    "figures": "figures",
    "tables": "tables",
    "rows": "rows in the longest table",
    "lines": "visible lines of code",
    "longest": "lines in the longest visible code cell",
    "cells": "visible code cells",
    "caption": "words in the longest caption",
    "hidden": "hidden lines of code",
    "exercises": "exercises",
    "without_hint": "exercises without a hint",
    "without_check": "exercises without a check, open ones aside",
}
WORDS = {
    "hook": 700,
    "depth_as_time": 1800,
    "linearization": 1800,
    "reduction": 2000,
    "gains": 1800,
    "order": 2000,
    "control": 2200,
    "steering": 2000,
    "scaling": 1800,
    "ablations": 1000,
    "own_model": 1500,
}
"""Words that a chapter should have, a fifth more or less: a guide, and no rule."""

_HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
_UNSEEN = {"hide-cell", "hide-output", "remove-output", "remove-cell"}
_ASIDE = ("exercise", "dropdown", "solution", "solution-start", "solution-end")
_FORMULA = re.compile(r"\$[^$]+\$")
_ROLE = re.compile(r"\{[\w:-]+\}(?=`)")


@dataclass(frozen=True)
class PageCounts:
    """What is counted on a page: :data:`MEANING` says of what; None is not known before the page is executed.

    Words are those of the running text; exercises, solutions, captions and code are left out.  Code in solutions is
    neither visible nor hidden, and what it shows is not counted; blank lines are none.
    """

    page: str
    executed: bool
    words: int
    figures: int
    tables: int
    rows: int | None
    lines: int
    longest: int
    cells: int
    caption: int
    hidden: int
    exercises: int
    without_hint: int
    without_check: int

    @property
    def broken(self) -> dict[str, str]:
        """The rules that the page breaks, each with its limit in words."""
        limits = {rule: f"at most {limit}" for rule, limit in AT_MOST.items() if (getattr(self, rule) or 0) > limit}
        return limits | {rule: f"at least {limit}" for rule, limit in AT_LEAST.items() if getattr(self, rule) < limit}

    @property
    def faults(self) -> list[str]:
        """A sentence for each rule that the page breaks: page, number, rule, limit."""
        found = self.broken.items()
        return [f"{self.page}.md: {getattr(self, rule)} {MEANING[rule]}; {limit}." for rule, limit in found]


def bound_pages(root: Path, pages: Iterable[Page]) -> list[Page]:
    """The pages that the rules bind, in reading order."""
    contents = read_yaml(root / CONTENTS, "the book's contents")
    with foreign(root / CONTENTS, "the book's contents"):
        numbered = {name for part in contents.get("parts", ()) if part.get("numbered") for name in listed(part)}
    return [page for page in pages if page.is_chapter and (page.name in numbered or _short(page.name) == "hook")]


def count_book(root: Path, pages: Iterable[Page]) -> list[PageCounts]:
    """Counts of the pages that the rules bind, of executed notebooks where they are of the present text."""
    found = []
    for page in bound_pages(root, pages):
        executed = read_current(page, executed_path(root / "_build" / "executed", page.name))
        with foreign(page.path, "a chapter"):  # code of which no Python can be made
            found.append(count_page(page, executed or read_notebook(page)))
    return found


def rule_faults(counts: Iterable[PageCounts]) -> list[str]:
    """The faults of the pages in :data:`RULED`."""
    return [fault for page in counts if _short(page.page) in RULED for fault in page.faults]


def counts_table(counts: Iterable[PageCounts]) -> str:
    """The counts as lines of text: a page in each, ``!`` behind a number that breaks its rule."""
    names = [field.name for field in fields(PageCounts)][2:]
    rows = [["page", "counted", *names], ["(limit)", "", "(guide)"]]
    rows[1] += [f"<={AT_MOST[name]}" if name in AT_MOST else f">={AT_LEAST[name]}" for name in names[1:]]
    for page in counts:
        guide = WORDS.get(_short(page.page))
        cells = [f"{page.words}" + (f"/{guide}" if guide else "")]
        for name in names[1:]:
            value = getattr(page, name)
            cells.append("?" if value is None else f"{value}{'!' * (name in page.broken)}")
        rows.append([_short(page.page), "executed" if page.executed else "text", *cells])
    heads = [head.replace("_", " ") for head in rows[0]]
    widths = [max(len(row[place]) for row in [heads, *rows[1:]]) for place in range(len(heads))]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows[1:]]
    )
    return "\n".join(lines)


def count_page(page: Page, notebook: NotebookNode) -> PageCounts:
    """Counts of a page from its notebook, executed or not."""
    executed = "llvlit" in notebook.metadata
    words, captions, tables, visible, hidden = 0, list[str](), list[int | None](), list[int](), 0
    exercises, hints, checked = dict[str, str](), set[str](), set[str]()
    label, inside = "", False  # of the last exercise; whether a solution is open
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tags = set(cell.metadata.get("tags", ()))
            if inside or "injected-parameters" in tags:
                continue
            if CHECK in tags:
                checked.add(label)
            n_lines = sum(bool(line.strip()) for line in cell.source.splitlines())
            if tags & _HIDDEN:
                hidden += n_lines
            else:
                visible.append(n_lines)
            if not tags & _UNSEEN:
                captions += _captions(cell) if executed else _called(cell.source, "caption", "figures.show")
                tables += (
                    _shown_tables(cell)
                    if executed
                    else [None for _ in _called(cell.source, "", "table", "figures.table")]
                )
            continue
        for part in split(cell.source, _ASIDE):
            if isinstance(part, Directive):
                if part.name == "exercise":
                    label = part.options.get("label", "")
                    exercises[label] = part.argument
                elif part.name == "dropdown" and not inside:
                    hints.add(label)
                inside = part.name == "solution-start" or (inside and part.name != "solution-end")
            elif not inside:
                words += sum(map(_n_words, _texts(part)))
                captions += [
                    block.body for block in walk(part) if isinstance(block, Directive) and block.name == "figure"
                ]
                tables += _written_tables(part)
    known = [rows for rows in tables if rows is not None]
    return PageCounts(
        page=page.name,
        executed=executed,
        words=words,
        figures=len(captions),
        tables=len(tables),
        rows=max(known, default=0) if len(known) == len(tables) else None,
        lines=sum(visible),
        longest=max(visible, default=0),
        cells=len(visible),
        caption=max(map(_n_words, captions), default=0),
        hidden=hidden,
        exercises=len(exercises),
        without_hint=len(exercises.keys() - hints),
        without_check=len({each for each, title in exercises.items() if not title.startswith("Open: ")} - checked),
    )


def _short(name: str) -> str:
    return PurePosixPath(name).name


def _n_words(text: str) -> int:
    """Words of a text; a formula is one."""
    return len(re.findall(r"\S*\w\S*", _ROLE.sub("", _FORMULA.sub("x", text))))


def _texts(text: str) -> Iterator[str]:
    """The running text of a MyST text, paragraph by paragraph."""
    for block in walk(text):
        if not isinstance(block, Directive) and block.type == "inline":
            yield block.content


def _written_tables(text: str) -> Iterator[int]:
    """Rows of each table that stands in a MyST text, heads aside."""
    rows = 0
    for block in walk(text):
        if isinstance(block, Directive):
            if block.name == "list-table":
                yield len(re.findall(r"^\* -", block.body, re.MULTILINE)) - int(
                    block.options.get("header-rows", 0) or 0
                )
        elif block.type == "tr_open":
            rows += 1
        elif block.type == "table_close":
            yield rows - 1
            rows = 0


def _outputs(cell: NotebookNode) -> Iterator[Mapping[str, Any]]:
    return (output for output in cell.get("outputs", ()) if "data" in output)


def _captions(cell: NotebookNode) -> list[str]:
    """The caption of each figure that an executed cell shows."""
    images = [part for part in _outputs(cell) if any(kind.startswith("image/") for kind in part["data"])]
    return [str(part["metadata"].get("llvlit", {}).get("caption", "")) for part in images]


def _shown_tables(cell: NotebookNode) -> list[int | None]:
    """Rows of each table that an executed cell shows, heads aside."""
    found: list[int | None] = []
    for part in _outputs(cell):
        found += _written_tables("".join(part["data"].get("text/markdown", "")))
        tables = BeautifulSoup("".join(part["data"].get("text/html", "")), "html.parser").find_all("table")
        found += [sum(row.find("td") is not None for row in table.find_all("tr")) for table in tables]
    return found


def _called(source: str, keyword: str, *functions: str) -> list[str]:
    """Text of a keyword in each call of one of these functions; a value within an f-string is one word."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    calls = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Call)]
    found = []
    for call in (call for call in calls if ast.unparse(call.func) in functions):
        value = next((word.value for word in call.keywords if word.arg == keyword), None)
        parts = value.values if isinstance(value, ast.JoinedStr) else [value]
        found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in parts))
    return found
