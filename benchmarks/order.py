"""Does scale bring low order?  ``python benchmarks/order.py embedded/small embedded/large untrained:embedded/small``

Prints a table for each task.  Every model's gain matrix is measured on the same held-out prompts; its order at 5 % and
at 1 % is the smallest whose balanced realization misses at most that share of the mean matrix, and the share of the
first singular value is ``sum_k s_1(H_k)^2 / sum_k |H_k|^2`` over the Hankel blocks H_k at all states.  Brackets are
95 % intervals over independent prompts; drawn means are noisier than the mean, so they tend to lie high.  Beside it:

*turned*  the concept's directions at all states turned together by one random rotation: their angles to each other, and
          with them all that the residual stream does by itself, stay, and where the model puts the concept goes;
*drawn*   a random direction at every state, each its own;
*missed*  the shares that orders 1, 2, 4 and 8 miss of the concept's matrix, and of those along the turned directions;
*identity* layers that do nothing, ``G[l, k] = v_k^T v_l``: no model is run; its order, and what it misses;
*floor*   the second singular value that rounding alone makes, relative to the first, at the worst state;
*coupling* of the layers' Jacobians, ``1 - |U_m^T (A_l - I) V_m - S_l| / |S_l|`` with the ten largest singular values
          S_l and the vectors U_m, V_m of another layer, mean over pairs of layers and over prompts (Aubry et al. 2025).

With a network: ``python benchmarks/order.py gpt2 gpt2-medium gpt2-large untrained:gpt2``
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.engine.depth import depth_system
from llvlit.engine.models import LanguageModel, embedded_names
from llvlit.engine.tokens import tokenize, usable_prompts
from llvlit.errors import ConceptNotVisibleError
from llvlit.method.concepts import Directions, concept_directions, random_directions
from llvlit.method.gain_matrix import GainMatrix, gain_matrix, noise_floor
from llvlit.method.hankel import balance, misses, most_orders, smallest_orders
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.rivals import identity_matrix
from llvlit.progress import progress
from llvlit.provenance import environment
from llvlit.study.cells import load_subject
from llvlit.tasks.splits import Splits
from llvlit.tasks.task import load_task

TOLERANCES = (0.05, 0.01)
NULL_SEEDS = (1, 2, 3)
ORDERS = (1, 2, 4, 8)
COUPLED = 10


def first_share(matrix: np.ndarray) -> np.ndarray:
    """Share of the first singular values in the Hankel blocks of matrices ``(..., n_layers, n_layers + 1)``."""
    squares = balance(matrix).singular_values ** 2
    return np.asarray(squares[..., 0].sum(axis=-1) / squares.sum(axis=(-2, -1)))


def share_interval(matrix: GainMatrix) -> np.ndarray:
    """Its 95 % interval over independent prompts."""
    draws = resampled_means(matrix.per_prompt.reshape(len(matrix.pairs), -1), matrix.pairs, seed=0)[:200]
    return interval(first_share(draws.reshape(-1, *matrix.per_prompt.shape[1:])))


def turned(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """The same vectors under one random rotation of their space."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(vectors.shape[-1], vectors.shape[-1], generator=generator, dtype=torch.float64)
    rotation, triangle = torch.linalg.qr(square)
    return vectors.to(torch.float64) @ (rotation * triangle.diagonal().sign())


def null_matrices(model: LanguageModel, tokens: Any, sets: list[torch.Tensor]) -> np.ndarray:
    """Mean gain matrices along sets of random directions."""
    return np.stack([gain_matrix(model, tokens, each).mean for each in sets])


def orders_of(means: np.ndarray) -> str:
    """Orders at both tolerances, each the median of the matrices."""
    return " / ".join(f"{np.median(smallest_orders(means, tolerance)):.0f}" for tolerance in TOLERANCES)


def missed(means: np.ndarray) -> str:
    """Shares that the first orders miss, each the median of the matrices."""
    orders = [order for order in ORDERS if order <= most_orders(means.shape[-2])]
    return ", ".join(f"{np.median(misses(means, balance(means).matrix(order))):.3f}" for order in orders)


def coupling(model: LanguageModel, prompts: Any) -> float:
    """Alignment of the layers' Jacobians, without the identity; 1: they share their largest singular vectors."""
    system = depth_system(model, prompts)
    identity = torch.eye(model.hidden_size, device=model.device)
    parts = [torch.linalg.svd(system.jacobian(layer) - identity) for layer in range(model.n_layers)]
    misfits = []
    for (left, values, right), (U, _, V) in permutations(parts, 2):
        moved = (U[..., :COUPLED].mT @ left) * values.unsqueeze(1) @ (right @ V[:, :COUPLED].mT)
        largest = torch.diag_embed(values[:, :COUPLED])
        misfits.append((moved - largest).norm(dim=(1, 2)) / largest.norm(dim=(1, 2)))
    return 1 - torch.stack(misfits).mean().item()


def directions_of(model: LanguageModel, prompts: Any, before: Directions | None) -> tuple[Directions, str]:
    """The model's own directions; where it shows no concept, those of the model before it of the same shape."""
    try:
        found = concept_directions(model, prompts)
    except ConceptNotVisibleError:
        if before is None or before.vectors.shape != (model.n_layers + 1, model.hidden_size):
            raise
        return before, "lent"
    return found, f"{int(found.borrowed.sum())} of {len(found.borrowed)}"


def measure(model: LanguageModel, splits: Splits, before: Directions | None, n_coupled: int) -> dict[str, Any]:
    """One row of the table."""
    concept, _ = usable_prompts(model, splits.concept)
    directions, borrowed = directions_of(model, concept, before)
    tokens = tokenize(model, splits.evaluation)
    matrix = gain_matrix(model, tokens, directions)
    values = balance(matrix.mean).singular_values
    vectors = directions.vectors.to(torch.float64).cpu()
    row: dict[str, Any] = {
        "model": model.name,
        "parameters": model.n_parameters,
        "layers": model.n_layers,
        "hidden size": model.hidden_size,
        "borrowed": borrowed,
        "directions": directions,
    }
    for tolerance in TOLERANCES:
        low, high = matrix.order_interval(tolerance)
        row[f"order {tolerance:.0%}"] = f"{matrix.order(tolerance)} [{low}, {high}]"
    low, high = share_interval(matrix)
    row["first"] = f"{first_share(matrix.mean):.4f} [{low:.4f}, {high:.4f}]"
    rotations = null_matrices(model, tokens, [turned(vectors, seed) for seed in NULL_SEEDS])
    drawn = null_matrices(model, tokens, [random_directions(*vectors.shape, seed=seed) for seed in NULL_SEEDS])
    still = identity_matrix(vectors)
    row |= {"turned": orders_of(rotations), "drawn": orders_of(drawn), "identity": orders_of(still[None])}
    row |= {"missed": missed(matrix.mean[None]), "missed, turned": missed(rotations)}
    row["missed, identity"] = f"{misses(matrix.mean, still):.3f}"
    floor = noise_floor(model, tokens, directions)
    row["floor"] = f"{(floor[2:-1] / values[2:-1, 0]).max():.0e}"
    row["coupling"] = f"{coupling(model, tokens.select(range(n_coupled))):.3f}" if n_coupled else ""
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=list(embedded_names()), help="names, folders, GGUF files; untrained:NAME"
    )
    parser.add_argument("--tasks", nargs="+", default=["film-sentiment"], help="embedded tasks or .parquet files")
    parser.add_argument("--suffix", help="ends every prompt; unless given, each task's own")
    parser.add_argument("--concept", type=int, default=200, help="prompts per class for the directions")
    parser.add_argument("--evaluation", type=int, default=20, help="held-out prompts per class for the matrices")
    parser.add_argument("--coupled", type=int, default=3, help="prompts for the coupling; 0: leave it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path, help="file that the rows are appended to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.tasks:
        task = load_task(name, suffix=options.suffix)
        splits = task.split(concept=options.concept, operating=1, evaluation=options.evaluation)
        print(
            f"## {task.name}\n\nEvery prompt ends in {task.suffix!r}; prompts {splits.evaluation.fingerprint}.\n",
            flush=True,
        )
        before, header = None, False
        for subject in progress(options.models, task.name):
            model = load_subject(subject, device=options.device)
            row = {"task": task.name, "suffix": task.suffix, **measure(model, splits, before, options.coupled)}
            before = row.pop("directions")
            shown = {key: value for key, value in row.items() if key not in ("task", "suffix")}
            if not header:
                print("| " + " | ".join(shown) + " |\n|---" + "|---:" * (len(shown) - 1) + "|")
                header = True
            print("| " + " | ".join(map(str, shown.values())) + " |", flush=True)
            if options.csv:
                fresh = not options.csv.exists()
                with options.csv.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    if fresh:
                        writer.writeheader()
                    writer.writerow(row)
        print()
    facts = ", ".join(f"{key} {value}" for key, value in environment(model.device).items())
    print(f"Computed {datetime.date.today()} by `python benchmarks/order.py {' '.join(sys.argv[1:])}`: {facts}.")


if __name__ == "__main__":
    main()
