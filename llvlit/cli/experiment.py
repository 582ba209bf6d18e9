"""What the commands on one model and one task share: options, what they load, which directions are borrowed."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

from llvlit.cli.options import add_data_dir, add_device, count, seed
from llvlit.cli.terminal import terminal_width

if TYPE_CHECKING:
    from llvlit.engine.models import LanguageModel
    from llvlit.method.concepts import Directions
    from llvlit.tasks.task import Splits


def add_experiment(command: argparse.ArgumentParser) -> None:
    """Add what names a model, a task and the prompts of its splits."""
    command.add_argument("--model", default="embedded/large", help="embedded/..., a folder, or a hub id")
    command.add_argument("--task", default="film-sentiment", help="a task's name or a .parquet file")
    add_data_dir(command)
    command.add_argument("--prompts", type=count, default=50, help="prompts per class and split (default 50)")
    command.add_argument("--seed", type=seed, default=0, help="seed of the splits (default 0)")
    add_device(command)


def load_experiment(options: argparse.Namespace) -> tuple[LanguageModel, Splits]:
    """The model and the splits of the task that the options name; the task first, since it is read sooner."""
    from llvlit.engine.models import load_model
    from llvlit.tasks.task import load_task

    n = options.prompts
    task = load_task(options.task, data_dir=options.data_dir)
    splits = task.split(concept=2 * n, operating=n, evaluation=n, seed=options.seed)
    return load_model(options.model, device=options.device), splits


def borrowed_states(directions: Directions) -> list[int]:
    """States whose direction is that of another state."""
    states: list[int] = directions.borrowed.nonzero()[0].tolist()
    return states


def borrowed_note(directions: Directions) -> str:
    """A sentence that names the states whose direction is borrowed; empty if there are none."""
    states = borrowed_states(directions)
    if not states:
        return ""
    return textwrap.fill(
        f"* Borrowed: at state{'s' * (len(states) > 1)} {', '.join(map(str, states))} the class gap is within chance; "
        "the direction there is that of the next state whose gap is not.",
        terminal_width(),
    )
