"""The headline figure: how many numbers a concept needs on its way through depth, and its nulls.

``python benchmarks/headline_figure.py`` draws ``book/_static/headline.svg`` from ``results/method/headline.csv``;
``--measure`` measures that table anew first, in the sizes of the book. A row is a share of the gain matrix that
a realization of some order misses, from the first state on that has a direction of its own:

*concept*  SmolLM2-135M on film-sentiment, held-out prompts;
*turned*   its directions at all states turned together by a random rotation, five of them: their angles stay;
*drawn*    a random direction at every state, three sets;
*idle*     layers that do nothing, ``G[l, k] = v_k^T v_l``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import llvlit
from llvlit.engine.tokens import tokenize
from llvlit.files import write_atomically
from llvlit.method.concepts import random_directions
from llvlit.method.rivals import identity_matrix
from llvlit.plots import figures
from llvlit.publishing.settings import WRITTEN, load_settings
from llvlit.study.reports import read_shares

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results" / "method" / "headline.csv"
TARGET = ROOT / "book" / "_static" / "headline.svg"
N_TURNED, N_DRAWN = 5, 3


def measure() -> pd.DataFrame:
    settings = load_settings(WRITTEN)
    model = llvlit.load_model(settings.models[-1])
    splits = settings.split(settings.tasks[0])
    directions = llvlit.concept_directions(model, splits.concept)
    prompts = tokenize(model, splits.evaluation)
    v = directions.vectors.double().cpu().numpy()
    sets = [("concept", 0, directions)]
    for draw in range(N_TURNED):
        square = np.random.default_rng(draw).standard_normal((model.hidden_size, model.hidden_size))
        sets.append(("turned", draw, v @ np.linalg.qr(square)[0]))
    sets += [("drawn", draw, random_directions(*v.shape, seed=draw)) for draw in range(N_DRAWN)]
    matrices = [(name, draw, llvlit.gain_matrix(model, prompts, each)) for name, draw, each in sets]
    matrices.append(("idle", 0, llvlit.GainMatrix(identity_matrix(directions)[None], "linear", 0.0)))
    rows = [
        {"model": model.name, "directions": name, "draw": draw, "order": order, "missed": float(f"{share:.5g}")}
        for name, draw, matrix in matrices
        for order, share in enumerate(matrix.from_state(directions.first_own).shares_missed(), start=1)
    ]
    return pd.DataFrame(rows)


def draw() -> None:
    shares = read_shares(start=ROOT).groupby(["directions", "order"])["missed"].median().unstack("order")
    words = {
        "concept": "the concept",
        "turned": "turned together",
        "drawn": "drawn for each state",
        "idle": "idle layers",
    }
    figure, (axes,) = figures.new(width=5.4, height=3.9)
    figures.shares_missed(
        {words[name]: shares.loc[name].to_numpy() for name in words},
        axes=axes,
        title="Film sentiment through 30 layers of SmolLM2-135M",
    )
    axes.set(xlabel="Numbers that the state keeps", ylabel="Share of the gain matrix missed")
    write_atomically(TARGET, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the table anew first")
    if parser.parse_args().measure:
        frame = measure()
        write_atomically(TABLE, lambda path: frame.to_csv(path, index=False, lineterminator="\n"))
    draw()
