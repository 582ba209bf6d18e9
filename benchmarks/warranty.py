"""Does the warranty hold, and is the choice of layers the best?  ``python benchmarks/warranty.py``

For every model, task, split and budget a recommendation is made from the operating prompts and pushed at the evaluation
prompts, which it has not seen.  Two tables:

1. The warranty: measured over promised divergence, whether shift and divergence lie where they were expected, and the
   divergence after one correction of the strength.
2. The choice of layers: the shift at *equal measured divergence*, as a share of the best single layer of a full scan of
   layers and strengths at the evaluation prompts themselves (an oracle).  Rivals choose one layer, or a shape, as the
   usual tools do: highest AUC or d' of the concept, largest gap of class means, depth 0.4, the last layer, a layer
   drawn at random; uniform, and uniform in the late third.  With words (``--positive``, ``--negative``) also the layer
   whose state, read by the logit lens, tells the classes best.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from heading import begin, parser_of

import llvlit
from llvlit.engine.depth import last_token_states
from llvlit.engine.head import head_of
from llvlit.engine.models import LanguageModel
from llvlit.errors import LlvlitError
from llvlit.method.concepts import Directions, separation
from llvlit.method.effects import push_effects
from llvlit.method.outputs import Output, reading
from llvlit.method.recommendation import Recommendation
from llvlit.prompts import Prompts, auc
from llvlit.study.warranty import promises_kept, shares_of_oracle
from llvlit.tasks.splits import Splits

SCALES = np.array([0.3, 0.6, 1.0, 1.7, 3.0])


def single_choices(
    states: Any, prompts: Prompts, directions: Directions, lens: np.ndarray | None, seed: int
) -> dict[str, int]:
    """The layer that each rival picks, from the prompts that gave the directions."""
    labels, n_layers = np.array(prompts.labels), states.shape[1] - 1
    own = ~directions.borrowed[:-1]
    projected = np.einsum("nsh,sh->ns", states.double().numpy(), directions.vectors.numpy())[:, :-1]
    spread = np.sqrt((projected[labels == 1].var(axis=0) + projected[labels == 0].var(axis=0)) / 2)
    scores = {
        "highest AUC": separation(states, labels, directions.vectors)[:-1],
        "highest d'": directions.gaps[:-1] / spread,
        "largest gap": directions.gaps[:-1],
        "random layer": np.random.default_rng(seed).random(n_layers),
    }
    if lens is not None:
        scores["logit lens"] = lens
    chosen = {name: int(np.where(own, score, -np.inf).argmax()) for name, score in scores.items()}
    return {**chosen, "depth 0.4": round(0.4 * n_layers), "last layer": n_layers - 1}


def at_equal_divergence(shifts: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """Mean shift where the mean divergence is the budget, by straight lines in the logarithm of the divergence."""
    heights, moved = np.log(np.maximum(costs.mean(axis=0), 1e-300)), shifts.mean(axis=0)
    if (np.diff(heights) <= 0).any() or not heights[0] <= np.log(budget) <= heights[-1]:
        return float("nan")
    return float(np.interp(np.log(budget), heights, moved / np.exp(heights / 2)) * np.sqrt(budget))


def choices(
    model: LanguageModel, advice: Recommendation, splits: Splits, output: Output | None, seed: int
) -> dict[str, float]:
    """Share of the oracle's shift that each choice reaches at the evaluation prompts."""
    directions = advice.directions
    vectors, n_layers = directions.on(model), model.n_layers
    tokens = llvlit.tokenize(model, splits.evaluation)
    source = reading(model, tokens, vectors[-1], output)
    head = source.head or head_of(model, tokens)
    learned = last_token_states(model, splits.concept)
    lens = None
    if output is not None:
        read = [source.values(learned[:, layer]).numpy() for layer in range(n_layers)]
        lens = np.array([auc(values, splits.concept.labels) for values in read])
    singles = single_choices(learned, splits.concept, directions, lens, seed)
    shapes = {f"layer {layer}": unit for layer, unit in enumerate(np.eye(n_layers))}
    shapes |= {plan.name: plan.inputs for plan in advice.alternatives if plan.name in ("uniform", "late third")}
    shapes["recommended"] = advice.inputs
    own = ~directions.borrowed[:-1]
    h, F = advice.gains.mean, advice.fisher.mean
    units = [u * (np.sign(h @ u) or 1) * np.sqrt(2 * advice.target / max(u @ F @ u, 1e-300)) for u in shapes.values()]
    inputs = np.stack([scale * unit for unit in units for scale in SCALES])
    every = np.broadcast_to(inputs, (len(tokens), *inputs.shape))
    shifts, costs = push_effects(head, tokens, vectors, every, source)
    shifts, costs = (each.reshape(len(tokens), len(units), len(SCALES)) for each in (shifts, costs))
    found = {
        name: at_equal_divergence(shifts[:, place], costs[:, place], advice.target) for place, name in enumerate(shapes)
    }
    layers = np.array([found[f"layer {layer}"] for layer in range(n_layers)])
    oracle = np.nanmax(np.where(own, layers, np.nan))
    found |= {name: layers[layer] for name, layer in singles.items()}
    return {name: value / oracle for name, value in found.items() if not name.startswith("layer ")}


def one(
    model: LanguageModel, task: Any, seed: int, budgets: list[float], output: Output | None, options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sizes = {"concept": options.concept, "operating": options.operating, "evaluation": options.evaluation}
    splits = task.split(**sizes, seed=seed)
    directions = llvlit.concept_directions(model, splits.concept)
    key = {"model": model.name, "task": task.name, "seed": seed, "output": "words" if output else "concept"}
    warranties, shares = [], []
    for budget in budgets:
        advice = llvlit.recommend(
            model, splits.operating, directions, budget=budget, output=output, positions=options.positions
        )
        check = advice.verify(model, splits.evaluation)
        again = check.corrected.verify(model, splits.evaluation)
        warranties.append(
            key
            | {
                "budget": budget,
                "shape": advice.plan.name,
                "kl over budget": check.kl.value / budget,
                "shift over expected": check.shift.value / advice.shift.value,
                "kl expected": advice.kl.low <= check.kl.value <= advice.kl.high,
                "shift expected": advice.shift.low <= check.shift.value <= advice.shift.high,
                "corrected over budget": again.kl.value / budget,
                "trust radius": advice.trust_radius,
            }
        )
        if options.positions == "last" and budget == options.compare:
            shares.append(key | {"budget": budget, **choices(model, advice, splits, output, seed)})
    return warranties, shares


def choices_file(path: Path) -> Path:
    return path.with_suffix(".choices.csv")


def report(trials: pd.DataFrame, shares: pd.DataFrame) -> None:
    print("\n## The warranty\n")
    for by in ("budget", "model"):
        print(promises_kept(trials, by=by).round(3).to_markdown(index=False), "\n")
    if len(shares):
        print("\n## The choice of layers: share of the oracle's shift at equal measured divergence\n")
        print(shares_of_oracle(shares).round(3).to_markdown(index=False), "\n")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["film-sentiment", "tense"], help="names or files")
    parser.add_argument("--suffix", default="", help="appended to the texts of files")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.3, 1.0])
    parser.add_argument("--compare", type=float, default=0.1, help="the budget at which layers are compared")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--concept", type=int, default=100, help="prompts of each class")
    parser.add_argument("--operating", type=int, default=16, help="prompts of each class")
    parser.add_argument("--evaluation", type=int, default=16, help="prompts of each class")
    parser.add_argument("--positive", nargs="*", default=[], help="words: their log-odds are the output, too")
    parser.add_argument("--negative", nargs="*", default=[])
    parser.add_argument("--positions", choices=("last", "all"), default="last")
    parser.add_argument("--csv", type=Path, help="where every trial is written")
    parser.add_argument("--rows", nargs="+", type=Path, help="print the tables of trials that --csv has kept")
    options = parser.parse_args()
    if options.rows:
        kept = [pd.concat(map(pd.read_csv, paths)) for paths in (options.rows, map(choices_file, options.rows))]
        report(*kept)
        return
    warnings.simplefilter("ignore")
    tasks = [llvlit.load_task(name, suffix=options.suffix if os.path.exists(name) else None) for name in options.tasks]
    begin(options, f"tasks {', '.join(task.name for task in tasks)}, seeds {options.seeds}")
    outputs: list[Output | None] = [None]
    if options.positive:
        outputs.append(llvlit.TokenContrast(options.positive, options.negative, first_tokens=True))
    warranties, shares = [], []
    for name in options.models:
        model = llvlit.load_model(name, device="cpu")
        for task in tasks:
            for seed in options.seeds:
                for output in outputs:
                    try:
                        found = one(model, task, seed, options.budgets, output, options)
                    except LlvlitError as error:
                        print(f"- {name}, {task.name}, seed {seed}: {error}", flush=True)
                        continue
                    warranties += found[0]
                    shares += found[1]
                    print(f"{name} {task.name} {seed} done", file=sys.stderr, flush=True)
                    if options.csv:
                        pd.DataFrame(warranties).to_csv(options.csv, index=False)
                        pd.DataFrame(shares).to_csv(choices_file(options.csv), index=False)
    report(pd.DataFrame(warranties), pd.DataFrame(shares))


if __name__ == "__main__":
    main()
