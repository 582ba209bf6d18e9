"""The MyST directives in a page's text, as the parser finds them that Sphinx uses, and the exercises among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from docutils.parsers.rst.directives.misc import TestDirective
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.myst_role.index import myst_role
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser

from llvlit.errors import BuildError
from llvlit.publishing.pages import Page

STAR = "★"
_CODE = ("code", "code-block", "code-cell", "raw")
_INFO = re.compile(r"\{([^\s}]+)\} *(.*)")


@dataclass(frozen=True)
class Directive:
    """A fenced directive: ``name``, what stands behind it, its ``:options:`` and its body."""

    name: str
    argument: str
    options: Mapping[str, str]
    body: str


@dataclass(frozen=True)
class Exercise:
    """An exercise: its label, its title without the stars, how many those are (0 if none), its page."""

    label: str
    title: str
    stars: int
    page: str


def _role(state: StateInline, silent: bool) -> bool:
    """MyST's rule for a role, which also keeps how it was written."""
    start = state.pos
    found = myst_role(state, silent)
    if found and not silent:
        state.tokens[-1].meta["source"] = state.src[start : state.pos]
    return found


_PARSER = create_md_parser(MdParserConfig(enable_extensions={"amsmath", "colon_fence", "dollarmath"}), RendererHTML)
_PARSER.inline.ruler.at("myst_role", _role)


def parse(text: str) -> list[Token]:
    """Blocks of a MyST text, each with its lines; inline text as children of a token ``inline``."""
    return _PARSER.parse(text)


def directive(token: Token) -> Directive | None:
    """The directive that a fence is, or None for code and anything else."""
    info = _INFO.fullmatch(token.info) if token.type in ("fence", "colon_fence") else None
    if info is None:
        return None
    # docutils' directive for tests takes any argument, options and body
    content = parse_directive_text(TestDirective, info[2], token.content)
    options = {name: value or "" for name, value in content.options.items()}
    return Directive(info[1], " ".join(content.arguments), options, "\n".join(content.body).strip("\n"))


def blocks(text: str) -> Iterator[str | Directive]:
    """Parts of a MyST text in order: directives, and the text between them with its plain code."""
    lines, at = text.split("\n"), 0
    for token in parse(text):
        block = directive(token) if token.level == 0 else None
        if block and token.map:
            yield "\n".join(lines[at : token.map[0]])
            yield block
            at = token.map[1]
    yield "\n".join(lines[at:])


def walk(text: str) -> Iterator[Token | Directive]:
    """Every block of a MyST text in reading order: directives, what is in them, and tokens of anything else."""
    for token in parse(text):
        block = directive(token)
        yield block or token
        if block and block.name not in _CODE:
            yield from walk(block.body)


def read_exercises(page: Page) -> tuple[Exercise, ...]:
    """The exercises of a chapter in their order.

    Raises
    ------
    BuildError
        If one has no label, or shares it with another of the page.
    """
    exercises: dict[str, Exercise] = {}
    for block in blocks(page.text):
        if isinstance(block, Directive) and block.name == "exercise":
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
    lines = ["| Chapter | Exercise | Name | Grade |", "|---|---|---|---|"]
    for exercise in (exercise for page in pages if page.is_chapter for exercise in read_exercises(page)):
        chapter, number = f"{{doc}}`/{exercise.page}`", f"{{ref}}`{exercise.label}`"
        lines.append(f"| {chapter} | {number} | {exercise.title} | {STAR * exercise.stars} |")
    return "\n".join(lines)
