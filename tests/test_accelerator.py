"""On an accelerator the numbers are those of the processor: float32 on both, rounded in another order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llvlit
from llvlit.engine.tokens import tokenize
from llvlit.method.bases import BASES
from llvlit.method.gains import adjoint_gains
from llvlit.method.identification import Plan, identify_all
from llvlit.study.experiment import schedule_energies

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

FLOAT32 = 2e-3
"""Relative: float32 sums of some hundred terms in another order, through twelve layers."""


@pytest.fixture(scope="module")
def both() -> dict[str, dict[str, np.ndarray]]:
    splits = llvlit.load_task("film-sentiment").split(concept=60, operating=20, evaluation=8)
    found = {}
    for device in ("cpu", "cuda"):
        model = llvlit.load_model("embedded/small", device=device)
        directions = llvlit.concept_directions(model, splits.concept)
        plans = {basis: Plan(directions, basis, 16) for basis in BASES}
        identified = identify_all(model, splits.operating, plans)
        gains = {basis: one.gains() for basis, one in identified.surrogates.items()}
        held_out = tokenize(model, splits.evaluation)
        weights = np.ones(model.n_layers)
        energies = schedule_energies(model, held_out, directions, {"krylov": gains["krylov"]}, weights, 0.2)
        central = llvlit.identify(model, splits.operating, directions, order=8, basis="random", jacobian="central")
        with llvlit.steer(model, directions, np.full(model.n_layers, 0.5)), torch.no_grad():
            tokens = model.tokenizer("The plot was thin", return_tensors="pt").to(device)
            logits = model.module(**tokens).logits
        found[device] = {
            "directions": directions.vectors.numpy(),
            "states": identified.states.cpu().numpy(),
            "linear": identified.linear["krylov"].per_prompt,
            "measured": llvlit.measured_gains(model, splits.evaluation, directions).per_prompt,
            "adjoint": adjoint_gains(model, splits.evaluation, directions).per_prompt,
            "central": central.gains(),
            "energies": np.array([row["energy"] for row in energies], dtype=float),
            "steered": logits.cpu().numpy(),
            **gains,
        }
    return found


@pytest.mark.parametrize(
    "name", ["directions", "states", "linear", "measured", "adjoint", "central", "energies", "steered", *BASES]
)
def test_cuda_gives_the_numbers_of_the_processor(both: dict[str, dict[str, np.ndarray]], name: str) -> None:
    here, there = both["cpu"][name], both["cuda"][name]
    assert np.linalg.norm(there - here) <= FLOAT32 * np.linalg.norm(here)
