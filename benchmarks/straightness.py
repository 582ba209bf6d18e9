"""How far can one layer be pushed before the output leaves its tangent?  ``python benchmarks/straightness.py``.

Writes a row for each layer of each model and task.  One layer at a time is pushed along its concept direction, and the
concept is read at the last state.  *of_mean* is the push at which the shift's mean over held-out prompts is 10 % off
its linear prediction, *median*, *low* and *high* are the median and the quartiles over prompts of the push at which a
prompt's own shift is; each from four pushes (llvlit.trust_radius), in units of the mean length of the state that the
push joins.  *lent*: the model shows no concept, and has the directions of the model named before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from heading import begin, parser_of

from llvlit.engine.depth import last_token_states
from llvlit.errors import ConceptNotVisibleError
from llvlit.method.concepts import Directions, concept_directions
from llvlit.method.trust import trust_radius
from llvlit.study.cells import load_subject
from llvlit.tasks.task import load_task


def rows_of(name: str, task: str, before: Directions | None, options: argparse.Namespace) -> tuple[list, Directions]:
    """Rows of a model and task, and its directions."""
    model = load_subject(name, device="cpu")
    splits = load_task(task).split(concept=options.concept, operating=1, evaluation=options.prompts)
    try:
        directions, lent = concept_directions(model, splits.concept), False
    except ConceptNotVisibleError:
        if before is None:
            raise
        directions, lent = before, True
    lengths = last_token_states(model, splits.evaluation).double().norm(dim=-1).mean(dim=0).cpu().numpy()[:-1]
    found = trust_radius(model, splits.evaluation, directions, np.diag(lengths), coverage=0.8)
    low, median, high = np.quantile(found.per_prompt, (0.25, 0.5, 0.75), axis=0)
    own = np.arange(model.n_layers) >= directions.first_own
    about = (model.name.removesuffix(".gguf"), task, model.n_parameters, model.n_layers, model.hidden_size)
    rows = zip(range(model.n_layers), own, lengths, found.of_mean, median, low, high, strict=True)
    return [(*about, lent, *row) for row in rows], directions


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["film-sentiment", "tense"])
    parser.add_argument("--concept", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=15)
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    begin(
        options,
        f"{', '.join(options.tasks)}; {options.concept} prompts a class for directions, {options.prompts} held out",
    )
    columns = ["model", "task", "parameters", "n_layers", "hidden_size", "lent", "layer", "own", "length"]
    columns += ["of_mean", "median", "low", "high"]
    rows: list = []
    for task in options.tasks:
        before = None
        for name in options.models:
            found, before = rows_of(name, task, before, options)
            rows += found
            pd.DataFrame(rows, columns=columns).to_csv(options.csv, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
