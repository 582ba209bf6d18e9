"""The README's figure, computed from the largest shipped model: ``python benchmarks/readme_figure.py``."""

from __future__ import annotations

from pathlib import Path

import llvlit
from llvlit import figures
from llvlit.files import write_atomically

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
    figure, (axes,) = figures.new()
    title = f"{model.name}, film sentiment, {len(splits.evaluation)} held-out prompts"
    figures.gain_profile(measured.mean, measured.interval(), predicted, axes=axes, title=title)
    write_atomically(TARGET, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    main()
