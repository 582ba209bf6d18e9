"""The book's MyST text as the plain Markdown that JupyterLab shows: directives as boxes, roles as words."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import yaml
from pybtex.database import parse_file

from llvlit.publishing.directives import STAR, Directive, blocks
from llvlit.publishing.pages import Page

_LABEL = re.compile(r"^\(([\w-]+)\)= *\n+#+ +(.+)$", re.MULTILINE)
_EQUATION = re.compile(r"\$\$ \(([\w-]+)\)")
_FIGURE = re.compile(r"""\bname=["'](fig-[\w-]+)["']""")
_ROLE = re.compile(r"\{([a-z:]+)\}`([^`]*)`")
_TARGET = re.compile(r"(.*?)\s*<([^<>]+)>", re.DOTALL)


@dataclass(frozen=True)
class References:
    """What the pages can refer to, in words.

    Attributes
    ----------
    labels : mapping of str to str
        Words for a section, a theorem or an exercise by its label.
    numbers : mapping of str to (str, int)
        Page and number, counted within the page, of a labelled equation or a figure.
    pages : mapping of str to (str, bool)
        Title of a page by its name, and whether it is a chapter, and so a notebook.
    citations : mapping of str to (str, str)
        Authors and year by key.
    macros : mapping of str to str
        TeX for the book's own macros, which JupyterLab does not know.
    """

    labels: Mapping[str, str]
    numbers: Mapping[str, tuple[str, int]]
    pages: Mapping[str, tuple[str, bool]]
    citations: Mapping[str, tuple[str, str]]
    macros: Mapping[str, str]


def collect_references(root: Path, pages: Sequence[Page]) -> References:
    """Everything that the pages of the book in ``root`` can refer to."""
    labels, numbers, titles = dict[str, str](), dict[str, tuple[str, int]](), dict[str, tuple[str, bool]]()
    for page in pages:
        heading = re.search(r"^# +(.+)$", page.text, re.MULTILINE)
        titles[page.name] = (heading[1].strip() if heading else page.name, page.is_chapter)
        labels |= {found[1]: f"*{found[2].strip()}*" for found in _LABEL.finditer(page.text)}
        for names in (_EQUATION.findall(page.text), _FIGURE.findall(page.text)):
            numbers |= {label: (page.name, number) for number, label in enumerate(names, start=1)}
        for block in blocks(page.text):
            if isinstance(block, Directive) and "label" in block.options:
                kind = "" if block.name == "exercise" else block.name.rpartition(":")[2].capitalize()
                title = block.argument.strip(f"{STAR} ")
                labels[block.options["label"]] = f"{kind} *{title}*".strip() if title else kind
    settings = root / "_config.yml"
    config = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    tex = config.get("sphinx", {}).get("config", {}).get("mathjax3_config", {}).get("tex", {})
    citations = {}
    for name in config.get("bibtex_bibfiles", ()):
        for key, entry in parse_file(str(root / name)).entries.items():
            people = (person.rich_prelast_names + person.rich_last_names for person in entry.persons["author"])
            authors = [" ".join(map(str, names)) for names in people]
            first = " and ".join(authors) if len(authors) < 3 else f"{authors[0]} et al."
            citations[key] = (first, entry.fields.get("year", "n.d."))
    macros = {name: value for name, value in tex.get("macros", {}).items() if isinstance(value, str)}
    return References(labels, numbers, titles, citations, macros)


def plain_markdown(parts: Iterable[str | Directive], page: Page, references: References) -> str:
    """The parts of a MyST text without anything that only Sphinx understands."""
    texts = (
        _directive_text(block, page, references) if isinstance(block, Directive) else _words(block, page, references)
        for block in parts
    )
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(part.strip("\n") for part in texts)).strip("\n")


def _directive_text(block: Directive, page: Page, references: References) -> str:
    if block.name in ("code-block", "code"):
        return f"```{block.argument}\n{block.body}\n```"
    body = plain_markdown(blocks(block.body), page, references)
    title = _words(block.argument, page, references)
    if block.name == "list-table":
        return _table(body)
    if block.name.startswith("prf:"):
        kind = block.name.removeprefix("prf:").capitalize()
        if kind == "Proof":
            return f"**Proof.** {body} ∎" if not body.endswith("$$") else f"**Proof.** {body}\n\n∎"
        title = f"{kind}: {title}" if title else kind
    elif block.name != "admonition" and not title:
        title = block.name.capitalize()
    one_line = re.sub(r"\$\$.*?\$\$", lambda found: " ".join(found[0].split()), body, flags=re.DOTALL)
    return "\n".join(f"> {line}".rstrip() for line in (f"**{title}**", "", *one_line.splitlines()))


def _table(body: str) -> str:
    rows = list[list[str]]()
    for line in body.splitlines():
        if line.startswith("* - "):
            rows.append([line[4:]])
        elif line.startswith("  - "):
            rows[-1].append(line[4:])
        elif line.strip():
            rows[-1][-1] += " " + line.strip()
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(text: str, page: Page, references: References) -> str:
    """Text between directives: labels dropped, equations numbered, macros written out, roles as words."""
    fences = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    for number in range(0, len(fences), 2):  # what stands between fences of code
        part = re.sub(r"^\([\w-]+\)= *\n", "", fences[number], flags=re.MULTILINE)
        part = re.sub(r"\n\$\$ \(([\w-]+)\)", partial(_tagged, references=references), part)
        for name, value in references.macros.items():
            part = re.sub(rf"\\{name}(?![A-Za-z])", value.replace("\\", r"\\"), part)
        fences[number] = _ROLE.sub(lambda found: _role(found[1], found[2], page, references), part)
    return "".join(fences)


def _tagged(found: re.Match[str], *, references: References) -> str:
    return f" \\tag{{{references.numbers[found[1]][1]}}}\n$$"


def _role(name: str, content: str, page: Page, references: References) -> str:
    told = _TARGET.fullmatch(content)
    target = " ".join((told[2] if told else content).split())
    if name == "doc":
        full = target.lstrip("/") if target.startswith("/") else posixpath.join(PurePosixPath(page.name).parent, target)
        title, is_chapter = references.pages.get(full, (target, False))
        title = told[1] if told else title
        return f"[{title}]({PurePosixPath(full).name}.ipynb)" if is_chapter else f"*{title}*"
    if name in ("cite:t", "cite:p", "cite"):
        found = [references.citations.get(key.strip(), (key.strip(), "")) for key in target.split(",")]
        if name == "cite:t":
            return ", ".join(f"{authors} ({year})" for authors, year in found)
        return f"({'; '.join(f'{authors}, {year}' for authors, year in found)})"
    if name == "math":
        return f"${content}$"
    if told:
        return told[1]
    if name in ("eq", "numref") and target in references.numbers:
        where, number = references.numbers[target]
        words = f"({number})" if name == "eq" else f"Figure {number}"
        return words if where == page.name else f"{words} of *{references.pages[where][0]}*"
    if name in ("ref", "prf:ref"):
        return references.labels.get(target, target)
    return content
