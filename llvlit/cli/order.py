"""``llvlit order``: how many numbers carry a concept through depth, measured by experiments alone."""

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
from llvlit.cli.terminal import bar, columns

if TYPE_CHECKING:
    from llvlit.method.gain_matrix import GainMatrix

BAR = 24
TOLERANCES = [0.05, 0.01]
MOST_ROWS = 10
ABOUT = ("title", "n_layers", "note")


def mount(commands: Any) -> None:
    """Add the command."""
    parser = command(commands, order, "llvlit order --model smollm2-135m --task film-sentiment")
    add_experiment(parser)
    parser.add_argument(
        "--tolerance",
        type="share",
        nargs="+",
        default=TOLERANCES,
        help="share of the gain matrix that the order may miss, one or several (default 0.05 0.01)",
    )
    parser.add_argument(
        "--method", default="measured", help="measured (default), or linear: products with Jacobians, no pushes"
    )
    parser.add_argument("--amplitude", type="length", default=0.1, help="length of the measured push (default 0.1)")
    parser.add_argument(
        "--nulls", action="store_true", help="also of directions turned together, random ones, and untrained weights"
    )
    add_files(parser, "it", "the gain matrix (safetensors); GainMatrix.load reads it")


def order(options: argparse.Namespace) -> None:
    """Order of depth: the smallest number of dimensions that carries a concept's gain matrix."""
    places = places_of(options)
    found, matrix = compute(options)
    report(options, places, found, text(found), about=ABOUT, save=matrix.save, draw=draw)


def compute(options: argparse.Namespace) -> tuple[dict[str, Any], GainMatrix]:
    """Orders and singular values, as they are printed and drawn, and the gain matrix."""
    import numpy as np

    from llvlit.engine.tokens import tokenize
    from llvlit.method.concepts import concept_directions, random_directions
    from llvlit.method.gain_matrix import gain_matrix, noise_floor
    from llvlit.provenance import environment
    from llvlit.study.cells import load_subject

    model, splits = load_experiment(options)
    tokens = splits["evaluation"]
    directions = concept_directions(model, splits["concept"])
    how = {"amplitude": options.amplitude, "method": options.method}
    matrix = gain_matrix(model, tokens, directions, **how)
    nulls = {}
    if options.nulls:
        shape = model.n_layers + 1, model.hidden_size
        turn, _ = np.linalg.qr(np.random.default_rng(options.seed).standard_normal((model.hidden_size,) * 2))
        turned = directions.vectors.double().cpu().numpy() @ turn
        nulls["the same directions, turned together"] = gain_matrix(model, tokens, turned, **how)
        nulls["random directions"] = gain_matrix(model, tokens, random_directions(*shape, seed=options.seed), **how)
        untrained = load_subject(f"untrained:{options.model}", device=options.device)
        own = tokenize(untrained, tokens.prompts, chat=options.chat, token_index=options.token_index)
        nulls["untrained weights, the same directions"] = gain_matrix(untrained, own, directions, **how)
    return {
        "title": f"{model.name} on {task_title(options)}",
        "n_layers": model.n_layers,
        "n_prompts": len(tokens),
        "note": prompts_note(tokens),
        "orders": _orders(matrix, options),
        "nulls": {name: _orders(null, options) for name, null in nulls.items()},
        "singular_values": [values.tolist() for values in matrix.hankel_singular_values()],
        "missed": matrix.shares_missed(),
        "floor": noise_floor(model, tokens, directions, amplitude=options.amplitude) if matrix.amplitude else None,
        "borrowed": matrix.borrowed,
        "figure": None,
        "metadata": {**environment(), **matrix.metadata},
    }, matrix


def _orders(matrix: GainMatrix, options: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {
            "tolerance": each,
            "order": matrix.order(each),
            "interval": list(matrix.order_interval(each, seed=options.seed)),
        }
        for each in options.tolerance
    ]


def text(found: dict[str, Any]) -> str:
    """The orders with their intervals, and the singular values as bars."""
    lines = [f"{found['title']}: {found['n_layers']} layers, every push read at every later state\n"]
    for name, orders in {"order of depth": found["orders"], **found["nulls"]}.items():
        told = ("{order} {interval} at {tolerance:.3g}".format(**each) for each in orders)
        lines.append(f"{name}: {', '.join(told)}")
    spectra = found["singular_values"]
    sizes = [max(values[i] for values in spectra if len(values) > i) for i in range(len(found["missed"]))]
    rows = [
        {
            "order": f"{number:>5}",
            "singular value": size,
            "missed": missed,
            "largest singular value of any state": bar(size, sizes[0], BAR),
        }
        for number, size, missed in zip(range(1, MOST_ROWS + 1), sizes, found["missed"], strict=False)
    ]
    lines += ["", columns(rows, {"singular value": "{:>14.4f}", "missed": "{:>8.2%}"})]
    lines.append(
        f"\nMissed: the share of the matrix that a realization of this order misses ({found['n_prompts']} held-out "
        f"prompts, 95 % intervals over them)."
    )
    if found["floor"] is not None:
        lines.append(f"Rounding makes singular values of {max(found['floor']):.1g} at the least.")
    return "\n".join([*lines, *borrowed_note(found["borrowed"], read=True), *found["note"]])


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure of the singular values as PNG."""
    from llvlit.plots import figures

    figure, axes = figures.new(2)
    floor = None if found["floor"] is None else max(found["floor"])
    figures.hankel_spectrum(found["singular_values"], axes=axes[0], floor=floor, title=found["title"])
    tolerances = [each["tolerance"] for each in found["orders"]]
    figures.shares_missed({"realized": found["missed"]}, axes=axes[1], tolerances=tolerances)
    figures.save(figure, path)
