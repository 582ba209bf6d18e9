"""The book's MyST text as the plain Markdown that JupyterLab shows: directives as boxes, roles as words."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from markdown_it.token import Token
from pybtex.database import parse_string

from llvlit.files import foreign, read_text
from llvlit.publishing.directives import STAR, Directive, blocks, directive, parse, walk
from llvlit.publishing.pages import Page, read_yaml

_FIGURE = re.compile(r"""\bname=["'](fig-[\w-]+)["']""")
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
    """Everything that the pages of the book in ``root`` can refer to.

    Raises
    ------
    FileError
        If the book's settings or its bibliography cannot be read.
    """
    labels, numbers, titles = dict[str, str](), dict[str, tuple[str, int]](), dict[str, tuple[str, bool]]()
    for page in pages:
        parts = list(walk(page.text))
        directives = [part for part in parts if isinstance(part, Directive)]
        tokens = [part for part in parts if isinstance(part, Token)]
        title = ""
        for above, opening, heading in zip([None, *tokens], tokens, tokens[1:], strict=False):
            if opening.type == "heading_open":
                title = title or heading.content
                if above and above.type == "myst_target":
                    labels[above.content] = f"*{heading.content}*"
        titles[page.name] = (title or page.name, page.is_chapter)
        for block in directives:
            if "label" in block.options:
                labels[block.options["label"]] = _label_words(block)
        equations = [token.info for token in tokens if token.type == "math_block_label"]
        code = [block.body for block in directives if block.name == "code-cell"]
        figures = _FIGURE.findall("\n".join(code))
        for names in (equations, figures):
            numbers |= {label: (page.name, number) for number, label in enumerate(names, start=1)}
    settings = root / "_config.yml"
    config = read_yaml(settings, "the book's settings")
    with foreign(settings, "the book's settings"):
        tex = config.get("sphinx", {}).get("config", {}).get("mathjax3_config", {}).get("tex", {})
        macros = {name: value for name, value in tex.get("macros", {}).items() if isinstance(value, str)}
        bibliographies = [root / name for name in config.get("bibtex_bibfiles", ())]
    citations = {key: words for path in bibliographies for key, words in _citations(path)}
    return References(labels, numbers, titles, citations, macros)


def _label_words(block: Directive) -> str:
    """Words for a theorem or an exercise that a page refers to."""
    kind = "" if block.name == "exercise" else block.name.rpartition(":")[2].capitalize()
    title = block.argument.strip(f"{STAR} ")
    return f"{kind} *{title}*".strip() if title else kind


def _citations(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Key, authors and year of each entry of a bibliography."""
    text = read_text(path, "a bibliography")
    with foreign(path, "a bibliography"):
        for key, entry in parse_string(text, "bibtex").entries.items():
            people = (person.rich_prelast_names + person.rich_last_names for person in entry.persons["author"])
            authors = [" ".join(map(str, names)) for names in people]
            first = " and ".join(authors) if len(authors) < 3 else f"{authors[0]} et al."
            yield key, (first, entry.fields.get("year", "n.d."))


@dataclass(frozen=True)
class Writer:
    """Writes the MyST text of a page without anything that only Sphinx understands."""

    page: Page
    references: References

    def text(self, parts: Iterable[str | Directive], *, boxed: bool = False) -> str:
        """Parts of a text as plain Markdown; ``boxed`` sets an equation on one line, as a quotation needs it."""
        texts = (self._box(part) if isinstance(part, Directive) else self._words(part, boxed) for part in parts)
        return "\n\n".join(text for text in (text.strip("\n") for text in texts) if text)

    def _box(self, block: Directive) -> str:
        if block.name in ("code-block", "code"):
            return f"```{block.argument}\n{block.body}\n```"
        if block.name == "prf:proof":
            body = self.text(blocks(block.body))
            return f"**Proof.** {body}" + ("\n\n∎" if body.endswith("$$") else " ∎")
        if block.name == "list-table":
            return self._table(block.body)
        body = self.text(blocks(block.body), boxed=True)
        title = self._words(block.argument, boxed=True)
        kind = block.name.removeprefix("prf:").capitalize()
        if block.name.startswith("prf:"):
            title = f"{kind}: {title}" if title else kind
        lines = (f"**{title or kind}**", "", *body.split("\n"))
        return "\n".join(f"> {line}".rstrip() for line in lines)

    def _table(self, body: str) -> str:
        """A table whose rows are a list, and whose cells are lists in it."""
        rows = list[list[str]]()
        for token in parse(body):
            if token.type == "list_item_open" and token.level == 1:
                rows.append([])
            elif token.type == "inline" and rows:
                rows[-1].append(" ".join(self._words(token.content, boxed=True).split()))
        rows[1:1] = [["---"] * len(row) for row in rows[:1]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _words(self, text: str, boxed: bool) -> str:
        """Text between directives: labels dropped, equations numbered, macros written out, roles as words."""
        lines: list[str | None] = list(text.split("\n"))
        for token in parse(text):
            if token.map is None:
                continue
            start, end = token.map
            old = "\n".join(line for line in lines[start:end] if line is not None)
            new = self._block(token, old, boxed)
            if new != old:  # the lines keep their places, which later tokens name
                lines[start:end] = [new, *[None] * (end - start - 1)]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line is not None))

    def _block(self, token: Token, source: str, boxed: bool) -> str | None:
        """What stands for the lines of a token, None for nothing."""
        margin = source[: len(source) - len(source.lstrip(" >\t"))]
        if token.type in ("myst_target", "myst_line_comment"):
            return None
        if block := directive(token):  # in a list
            return "\n".join(margin + line for line in self._box(block).split("\n"))
        if token.type in ("math_block", "math_block_label"):
            _, number = self.references.numbers.get(token.info, ("", None))
            tag = f" \\tag{{{number}}}" if number else ""
            lines = ["$$", *f"{self._tex(token.content).strip()}{tag}".splitlines(), "$$"]
            return margin + (" " if boxed else f"\n{margin}").join(line.strip() if boxed else line for line in lines)
        if token.type == "amsmath":
            return self._tex(source)
        at = 0
        for child in token.children or ():
            if child.type == "myst_role":
                old, new = child.meta["source"], self._role(child.meta["name"], child.content)
            elif child.type.startswith("math_inline"):
                old = f"{child.markup}{child.content}{child.markup}"
                new = self._tex(old)
            else:
                continue
            place = re.compile(r"[\s>]+".join(map(re.escape, old.split()))).search(source, at)
            if place:
                source = source[: place.start()] + new + source[place.end() :]
                at = place.start() + len(new)
        return source

    def _tex(self, formula: str) -> str:
        for name, value in self.references.macros.items():
            formula = re.sub(rf"\\{re.escape(name)}(?![A-Za-z])", value.replace("\\", r"\\"), formula)
        return formula

    def _role(self, name: str, content: str) -> str:
        named = _TARGET.fullmatch(content)  # such as "some words <label>"
        target = " ".join((named[2] if named else content).split())
        if name == "doc":
            folder = PurePosixPath(self.page.name).parent
            full = target.lstrip("/") if target.startswith("/") else posixpath.join(folder, target)
            title, is_chapter = self.references.pages.get(full, (target, False))
            title = named[1] if named else title
            return f"[{title}]({PurePosixPath(full).name}.ipynb)" if is_chapter else f"*{title}*"
        if name in ("cite:t", "cite:p", "cite"):
            works = [self.references.citations.get(key.strip(), (key.strip(), "")) for key in target.split(",")]
            if name == "cite:t":
                return ", ".join(f"{authors} ({year})" for authors, year in works)
            return f"({'; '.join(f'{authors}, {year}' for authors, year in works)})"
        if name == "math":
            return f"${self._tex(content)}$"
        if named:
            return named[1]
        if name in ("eq", "numref") and target in self.references.numbers:
            where, number = self.references.numbers[target]
            words = f"({number})" if name == "eq" else f"Figure {number}"
            return words if where == self.page.name else f"{words} of *{self.references.pages[where][0]}*"
        if name in ("ref", "prf:ref"):
            return self.references.labels.get(target, target)
        return content
