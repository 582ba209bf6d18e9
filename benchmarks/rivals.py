"""Who predicts the gain matrix?  ``python benchmarks/rivals.py --models embedded/small gemma-3-270m.gguf``

Every basis, both nulls and every rival side by side, for each model and task.  The share of a matrix that a prediction
misses is ``|G - G'| / |G|``.

For each number of operating prompts, the smallest first:

1. Reduction and transfer: the measured gain matrix and the gain profile (its last column) of *other* prompts, missed by
   each prediction at each order; with the 95 % interval of the matrix at the largest order.
2. Reduction alone: the gain matrix of the operating prompts' mean chain, missed by each basis cut to an order.  Is
   ``balanced`` best at every order?

Then, the numbers of operating prompts side by side, what is missed of the matrix.  Intervals are over the other
prompts, pairs as units, and basic ones: a drawn mean is noisier than the mean, and predictions miss more of it.

``--speed`` counts products with Jacobians and times ``balanced`` beside ``reachability`` at twice its order instead.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
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
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
SHOWN = {"balanced": (2, 4, 16), "realized": (2, 4, 16)}
"""Orders in the table of intervals; of the other predictions, the largest."""
FULL = ("full order", "identity")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: object) -> None:
    print(f"\n{row(*cells)}\n|---{'|---:' * (len(cells) - 1)}|")


def share(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def title(model: LanguageModel) -> str:
    """Its name; of a file, without the folder."""
    return Path(model.name).stem if Path(model.name).is_file() else model.name


def identified(model: LanguageModel, prompts: Prompts, directions: Directions, bases: list[str]) -> Identification:
    order = min(ORDERS[-1], model.hidden_size)
    return identify_all(model, prompts, {name: Plan(directions, name, order) for name in bases}, linear=False)


def head_of(matrix: GainMatrix, n_prompts: int) -> GainMatrix:
    return replace(matrix, per_prompt=matrix.per_prompt[:n_prompts], pairs=matrix.pairs[:n_prompts])


def predictions(
    found: Identification, measured: GainMatrix, linear: GainMatrix, directions: Directions
) -> dict[str, Callable[[int], np.ndarray]]:
    """Gain matrix that each rival predicts, by order, from the same operating prompts."""
    most = most_orders(len(measured.mean))
    full = {
        "full order: mean chain": found.surrogates["balanced"].matrix(),
        "full order: adjoint": linear.mean,
        "full order: measured": measured.mean,
        "identity": identity_matrix(directions),
    }
    return {
        **{name: lambda order, llv=llv: llv.truncate(order).matrix() for name, llv in found.surrogates.items()},
        "dynamic modes": lambda order: dynamic_modes(found.states, directions, order=order).matrix(),
        "realized": lambda order: llvlit.realize(measured, order=min(order, most)).matrix(),
        **{name: lambda _, matrix=matrix: matrix for name, matrix in full.items()},
    }


def missed_profile(matrix: GainMatrix, prediction: np.ndarray) -> float:
    measured = matrix.mean[:, -1]
    return float(np.linalg.norm(prediction[:, -1] - measured) / np.linalg.norm(measured))


def bounds(matrix: GainMatrix, prediction: np.ndarray) -> str:
    """Of the share missed, basic (see the top)."""
    values = matrix.per_prompt.reshape(len(matrix.pairs), -1)
    draws = resampled_means(values, matrix.pairs, seed=0).reshape(-1, *prediction.shape)
    low, high = np.maximum(interval(2 * matrix.missed_by(prediction) - misses(draws, prediction)), 0)
    return f"{low:.3f} to {high:.3f}"


def compare(model: LanguageModel, task: str, options: argparse.Namespace) -> bool:
    counts, bases = sorted(options.operating), [name for name in BASES if name in {*options.bases, "balanced"}]
    most = max(counts)
    splits = llvlit.load_task(task).split(
        concept=options.concept, operating=(most + 1) // 2, evaluation=options.evaluation
    )
    directions = llvlit.concept_directions(model, splits.concept)
    others = llvlit.gain_matrix(model, splits.evaluation, directions)
    measured = llvlit.gain_matrix(model, splits.operating, directions)
    linear = llvlit.gain_matrix(model, splits.operating, directions, method="linear")
    orders = [order for order in ORDERS if order <= model.hidden_size]
    print(
        f"\n## {title(model)}, {task}\n\n{model.n_layers} layers, hidden size {model.hidden_size}; "
        f"{len(splits.concept)} prompts for the directions ({int(directions.borrowed.sum())} of {model.n_layers + 1} "
        f"states borrow theirs), {most} operating prompts, {len(others.pairs)} other prompts in "
        f"{len(set(others.pairs))} pairs."
    )
    cells: dict[str, list[str]] = {}
    best = True
    for count in counts:
        found = identified(model, splits.operating.select(range(count)), directions, bases)
        predicted = predictions(found, head_of(measured, count), head_of(linear, count), directions)
        print(f"\nFrom {count} operating prompts, share of the other prompts' matrix / profile missed at each order:")
        head("Prediction", *orders, f"matrix, {orders[-1]}: 95 % interval")
        for name, at in predicted.items():
            matrices = [at(order) for order in orders]
            scores = (f"{share(others.missed_by(each))} / {share(missed_profile(others, each))}" for each in matrices)
            print(row(name, *scores, bounds(others, matrices[-1])), flush=True)
            for order in SHOWN.get(name, orders[-1:]):
                label = name if name.startswith(FULL) else f"{name}, order {order}"
                matrix = at(order)
                cells.setdefault(label, []).append(f"{others.missed_by(matrix):.3f} ({bounds(others, matrix)})")

        chain = found.surrogates["balanced"].matrix()  # at full order
        print(f"\nMean chain of {count} operating prompts, share of its gain matrix missed at each order:")
        head("Basis", *orders)
        missed = {
            name: [float(misses(chain, llv.truncate(each).matrix())) for each in orders]
            for name, llv in found.surrogates.items()
        }
        for name, values in missed.items():
            print(row(name, *map(share, values)))
        first = all((np.array(missed["balanced"]) <= np.array(values) + 1e-6).all() for values in missed.values())
        print(f"\nBalanced is best at {'every' if first else 'NOT every'} order.", flush=True)
        best = best and first

    print("\nShare of the other prompts' matrix missed from that many operating prompts, with 95 % intervals:")
    head("Prediction", *counts)
    for name, shown in cells.items():
        print(row(name, *shown), flush=True)
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
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names, folders, GGUF files")
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES, help="beside the balanced one")
    parser.add_argument("--tasks", nargs="+", default=["film-sentiment"], help="names as load_task takes them")
    parser.add_argument(
        "--operating", nargs="+", type=int, default=[2, 8, 32, 100], help="numbers of operating prompts"
    )
    parser.add_argument(
        "--evaluation", type=int, default=20, help="other prompts of each class, which predictions are held against"
    )
    parser.add_argument("--concept", type=int, default=200, help="prompts of each class that give the directions")
    parser.add_argument("--speed", action="store_true", help="count and time instead; 16 operating prompts")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing, in turn")
    options = parser.parse_args()
    facts = environment()
    words = " ".join(Path(word).name if Path(word).is_file() else word for word in sys.argv[1:])
    print(
        f"`python benchmarks/rivals.py {words}`: "
        f"llvlit {llvlit.__version__} at commit {str(facts.get('commit'))[:7]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, CPU, "
        f"{torch.get_num_threads()} thread(s), {date.today()}",
        flush=True,
    )
    if options.speed:
        speed(options.models, options.tasks[0], 16, options.repeats)
        return
    best = {}
    for name in options.models:
        model = llvlit.load_model(name, device="cpu")
        for task in options.tasks:
            best[f"{title(model)}, {task}"] = compare(model, task, options)
    print("\nBalanced is best at every order:", ", ".join(f"{key}: {'yes' if b else 'NO'}" for key, b in best.items()))


if __name__ == "__main__":
    main()
