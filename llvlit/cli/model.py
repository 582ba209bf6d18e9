"""What `llvlit gains` and `llvlit steer` do; each returns what ``--json`` prints."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.commands import say
from llvlit.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from llvlit.engine.models import LanguageModel
    from llvlit.method.concepts import Directions
    from llvlit.tasks.task import Splits

BAR = 20


def _splits(options: argparse.Namespace) -> Splits:
    from llvlit.tasks.task import load_task

    n = options.prompts
    return load_task(options.task, data_dir=options.data_dir).split(
        concept=2 * n, operating=n, evaluation=n, seed=options.seed
    )


def gains(options: argparse.Namespace) -> dict[str, Any]:
    """Print measured, predicted and adjoint gains, and draw them."""
    plot = _plot_path(options)
    from llvlit.cli.terminal import bar, sparkline, takes_blocks
    from llvlit.engine.models import load_model
    from llvlit.method.agreement import agreement
    from llvlit.method.concepts import concept_directions
    from llvlit.method.gains import adjoint_gains, measured_gains
    from llvlit.method.identification import identify

    splits = _splits(options)
    model = load_model(options.model, device=options.device)
    directions = concept_directions(model, splits.concept)
    order = min(32, model.hidden_size) if options.order is None else options.order
    surrogate = identify(model, splits.operating, directions, order=order, basis=options.basis)
    measured = measured_gains(model, splits.evaluation, directions, amplitude=options.amplitude)
    adjoint = adjoint_gains(model, splits.operating, directions)
    low, high = measured.interval()
    predicted = surrogate.gains()
    found = agreement(predicted, measured)
    blocks = takes_blocks()
    say(options, f"{model.name} on {options.task}: output y = v_L . x_L, gains per unit push\n")
    say(options, f"{'layer':>5} {'measured':>9} {'95 % interval':>18} {options.basis:>13} {'adjoint':>9}  measured")
    largest = float(abs(measured.mean[1:]).max(initial=0.0)) or float(abs(measured.mean).max()) or 1.0
    for layer, gain in enumerate(measured.mean):
        bounds = f"[{low[layer]:.3f}, {high[layer]:.3f}]"
        drawn = bar(gain, largest, BAR, blocks=blocks)
        numbers = f"{layer:>5} {gain:>9.3f} {bounds:>18} {predicted[layer]:>13.3f} {adjoint.mean[layer]:>9.3f}"
        say(options, f"{numbers}  {drawn}")
    if model.n_layers > 1:  # layer 0 often stands far from all others
        lines = {"measured": measured.mean[1:], options.basis: predicted[1:]}
        low_line, high_line = (edge([*lines["measured"], *lines[options.basis]]) for edge in (min, max))
        say(options, f"\nLayers 1 to {model.n_layers - 1}, from {low_line:.3f} to {high_line:.3f}:")
        for name, values in lines.items():
            say(options, f"{name:>14}  {sparkline(values, low_line, high_line, blocks=blocks)}")
    say(
        options,
        f"\nOrder {order}: Spearman {found.spearman:.3f}, Pearson {found.pearson:.3f}, "
        f"relative error {found.relative_error:.3f} ({len(splits.evaluation)} held-out prompts)",
    )
    if measured.metadata["n_cut"]:
        say(options, f"{measured.metadata['n_cut']} prompts were cut on the left.")
    if options.save:
        surrogate.save(options.save)
        say(options, f"Saved: {options.save}")
    if plot is not None:
        from llvlit.plots import figures

        figure, (axes,) = figures.new()
        predictions = {options.basis: predicted.tolist(), "adjoint": adjoint.mean.tolist()}
        title = f"{model.name} on {options.task}, order {order}"
        figures.gain_profile(measured.mean.tolist(), (low, high), predictions, axes=axes, title=title)
        figures.save(figure, plot)
        say(options, f"Figure: {plot}")
    return {
        "measured": measured.mean.tolist(),
        "interval": [low.tolist(), high.tolist()],
        "predicted": predicted.tolist(),
        "adjoint": adjoint.mean.tolist(),
        "agreement": found.row(),
        "figure": None if plot is None else str(plot),
        "metadata": surrogate.metadata,
    }


def _plot_path(options: argparse.Namespace) -> Path | None:
    """Where the figure goes; a place that cannot be written to is refused before anything is computed."""
    if options.no_plot:
        return None
    parts = (Path(options.model).name, Path(options.task).stem)
    name = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)
    path = Path(options.plot or f"gains-{name}.png")
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot {path}: the figure is a PNG; give a name that ends in .png.")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise InputError(f"--plot {path} cannot be written. Give a file in a folder that exists, or --no-plot.")
    return path


def steer(options: argparse.Namespace) -> dict[str, Any]:
    """Print continuations side by side: unsteered, by the cheapest push, by a uniform one of the same energy."""
    import numpy as np

    from llvlit.cli.terminal import side_by_side, terminal_width
    from llvlit.engine.depth import depth_system, last_token_states
    from llvlit.engine.models import load_model
    from llvlit.method.concepts import concept_directions
    from llvlit.method.control import energy, minimum_energy, relative_weights
    from llvlit.method.gains import adjoint_gains
    from llvlit.method.verification import output_shifts
    from llvlit.tasks.task import Prompts

    splits = _splits(options)
    model = load_model(options.model, device=options.device)
    encoded = _encoded(model, options)
    directions = concept_directions(model, splits.concept)
    h, gap = adjoint_gains(model, splits.operating, directions).mean, float(directions.gaps[-1])
    weights = np.ones(model.n_layers)
    if options.energy == "relative":
        weights = relative_weights(last_token_states(model, splits.operating))
    optimal = minimum_energy(h, options.target * gap, weights=weights)
    cost = energy(optimal, weights=weights)
    uniform = equal_energy(1 / np.sqrt(weights), h, optimal, weights)
    inputs = {"plain": np.zeros(model.n_layers), "optimal": optimal, "uniform": uniform}
    system = depth_system(model, Prompts((options.prompt,), (1,)))
    vectors = directions.vectors.to(model.device, model.dtype)
    reached = output_shifts(system, vectors, np.stack([*inputs.values()])[None])[0] / gap
    rows, columns = {}, {}
    for (name, pushes), measured in zip(inputs.items(), reached, strict=True):
        text = _continuation(model, directions, pushes, encoded, options.tokens)
        at = int(abs(pushes).argmax())
        rows[name] = {
            "text": text,
            "energy": energy(pushes, weights=weights),
            "predicted": float(h @ pushes) / gap,
            "measured": float(measured),
            "inputs": pushes.tolist(),
        }
        facts = "no push"
        if name != "plain":
            facts = (
                f"energy {rows[name]['energy']:.3g}\npredicted {rows[name]['predicted']:+.2f} class gaps\n"
                f"measured {measured:+.2f} class gaps\nlargest push {pushes[at]:+.3g}, before layer {at}"
            )
        columns[name] = f"{facts}\n\n{text}"
    say(options, side_by_side(columns, terminal_width()))
    say(
        options,
        f"\nTarget: {options.target:+g} class gaps of {options.task} at the output of {model.name}.\n"
        f"Both pushes have the {options.energy} energy {cost:.3g}. Predicted: by the linear gains.\n"
        "Measured: in the full model, at the prompt's last token. A gap: the distance of the classes' means.",
    )
    return {"target": options.target, "energy": cost, "metric": options.energy, **rows}


def equal_energy(shape: np.ndarray, gains: np.ndarray, rival: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A shape ``(n_layers,)`` scaled to its rival's energy, and turned so that it is predicted to push the same way."""
    from llvlit.method.control import energy

    way = -1.0 if (gains @ shape) * (gains @ rival) < 0 else 1.0
    scaled: np.ndarray = way * shape * (energy(rival, weights=weights) / energy(shape, weights=weights)) ** 0.5
    return scaled


def _encoded(model: LanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    """The prompt as tokens, if the model has room for it and for what it shall generate."""
    if not 0 < options.tokens < model.max_positions:
        raise InputError(
            f"tokens={options.tokens} is not between 1 and {model.max_positions - 1}; {model.name} holds one more."
        )
    encoded = model.tokenizer(options.prompt, return_tensors="pt").to(model.device)
    n_tokens = encoded["input_ids"].shape[1]
    if not n_tokens or n_tokens + options.tokens > model.max_positions:
        raise InputError(
            f"The prompt has {n_tokens} tokens; with --tokens {options.tokens} it must have 1 to "
            f"{model.max_positions - options.tokens}, as {model.name} holds {model.max_positions}."
        )
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def _continuation(
    model: LanguageModel, directions: Directions, inputs: np.ndarray, encoded: dict[str, Any], tokens: int
) -> str:
    import torch

    from llvlit.method.steering import steer

    module: Any = model.module
    with steer(model, directions, inputs), torch.no_grad():
        out = module.generate(
            **encoded,
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.3,
            pad_token_id=model.tokenizer.eos_token_id,
        )
    return str(model.tokenizer.decode(out[0], skip_special_tokens=True))
