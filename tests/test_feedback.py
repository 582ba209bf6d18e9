"""The regulator is the optimum of the stacked problem; its feedback re-plans after every disturbance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import EXACT, PROMPTS
from llvlit.engine.depth import DepthSystem, depth_system
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import random_directions
from llvlit.method.control import minimum_energy
from llvlit.method.feedback import adjoint_surrogate, closed_loop, lqr
from llvlit.method.gain_matrix import GainMatrix, realize
from llvlit.method.gains import adjoint_gains
from llvlit.method.identification import identify
from llvlit.method.surrogate import LLV

L, H = 7, 5


@dataclass(frozen=True)
class LinearLayer:
    """A layer that multiplies by a matrix."""

    matrix: torch.Tensor
    model: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="linear", fingerprint=""))
    after: tuple = ()

    def step(self, candidates: torch.Tensor) -> torch.Tensor:
        return candidates @ self.matrix.T


def linear(seed: int, *, n_prompts: int = 3) -> tuple[DepthSystem, torch.Tensor, LLV]:
    """A random linear system of depth L, its directions, and the surrogate of full order, in the states themselves."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(L, H, H, generator=generator, dtype=torch.float64) / np.sqrt(H)
    vectors = random_directions(L + 1, H, seed=seed)
    states = [torch.randn(n_prompts, H, generator=generator, dtype=torch.float64)]
    for matrix in matrices:
        states.append(states[-1] @ matrix.T)
    system = DepthSystem(torch.stack(states, dim=1), tuple(map(LinearLayer, matrices)), 0)
    return system, vectors, full_order(matrices, vectors)


def full_order(matrices: torch.Tensor, vectors: torch.Tensor) -> LLV:
    A = matrices.numpy()
    B = np.einsum("lij,lj->li", A, vectors[:-1].numpy())
    bases = np.tile(np.eye(H), (L + 1, 1, 1))
    return LLV(
        A, vectors[-1].numpy(), bases, np.full(L + 1, H), A[None], {},
        B=B, outputs=vectors.numpy(), per_prompt_inputs=B[None],
    )  # fmt: skip


def without_bases(surrogate: LLV) -> LLV:
    none = np.zeros((surrogate.n_layers + 1, 0, surrogate.order))
    return replace(surrogate, bases=none, left_bases=none)


def penalties_of(surrogate: LLV, tightness: float | np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``q_k = tightness / (h_k^T W^-1 h_k)``."""
    reach = (surrogate.matrix() ** 2 / weights[:, None]).sum(axis=0)
    return np.where(reach > 0, tightness / np.where(reach > 0, reach, 1), 0.0)


def stacked(
    gains: np.ndarray, offset: np.ndarray, setpoints: np.ndarray, penalties: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Oracle: inputs (n,) that minimize ``u^T W u + sum_k q_k (offset + gains^T u - s)_k^2``, by least squares."""
    roots = np.sqrt(penalties)
    rows = np.concatenate([np.diag(np.sqrt(weights)), roots[:, None] * gains.T])
    right = np.concatenate([np.zeros(len(weights)), roots * (setpoints - offset)])
    return np.linalg.lstsq(rows, right, rcond=None)[0]


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_is_the_optimum_of_the_stacked_problem(seed):
    _, _, surrogate = linear(seed)
    rng = np.random.default_rng(seed)
    weights, setpoints = rng.uniform(0.2, 5, L), rng.standard_normal(L + 1)
    tightness = rng.uniform(0, 100, L + 1) * (np.arange(L + 1) > seed % 5)
    law = lqr(surrogate, setpoints, tightness=tightness, weights=weights)
    penalties = penalties_of(surrogate, tightness, weights)
    best = stacked(surrogate.matrix(), np.zeros(L + 1), setpoints, penalties, weights)
    assert np.allclose(law.plan(), best, rtol=1e-8, atol=1e-10)


def test_a_tight_target_at_the_end_is_minimum_energy():
    _, _, surrogate = linear(1)
    weights = np.linspace(1, 3, L)
    law = lqr(surrogate, 2.0, tightness=1e8, weights=weights)
    assert np.allclose(law.plan(), minimum_energy(surrogate.gains(), 2.0, weights=weights), rtol=1e-6)
    loose = lqr(surrogate, 2.0, tightness=9.0)
    assert loose.plan() @ surrogate.gains() == pytest.approx(0.9 * 2.0)  # missed by 1 / (1 + tightness)


@pytest.mark.parametrize("observed", ["states", "output"])
def test_undisturbed_feedback_does_what_the_plan_says(observed):
    system, vectors, surrogate = linear(2)
    surrogate = surrogate if observed == "states" else without_bases(surrogate)
    setpoints = np.linspace(0, 2, L + 1)
    law = lqr(surrogate, setpoints, tightness=50.0)
    closed, opened = (closed_loop(system, one, vectors) for one in (law, law.open_loop()))
    assert np.allclose(opened.inputs, law.plan(), atol=EXACT)
    assert np.allclose(closed.inputs, law.plan(), atol=1e-10)
    assert np.allclose(closed.outputs, law.plan() @ surrogate.matrix(), atol=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_after_a_disturbance_the_law_plans_anew_what_is_left(seed):
    """Principle of optimality: inputs from the disturbed layer on solve the stacked problem that begins there."""
    system, vectors, surrogate = linear(seed, n_prompts=1)
    rng = np.random.default_rng(seed)
    at, weights = seed % (L - 1), rng.uniform(0.5, 2, L)
    disturbance = torch.zeros(L, H, dtype=torch.float64)
    disturbance[at] = torch.from_numpy(rng.standard_normal(H))
    setpoints = rng.standard_normal(L + 1)
    law = lqr(surrogate, setpoints, tightness=20.0, weights=weights)
    closed = closed_loop(system, law, vectors, disturbance=disturbance)
    free = replace(law, gains=0 * law.gains, feedforward=np.where(np.arange(L) < at, closed.inputs[0], 0.0))
    offset = closed_loop(system, free, vectors, disturbance=disturbance).outputs[0]
    best = stacked(surrogate.matrix()[at:], offset, setpoints, penalties_of(surrogate, 20.0, weights), weights[at:])
    assert np.allclose(closed.inputs[0, at:], best, rtol=1e-7, atol=1e-9)


def test_feedback_beats_the_open_loop_under_disturbances():
    """In the cost that it minimizes, and in the target missed; from the output alone it still does, on average."""
    costs = {"states": [], "output": [], "open": []}
    for seed in range(30):
        system, vectors, surrogate = linear(seed)
        rng = np.random.default_rng(seed)
        disturbance = torch.from_numpy(0.5 * rng.standard_normal((3, L, H)))
        law = lqr(surrogate, 2.0, tightness=100.0)
        penalty = penalties_of(surrogate, 100.0, np.ones(L))[-1]
        laws = {"states": law, "output": lqr(without_bases(surrogate), 2.0, tightness=100.0), "open": law.open_loop()}
        for name, one in laws.items():
            result = closed_loop(system, one, vectors, disturbance=disturbance)
            costs[name].append((result.inputs**2).sum(axis=1) + penalty * (result.outputs[:, -1] - 2.0) ** 2)
    states, output, opened = (np.mean(costs[name]) for name in ("states", "output", "open"))
    assert states < 0.8 * output < 0.8 * opened


def test_one_number_is_enough_for_a_target_at_the_end():
    """K_l is in proportion to the adjoint of the output, so a law of order one does all that the dense one does."""
    system, vectors, surrogate = linear(4)
    adjoints = [vectors[-1].numpy()]
    for A in surrogate.A[::-1]:
        adjoints.insert(0, A.T @ adjoints[0])
    h = surrogate.gains()[:, None]
    small = LLV(
        np.ones((L, 1, 1)), np.ones(1), np.array(adjoints)[..., None], np.ones(L + 1, int), np.ones((1, L, 1, 1)), {},
        B=h, outputs=np.eye(L + 1)[:, -1:], per_prompt_inputs=h[None],
    )  # fmt: skip
    dense, one = lqr(surrogate, 2.0), lqr(small, 2.0)
    assert np.allclose(dense.gains, one.gains * np.array(adjoints)[:-1], atol=1e-10)
    disturbance = torch.from_numpy(np.random.default_rng(0).standard_normal((3, L, H)))
    both = [closed_loop(system, law, vectors, disturbance=disturbance) for law in (dense, one)]
    assert np.allclose(both[0].inputs, both[1].inputs, atol=1e-9)
    assert np.allclose(both[0].outputs, both[1].outputs, atol=1e-9)


def test_one_backward_pass_gives_the_dense_law(gpt2):
    """Of one prompt, whose mean Jacobians are its own; of more, the mean adjoint is that of :func:`adjoint_gains`."""
    vectors, one = random_directions(5, 24, seed=5), PROMPTS.select([0])
    dense = lqr(identify(gpt2, one, vectors, order=24, basis="random"), 0.1)
    small = lqr(adjoint_surrogate(gpt2, one, vectors), 0.1)
    disturbance = 0.01 * torch.from_numpy(np.random.default_rng(1).standard_normal((4, 24)))
    both = [closed_loop(depth_system(gpt2, one), law, vectors, disturbance=disturbance) for law in (dense, small)]
    assert np.allclose(both[0].inputs, both[1].inputs, rtol=1e-8)
    gains = adjoint_gains(gpt2, PROMPTS, vectors).mean
    assert np.allclose(adjoint_surrogate(gpt2, PROMPTS, vectors).gains(), gains, atol=EXACT)


def test_the_filter_is_the_least_squares_estimate_of_the_state():
    """Oracle: the mean of the last state given all outputs, from the joint covariance of disturbances and noise."""
    _, _, surrogate = linear(6)
    noise = 0.3
    law = lqr(without_bases(surrogate), 1.0, noise=noise)
    rng = np.random.default_rng(6)
    outputs = rng.standard_normal(L)
    state = np.zeros(H)
    for layer in range(L):
        state = surrogate.A[layer - 1] @ state if layer else state
        state = state + law.filter_gains[layer] * (outputs[layer] - surrogate.outputs[layer] @ state)
    maps = [np.zeros((H, L * H))]  # each state as a map of all disturbances
    for layer in range(L):
        new = surrogate.A[layer - 1] @ maps[-1] if layer else maps[-1].copy()
        new[:, layer * H : (layer + 1) * H] += np.eye(H)
        maps.append(new)
    seen = np.stack([C @ one for C, one in zip(surrogate.outputs[:L], maps[1:], strict=True)])
    covariance = seen @ seen.T + np.diag([noise * C @ C for C in surrogate.outputs[:L]])
    assert np.allclose(state, maps[-1] @ seen.T @ np.linalg.solve(covariance, outputs), atol=1e-9)


def test_on_a_model_small_targets_are_reached_and_disturbances_repaired(gpt2):
    vectors, one = random_directions(5, 24, seed=5), PROMPTS.select([0])
    first, system = depth_system(gpt2, one), depth_system(gpt2, PROMPTS)
    surrogate = identify(gpt2, one, vectors, order=24, basis="reachability")
    realized = realize(GainMatrix(surrogate.matrix()[None], "linear", 0.0), order=2)
    for each in (surrogate, realized):
        law = lqr(each, 1e-3, tightness=1e6)
        assert np.allclose(closed_loop(first, law, vectors).outputs[:, -1], 1e-3, rtol=0.01)
    law = lqr(surrogate, 1e-3, tightness=1e6)
    disturbance = 2e-4 * torch.from_numpy(np.random.default_rng(0).standard_normal((len(PROMPTS), 4, 24)))
    closed, opened = (
        np.abs(closed_loop(system, each, vectors, disturbance=disturbance).outputs[:, -1] - 1e-3).mean()
        for each in (law, law.open_loop())
    )
    assert closed < 0.8 * opened


def test_balanced_states_are_read_through_their_left_bases(gpt2):
    """At state 3 of 4 layers they hold all that later outputs see of a disturbance, as the adjoint does."""
    vectors, one = random_directions(5, 24, seed=5), PROMPTS.select([0])
    system, disturbance = depth_system(gpt2, one), torch.zeros(4, 24, dtype=torch.float64)
    disturbance[3] = 1e-6 * torch.from_numpy(np.random.default_rng(0).standard_normal(24))
    balanced = identify(gpt2, one, vectors, order=24, basis="balanced")
    inputs, expected = (
        closed_loop(system, lqr(surrogate, 1e-6, tightness=1.0), vectors, disturbance=disturbance).inputs
        for surrogate in (balanced, adjoint_surrogate(gpt2, one, vectors))
    )
    assert np.allclose(inputs, expected, rtol=1e-3, atol=1e-10)
    assert not np.allclose(expected[0], lqr(balanced, 1e-6, tightness=1.0).plan(), rtol=0.1, atol=1e-10)


def test_the_outputs_of_a_plan_are_those_of_the_full_model_under_its_inputs(gpt2):
    vectors = random_directions(5, 24, seed=5)
    system = depth_system(gpt2, PROMPTS)
    law = lqr(identify(gpt2, PROMPTS, vectors, order=3), 0.5).open_loop()
    result = closed_loop(system, law, vectors)
    pushes = torch.from_numpy(result.inputs[0])[:, None] * vectors[:-1]
    for stop in range(5):
        reached = system.propagate(system.states[:, :1], stop=stop, inputs=pushes)[:, 0]
        expected = (reached - system.states[:, stop]) @ vectors[stop]
        assert np.allclose(result.outputs[:, stop], expected, atol=1e-10)


def test_bad_input_is_refused_by_name(gpt2):
    system, vectors, surrogate = linear(0)
    law = lqr(surrogate, 1.0)
    still = replace(surrogate, B=0 * surrogate.B, per_prompt_inputs=0 * surrogate.per_prompt_inputs)
    other = depth_system(gpt2, PROMPTS)
    for error, named, call in (
        (InputError, "surrogate", lambda: lqr(np.eye(3), 1.0)),
        (InputError, "setpoints", lambda: lqr(surrogate, np.ones(3))),
        (InputError, "tightness", lambda: lqr(surrogate, 1.0, tightness=-1.0)),
        (InputError, "tightness", lambda: lqr(surrogate, 1.0, tightness=0.0)),
        (InputError, "tightness", lambda: lqr(surrogate, np.ones(L + 1), tightness=np.eye(L + 1)[0])),
        (InputError, "weights", lambda: lqr(surrogate, 1.0, weights=np.zeros(L))),
        (InputError, "noise", lambda: lqr(surrogate, 1.0, noise=0.0)),
        (NumericalError, "state 7", lambda: lqr(still, 1.0)),
        (InputError, "law", lambda: closed_loop(system, surrogate, vectors)),
        (InputError, "system", lambda: closed_loop(gpt2, law, vectors)),
        (InputError, "directions", lambda: closed_loop(system, law, vectors[:-1])),
        (InputError, "law.gains", lambda: closed_loop(other, law, random_directions(5, 24))),
        (InputError, "disturbance", lambda: closed_loop(system, law, vectors, disturbance=torch.ones(L))),
    ):
        with pytest.raises(error, match=named):
            call()
    short = lqr(identify(gpt2, PROMPTS, random_directions(5, 24), order=2), 1.0)
    wide = DepthSystem(torch.ones(2, 5, 8, dtype=torch.float64), system.layers[:4], 0)
    foreign = replace(short, surrogate=replace(short.surrogate, metadata={"model": "a", "model_fingerprint": "b"}))
    with pytest.raises(InputError, match="law is of the model a"):
        closed_loop(other, foreign, random_directions(5, 24))
    with pytest.raises(InputError, match="final_norm"):
        closed_loop(depth_system(gpt2, PROMPTS, final_norm=True), short, random_directions(5, 24))
    with pytest.raises(InputError, match="24 rows"):
        closed_loop(wide, short, random_directions(5, 8))
