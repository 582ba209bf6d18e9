"""Who predicts the gain matrix? Every basis, both nulls and every rival side by side: ``python benchmarks/rivals.py``.

Three tables for each model and task.  The share of a matrix that a prediction misses is ``|G - G'| / |G|``.

1. Reduction alone: the gain matrix of the operating prompts' mean chain, missed by each basis cut to an order.  Is
   ``balanced`` best at every order?
2. Reduction and transfer: the measured gain matrix, and the gain profile, of *other* prompts, missed by each
   prediction from the operating prompts.
3. Transfer: the same against the number of operating prompts, with 95 % intervals over the other prompts.

``--speed`` counts products with Jacobians and times ``balanced`` beside ``reachability`` at twice its order instead.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import torch
import transformers
from engine import interleaved

import llvlit
from llvlit.engine.layer import LinearizedLayer
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import tokenize
from llvlit.method.bases import BASES
from llvlit.method.concepts import Directions
from llvlit.method.gain_matrix import GainMatrix
from llvlit.method.hankel import misses, most_orders
from llvlit.method.identification import Identification, Plan, identify_all
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.rivals import dynamic_modes, identity_matrix
from llvlit.prompts import Prompts
from llvlit.provenance import environment

MODELS = ("embedded/small", "embedded/medium", "embedded/large", "smollm2-135m")
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
LARGEST = 32


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: object) -> None:
    print(f"\n{row(*cells)}\n|---{'|---:' * (len(cells) - 1)}|")


def share(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def identified(model: LanguageModel, prompts: Prompts, directions: Directions) -> Identification:
    order = min(LARGEST, model.hidden_size)
    return identify_all(model, prompts, {name: Plan(directions, name, order) for name in BASES}, linear=False)


def head_of(matrix: GainMatrix, n_prompts: int) -> GainMatrix:
    return replace(matrix, per_prompt=matrix.per_prompt[:n_prompts], pairs=matrix.pairs[:n_prompts])


def missed_profile(matrix: GainMatrix, prediction: np.ndarray) -> float:
    measured = matrix.mean[:, -1]
    return float(np.linalg.norm(prediction[:, -1] - measured) / np.linalg.norm(measured))


def with_interval(matrix: GainMatrix, prediction: np.ndarray) -> str:
    values = matrix.per_prompt.reshape(len(matrix.pairs), -1)
    draws = resampled_means(values, matrix.pairs, seed=0).reshape(-1, *prediction.shape)
    missed = matrix.missed_by(prediction)
    low, high = np.maximum(interval(2 * missed - misses(draws, prediction)), 0)  # basic: a drawn mean is noisier
    return f"{missed:.3f} ({low:.3f} to {high:.3f})"


def compare(model: LanguageModel, task: str, counts: list[int], n_evaluation: int, n_concept: int) -> bool:
    half = (max(counts) + 1) // 2
    splits = llvlit.load_task(task).split(concept=n_concept, operating=half, evaluation=n_evaluation)
    directions = llvlit.concept_directions(model, splits.concept)
    others = llvlit.gain_matrix(model, splits.evaluation, directions)
    measured = llvlit.gain_matrix(model, splits.operating, directions)
    linear = llvlit.gain_matrix(model, splits.operating, directions, method="linear")
    found = {count: identified(model, splits.operating.select(range(count)), directions) for count in counts}
    most = max(counts)
    borrowed = int(directions.borrowed.sum())
    print(
        f"\n## {model.name}, {task}\n\n{model.n_layers} layers, hidden size {model.hidden_size}; {len(splits.concept)} "
        f"prompts for the directions ({borrowed} of {model.n_layers + 1} states borrow theirs), {most} operating and "
        f"{len(splits.evaluation)} other prompts."
    )
    orders = [order for order in ORDERS if order <= model.hidden_size]
    surrogates = found[most].surrogates
    chain = surrogates["balanced"].matrix()  # at full order
    print(f"\nMean chain of {most} operating prompts, share of its gain matrix missed at each order:")
    head("Basis", *orders)
    missed = {
        name: [float(misses(chain, llv.truncate(order).matrix())) for order in orders]
        for name, llv in surrogates.items()
    }
    for name, values in missed.items():
        print(row(name, *map(share, values)))
    best = all(
        missed["balanced"][place] <= missed[name][place] + 1e-6 for name in BASES for place in range(len(orders))
    )
    print(f"\nBalanced is best at {'every' if best else 'NOT every'} order.")

    shown = [1, 2, 4, 8, 16, 32]
    for title, score in (("gain matrix", others.missed_by), ("gain profile", lambda m: missed_profile(others, m))):
        print(f"\nMeasured {title} of {len(splits.evaluation)} other prompts, share missed at each order:")
        head("Prediction", *shown)
        modes = dynamic_modes(found[most].states, directions, order=min(LARGEST, model.hidden_size))
        for name, llv in {**surrogates, "dynamic modes": modes}.items():
            print(row(name, *(share(score(llv.truncate(order).matrix())) for order in shown)))
        realized = [llvlit.realize(measured, order=min(order, most_orders(model.n_layers))) for order in shown]
        print(row("realized", *(share(score(each.matrix())) for each in realized)))
        fixed = {
            "full order: adjoint": linear.mean,
            "full order: mean chain": chain,
            "full order: measured": measured.mean,
            "identity": identity_matrix(directions),
        }
        for name, matrix in fixed.items():
            print(row(name, *[share(score(matrix))] * len(shown)))

    print(f"\nThe same matrix, missed from that many operating prompts, with 95 % intervals over {len(others.pairs)}:")
    head("Prediction", *counts)
    for name, order in (("balanced", 2), ("balanced", 4), ("balanced", 16), ("reachability", 32), ("krylov", 32)):
        cells = (found[count].surrogates[name].truncate(order).matrix() for count in counts)
        print(row(f"{name}, order {order}", *(with_interval(others, cell) for cell in cells)))
    for order in (2, 4, 6):
        cells = (llvlit.realize(head_of(measured, count), order=order).matrix() for count in counts)
        print(row(f"realized, order {order}", *(with_interval(others, cell) for cell in cells)))
    for name, full in (("adjoint", linear), ("measured", measured)):
        cells = (head_of(full, count).mean for count in counts)
        print(row(f"full order: {name}", *(with_interval(others, cell) for cell in cells)))
    return best


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Products with Jacobians that run inside, of each prompt."""
    counts, kept = {"jvp": 0, "vjp": 0}, (LinearizedLayer.jvp, LinearizedLayer.vjp)

    def jvp(self: LinearizedLayer, tangents: torch.Tensor, **options: Any) -> torch.Tensor:
        counts["jvp"] += tangents.shape[1]
        return kept[0](self, tangents, **options)

    def vjp(self: LinearizedLayer, cotangents: torch.Tensor) -> torch.Tensor:
        counts["vjp"] += cotangents.shape[1]
        return kept[1](self, cotangents)

    LinearizedLayer.jvp, LinearizedLayer.vjp = jvp, vjp  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        LinearizedLayer.jvp, LinearizedLayer.vjp = kept  # type: ignore[method-assign]


def speed(models: list[str], task: str, n_prompts: int, repeats: int) -> None:
    head("Model", "Order", "balanced: JVP + VJP", "reachability at twice: JVP", "Products, ratio", "Seconds", "Ratio")
    for name in models:
        model = llvlit.load_model(name, device="cpu")
        splits = llvlit.load_task(task).split(concept=50, operating=(n_prompts + 1) // 2, evaluation=2)
        directions = llvlit.concept_directions(model, splits.concept)
        tokens = tokenize(model, splits.operating)
        for order in (2, 4, 8, 16):

            def reduce(basis: str, order: int) -> None:
                llvlit.identify(model, tokens, directions, order=order, basis=basis)  # noqa: B023

            with counted() as two_sided:
                reduce("balanced", order)
            with counted() as one_sided:
                reduce("reachability", 2 * order)
            times = interleaved(
                {
                    "balanced": lambda order=order: reduce("balanced", order),
                    "reachability": lambda order=order: reduce("reachability", 2 * order),
                },
                repeats,
            )
            products = sum(two_sided.values()) / one_sided["jvp"]
            ratio = times["balanced"] / times["reachability"]
            both = f"{two_sided['jvp']} + {two_sided['vjp']}"
            seconds = f"{times['balanced']:.2f} / {times['reachability']:.2f}"
            print(row(name, order, both, one_sided["jvp"], f"{products:.2f}", seconds, f"{ratio:.2f}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names as load_model takes them")
    parser.add_argument("--tasks", nargs="+", default=["film-sentiment"], help="names as load_task takes them")
    parser.add_argument(
        "--operating", nargs="+", type=int, default=[2, 8, 32, 100], help="numbers of operating prompts"
    )
    parser.add_argument("--evaluation", type=int, default=20, help="other prompts of each class")
    parser.add_argument("--concept", type=int, default=200, help="prompts of each class that give the directions")
    parser.add_argument("--speed", action="store_true", help="count and time instead; 16 operating prompts")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing, in turn")
    options = parser.parse_args()
    facts = environment()
    print(
        f"llvlit {llvlit.__version__} at commit {str(facts.get('commit'))[:7]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, CPU, "
        f"{torch.get_num_threads()} thread(s), {date.today()}"
    )
    if options.speed:
        speed(options.models, options.tasks[0], 16, options.repeats)
        return
    best = {}
    for name in options.models:
        model = llvlit.load_model(name, device="cpu")
        for task in options.tasks:
            best[f"{name}, {task}"] = compare(model, task, options.operating, options.evaluation, options.concept)
    print("\nBalanced is best at every order:", ", ".join(f"{key}: {'yes' if b else 'NO'}" for key, b in best.items()))


if __name__ == "__main__":
    main()
