"""Kinds of value that options take, through the door of the package; what is wrong is refused before any work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llvlit.errors import InputError


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    """A command's own parser, mounted among the others; ``run`` is what main calls."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("type", None, named)  # what an option takes unless it says otherwise
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--data-dir``."""
    parser.add_argument("--data-dir", metavar="FOLDER", help="NAME.parquet in it (text, label) serves the task NAME")


def named(value: str) -> str:
    """What may name a file, a folder, a model or a task; ``~`` is the home folder."""
    _checked(lambda checks: checks.path("name", checks.text("name", value)))
    return os.path.expanduser(value)


def text(value: str) -> str:
    """Any text, the empty one too."""
    return str(_checked(lambda checks: checks.text("text", value)))


def count(value: str) -> int:
    """Whole number above 0."""
    return int(_checked(lambda checks: checks.integer("number", _parsed(int, value), at_least=1)))


def step(value: str) -> int:
    """Whole number, 0 too."""
    return int(_checked(lambda checks: checks.integer("number", _parsed(int, value), at_least=0)))


def seed(value: str) -> int:
    """Seed of a random generator."""
    return int(_checked(lambda checks: checks.seed("seed", _parsed(int, value))))


def number(value: str) -> float:
    """Finite number."""
    return float(_checked(lambda checks: checks.number("number", _parsed(float, value))))


def length(value: str) -> float:
    """Finite number above 0."""
    return float(_checked(lambda checks: checks.number("number", _parsed(float, value), above=0)))


def _checked(check: Callable[[ModuleType], Any]) -> Any:
    from llvlit import checks  # here, since numpy takes as long to import as all of --help

    try:
        return check(checks)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parsed(parse: Callable[[str], float], value: str) -> Any:
    """A number; what is none stays text, which the check refuses."""
    try:
        return parse(value)
    except ValueError:
        return value
