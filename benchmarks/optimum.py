"""How far the linear optimum is from the true one of the full model: ``python benchmarks/optimum.py``.

For each target, in class gaps at the output, the cheapest inputs whose mean shift over the operating prompts is the
target: by the gains alone (llvlit.minimum_energy), and on the full model (true_optimum: sequential quadratic
programming through every layer, from three starts).  The price of the linear optimum: its shape is scaled until its
mean shift is the target on the full model, too, and its energy is divided by that of the true optimum; once on the
prompts that both were found on, once on held-out prompts, where both are scaled.

All of it is done on several splits that share no prompt.  Prices are geometric means over them, with 95 % intervals by
Student's t of the logarithms: the independent unit is the split.  Directions are the same for all.  Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch
from heading import begin, parser_of
from scipy import stats

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


@dataclass(frozen=True)
class Findings:
    """Of each split that reached the target: shift of the linear optimum over the target, prices, cosine, ends."""

    linear: list[float] = field(default_factory=list)
    price: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def row(self, n_splits: int) -> str:
        cells = [f"{len(self.price)} of {n_splits}"]
        if self.price:
            cells += [f"{np.mean(self.linear):.2f}", told(self.price), told(self.held_out)]
            cells += [f"{np.mean(self.cosine):.2f}", f"{max(self.ends):.2f}"]
        return " | ".join(cells)


def told(values: list[float]) -> str:
    """Geometric mean, and its interval."""
    logs = np.log(values)
    if len(logs) < 2 or not np.isfinite(logs).all():
        return f"{np.exp(logs.mean()):.2f}"
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return "{:.2f} [{:.2f}, {:.2f}]".format(*np.exp(logs.mean() + half * np.array([0, -1, 1])))


def print_rows(name: str, task_name: str, options: argparse.Namespace) -> None:
    model, n = load_model(name, device="cpu"), 2 * options.prompts
    sizes = {"concept": options.concept, **dict.fromkeys(("operating", "evaluation"), options.prompts * options.splits)}
    parts = load_task(task_name).split(**sizes)
    directions = concept_directions(model, parts.concept)
    gap, vectors = float(directions.gaps[-1]), directions.vectors
    wanted = [(metric, fraction) for metric in options.energies for fraction in options.targets]
    found = {each: Findings() for each in wanted}
    for split in progress(range(options.splits), f"{name}, {task_name}"):
        own, others = (each.select(range(n * split, n * (split + 1))) for each in (parts.operating, parts.evaluation))
        gains = adjoint_gains(model, own, directions)
        system, other = depth_system(model, own), depth_system(model, others)
        for metric, fraction in wanted:
            weights = relative_weights(system.states) if metric == "relative" else None
            target, findings = fraction * gap, found[metric, fraction]
            linear = minimum_energy(gains, target, weights=weights)
            try:
                best = true_optimum(system, directions, target, weights=weights)
            except NumericalError:
                continue
            spent = energy(linear, weights=weights) / best.energy
            held = [scale_to(other, vectors, each, target) for each in (linear, best.inputs)]
            a, b = (each * np.sqrt(1.0 if weights is None else weights) for each in (linear, best.inputs))
            findings.linear.append(float(means(system, vectors, linear, np.ones(1))[0]) / target)
            findings.price.append(scale_to(system, vectors, linear, target) ** 2 * spent)
            findings.held_out.append((held[0] / held[1]) ** 2 * spent)
            findings.cosine.append(float(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)))
            findings.ends.append(max(best.local) / best.energy)
    for (metric, fraction), findings in found.items():
        print(f"| {name} | {task_name} | {metric} | {fraction:g} | {findings.row(options.splits)} |", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    tasks = ["film-sentiment", "food-sentiment", "tense", "hostility"]
    parser.add_argument("--tasks", nargs="+", default=tasks, help="names that load_task knows")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="in class gaps")
    parser.add_argument("--energies", nargs="+", default=["absolute", "relative"], help="what inputs cost")
    parser.add_argument("--prompts", type=int, default=8, help="of each class, operating and held out (default 8)")
    parser.add_argument("--concept", type=int, default=100, help="of each class, for directions (default 100)")
    parser.add_argument("--splits", type=int, default=5, help="without a prompt in common (default 5)")
    options = parser.parse_args()
    begin(
        options,
        f"{', '.join(options.tasks)}; directions from {options.concept} prompts a class, {options.splits} splits of "
        f"{options.prompts} a class, and as many held out",
    )
    print(
        "| Model | Task | Energy | Target, gaps | Splits | Linear optimum's shift, targets | Its price "
        "| Price held out | Cosine of the two | Worst end of a start |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.models:
        for task in options.tasks:
            print_rows(name, task, options)


if __name__ == "__main__":
    main()
