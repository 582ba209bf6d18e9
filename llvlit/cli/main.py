"""Command line: llvlit book | exercises | publish | gains | steer | study | train | models | tasks."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from llvlit.cli import commands
from llvlit.cli import exercises as commands_exercises
from llvlit.cli import model as commands_model
from llvlit.cli import study as commands_study
from llvlit.errors import LlvlitError

FIRST_STEPS = """\
llvlit: which layers of a transformer move a concept, how strongly, and what is the cheapest push?

  llvlit gains                            gain of every layer of a shipped model, measured and predicted
  llvlit steer                            text generated with no push, the cheapest, and a uniform one
  llvlit models; llvlit tasks             what can be named
  llvlit --help                           all commands; each has --help with an example

No network and no GPU is needed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of ours are one line on standard error, with exit status 1."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has left, as `head` does: nothing to say, nor at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    if not (sys.argv[1:] if arguments is None else arguments):
        print(FIRST_STEPS)
        return 0
    options = parser().parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        result = options.run(options)
    except LlvlitError as error:
        print(f"llvlit {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"llvlit {options.command}: interrupted; finished results are kept.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(_finite(result), indent=1, allow_nan=False))
    return 0


def _finite(result: Any) -> Any:
    """The same result with null for every number that JSON has no word for (NaN and the infinities)."""
    if isinstance(result, dict):
        return {key: _finite(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [_finite(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, with a parser of its own for each command."""
    parser = argparse.ArgumentParser(
        prog="llvlit",
        description="System identification of transformers: depth as time, one push per layer, "
        "what it does to a concept at the output, and the cheapest push that reaches a target.",
        epilog="Start with `llvlit gains`. Every command has --help with an example.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        return command

    book = add("book", commands.book, "Execute every chapter and build the book.", "llvlit book --profile embedded")
    book.add_argument("--root", default=".", help="folder with _config.yml and _toc.yml (default: here)")
    book.add_argument(
        "--profile", default="embedded", help="embedded (default, offline), paper (hub), or a folder of models"
    )
    _device(book)
    book.add_argument("--chapters", nargs="+", metavar="NAME", help="execute these only, such as: gains control")
    book.add_argument("--pdf", action="store_true", help="also print the book into _build/llvlit.pdf (needs Chromium)")
    book.add_argument("--screenshots", metavar="FOLDER", help="also every page as PNG: light, dark, phone (Chromium)")
    book.add_argument("--jobs", type=int, help="chapters executed at once")

    publish = add(
        "publish",
        commands.publish,
        "Lay out the site of the built book: a folder for this version, beside the versions it already has.",
        "llvlit publish\n  llvlit publish --version v0.1.0 --previous gh-pages",
    )
    publish.add_argument("--root", default=".", help="folder of the book, already built (default: here)")
    publish.add_argument("--version", default="latest", help="latest (default), or a tag such as v0.1.0")
    publish.add_argument("--site", metavar="FOLDER", help="folder to write (default _build/site)")
    publish.add_argument("--previous", metavar="FOLDER", help="site whose other versions are kept; empty for the first")
    publish.add_argument("--revision", help="commit or tag that notebooks install (default: the tag, or this commit)")

    exercises = add(
        "exercises",
        commands_exercises.exercises,
        "Write each chapter as a notebook without solutions for students, and with them for instructors.",
        "llvlit exercises --out course",
    )
    exercises.add_argument("--root", default=".", help="folder with _config.yml and _toc.yml (default: here)")
    exercises.add_argument("--out", default="exercises", metavar="FOLDER", help="folder to write (default exercises)")
    exercises.add_argument("--force", action="store_true", help="replace notebooks there that differ")

    gains = add(
        "gains",
        commands_model.gains,
        "Gain profile of a model on a task: measured on the full model, and predicted.",
        "llvlit gains --model embedded/large --task film-sentiment --basis reachability --order 16",
    )
    _experiment(gains)
    gains.add_argument("--basis", default="reachability", help="krylov, reachability (default) or random")
    gains.add_argument("--order", type=int, help="order d of the surrogate (default 32, or H if that is less)")
    gains.add_argument("--amplitude", type=float, default=0.1, help="length of the measured push (default 0.1)")
    gains.add_argument("--plot", metavar="FILE", help="PNG of the profile (default gains-MODEL-TASK.png, here)")
    gains.add_argument("--no-plot", action="store_true", help="write no figure")
    gains.add_argument("--save", metavar="FILE", help="save the surrogate (safetensors); LLV.load reads it")

    steer = add(
        "steer",
        commands_model.steer,
        "Generate text side by side: unsteered, with the cheapest push that moves the concept by a target, and with a "
        "uniform push of the same energy.",
        'llvlit steer "The plot was thin and" --target 2',
    )
    steer.add_argument(
        "prompt", nargs="?", default="The plot was thin and", help='text to continue (default "The plot was thin and")'
    )
    _experiment(steer)
    steer.add_argument(
        "--target", type=float, default=1.0, help="shift of the output in units of the class gap (default 1)"
    )
    steer.add_argument(
        "--energy",
        choices=("absolute", "relative"),
        default="relative",
        help="what is cheap: the push beside the state that it joins (relative, default), or by itself (absolute)",
    )
    steer.add_argument("--tokens", type=int, default=30, help="tokens to generate (default 30)")

    study = add(
        "study",
        commands_study.study,
        "A grid of models, tasks and seeds: agreement of every predictor, energy of every schedule. A killed run "
        "goes on where it stopped.",
        "llvlit study embedded --workers 2\n  llvlit study real --data-dir tasks --out real --workers 2\n"
        "  llvlit study paper --dry-run",
    )
    study.add_argument("grid", nargs="?", default="embedded", help="embedded (default), real, paper, or a .toml file")
    study.add_argument("--out", metavar="FOLDER", help="folder of the results (default study-GRID)")
    study.add_argument("--models", nargs="+", metavar="NAME", help="instead of the grid's; untrained:NAME is a control")
    study.add_argument("--tasks", nargs="+", metavar="NAME", help="instead of the grid's")
    study.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="instead of the grid's")
    study.add_argument(
        "--prompts", type=int, metavar="N", help="N prompts per class to operate and N to evaluate, 2 N for directions"
    )
    study.add_argument("--workers", type=int, default=1, metavar="N", help="worker processes (default 1)")
    study.add_argument(
        "--scheduler", metavar="ADDRESS", help="a running Dask scheduler, such as tcp://host:8786 (extra: llvlit[dask])"
    )
    study.add_argument("--dry-run", action="store_true", help="list every cell with its predicted cost, run nothing")
    study.add_argument("--report", action="store_true", help="run nothing; report what the folder holds")
    study.add_argument("--save", metavar="FOLDER", help="folder of CSV files and figures (default OUT/report)")
    _data_dir(study)
    _device(study)

    train = add(
        "train",
        commands.train,
        "Train the shipped family from scratch; a killed run continues where it stopped.",
        "llvlit train --corpus aclImdb --out run --sizes small medium large",
    )
    train.add_argument("--corpus", required=True, help="folder: aclImdb/, or *.txt.gz and *.tsv.gz files")
    train.add_argument("--out", required=True, help="folder of checkpoints and, at the end, models")
    train.add_argument("--sizes", nargs="+", default=["small", "medium", "large"], metavar="SIZE")
    train.add_argument("--keep", nargs="+", type=int, default=[], metavar="STEP", help="also export after these")
    train.add_argument("--steps", type=int, help="steps of each model (default: the recipe's)")
    train.add_argument("--seed", type=int, default=0, help="seed of weights, windows and held-out reviews")
    train.add_argument("--compile", action="store_true", help="torch.compile first (needs a C++ compiler)")
    _device(train)

    add("models", commands.models, "List the models that can be named.", "llvlit models")
    tasks = add("tasks", commands.tasks, "List the tasks that can be named.", "llvlit tasks")
    _data_dir(tasks)
    return parser


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")


def _data_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", metavar="FOLDER", help="NAME.parquet in it (text, label) serves the task NAME")


def _experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="embedded/large", help="embedded/..., a folder, or a hub id")
    command.add_argument("--task", default="film-sentiment", help="a task's name or a .parquet file")
    _data_dir(command)
    command.add_argument("--prompts", type=int, default=50, help="prompts per class and split (default 50)")
    command.add_argument("--seed", type=int, default=0, help="seed of the splits (default 0)")
    _device(command)


if __name__ == "__main__":
    sys.exit(main())
