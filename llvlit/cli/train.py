"""``llvlit train``: the shipped family, from scratch."""

from __future__ import annotations

import argparse
from typing import Any

from llvlit.cli.options import add_device, command
from llvlit.cli.terminal import show


def mount(commands: Any) -> None:
    """Add the command."""
    train = command(
        commands,
        "train",
        run,
        "Train the shipped family from scratch; a killed run continues where it stopped.",
        "llvlit train --corpus aclImdb --out run --sizes small medium large",
    )
    train.add_argument("--corpus", required=True, help="folder: aclImdb/, or *.txt.gz and *.tsv.gz files")
    train.add_argument("--out", required=True, help="folder of checkpoints and, at the end, models")
    train.add_argument("--sizes", nargs="+", default=["small", "medium", "large"], metavar="SIZE")
    train.add_argument("--keep", type="step", nargs="+", default=[], metavar="STEP", help="also export after these")
    train.add_argument("--steps", type="count", help="steps of each model (default: the recipe's)")
    train.add_argument("--seed", type="seed", default=0, help="seed of weights, windows and held-out reviews")
    train.add_argument("--compile", action="store_true", help="torch.compile first (needs a C++ compiler)")
    add_device(train)


def run(options: argparse.Namespace) -> None:
    """Train the family."""
    from llvlit.training.family import train_family

    losses = train_family(
        options.corpus,
        options.out,
        sizes=options.sizes,
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        compiled=options.compile,
        keep=options.keep,
    )
    show(options, losses, f"Models of {len(losses)} sizes, each with its held-out loss: {options.out}/models")
