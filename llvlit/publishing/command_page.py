"""The page of the command line, made from the parsers themselves, so that it says what ``--help`` says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial

COMMAND_MARK = "<!-- command-line -->"
USAGE_WIDTH = 60
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def command_page(parser: argparse.ArgumentParser) -> str:
    """Markdown of every command of a parser: what it does, an example, its usage, its arguments.

    Examples
    --------
    >>> import argparse
    >>> from llvlit.publishing.command_page import command_page
    >>> parser = argparse.ArgumentParser(prog="gain")
    >>> command = parser.add_subparsers().add_parser("show", description="Show a gain.")
    >>> "Show a gain." in command_page(parser)
    True
    """
    return "\n\n".join(_section(name, command) for name, command in commands(parser).items())


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of the commands, by name, in the order of ``--help``."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices)


def _section(name: str, command: argparse.ArgumentParser) -> str:
    command.formatter_class = partial(argparse.HelpFormatter, width=USAGE_WIDTH)
    usage = _COLOUR.sub("", command.format_usage()).rstrip()
    usage = "\n".join(line[len("usage: ") :] for line in usage.splitlines())
    parts = [f"(cli-{name})=\n## `{command.prog}`", f"```{{index}} command line; {command.prog}\n```"]
    parts.append(_prose(command.description or ""))
    if command.epilog:
        lines = command.epilog.splitlines()[1:]  # the first says "Example:"
        parts.append("```console\n" + "\n".join(f"$ {line.strip()}" for line in lines) + "\n```")
    parts.append(f"```text\n{usage}\n```")
    parts += _arguments(name, command)
    return "\n\n".join(parts)


def _arguments(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """Each argument as a term with an anchor (``cli-gains-model``), and what ``--help`` says of it."""
    formatter = command._get_formatter()
    for action in command._actions:
        if action.dest == "help":
            continue
        invocation = _COLOUR.sub("", formatter._format_action_invocation(action))
        says = _prose(_COLOUR.sub("", formatter._expand_help(action)) if action.help else "No more is said of it.")
        yield f"[`{invocation}`]{{#cli-{name}-{action.dest.replace('_', '-')}}}\n: {says}"


def _prose(text: str) -> str:
    """Plain text as Markdown: options in code, and nothing else taken for markup."""
    escaped = re.sub(r"([\\`*_{}\[\]<>$|~^#])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)(--[a-z][a-z-]*)", r"`\1`", escaped)
