"""``llvlit models``, ``llvlit tasks`` and ``llvlit architectures``: what can be named, and what can be replayed."""

from __future__ import annotations

import argparse
import csv
import warnings
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

from llvlit.cli.options import add_data_dir, check_place, command
from llvlit.cli.terminal import columns, show
from llvlit.errors import InputError


def mount(commands: Any) -> None:
    """Add the commands."""
    command(commands, models, "llvlit models")
    add_data_dir(command(commands, tasks, "llvlit tasks"))
    parser = command(commands, architectures, "llvlit architectures llama mamba bert --save found.csv")
    parser.add_argument("types", nargs="*", type="text", metavar="TYPE", help="model types (default: all, in minutes)")
    parser.add_argument("--save", metavar="FILE", help="write the table: .csv, or .json")


def models(options: argparse.Namespace) -> None:
    """List the models that can be named."""
    from llvlit.engine.models import PACKAGED, embedded_names, load_model

    models = {name: load_model(name, device="cpu") for name in embedded_names()} | PACKAGED
    rows = [
        {
            "name": name,
            "parameters": model.n_parameters,
            "layers": model.n_layers,
            "hidden_size": model.hidden_size,
            "context": model.max_positions,
        }
        for name, model in models.items()
    ]
    missing = [f"For {name}: {model.remedy}" for name, model in PACKAGED.items() if not model.file]
    also = "Also: a local folder in the hub's format (safetensors), a .gguf file, or a hub id such as gpt2."
    show(options, rows, "\n".join([columns(rows, {"parameters": "{:>11,}"}), "", *missing, also]))


def tasks(options: argparse.Namespace) -> None:
    """List the tasks that can be named."""
    from llvlit.tasks.sources import HUB_READING, HUB_TASKS
    from llvlit.tasks.task import task_facts

    facts = task_facts(options.data_dir)
    lines = []
    for name, task in facts.items():
        lines.append(f"{name:<20} {task['description']}")
        if task["kind"] == "hub":
            lines.append(f"{'':<22}{HUB_TASKS[name].place}\n{'':<22}{HUB_TASKS[name].reading}")
    lines.append(f"\n{HUB_READING}\nAlso: a .parquet, .csv or .jsonl file with the columns text and label (0 or 1).")
    show(options, facts, "\n".join(lines))


def architectures(options: argparse.Namespace) -> None:
    """Check every causal language model of transformers, tiny and random: exact, or refused with the reason."""
    from llvlit.engine.architectures import check_all, model_types
    from llvlit.files import write_json, write_text
    from llvlit.hub import quiet_transformers
    from llvlit.progress import progress

    if options.save and not options.save.endswith((".csv", ".json")):
        raise InputError(f"--save {options.save} is neither .csv nor .json; name one of these.")
    if options.save:
        check_place("--save", Path(options.save))
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of foreign models
        types = progress(options.types or model_types(), "architectures")
        rows = [row for each in types for row in check_all([each])]
    if options.save and options.save.endswith(".json"):
        write_json(options.save, rows)
    elif options.save:
        stream = StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(options.save, stream.getvalue())
    counts = Counter(row["status"] for row in rows)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    shown = [{key: value for key, value in row.items() if key != "transformers"} for row in rows]
    show(options, rows, f"{columns(shown)}\n\ntransformers {rows[0]['transformers']}: {told}")
