"""``llvlit gains``: the gain of every layer, computed, printed and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.options import (
    add_experiment,
    add_files,
    borrowed_note,
    command,
    load_experiment,
    places_of,
    prompts_note,
    report,
    task_title,
)
from llvlit.cli.terminal import bar, columns, sparkline

if TYPE_CHECKING:
    from llvlit.method.surrogate import LLV

BAR = 20
ABOUT = ("title", "basis", "order", "n_prompts", "note")
"""What text and figure say of a profile besides its numbers."""


def mount(commands: Any) -> None:
    """Add the command."""
    example = "llvlit gains --model embedded/large --task film-sentiment --basis reachability --order 16"
    parser = command(commands, gains, example)
    add_experiment(parser)
    parser.add_argument(
        "--basis",
        default="reachability",
        help="krylov, krylov-shifted, reachability (default), balanced, pca or random",
    )
    parser.add_argument("--order", type="count", help="order d of the surrogate (default 32, or H if less)")
    parser.add_argument("--amplitude", type="length", default=0.1, help="length of the measured push (default 0.1)")
    add_files(parser, "it", "the surrogate (safetensors); LLV.load reads it")


def gains(options: argparse.Namespace) -> None:
    """Gain profile of a model on a task: measured on the full model, and predicted."""
    places = places_of(options)
    profile, surrogate = compute(options)
    report(options, places, profile, text(profile), about=ABOUT, save=surrogate.save, draw=draw)


def compute(options: argparse.Namespace) -> tuple[dict[str, Any], LLV]:
    """Gains, measured and predicted, as they are printed and drawn, and the surrogate; each split is tokenized once."""
    from llvlit.method.agreement import agreement
    from llvlit.method.concepts import concept_directions
    from llvlit.method.gains import adjoint_gains, measured_gains
    from llvlit.method.identification import identify
    from llvlit.provenance import environment

    model, splits = load_experiment(options)
    directions = concept_directions(model, splits["concept"])
    order = min(32, model.hidden_size) if options.order is None else options.order
    surrogate = identify(model, splits["operating"], directions, order=order, basis=options.basis)
    measured = measured_gains(model, splits["evaluation"], directions, amplitude=options.amplitude)
    return {
        "title": f"{model.name} on {task_title(options)}",
        "basis": options.basis,
        "order": surrogate.order,
        "n_prompts": len(measured.per_prompt),
        "note": prompts_note(splits["evaluation"]),
        "measured": measured.mean,
        "interval": measured.interval(),
        "predicted": surrogate.gains(),
        "adjoint": adjoint_gains(model, splits["operating"], directions).mean,
        "borrowed": measured.borrowed,
        "agreement": agreement(surrogate.gains(), measured).row(),
        "figure": None,
        "metadata": {**environment(), **surrogate.metadata},
    }, surrogate


def text(profile: dict[str, Any]) -> str:
    """A profile as a table, a bar for each measured gain, and both lines small."""
    measured, predicted, basis = profile["measured"], profile["predicted"], profile["basis"]
    largest = float(abs(measured[1:]).max(initial=0.0)) or float(abs(measured).max()) or 1.0
    rows = [
        {
            "layer": f"{layer:>5}{'*' * (layer in profile['borrowed'])}",
            "measured": gain,
            "95 % interval": "[{:.3f}, {:.3f}]".format(*profile["interval"][:, layer]),
            basis: predicted[layer],
            "adjoint": profile["adjoint"][layer],
            "measured gain": bar(gain, largest, BAR),
        }
        for layer, gain in enumerate(measured)
    ]
    table = columns(rows, dict.fromkeys(("measured", basis, "adjoint"), "{:>8.3f}"))
    lines = [f"{profile['title']}: output y = v_L . x_L, gains per unit push\n", table]
    lines += borrowed_note(profile["borrowed"])
    if len(measured) > 1:  # layer 0 often stands far from all others
        small = {"measured": measured[1:], basis: predicted[1:]}
        bottom, top = min(map(min, small.values())), max(map(max, small.values()))
        lines.append(f"\nLayers 1 to {len(measured) - 1}, from {bottom:.3f} to {top:.3f}:")
        lines += [f"{name:>14}  {sparkline(line.tolist(), bottom, top)}" for name, line in small.items()]
    lines.append(
        "\nOrder {order}: Spearman {spearman:.3f}, Pearson {pearson:.3f}, relative error {relative_error:.3f} "
        "({n_prompts} held-out prompts)".format(**profile, **profile["agreement"])
    )
    return "\n".join([*lines, *profile["note"], f"Computed in {profile['metadata']['precision']}."])


def draw(profile: dict[str, Any], path: Path) -> None:
    """Write a profile's figure as PNG."""
    from llvlit.plots import figures

    figure, (axes,) = figures.new()
    figures.gain_profile(
        profile["measured"],
        profile["interval"],
        {profile["basis"]: profile["predicted"], "adjoint": profile["adjoint"]},
        axes=axes,
        title=f"{profile['title']}, order {profile['order']}",
        borrowed=profile["borrowed"],
    )
    figures.save(figure, path)
