"""The book's MyST text, as Sphinx's parser reads it, and as the plain Markdown that JupyterLab shows.

Directives become boxes, roles words, labelled equations numbered ones; any other text stays as it is written.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from docutils.parsers.rst.directives.misc import TestDirective
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser
from pybtex.database import parse_string

from llvlit.files import foreign, read_text
from llvlit.publishing.pages import Page, read_yaml

STAR = "★"
_CODE = ("code", "code-block", "code-cell", "raw")
_PARSER = create_md_parser(MdParserConfig(enable_extensions={"amsmath", "colon_fence", "dollarmath"}), RendererHTML)
_DIRECTIVE = re.compile(r"\{([^\s}]+)\} *(.*)")
_TARGET = re.compile(r"(.*?)\s*<([^<>]+)>", re.DOTALL)
_FIGURE = re.compile(r"""\bname=["'](fig-[\w-]+)["']""")


@dataclass(frozen=True)
class Directive:
    """A fenced directive: ``name``, what stands behind it, its ``:options:`` and its body."""

    name: str
    argument: str
    options: Mapping[str, str]
    body: str


def _directive(token: Token) -> Directive | None:
    """The directive that a fence is, or None for code and anything else."""
    opening = _DIRECTIVE.fullmatch(token.info) if token.type in ("fence", "colon_fence") else None
    if opening is None:
        return None
    # docutils' directive for tests takes any argument, options and body
    content = parse_directive_text(TestDirective, opening[2], token.content)
    options = {name: value or "" for name, value in content.options.items()}
    return Directive(opening[1], " ".join(content.arguments), options, "\n".join(content.body).strip("\n"))


def split(text: str, names: Collection[str]) -> Iterator[str | Directive]:
    """Parts of a MyST text in order: the directives of these names outside others, and the text between them."""
    lines, at = text.split("\n"), 0
    for token in _PARSER.parse(text):
        block = _directive(token) if token.level == 0 else None
        if block and token.map and block.name in names:
            yield "\n".join(lines[at : token.map[0]])
            yield block
            at = token.map[1]
    yield "\n".join(lines[at:])


def walk(text: str) -> Iterator[Token | Directive]:
    """Every block of a MyST text in reading order: directives, what is in them, and tokens of anything else."""
    for token in _PARSER.parse(text):
        block = _directive(token)
        yield block or token
        if block and block.name not in _CODE:
            yield from walk(block.body)


@dataclass(frozen=True)
class References:
    """What the pages can refer to, in words.

    Attributes
    ----------
    labels : mapping of str to (str, str)
        By label: words for a section, a theorem, an exercise, an equation or a figure, and the page within which
        these count; the name of no page for words that hold anywhere.
    pages : mapping of str to (str, bool)
        Title of a page by its name, and whether it is a chapter, and so a notebook.
    citations : mapping of str to (str, str)
        Authors and year by key.
    macros : mapping of str to str
        TeX for the book's own macros, which JupyterLab does not know.
    """

    labels: Mapping[str, tuple[str, str]]
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
    labels, titles = dict[str, tuple[str, str]](), dict[str, tuple[str, bool]]()
    for page in pages:
        tokens, equations, figures = list[Token](), list[str](), list[str]()
        for part in walk(page.text):
            if isinstance(part, Token):
                tokens.append(part)
                equations += [part.info] * (part.type == "math_block_label")
                continue
            if part.name == "code-cell":
                figures += _FIGURE.findall(part.body)
            if "label" in part.options:
                kind = "" if part.name == "exercise" else part.name.rpartition(":")[2].capitalize()
                title = part.argument.strip(f"{STAR} ")
                labels[part.options["label"]] = (f"{kind} *{title}*".strip() if title else kind, "")
        labels |= {label: (f"({number})", page.name) for number, label in enumerate(equations, start=1)}
        labels |= {label: (f"Figure {number}", page.name) for number, label in enumerate(figures, start=1)}
        headings = [place for place, token in enumerate(tokens) if token.type == "heading_open"]
        for place in headings:
            if place and tokens[place - 1].type == "myst_target":
                labels[tokens[place - 1].content] = (f"*{tokens[place + 1].content}*", "")
        title = tokens[headings[0] + 1].content if headings else ""
        titles[page.name] = (title or page.name, page.is_chapter)
    settings = root / "_config.yml"
    config = read_yaml(settings, "the book's settings")
    with foreign(settings, "the book's settings"):
        tex = config.get("sphinx", {}).get("config", {}).get("mathjax3_config", {}).get("tex", {})
        macros = {name: value for name, value in tex.get("macros", {}).items() if isinstance(value, str)}
        bibliographies = [root / name for name in config.get("bibtex_bibfiles", ())]
    citations = {key: words for path in bibliographies for key, words in _citations(path)}
    return References(labels, titles, citations, macros)


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

    def text(self, text: str, *, boxed: bool = False) -> str:
        """A text as plain Markdown; ``boxed`` sets an equation on one line, as a quotation needs it."""
        lines = text.split("\n")
        for token in reversed(_PARSER.parse(text)):  # from the end, so that the lines of earlier tokens stay theirs
            if token.map and token.nesting == 0:
                place = slice(*token.map)
                lines[place] = self._block(token, "\n".join(lines[place]), boxed).split("\n")
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")

    def _block(self, token: Token, source: str, boxed: bool) -> str:
        """What stands for the lines of a token."""
        margin = source[: len(source) - len(source.lstrip(" >\t"))]  # it may lie in a list or a quotation
        if token.type in ("myst_target", "myst_line_comment"):
            return ""
        if block := _directive(token):
            return "\n".join((margin + line).rstrip() for line in ("", *self._box(block).split("\n"), ""))
        if token.type in ("math_block", "math_block_label"):
            number, _ = self.references.labels.get(token.info, ("", ""))
            tag = f" \\tag{{{number.strip('()')}}}" if number else ""
            lines = ["$$", *f"{self._tex(token.content).strip()}{tag}".splitlines(), "$$"]
            return margin + (" " if boxed else f"\n{margin}").join(line.strip() if boxed else line for line in lines)
        if token.type == "amsmath":
            return self._tex(source)
        written, at = "", 0  # the parser does not tell where in the source a child lies
        for child in token.children or ():
            opening = closing = re.escape(child.markup)
            if child.type == "myst_role":
                opening, closing = rf"\{{{re.escape(child.meta['name'])}\}}`+", "`+"
            elif child.type not in ("code_inline", "math_inline", "math_inline_double"):
                continue
            words = r"[\s>]*".join([opening, *map(re.escape, child.content.split()), closing])
            if found := re.compile(words).search(source, at):
                new = found[0] if child.type == "code_inline" else self._tex(found[0])
                if child.type == "myst_role":
                    new = self._role(child.meta["name"], child.content)
                written, at = written + source[at : found.start()] + new, found.end()
        return written + source[at:]

    def _box(self, block: Directive) -> str:
        if block.name in ("code-block", "code"):
            return f"```{block.argument}\n{block.body}\n```"
        if block.name == "prf:proof":
            body = self.text(block.body)
            return f"**Proof.** {body}" + ("\n\n∎" if body.endswith("$$") else " ∎")
        if block.name == "dropdown":
            return f"<details>\n<summary>{block.argument}</summary>\n\n{self.text(block.body)}\n\n</details>"
        title, body = self.text(block.argument, boxed=True), self.text(block.body, boxed=True)
        kind = block.name.removeprefix("prf:").capitalize()
        if block.name.startswith("prf:"):
            title = f"{kind}: {title}" if title else kind
        return "\n".join(f"> {line}".rstrip() for line in (f"**{title or kind}**", "", *body.split("\n")))

    def _tex(self, formula: str) -> str:
        for name, value in self.references.macros.items():
            formula = re.sub(rf"\\{re.escape(name)}(?![A-Za-z])", value.replace("\\", r"\\"), formula)
        return formula

    def _role(self, name: str, content: str) -> str:
        written = _TARGET.fullmatch(content)  # such as "some words <label>"
        words, target = written.groups() if written else ("", content)
        target = " ".join(target.split())
        if name == "math":
            return f"${self._tex(content)}$"
        if name == "doc":
            place = posixpath.join(posixpath.dirname(self.page.name), target).lstrip("/")
            title, is_chapter = self.references.pages.get(place, (target, False))
            return f"[{words or title}]({posixpath.basename(place)}.ipynb)" if is_chapter else f"*{words or title}*"
        if name in ("cite:t", "cite:p", "cite"):
            works = [self.references.citations.get(key.strip(), (key.strip(), "")) for key in target.split(",")]
            if name == "cite:t":
                return ", ".join(f"{authors} ({year})" for authors, year in works)
            return f"({'; '.join(f'{authors}, {year}' for authors, year in works)})"
        if words or name not in ("eq", "numref", "ref", "prf:ref"):
            return words or content
        found, page = self.references.labels.get(target, (target, ""))
        return f"{found} of *{self.references.pages[page][0]}*" if page not in ("", self.page.name) else found
