"""The page of the command line, made from the parser itself, so that it says what ``--help`` says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from llvlit.publishing.pages import escaped

USAGE_WIDTH = 60


def command_sections(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Markdown of every command of a parser, by name: what it does, an example, its usage, its arguments.

    Examples
    --------
    >>> import argparse
    >>> from llvlit.publishing.command_page import command_sections
    >>> parser = argparse.ArgumentParser(prog="gain")
    >>> command = parser.add_subparsers().add_parser("show", description="Show a gain.")
    >>> "Show a gain." in command_sections(parser)["show"]
    True
    """
    return {
        name: _section(name, command)
        for argument in arguments(parser)
        if isinstance(argument.choices, dict)  # a parser by name
        for name, command in argument.choices.items()
    }


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Arguments of a parser in their order, as argparse hands them to whoever formats its help."""
    collected: list[argparse.Action] = []

    class Collector(argparse.HelpFormatter):
        def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *_: Any, **__: Any) -> None:
            collected.extend(actions)

    formatter, parser.formatter_class = parser.formatter_class, Collector
    parser.format_help()
    parser.formatter_class = formatter
    return collected


def _section(name: str, command: argparse.ArgumentParser) -> str:
    parts = [f"```{{index}} command line; {command.prog}\n```", _prose(command.description or "")]
    if command.epilog:
        lines = command.epilog.splitlines()[1:]  # the first says "Example:"
        parts.append("```console\n" + "\n".join(f"$ {line.strip()}" for line in lines) + "\n```")
    command.formatter_class = partial(argparse.HelpFormatter, width=USAGE_WIDTH)
    usage = "\n".join(line[len("usage: ") :] for line in command.format_usage().rstrip().splitlines())
    parts.append(f"```text\n{usage}\n```")
    parts += _definitions(name, command)
    return "\n\n".join(parts)


def _definitions(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """Each argument as a term with an anchor (``cli-gains-model``), and what ``--help`` says of it."""
    for argument in arguments(command):
        if argument.dest != "help":
            told = (argument.help or "No more is said of it.") % {**vars(argument), "prog": command.prog}
            anchor = f"cli-{name}-{argument.dest.replace('_', '-')}"
            yield f"[`{_invocation(argument)}`]{{#{anchor}}}\n: {_prose(told)}"


def _invocation(argument: argparse.Action) -> str:
    """How an argument is written on the command line, such as ``--models NAME [NAME ...]``."""
    choices = "{" + ",".join(map(str, argument.choices)) + "}" if argument.choices is not None else ""
    if not argument.option_strings:
        return str(argument.metavar or choices or argument.dest)
    value = str(argument.metavar or choices or argument.dest.upper())
    several = {"?": f"[{value}]", "*": f"[{value} ...]", "+": f"{value} [{value} ...]"}
    times = argument.nargs if isinstance(argument.nargs, int) else 1
    values = several.get(str(argument.nargs), " ".join([value] * times))
    return " ".join([", ".join(argument.option_strings), values]).strip()


def _prose(text: str) -> str:
    """Plain text as Markdown with options in code."""
    return re.sub(r"(?<!\w)(--[a-z][a-z-]*)", r"`\1`", escaped(text))
