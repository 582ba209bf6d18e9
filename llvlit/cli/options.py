"""Options: the kinds of value they take, those that several commands share, and the model and task they name."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llvlit.cli.terminal import show, terminal_width
from llvlit.errors import InputError

if TYPE_CHECKING:
    from llvlit.engine.models import LanguageModel
    from llvlit.engine.tokens import TokenizedPrompts
    from llvlit.tasks.task import Task


def command(commands: Any, run: Callable[[argparse.Namespace], None], example: str) -> argparse.ArgumentParser:
    """A command's own parser, mounted among the others: the name and the docstring of what main calls are its own.

    Of several examples, each has a line.
    """
    summary = " ".join((run.__doc__ or "").split())
    parser: argparse.ArgumentParser = commands.add_parser(
        run.__name__,
        help=summary,
        description=textwrap.fill(summary, min(terminal_width(), 100)),
        epilog=textwrap.indent(example, "  ").join([f"Example{'s' * (chr(10) in example)}:\n", ""]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind, check in KINDS.items():
        parser.register("type", kind, partial(_checked, check))
    parser.register("action", None, _Store)
    parser.set_defaults(run=run, given=())
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


class _Store(argparse.Action):
    """Stores a value as argparse does, and notes in ``given`` that it was given, be it the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = (*namespace.given, self.dest)


MADE_WITH = ("layers", "limit", "horizon", "towards", "positive", "negative", "first_tokens")
SHOWN_BY = ("task", "contrast", "suffix", "data_dir", "prompts", "seed")
OWN_SIGN = "the shift has a sign of its own"
IDLE = {
    "plan": ((*MADE_WITH, *SHOWN_BY), "the plan has its own; make another with `llvlit recommend`"),
    "inputs": (("layers", "limit", "towards"), "pushes by hand are those that you write"),
    "target": (("towards",), OWN_SIGN),
    "targets": (("towards",), OWN_SIGN),
    "shift": (("towards",), OWN_SIGN),
    "contrast": (("task", "data_dir"), "your own prompts take the place of a task"),
    "no_plot": (("plot",), "no figure is written"),
}
"""With an option, those that say nothing beside it, and why."""
NEEDS = {"first_tokens": "positive", "positive": "negative", "negative": "positive"}
"""Options that say nothing without another."""


def check_idle(options: argparse.Namespace) -> None:
    """InputError if an option was given that says nothing with the others."""

    def is_given(name: str) -> bool:
        return name in options.given or getattr(options, name, None) is True

    for mode, (names, why) in IDLE.items():
        for name in filter(is_given, names if is_given(mode) else ()):
            raise InputError(f"{as_written(name)} says nothing with {as_written(mode)}: {why}. Leave out one of them.")
    for name, needed in NEEDS.items():
        if is_given(name) and not is_given(needed):
            raise InputError(f"{as_written(name)} says nothing without {as_written(needed)}. Give both, or neither.")


def as_written(name: str) -> str:
    """An option as it is written."""
    return f"--{name.replace('_', '-')}"


def _name(checks: ModuleType, word: str) -> str:
    checks.path("name", checks.text("name", word))
    return os.path.expanduser(word)


def _number(parse: Callable[[str], float], word: str) -> float | str:
    """A number; what is none stays text, which the check refuses."""
    with suppress(ValueError):
        return parse(word)
    return word


def _layers(word: str) -> tuple[int, int]:
    """A layer, or the first and last of several: ``8-20``."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise InputError(f"layers={word!r} names no layers; write one, such as 12, or the first and last: 8-20.")
    return int(match[1]), int(match[2] or match[1])


KINDS: dict[str | None, Callable[[ModuleType, str], Any]] = {
    None: _name,  # of a file, a folder, a model or a task; ``~`` is the home folder
    "text": lambda checks, word: checks.text("text", word),
    "count": lambda checks, word: checks.integer("number", _number(int, word), at_least=1),
    "step": lambda checks, word: checks.integer("number", _number(int, word), at_least=0),
    "index": lambda checks, word: checks.integer("number", _number(int, word)),
    "seed": lambda checks, word: checks.seed("seed", _number(int, word)),
    "shift": lambda checks, word: checks.number("number", _number(float, word), nonzero=True),
    "share": lambda checks, word: checks.number("number", _number(float, word), above=0, below=1),
    "length": lambda checks, word: checks.number("number", _number(float, word), above=0),
    "layers": lambda checks, word: _layers(word),
}
"""What ``type`` of an option can be: a check of ``llvlit.checks`` each, so that no value is refused after some work."""


SIGNED = ("--shift", "--target", "--targets")
"""Options whose numbers may be below zero."""


def plain_numbers(words: Sequence[str]) -> list[str]:
    """Words of a command, signed numbers in plain decimals: argparse takes ``-1e-1`` for an option, not ``-0.1``."""
    plain, option = [], ""
    for word in words:
        if option in SIGNED and re.fullmatch(r"-(\d+\.?\d*|\.\d+)[eE][+-]?\d{1,3}", word):
            word = f"{Decimal(word):f}"
        elif word.startswith("--"):
            option = word
        plain.append(word)
    return plain


def _checked(check: Callable[[ModuleType, str], Any], word: str) -> Any:
    from llvlit import checks  # here, since numpy takes as long to import as all of --help

    try:
        return check(checks, word)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="auto", help="what computes: auto (default), cpu, cuda, ...")


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--data-dir``."""
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="NAME.parquet, .csv or .jsonl in it (text, label) serves the task NAME"
    )


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add what names a model, a task and the prompts of its splits."""
    group = parser.add_argument_group("the model, and the prompts that show the concept")
    group.add_argument(
        "--model",
        default="embedded/large",
        help="a name that `llvlit models` lists, such as smollm2-135m; a folder; a .gguf file; or a hub id "
        "(default embedded/large)",
    )
    group.add_argument("--dtype", type="text", help="float32 (default), float64, bfloat16 or float16")
    group.add_argument(
        "--task",
        default="film-sentiment",
        help="labeled prompts of two classes: a name that `llvlit tasks` lists, or a .parquet, .csv or .jsonl file "
        "with the columns text and label, 1 for the concept and 0 without (default film-sentiment)",
    )
    group.add_argument(
        "--contrast",
        nargs=2,
        metavar="FILE",
        help="your own prompts in place of a task: two text files, one prompt a line, those with the concept first; "
        "let them end like the texts that you will steer",
    )
    group.add_argument(
        "--data-dir", metavar="FOLDER", help="where NAME.parquet, .csv or .jsonl lies, so that --task NAME finds it"
    )
    group.add_argument(
        "--prompts",
        type="count",
        metavar="N",
        default=50,
        help="prompts of each class to predict from, and as many others to test on (default 50, of which recommend and "
        "steer use 16; of two files, a quarter at most); directions are found on four times as many, or twice where "
        "there are no more; fewer take less time and tell less",
    )
    group.add_argument(
        "--suffix",
        type="text",
        help='what every prompt ends in, such as " The film was" (default: what the task says); let the texts that '
        "you will steer end so, too",
    )
    group.add_argument("--seed", type="seed", default=0, help="which prompts are drawn (default 0)")
    group.add_argument(
        "--chat", action="store_true", help="make each prompt a user's message in the model's chat template"
    )
    group.add_argument(
        "--token-index",
        type="index",
        metavar="I",
        default=-1,
        help="the token that is read and pushed, -1 being the last (default), -2 the one before; what follows it is "
        "cut off. Of use where prompts end in the answer, which must not tell the class",
    )
    add_device(group)


def lines_of(path: str | Path) -> list[str]:
    """Lines of a text file that have content."""
    from llvlit.files import read_text

    lines = [line.strip() for line in read_text(path, "a text file").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty. Write one entry a line.")
    return lines


def short_name(model: LanguageModel) -> str:
    """A model's name; of a folder or a file, its own without the path."""
    return Path(model.name).name if Path(model.name).exists() else model.name


def task_title(options: argparse.Namespace) -> str:
    """What the prompts are called."""
    return " against ".join(Path(path).stem for path in options.contrast) if options.contrast else str(options.task)


def _task(options: argparse.Namespace) -> Task:
    from llvlit.tasks.task import Task, load_task

    if not options.contrast:
        return load_task(options.task, suffix=options.suffix, data_dir=options.data_dir)
    positive, negative = map(lines_of, options.contrast)
    positive_name, negative_name = (Path(path).stem for path in options.contrast)
    return Task(
        task_title(options),
        "two files of prompts",
        (negative_name, positive_name),
        (*positive, *negative),
        (1,) * len(positive) + (0,) * len(negative),
        options.suffix or "",
    )


def load_experiment(options: argparse.Namespace) -> tuple[LanguageModel, dict[str, TokenizedPrompts]]:
    """The model that the options name, and the tokens of the task's splits: concept, operating, evaluation.

    Of two files of prompts, no more are asked for than there are.
    """
    from llvlit.engine.models import load_model
    from llvlit.engine.tokens import tokenize

    n, task = options.prompts, _task(options)  # before the model, which takes longer
    if options.contrast:
        n = min(n, max(min(task.labels.count(label) for label in (0, 1)) // 4, 1))
    try:  # a gap between classes shows with many prompts first, and they cost a forward pass each, no more
        splits = task.split(concept=4 * n, operating=n, evaluation=n, seed=options.seed)
    except InputError:
        splits = task.split(concept=2 * n, operating=n, evaluation=n, seed=options.seed)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    how = {"chat": options.chat, "token_index": options.token_index}
    parts = ("concept", "operating", "evaluation")
    return model, {part: tokenize(model, getattr(splits, part), **how) for part in parts}


def add_files(parser: argparse.ArgumentParser, drawn: str, saved: str) -> None:
    """Add where the figure and the result go."""
    stem = parser.prog.split()[-1]
    parser.add_argument("--plot", metavar="FILE", help=f"PNG of {drawn} (default {stem}-MODEL-TASK.png, here)")
    parser.add_argument("--no-plot", action="store_true", help="write no figure")
    parser.add_argument("--save", metavar="FILE", help=f"save {saved}")


def check_place(option: str, path: Path, *, also: str = "") -> None:
    """InputError if no file can be written there, before anything is computed."""
    if not path.absolute().parent.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{option} {path} cannot be written. Give a file in a folder that exists{also}.")


def places_of(options: argparse.Namespace) -> dict[str, Path]:
    """Where files go, by option; a place that cannot be written to is refused before anything is computed."""
    places = {"save": Path(options.save)} if options.save else {}
    if not options.no_plot:
        parts = (options.command, Path(options.model).name, Path(task_title(options)).stem)
        stem = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-")[:60] for part in parts)
        places["plot"] = Path(options.plot or f"{stem}.png")
        if places["plot"].suffix.lower() != ".png":
            raise InputError(f"--plot {places['plot']}: the figure is a PNG; give a name that ends in .png.")
    for option, path in places.items():
        check_place(f"--{option}", path, also=", or --no-plot" * (option == "plot"))
    return places


def prompts_note(tokens: TokenizedPrompts) -> list[str]:
    """Lines on what was done to the prompts; none if nothing was."""
    return textwrap.wrap(f"Prompts as tokens: {tokens}.") if any(tokens.metadata.values()) else []


def borrowed_note(states: Sequence[int], *, read: bool = False) -> list[str]:
    """A line on the layers pushed along a borrowed direction, or the states pushed and read; none if there are none."""
    named = f"{'s' * (len(states) > 1)} {', '.join(map(str, states))}: the class gap there is within chance, so"
    pushed = f"before layer{named} the push goes along the next state's own direction, and its sign means nothing."
    both = f"at state{named} pushes and readings there go along the next state's own direction."
    return textwrap.wrap(f"Borrowed directions {both}" if read else f"* Borrowed directions {pushed}") if states else []


def report(
    options: argparse.Namespace,
    places: dict[str, Path],
    found: dict[str, Any],
    text: str,
    *,
    about: Sequence[str],
    save: Callable[[Path], None],
    draw: Callable[[dict[str, Any], Path], None],
    export: Callable[[Path], object] | None = None,
) -> None:
    """Write the files that were asked for, and show what was found: as text, or as JSON without what it is about."""
    lines = [text]
    try:
        if "save" in places:
            save(places["save"])
            lines.append(f"Saved: {options.save}")
        if export and "export" in places:
            export(places["export"])
            lines.append(f"Exported: {options.export}")
        if "plot" in places:
            draw(found, places["plot"])
            found["figure"] = str(places["plot"])
            lines.append(f"Figure: {places['plot']}")
    finally:  # also when a file could not be written
        show(options, {key: value for key, value in found.items() if key not in about}, "\n".join(lines))
