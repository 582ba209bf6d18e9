"""The README's figure, computed from the largest shipped model: ``python benchmarks/readme_figure.py``."""

from __future__ import annotations

from pathlib import Path

import llvlit
from llvlit.files import write_atomically
from llvlit.plots import figures

TARGET = Path(__file__).resolve().parent.parent / "book" / "_static" / "gain-profile.svg"


def main() -> None:
    model = llvlit.load_model("embedded/large")
    splits = llvlit.load_task("film-sentiment").split(concept=200, operating=50, evaluation=100)
    directions = llvlit.concept_directions(model, splits.concept)
    measured = llvlit.measured_gains(model, splits.evaluation, directions)
    predicted = {
        basis: llvlit.identify(model, splits.operating, directions, basis=basis).gains()
        for basis in ("krylov", "reachability")
    }
    predicted["adjoint"] = llvlit.adjoint_gains(model, splits.operating, directions).mean
    for name, gains in predicted.items():
        print(name, llvlit.agreement(gains, measured).row())
    figure, (left, right) = figures.new(2, width=9.0)
    n_prompts = len(splits.evaluation)
    title = f"{model.name}, film sentiment, {n_prompts} prompts"
    for axes, words in ((left, title), (right, "without layer 0")):
        bounds, borrowed = measured.interval(), measured.borrowed
        figures.gain_profile(measured.mean, bounds, predicted, axes=axes, title=words, borrowed=borrowed)
    right.set_xlim(0.5, model.n_layers - 0.5)
    lines = [measured.mean[1:], *(gains[1:] for gains in predicted.values())]
    low, high = min(map(min, lines)), max(map(max, lines))
    right.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    right.set_ylabel("")
    right.get_legend().remove()
    write_atomically(TARGET, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    main()
