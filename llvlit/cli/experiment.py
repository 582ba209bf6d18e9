"""What the commands on one model and one task share: options, what they load, which directions are borrowed."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llvlit.cli.options import add_data_dir, add_device, count, seed
from llvlit.cli.terminal import terminal_width

if TYPE_CHECKING:
    from llvlit.engine.models import LanguageModel
    from llvlit.engine.tokens import TokenizedPrompts


def add_experiment(command: argparse.ArgumentParser) -> None:
    """Add what names a model, a task and the prompts of its splits."""
    command.add_argument("--model", default="embedded/large", help="embedded/..., a folder, or a hub id")
    command.add_argument("--task", default="film-sentiment", help="a task's name or a .parquet file")
    add_data_dir(command)
    command.add_argument("--prompts", type=count, default=50, help="prompts per class and split (default 50)")
    command.add_argument("--seed", type=seed, default=0, help="seed of the splits (default 0)")
    add_device(command)


def load_experiment(options: argparse.Namespace) -> tuple[LanguageModel, dict[str, TokenizedPrompts]]:
    """The model that the options name, and the tokens of the task's splits: concept, operating, evaluation."""
    from llvlit.engine.models import load_model
    from llvlit.engine.tokens import tokenize
    from llvlit.tasks.task import load_task

    n = options.prompts
    task = load_task(options.task, data_dir=options.data_dir)  # before the model, which takes longer
    splits = task.split(concept=2 * n, operating=n, evaluation=n, seed=options.seed)
    model = load_model(options.model, device=options.device)
    return model, {name: tokenize(model, getattr(splits, name)) for name in ("concept", "operating", "evaluation")}


def borrowed_note(layers: Sequence[int]) -> str:
    """A line or two on the layers that are pushed along a borrowed direction; empty if none are."""
    if not layers:
        return ""
    return textwrap.fill(
        f"* Borrowed directions before layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}: the class gap "
        "there is within chance, so the push goes along the next state's own direction, and its sign means nothing.",
        terminal_width(),
    )
