"""Several concepts at once, and the price of moving one alone: ``python benchmarks/several_concepts.py``.

Each shipped task's direction comes from its own concept prompts; no two tasks share prompts, so every prompt is given
the same last words, " Rating:", and all directions are those of one token.  Gains among the concepts are measured on
film-sentiment's operating prompts.  For each other concept the script prints how it meets film sentiment: relative
gain, and the price of "more positive, the other unchanged" in relative energy (pushes in units of the state that they
join) and in absolute energy.  Then inputs for that target are carried out on the full model, on film-sentiment's
held-out prompts, and both outputs are read: the cheapest along the film direction alone, and decoupled ones.

Prints Markdown tables; minutes for the default models on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from heading import begin, parser_of

from llvlit.engine.depth import depth_system, last_token_states
from llvlit.engine.models import LanguageModel, load_model
from llvlit.method.concepts import Directions, concept_directions
from llvlit.method.control import minimum_energy, relative_weights
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.several_concepts import GainTensor, gain_tensor
from llvlit.progress import progress
from llvlit.prompts import Prompts
from llvlit.tasks.task import load_task

TASKS = ("film-sentiment", "food-sentiment", "tense", "hostility")
SUFFIX = " Rating:"
N_DRAWS = 200


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--concept", type=int, default=100, help="prompts a class for directions (default: 100)")
    parser.add_argument("--prompts", type=int, default=20, help="prompts a class for gains, and as many held out")
    parser.add_argument("--target", type=float, default=0.1, help="share of the class gap (default: 0.1)")
    options = parser.parse_args()
    begin(
        options,
        f"{', '.join(TASKS)}, all ending in {SUFFIX!r}; directions from {options.concept} prompts a class, gains and "
        f"outputs of {options.prompts} of film-sentiment a class each",
    )
    meeting: list[str] = []
    carried: list[str] = []
    for name in progress(options.models, "models"):
        model = load_model(name, device="cpu")
        splits = {
            task: load_task(task, suffix=SUFFIX).split(
                concept=options.concept, operating=options.prompts, evaluation=options.prompts
            )
            for task in TASKS
        }
        directions = {task: concept_directions(model, split.concept) for task, split in splits.items()}
        film = splits[TASKS[0]]
        tensor = gain_tensor(model, film.operating, list(directions.values()))
        weights = relative_weights(last_token_states(model, film.operating))
        target = options.target * float(directions[TASKS[0]].gaps[-1])
        for i, other in enumerate(TASKS[1:], start=1):
            pair = part(tensor, [0, i])
            meeting.append(meet(name, other, pair, weights))
            sets = [directions[TASKS[0]], directions[other]]
            carried += carry_out(model, film.evaluation, sets, pair, target, weights, (name, other))
    print(
        "| Model | Other concept | Cosine, mean over layers | Relative gain of film | Price, relative energy | "
        "Price, absolute |"
    )
    print("|---|---|---:|---:|---:|---:|\n" + "\n".join(meeting) + "\n")
    print("| Model | Other concept | Inputs | Energy | Film shift / target | Other shift / target |")
    print("|---|---|---|---:|---:|---:|\n" + "\n".join(carried))


def part(tensor: GainTensor, concepts: list[int]) -> GainTensor:
    """The same tensor of some of its concepts."""
    chosen = np.ix_(range(len(tensor.pairs)), concepts, concepts, range(tensor.n_layers))
    overlaps = tensor.overlaps[:, concepts][:, :, concepts]
    borrowed = tuple(tensor.borrowed[i] for i in concepts)
    return replace(tensor, per_prompt=tensor.per_prompt[chosen], overlaps=overlaps, borrowed=borrowed)


def meet(name: str, other: str, pair: GainTensor, weights: np.ndarray) -> str:
    """Row: how two concepts meet, with intervals over twins."""
    draws = resampled_means(pair.per_prompt.reshape(len(pair.pairs), -1), pair.pairs, seed=0)[:N_DRAWS]
    means = draws.reshape(-1, 1, *pair.mean.shape)
    drawn = [GainTensor(each, pair.overlaps, pair.kind, pair.amplitude) for each in means]

    def cell(value: Callable[[GainTensor], float]) -> str:
        low, high = interval(np.array([value(each) for each in drawn]))
        return f"{value(pair):.3g} [{low:.3g}, {high:.3g}]"

    cells = [
        cell(lambda each: each.relative_gain_array(weights=weights)[0, 0]),
        cell(lambda each: each.decoupled([1.0, 0.0], weights=weights).price),
        cell(lambda each: each.decoupled([1.0, 0.0]).price),
    ]
    return f"| {name} | {other} | {pair.overlaps[:, 0, 1].mean():.2f} | {' | '.join(cells)} |"


def carry_out(
    model: LanguageModel,
    prompts: Prompts,
    sets: list[Directions],
    pair: GainTensor,
    target: float,
    weights: np.ndarray,
    names: tuple[str, str],
) -> list[str]:
    """Rows: what inputs do to both outputs of the full model, on prompts that the gains have not seen."""
    system = depth_system(model, prompts)
    alone = minimum_energy(pair.mean[0, 0], target, weights=weights)
    vectors = [one.on(model) for one in sets]
    readouts = torch.stack([one[-1] for one in vectors], dim=1)
    rows = []
    for label, inputs in {
        "film alone, relative": np.stack([alone, np.zeros(model.n_layers)]),
        "decoupled, relative": pair.decoupled([target, 0.0], weights=weights).inputs,
        "decoupled, absolute": pair.decoupled([target, 0.0]).inputs,
    }.items():
        pushes = sum(torch.as_tensor(u).to(one)[:, None] * one[:-1] for u, one in zip(inputs, vectors, strict=True))
        finals = system.propagate(system.states[:, :1], inputs=pushes)[:, 0]
        shifts = ((finals - system.states[:, -1]) @ readouts).double().numpy() / target
        bounds = interval(resampled_means(shifts, prompts.pairs, seed=0))
        cells = [f"{shifts[:, j].mean():.3f} [{bounds[0, j]:.3f}, {bounds[1, j]:.3f}]" for j in (0, 1)]
        energy = pair.energy(inputs, weights=weights if label.endswith("relative") else None)
        rows.append(f"| {' | '.join(names)} | {label} | {energy:.3g} | {cells[0]} | {cells[1]} |")
    return rows


if __name__ == "__main__":
    main()
