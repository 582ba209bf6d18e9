"""MyST's fenced directives in a page's text, and the exercises among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llvlit.errors import BuildError
from llvlit.publishing.pages import Page

STAR = "★"
EXERCISE_MARK = "<!-- exercise-table -->"
_OPEN = re.compile(r"(`{3,}|:{3,})(?:\{([\w:-]+)\} *(.*)|(.*))")
_OPTION = re.compile(r":([\w-]+): *(.*)")


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


def blocks(text: str) -> Iterator[str | Directive]:
    """Parts of a Markdown text in order: directives, and the text between them with its plain code fences."""
    lines, plain = text.splitlines(), list[str]()
    at = 0
    while at < len(lines):
        opened = _OPEN.fullmatch(lines[at].rstrip())
        if not opened:
            plain.append(lines[at])
            at += 1
            continue
        fence = opened[1]
        closes = re.compile(rf"{re.escape(fence[0])}{{{len(fence)},}} *")
        end = next((row for row in range(at + 1, len(lines)) if closes.fullmatch(lines[row])), len(lines))
        if opened[2] is None:
            plain += lines[at : end + 1]
        else:
            if plain:
                yield "\n".join(plain)
                plain = []
            yield _directive(opened[2], opened[3], lines[at + 1 : end])
        at = end + 1
    if plain:
        yield "\n".join(plain)


def _directive(name: str, argument: str, lines: Sequence[str]) -> Directive:
    options, rest = {}, list(lines)
    while rest and (found := _OPTION.fullmatch(rest[0])):
        options[found[1]] = found[2]
        rest.pop(0)
    return Directive(name, argument.strip(), options, "\n".join(rest).strip("\n"))


def read_exercises(page: Page) -> tuple[Exercise, ...]:
    """The exercises of a chapter in their order.

    Raises
    ------
    BuildError
        If one has no label, or shares it with another of the page.
    """
    found: dict[str, Exercise] = {}
    for block in blocks(page.text):
        if isinstance(block, Directive) and block.name == "exercise":
            label = block.options.get("label", "")
            if not label or label in found:
                raise BuildError(
                    f"{page.source}: the exercise {block.argument!r} needs a `:label:` of its own, not {label!r}."
                )
            title = block.argument.replace(STAR, "").strip()
            found[label] = Exercise(label, title or label, block.argument.count(STAR), page.name)
    return tuple(found.values())


def exercise_table(pages: Iterable[Page]) -> str:
    """Every exercise of the chapters among these pages, as a MyST table: chapter, number, name, stars."""
    lines = ["| Chapter | Exercise | Name | Grade |", "|---|---|---|---|"]
    for one in (one for page in pages if page.is_chapter for one in read_exercises(page)):
        lines.append(f"| {{doc}}`/{one.page}` | {{ref}}`{one.label}` | {one.title} | {STAR * one.stars} |")
    return "\n".join(lines)
