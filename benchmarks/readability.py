"""How well the shipped models read a verdict: AUC of the mean-difference direction at every state.

``python benchmarks/readability.py film-sentiment path/to/imdb.parquet --out results/readability.md`` writes a table for
each task: directions from the concept split, areas under the ROC curve on the evaluation split.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
import torch

from llvlit.engine.depth import last_token_states
from llvlit.engine.models import embedded_names, load_model
from llvlit.files import write_atomically
from llvlit.method.concepts import concept_directions, separation
from llvlit.provenance import environment
from llvlit.tasks.task import load_task
from llvlit.training.corpus import SUFFIX


def table(task: str, concept: int, evaluation: int, device: str) -> list[str]:
    splits = load_task(task, suffix=SUFFIX).split(concept=concept, operating=1, evaluation=evaluation)
    labels = np.array(splits.evaluation.labels)
    columns: dict[str, list[str]] = {}
    fingerprints = []
    for name in embedded_names():
        model = load_model(name, device=device)
        directions = concept_directions(model, splits.concept)
        values = separation(last_token_states(model, splits.evaluation), labels, directions.vectors)
        columns[name] = [f"{v:.3f}{'*' if b else ''}" for v, b in zip(values, directions.borrowed, strict=True)]
        fingerprints.append(f"{name} {model.fingerprint}")
    names = list(columns)
    rows = [
        f"## {Path(task).stem}",
        "",
        f"{concept} prompts per class for the directions, {evaluation} held-out ones per class for the areas; every "
        f"prompt ends in `{SUFFIX}`; evaluation prompts {splits.evaluation.fingerprint}.",
        "",
        "| State | " + " | ".join(names) + " |",
        "|---:|" + "---:|" * len(names),
    ]
    for state in range(max(map(len, columns.values()))):
        cells = [column[state] if state < len(column) else "" for column in columns.values()]
        rows.append(f"| {state} | " + " | ".join(cells) + " |")
    best = [f"{max(float(v.rstrip('*')) for v in column):.3f}" for column in columns.values()]
    return [*rows, "| best | " + " | ".join(best) + " |", "", "Models: " + ", ".join(fingerprints) + ".", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="embedded task or .parquet file")
    parser.add_argument("--concept", type=int, default=400)
    parser.add_argument("--evaluation", type=int, default=400)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="Markdown file to write")
    options = parser.parse_args()
    lines = [
        "# How well the shipped models read a verdict",
        "",
        "Area under the ROC curve of the last token's state on its mean-difference direction; 0.5 is chance.",
        "A star marks a state whose class gap is no larger than under permuted labels: its direction is borrowed.",
        "",
    ]
    for task in options.tasks:
        lines += table(task, options.concept, options.evaluation, options.device)
    device = torch.device("cpu" if options.device == "auto" and not torch.cuda.is_available() else options.device)
    facts = ", ".join(f"{key} {value}" for key, value in environment(device).items())
    lines += [f"Computed {datetime.date.today()} by `python benchmarks/readability.py`: {facts}.", ""]
    text = "\n".join(lines)
    print(text)
    if options.out:
        write_atomically(options.out, lambda path: path.write_text(text, encoding="utf-8") and None)


if __name__ == "__main__":
    main()
