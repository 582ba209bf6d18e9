"""``llvlit gains``: the gain of every layer, computed, printed and drawn."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llvlit.cli.experiment import add_experiment, borrowed_note, load_experiment
from llvlit.cli.options import command, count, length
from llvlit.cli.terminal import bar, encodes_blocks, show, sparkline
from llvlit.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from llvlit.method.agreement import Agreement
    from llvlit.method.gains import Gains
    from llvlit.method.surrogate import LLV

BAR = 20


@dataclass(frozen=True)
class Profile:
    """Gains of every layer of a model on a task: measured on the full model, predicted, and their agreement."""

    model: str
    task: str
    basis: str
    measured: Gains
    adjoint: Gains
    surrogate: LLV
    agreement: Agreement

    @property
    def predicted(self) -> np.ndarray:
        """The surrogate's gains ``(n_layers,)``."""
        return self.surrogate.gains()

    @property
    def title(self) -> str:
        """What the profile is of."""
        return f"{self.model} on {self.task}"


def mount(commands: Any) -> None:
    """Add the command."""
    gains = command(
        commands,
        "gains",
        run,
        "Gain profile of a model on a task: measured on the full model, and predicted.",
        "llvlit gains --model embedded/large --task film-sentiment --basis reachability --order 16",
    )
    add_experiment(gains)
    gains.add_argument("--basis", default="reachability", help="krylov, reachability (default) or random")
    gains.add_argument("--order", type=count, help="order d of the surrogate (default 32, or H if less)")
    gains.add_argument("--amplitude", type=length, default=0.1, help="length of the measured push (default 0.1)")
    gains.add_argument("--plot", metavar="FILE", help="PNG of the profile (default gains-MODEL-TASK.png, here)")
    gains.add_argument("--no-plot", action="store_true", help="write no figure")
    gains.add_argument("--save", metavar="FILE", help="save the surrogate (safetensors); LLV.load reads it")


def run(options: argparse.Namespace) -> None:
    """Compute a profile; write its files; print it, also when a file could not be written."""
    plot = _plot_path(options)
    if options.save:
        _check_place("save", Path(options.save))
    profile = compute(options)
    written = {}
    try:
        if options.save:
            profile.surrogate.save(options.save)
            written["Saved"] = options.save
        if plot is not None:
            draw(profile, plot)
            written["Figure"] = str(plot)
    finally:
        files = [f"{kind}: {path}" for kind, path in written.items()]
        show(options, data(profile, written.get("Figure")), "\n".join([text(profile), *files]))


def compute(options: argparse.Namespace) -> Profile:
    """Measure and predict; each split is tokenized once."""
    from llvlit.method.agreement import agreement
    from llvlit.method.concepts import concept_directions
    from llvlit.method.gains import adjoint_gains, measured_gains
    from llvlit.method.identification import identify

    model, splits = load_experiment(options)
    directions = concept_directions(model, splits["concept"])
    order = min(32, model.hidden_size) if options.order is None else options.order
    surrogate = identify(model, splits["operating"], directions, order=order, basis=options.basis)
    measured = measured_gains(model, splits["evaluation"], directions, amplitude=options.amplitude)
    return Profile(
        model=model.name,
        task=options.task,
        basis=options.basis,
        surrogate=surrogate,
        measured=measured,
        adjoint=adjoint_gains(model, splits["operating"], directions),
        agreement=agreement(surrogate.gains(), measured),
    )


def data(profile: Profile, figure: str | None) -> dict[str, Any]:
    """A profile as ``--json`` prints it, with what it was computed with."""
    from llvlit.provenance import environment

    return {
        "measured": profile.measured.mean.tolist(),
        "interval": profile.measured.interval().tolist(),
        "predicted": profile.predicted.tolist(),
        "adjoint": profile.adjoint.mean.tolist(),
        "borrowed": profile.measured.borrowed,
        "agreement": profile.agreement.row(),
        "figure": figure,
        "metadata": {**environment(), **profile.surrogate.metadata},
    }


def text(profile: Profile) -> str:
    """A profile as a table, a bar for each measured gain, and both lines small."""
    blocks = encodes_blocks()
    measured, predicted, adjoint = profile.measured.mean, profile.predicted, profile.adjoint.mean
    low, high = profile.measured.interval()
    lines = [
        f"{profile.title}: output y = v_L . x_L, gains per unit push\n",
        f"{'layer':>5} {'measured':>9} {'95 % interval':>18} {profile.basis:>13} {'adjoint':>9}  measured",
    ]
    largest = float(abs(measured[1:]).max(initial=0.0)) or float(abs(measured).max()) or 1.0
    for layer, gain in enumerate(measured):
        bounds = f"[{low[layer]:.3f}, {high[layer]:.3f}]"
        mark = "*" if layer in profile.measured.borrowed else " "
        numbers = f"{layer:>5}{mark}{gain:>9.3f} {bounds:>18} {predicted[layer]:>13.3f} {adjoint[layer]:>9.3f}"
        lines.append(f"{numbers}  {bar(gain, largest, BAR, blocks=blocks)}".rstrip())
    if note := borrowed_note(profile.measured.borrowed):
        lines.append(note)
    if len(measured) > 1:  # layer 0 often stands far from all others
        small = {"measured": measured[1:], profile.basis: predicted[1:]}
        bottom, top = min(map(min, small.values())), max(map(max, small.values()))
        lines.append(f"\nLayers 1 to {len(measured) - 1}, from {bottom:.3f} to {top:.3f}:")
        lines += [f"{name:>14}  {sparkline(line.tolist(), bottom, top, blocks=blocks)}" for name, line in small.items()]
    agreement = profile.agreement
    lines.append(
        f"\nOrder {profile.surrogate.order}: Spearman {agreement.spearman:.3f}, Pearson {agreement.pearson:.3f}, "
        f"relative error {agreement.relative_error:.3f} ({len(profile.measured.per_prompt)} held-out prompts)"
    )
    if n_cut := profile.measured.metadata["n_cut"]:
        lines.append(f"{n_cut} prompts were cut on the left.")
    return "\n".join(lines)


def draw(profile: Profile, path: Path) -> None:
    """Write a profile's figure as PNG."""
    from llvlit.plots import figures

    figure, (axes,) = figures.new()
    figures.gain_profile(
        profile.measured.mean,
        profile.measured.interval(),
        {profile.basis: profile.predicted, "adjoint": profile.adjoint.mean},
        axes=axes,
        title=f"{profile.title}, order {profile.surrogate.order}",
        borrowed=profile.measured.borrowed,
    )
    figures.save(figure, path)


def _plot_path(options: argparse.Namespace) -> Path | None:
    """Where the figure goes; a place that cannot be written to is refused before anything is computed."""
    if options.no_plot:
        return None
    parts = (Path(options.model).name, Path(options.task).stem)
    stem = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-")[:60] for part in parts)
    path = Path(options.plot or f"gains-{stem}.png")
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot {path}: the figure is a PNG; give a name that ends in .png.")
    _check_place("plot", path, "or --no-plot")
    return path


def _check_place(option: str, path: Path, more: str = "") -> None:
    """Refuse what cannot be written, before anything is computed."""
    if not path.absolute().parent.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(
            f"--{option} {path} cannot be written. Give a file in a folder that exists{', ' * bool(more)}{more}."
        )
