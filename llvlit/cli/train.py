"""``llvlit train``: the shipped family, from scratch."""

from __future__ import annotations

import argparse
from typing import Any

from llvlit.cli.options import add_device, command
from llvlit.cli.terminal import show


def mount(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, train, "llvlit train --corpus aclImdb --out run --sizes small medium large")
    parser.add_argument("--corpus", required=True, help="folder: aclImdb/, or *.txt.gz and *.tsv.gz files")
    parser.add_argument("--out", required=True, help="folder of checkpoints and, at the end, models")
    sizes = ["small", "medium", "large"]
    parser.add_argument("--sizes", nargs="+", default=sizes, metavar="SIZE", help="of the family (default: all three)")
    parser.add_argument("--keep", type="step", nargs="+", default=[], metavar="STEP", help="also export after these")
    parser.add_argument("--steps", type="count", help="steps of each model (default: the recipe's)")
    parser.add_argument("--seed", type="seed", default=0, help="seed of weights, windows and held-out reviews")
    parser.add_argument("--compile", action="store_true", help="torch.compile first (needs a C++ compiler)")
    add_device(parser)


def train(options: argparse.Namespace) -> None:
    """Train the shipped family from scratch; a killed run continues where it stopped."""
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
