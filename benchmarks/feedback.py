"""Feedback against open loop, on disturbances that the surrogate has not seen: ``python benchmarks/feedback.py``.

The target is a share of film-sentiment's class gap at the output.  Every law is computed on the operating prompts and
carried out on the full model, layer by layer:

- open loop: the plan of the realized surrogate, whatever happens on the way;
- output: a regulator on the realized surrogate of at most order 8, which reads the concept alone, through a filter;
- states: a regulator on the reachability surrogate of order 8, which reads the residual stream through its bases;
- adjoint: a regulator of order one, whose single number is the mean adjoint's product with the residual stream;
- dense: a regulator on the mean Jacobians of the whole residual stream (not for models with many products).

Disturbances: other prompts of the task; the same with a random vector of a tenth of the state's length added before
one random layer; prompts of another task.  A second table holds the regulators to setpoints at every state, the
plan's own outputs.  A third tells what each law takes.

Prints Markdown tables; minutes for the default models on two cores.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from heading import begin, parser_of

from llvlit.engine.depth import DepthSystem, depth_system, last_token_states
from llvlit.engine.models import LanguageModel, load_model
from llvlit.method.concepts import Directions, concept_directions
from llvlit.method.control import energy, relative_weights
from llvlit.method.feedback import FeedbackLaw, adjoint_surrogate, closed_loop, lqr
from llvlit.method.gain_matrix import gain_matrix, realize
from llvlit.method.identification import identify
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.surrogate import LLV
from llvlit.progress import progress
from llvlit.prompts import Prompts
from llvlit.tasks.task import load_task

SUFFIX = " Rating:"
MOST = 8


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--other", default="hostility", help="task whose prompts are the third disturbance")
    parser.add_argument("--concept", type=int, default=100, help="prompts a class for directions (default: 100)")
    parser.add_argument("--operating", type=int, default=8, help="prompts a class for surrogates (default: 8)")
    parser.add_argument("--evaluation", type=int, default=12, help="prompts a class held out (default: 12)")
    parser.add_argument("--target", type=float, default=0.1, help="share of the class gap (default: 0.1)")
    parser.add_argument("--energy", choices=("relative", "absolute"), default="relative", help="what inputs cost")
    parser.add_argument("--dense", type=int, default=256, help="largest hidden size for the dense law (default: 256)")
    options = parser.parse_args()
    begin(
        options,
        f"film-sentiment, and prompts of {options.other}, all ending in {SUFFIX!r}; directions from {options.concept} "
        f"prompts a class, surrogates from {options.operating}, laws carried out on {options.evaluation} others",
    )
    reached, tracked, costs = [], [], []
    for name in progress(options.models, "models"):
        model = load_model(name, device="cpu")
        splits = load_task("film-sentiment", suffix=SUFFIX).split(
            concept=options.concept, operating=options.operating, evaluation=options.evaluation
        )
        other = load_task(options.other, suffix=SUFFIX).split(concept=1, evaluation=options.evaluation).evaluation
        directions = concept_directions(model, splits.concept)
        target = options.target * float(directions.gaps[-1])
        surrogates, lines = identified(model, splits.operating, directions, options.dense, name)
        costs += lines
        weights = relative_weights(last_token_states(model, splits.operating))
        weights = weights if options.energy == "relative" else np.ones(model.n_layers)
        laws = {label: lqr(surrogate, target, weights=weights) for label, surrogate in surrogates.items()}
        laws = {"open loop": laws["output"].open_loop(), **laws}
        plan = laws["open loop"].feedforward
        least = energy(plan, weights=weights)
        system = depth_system(model, splits.evaluation)
        for where, run, prompts, disturbance in (
            ("other prompts", system, splits.evaluation, None),
            ("other prompts, random vector", system, splits.evaluation, random_vectors(system)),
            (f"prompts of {options.other}", depth_system(model, other), other, None),
        ):
            for label, law in laws.items():
                result = closed_loop(run, law, directions, disturbance=disturbance)
                shares = result.outputs[:, -1] / target
                energies = result.inputs**2 @ weights / least
                values = np.stack([shares, np.abs(shares - 1), energies], axis=1)
                reached.append(f"| {name} | {where} | {label} | {cells(values, prompts)} |")
        along = plan @ surrogates["output"].matrix()
        for label, surrogate in surrogates.items():
            if label == "adjoint":  # it knows the output at the end alone
                continue
            for goal, law in (("end", laws[label]), ("every state", lqr(surrogate, along, weights=weights))):
                result = closed_loop(system, law, directions, disturbance=random_vectors(system))
                off = np.sqrt(((result.outputs - along)[:, 1:] ** 2).mean(axis=1)) / target
                energies = result.inputs**2 @ weights / least
                values = np.stack([off, np.abs(result.outputs[:, -1] / target - 1), energies], axis=1)
                tracked.append(f"| {name} | {label} | {goal} | {cells(values, splits.evaluation)} |")
    print(
        "| Model | Disturbance | Law | Shift / target | Miss / target | Energy / plan |\n|---|---|---|---:|---:|---:|"
    )
    print("\n".join(reached) + "\n")
    print("| Model | Law | Setpoints | Off the plan, all states / target | Miss at the end / target | Energy / plan |")
    print("|---|---|---|---:|---:|---:|\n" + "\n".join(tracked) + "\n")
    print(
        "| Model | Law | Order | Work a prompt and layer | Identification, s | Recursion, ms |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    print("\n".join(costs))


def cells(values: np.ndarray, prompts: Prompts) -> str:
    """Means of the columns and their intervals over twins."""
    bounds = interval(resampled_means(values, prompts.pairs, seed=0))
    return " | ".join(
        f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in zip(values.mean(axis=0), *bounds, strict=True)
    )


def random_vectors(system: DepthSystem) -> torch.Tensor:
    """For each prompt a random vector, a tenth as long as the state, before one random layer but the first."""
    generator = torch.Generator().manual_seed(0)
    n_prompts, n_states, hidden_size = system.states.shape
    disturbance = torch.zeros(n_prompts, n_states - 1, hidden_size)
    for prompt, layer in enumerate(torch.randint(1, n_states - 1, (n_prompts,), generator=generator).tolist()):
        vector = torch.randn(hidden_size, generator=generator)
        disturbance[prompt, layer] = 0.1 * system.states[prompt, layer].norm() * vector / vector.norm()
    return disturbance


def identified(
    model: LanguageModel, prompts: Prompts, directions: Directions, dense: int, name: str
) -> tuple[dict[str, LLV], list[str]]:
    """Surrogates by the law that rests on them, and rows that tell what they and their laws take."""

    def realized() -> LLV:
        matrix = gain_matrix(model, prompts, directions)
        return realize(matrix, order=min(matrix.order(0.01), MOST))

    ways = {
        "output": realized,
        "states": lambda: identify(model, prompts, directions, order=MOST, basis="reachability"),
        "adjoint": lambda: adjoint_surrogate(model, prompts, directions),
    }
    if model.hidden_size <= dense:  # any basis of full order is the whole residual stream
        ways["dense"] = lambda: identify(model, prompts, directions, order=model.hidden_size, basis="random")
    surrogates, rows = {}, []
    for label, way in ways.items():
        start = time.perf_counter()
        surrogates[label] = way()
        took = time.perf_counter() - start
        recursion = np.median([timed(surrogates[label]) for _ in range(5)])
        order = surrogates[label].order
        work = f"{model.n_layers + 1} pushed states" if label == "output" else f"products: {order}"
        rows.append(f"| {name} | {label} | {order} | {work} | {took:.2f} | {1000 * recursion:.2g} |")
    return surrogates, rows


def timed(surrogate: LLV) -> float:
    """Seconds of the regulator's recursions."""
    start = time.perf_counter()
    law = lqr(surrogate, 1.0)
    assert isinstance(law, FeedbackLaw)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
