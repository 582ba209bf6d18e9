"""``llvlit models`` and ``llvlit tasks``: what can be named."""

from __future__ import annotations

import argparse
from typing import Any

from llvlit.cli.options import add_data_dir, command
from llvlit.cli.terminal import columns, show


def mount(commands: Any) -> None:
    """Add the commands."""
    command(commands, models, "llvlit models")
    add_data_dir(command(commands, tasks, "llvlit tasks"))


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
    lines.append(f"\n{HUB_READING}\nAlso: a .parquet file with the columns text and label (0 or 1).")
    show(options, facts, "\n".join(lines))
