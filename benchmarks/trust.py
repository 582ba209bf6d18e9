"""How far a linear prediction can be trusted, and whether held-out prompts agree: ``python benchmarks/trust.py``.

Radii come from operating prompts (llvlit.trust_radius: 10 % of the shift, at 95 % of new prompts).  Each held-out
prompt is then pushed by 0.25, 0.5, 0.75 and 1 times the radius, in both signs, and its shift compared with the linear
prediction of its own gains.  Shapes: the linear optimum in absolute and in relative energy, an equal push at every
layer, single layers at a quarter, a half and three quarters of the depth, and the last.  Prints Markdown tables;
intervals are over independent prompts (twins count once).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from heading import begin, parser_of

from llvlit.engine.depth import DepthSystem, depth_system
from llvlit.engine.models import load_model
from llvlit.method.concepts import concept_directions
from llvlit.method.control import minimum_energy, relative_weights
from llvlit.method.gains import adjoint_gains
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.trust import trust_radius
from llvlit.method.verification import output_shifts
from llvlit.progress import progress
from llvlit.tasks.task import load_task

INSIDE = np.array([0.25, 0.5, 0.75, 1.0])
BEYOND = np.array([1.5, 2.0, 4.0])


def share(held: np.ndarray, pairs: tuple[int, ...]) -> str:
    """Share of pushes that held, of ``(n_prompts, ...)``, and its interval over units."""
    rows = held.reshape(len(held), -1).mean(axis=1, keepdims=True)
    low, high = interval(resampled_means(rows, pairs, seed=0)).ravel()
    return f"{100 * rows.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def errors(system: DepthSystem, vectors: torch.Tensor, scales: np.ndarray, shape: np.ndarray, slopes: np.ndarray):
    """Relative errors ``(n_prompts, k)`` of the linear prediction of each prompt's own slope; and the mean shifts."""
    inputs = np.broadcast_to((scales[:, None] * shape), (len(slopes), len(scales), len(shape)))
    shifts = output_shifts(system, vectors, inputs)
    return np.abs(shifts / (scales * slopes[:, None]) - 1), shifts.mean(axis=0)


def rows_of(name: str, task_name: str, options: argparse.Namespace) -> list[list[str]]:
    model, task = load_model(name, device="cpu"), load_task(task_name)
    splits = task.split(concept=options.concept, operating=options.prompts, evaluation=options.prompts)
    directions = concept_directions(model, splits.concept)
    gap, n_layers = float(directions.gaps[-1]), model.n_layers
    gains, own = (adjoint_gains(model, each, directions) for each in (splits.operating, splits.evaluation))
    system = depth_system(model, splits.evaluation)
    weights = relative_weights(system.states)
    sizes = 1 / np.sqrt(weights)
    shapes = {
        "optimum": minimum_energy(gains, 1.0),
        "optimum, relative energy": minimum_energy(gains, 1.0, weights=weights),
        "equal at every layer": np.ones(n_layers) / n_layers,
        **{f"layer {at}": np.eye(n_layers)[at] for at in (n_layers // 4, n_layers // 2, 3 * n_layers // 4)},
        "last layer": np.eye(n_layers)[-1],
    }
    found = trust_radius(model, splits.operating, directions, np.stack([*shapes.values()]))
    rows, inside, beyond = [], [], []
    for place, (label, shape) in enumerate(progress(shapes.items(), f"{name}, {task_name}")):
        radius, of_mean = float(found.radius[place]), float(found.of_mean[place])
        slopes = own.per_prompt @ shape
        factors = np.concatenate([INSIDE, BEYOND])
        missed, _ = errors(
            system, directions.vectors, np.concatenate([radius * factors, -radius * factors]), shape, slopes
        )
        holds = (missed <= found.tolerance).reshape(len(slopes), 2, -1)
        inside.append(holds[..., : len(INSIDE)])
        beyond.append(holds[..., len(INSIDE) :])
        edge = holds[..., len(INSIDE) - 1].all(axis=1)
        _, mean = errors(system, directions.vectors, of_mean * np.array([1.0, -1.0]), shape, slopes)
        linear = of_mean * np.array([1.0, -1.0])
        rows.append(
            [
                label,
                f"{100 * radius * np.abs(shape / sizes).max():.2g}",
                f"{radius * abs(gains.mean @ shape) / gap:.2g}",
                share(inside[-1], own.pairs),
                share(edge, own.pairs),
                share(beyond[-1][..., 1].all(axis=1), own.pairs),
                f"{of_mean * abs(gains.mean @ shape) / gap:.2g}",
                f"{100 * np.abs(mean / (linear * slopes.mean()) - 1).max():.0f}",
                f"{100 * np.abs(mean / (linear * (gains.mean @ shape)) - 1).max():.0f}",
            ]
        )
    pooled = [share(np.stack(each, axis=1), own.pairs) for each in (inside, [h[..., -1:] for h in inside])]
    far = [share(np.stack([h[..., i] for h in beyond], axis=1), own.pairs) for i in range(len(BEYOND))]
    summary = [name, task_name, str(len(set(own.pairs))), *pooled, *far]
    print(f"\n### {name}, {task_name}\n")
    print("| Shape | Largest push, % of its state | Shift, class gaps | Inside, % | At the edge, % | At twice, % |")
    print("|---|---:|---:|---:|---:|---:|")
    print("\n".join(f"| {' | '.join(row[:6])} |" for row in rows))
    print("\n| Mean shift of | Radius, class gaps | Error there, own gains, % | Error there, operating gains, % |")
    print("|---|---:|---:|---:|")
    print("\n".join(f"| {' | '.join([row[0], *row[6:]])} |" for row in rows), flush=True)
    return summary


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--tasks", nargs="+", default=["film-sentiment", "hostility"], help="names that load_task knows"
    )
    parser.add_argument("--prompts", type=int, default=20, help="of each class, for radii and held out (default 20)")
    parser.add_argument("--concept", type=int, default=200, help="of each class, for directions (default 200)")
    options = parser.parse_args()
    begin(
        options,
        f"{', '.join(options.tasks)}; directions from {options.concept} prompts a class, radii from {options.prompts}, "
        "and as many held out",
    )
    summaries = [rows_of(name, task, options) for name in options.models for task in options.tasks]
    print("\n## All shapes together\n")
    print("| Model | Task | Units | Inside, % | At the edge, % | At 1.5 radii, % | At 2, % | At 4, % |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(f"| {' | '.join(row)} |" for row in summaries))


if __name__ == "__main__":
    main()
