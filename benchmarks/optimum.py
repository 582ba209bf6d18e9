"""How far the linear optimum is from the true one of the full model: ``python benchmarks/optimum.py``.

For each target, in class gaps at the output, the cheapest inputs whose mean shift over the operating prompts is the
target: by the gains alone (llvlit.minimum_energy), and on the full model (true_optimum: sequential quadratic
programming through every layer, from three starts).  The price of the linear optimum: its shape is scaled until its
mean shift is the target on the full model, too, and its energy is divided by that of the true optimum; once on the
prompts that both were found on, once on held-out prompts, where both are scaled.  Prints a Markdown table, a row for
each target and split of the prompts.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from llvlit.engine.depth import DepthSystem, depth_system
from llvlit.engine.models import load_model
from llvlit.errors import NumericalError
from llvlit.method.concepts import concept_directions
from llvlit.method.control import energy, minimum_energy, relative_weights
from llvlit.method.gains import adjoint_gains
from llvlit.method.optimum import true_optimum
from llvlit.method.verification import output_shifts
from llvlit.progress import progress
from llvlit.tasks.task import load_task

SCALES = np.geomspace(0.1, 30, 90)


def means(system: DepthSystem, vectors: torch.Tensor, shape: np.ndarray, scales: np.ndarray) -> np.ndarray:
    inputs = np.broadcast_to(scales[:, None] * shape, (len(system.states), len(scales), len(shape)))
    return output_shifts(system, vectors, inputs).mean(axis=0)


def scale_to(system: DepthSystem, vectors: torch.Tensor, shape: np.ndarray, target: float) -> float:
    """Smallest scale at which the mean shift is the target; infinite if none of those that are tried."""
    beyond = means(system, vectors, shape, SCALES) >= target
    if not beyond.any():
        return np.inf
    low, high = np.concatenate([[0.0], SCALES])[beyond.argmax() :][:2]
    for _ in range(3):
        grid = np.linspace(low, high, 9)
        first = int((means(system, vectors, shape, grid) >= target).argmax())
        low, high = grid[max(first - 1, 0)], grid[first]
    return float(high)


def print_rows(name: str, task_name: str, options: argparse.Namespace) -> None:
    model, task = load_model(name, device="cpu"), load_task(task_name)
    for seed in range(options.splits):
        sizes = {"concept": options.concept, "operating": options.prompts, "evaluation": options.prompts}
        splits = task.split(**sizes, seed=seed)
        directions = concept_directions(model, splits.concept)
        gains, gap = adjoint_gains(model, splits.operating, directions), float(directions.gaps[-1])
        system, other = (depth_system(model, each) for each in (splits.operating, splits.evaluation))
        wanted = [(metric, fraction) for metric in ("absolute", "relative") for fraction in options.targets]
        for metric, fraction in progress(wanted, f"{name}, {task_name}"):
            weights = relative_weights(system.states) if metric == "relative" else None
            target, cells = fraction * gap, [name, task_name, str(seed), metric, f"{fraction:g}"]
            linear = minimum_energy(gains, target, weights=weights)
            cells.append(f"{float(means(system, directions.vectors, linear, np.ones(1))[0]) / target:.2f}")
            try:
                best = true_optimum(system, directions, target, weights=weights)
            except NumericalError:
                print(f"| {' | '.join(cells)} | not reached | | | |", flush=True)
                continue
            least = best.energy
            scale = scale_to(system, directions.vectors, linear, target)
            cells.append(f"{scale**2 * energy(linear, weights=weights) / least:.2f}")
            held = [scale_to(other, directions.vectors, each, target) for each in (linear, best.inputs)]
            cells.append(f"{(held[0] / held[1]) ** 2 * energy(linear, weights=weights) / least:.2f}")
            a, b = (each * np.sqrt(1.0 if weights is None else weights) for each in (linear, best.inputs))
            cells.append(f"{abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b):.2f}")
            cells.append(", ".join(f"{each / least:.2f}" for each in best.local))
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["embedded/small", "embedded/medium", "embedded/large", "smollm2-135m"]
    parser.add_argument("--models", nargs="+", default=models, help="names that load_model knows")
    parser.add_argument(
        "--tasks", nargs="+", default=["film-sentiment", "hostility"], help="names that load_task knows"
    )
    parser.add_argument("--targets", nargs="+", type=float, default=[0.1, 0.5, 1.0, 2.0], help="in class gaps")
    parser.add_argument("--prompts", type=int, default=8, help="of each class, operating and held out (default 8)")
    parser.add_argument("--concept", type=int, default=200, help="of each class, for directions (default 200)")
    parser.add_argument("--splits", type=int, default=1, help="of the prompts, each a row (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| Model | Task | Split | Energy | Target, gaps | Linear optimum's shift, targets | Its price | Price held out "
        "| Cosine of the two | Ends of the three starts |"
    )
    print("|---|---|---:|---|---:|---:|---:|---:|---:|---|")
    for name in options.models:
        for task in options.tasks:
            print_rows(name, task, options)


if __name__ == "__main__":
    main()
