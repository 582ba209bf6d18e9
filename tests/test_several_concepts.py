"""The gain tensor is the full model's; decoupled inputs are the cheapest that hold what they promise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import EXACT, PROMPTS, tiny_model
from llvlit.engine.depth import depth_system
from llvlit.engine.layer import FrozenLayer
from llvlit.errors import FileError, InputError, NumericalError
from llvlit.method.concepts import random_directions
from llvlit.method.control import minimum_energy
from llvlit.method.gains import adjoint_gains, measured_gains
from llvlit.method.several_concepts import GainTensor, combined, gain_tensor
from llvlit.method.steering import steer


@pytest.fixture(scope="module")
def several() -> list[torch.Tensor]:
    return [random_directions(5, 24, seed=seed) for seed in (2, 3, 4)]


def drawn(seed: int, m: int = 3, n_layers: int = 6) -> tuple[GainTensor, np.ndarray, np.ndarray]:
    """A tensor of two prompts, the vectors its overlaps come from, and weights."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((m, n_layers, 8))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    overlaps = np.einsum("ilh,jlh->lij", vectors, vectors)
    tensor = GainTensor(rng.standard_normal((2, m, m, n_layers)), overlaps, "linear", 0.0)
    return tensor, vectors, rng.uniform(0.2, 5, n_layers)


@pytest.mark.parametrize("method", ["measured", "linear"])
def test_each_entry_is_a_gain_of_its_own(gpt2, several, method):
    tensor = gain_tensor(gpt2, PROMPTS, several, method=method, max_tokens=64)
    single = measured_gains if method == "measured" else adjoint_gains
    for j in range(3):
        for i in range(3):
            along = torch.cat([several[i][:-1], several[j][-1:]])
            assert np.allclose(tensor.per_prompt[:, j, i], single(gpt2, PROMPTS, along).per_prompt, atol=EXACT)
    assert tensor.pairs == single(gpt2, PROMPTS, several[0]).pairs and tensor.metadata["model"] == gpt2.name


def test_pushes_are_shared_by_all_outputs(gpt2, several, monkeypatch):
    """Two sets of pushes a layer: the layers see no more candidates than they do for two sets alone."""
    from llvlit.method import gains

    counts = []
    propagate = gains.propagate_beside

    def counted(*args, **options):
        finals = propagate(*args, **options)
        counts.append(finals.shape[1])
        return finals

    monkeypatch.setattr(gains, "propagate_beside", counted)
    measured_gains(gpt2, PROMPTS, several[:2])
    gain_tensor(gpt2, PROMPTS, several[:2])
    assert counts[0] == counts[1]


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_decoupled_inputs_reach_every_target_and_none_is_cheaper(seed):
    tensor, vectors, weights = drawn(seed)
    rng = np.random.default_rng(seed)
    targets = np.array([1.5, 0.0, 0.0]) if seed % 2 else rng.standard_normal(3)
    found = tensor.decoupled(targets, weights=weights)
    assert np.allclose(tensor.shifts(found.inputs), targets, atol=1e-8)
    pushes = np.einsum("il,ilh->lh", found.inputs, vectors)
    assert found.energy == pytest.approx((weights * (pushes**2).sum(axis=1)).sum())
    assert found.energy == pytest.approx(tensor.energy(found.inputs, weights=weights))
    H = tensor.mean.reshape(3, -1)
    other = rng.standard_normal(H.shape[1])
    other -= H.T @ np.linalg.solve(H @ H.T, H @ other)  # moves no output
    rival = found.inputs + other.reshape(3, -1)
    assert tensor.energy(rival, weights=weights) >= found.energy * (1 - 1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_price_is_that_of_the_constraints(seed):
    """A constraint never makes it cheaper; one concept's price is 1 / (1 - R^2), the diagonal of K * inv(K)^T."""
    tensor, _, weights = drawn(seed)
    targets = np.array([0.0, 2.0, 0.0])
    found = tensor.decoupled(targets, weights=weights)
    free = tensor.energy(found.free, weights=weights)
    assert found.price == pytest.approx(found.energy / free) and found.price >= 1 - 1e-12
    assert tensor.shifts(found.free)[1] == pytest.approx(2.0)
    H = tensor.mean.transpose(0, 2, 1).reshape(3, -1)
    metric = np.zeros((18, 18))
    for layer, (block, weight) in enumerate(zip(tensor.overlaps, weights, strict=True)):
        metric[3 * layer : 3 * layer + 3, 3 * layer : 3 * layer + 3] = weight * block
    K = H @ np.linalg.solve(metric, H.T)
    assert found.price == pytest.approx((K * np.linalg.inv(K).T)[1, 1], rel=1e-6)
    assert tensor.decoupled([1.0, 2.0, -1.0]).price == pytest.approx(1)


def test_concepts_that_do_not_meet_need_no_decoupling():
    """Then every concept's inputs are its own minimum-energy ones, and the relative gains are the identity."""
    h = np.random.default_rng(0).standard_normal((2, 5))
    per_prompt = np.zeros((1, 2, 2, 5))
    per_prompt[0, 0, 0], per_prompt[0, 1, 1] = h
    tensor = GainTensor(per_prompt, np.tile(np.eye(2), (5, 1, 1)), "linear", 0.0)
    found = tensor.decoupled([2.0, 0.0])
    assert np.allclose(found.inputs, [minimum_energy(h[0], 2.0), np.zeros(5)], atol=EXACT)
    assert found.price == pytest.approx(1)
    assert np.allclose(tensor.relative_gain_array(), np.eye(2), atol=EXACT)


def test_a_relative_gain_is_the_open_gain_over_the_one_with_all_else_held():
    tensor, _, weights = drawn(7)
    array = tensor.relative_gain_array(weights=weights)
    assert np.allclose(array.sum(axis=0), 1) and np.allclose(array.sum(axis=1), 1)
    own = np.einsum("iil->il", tensor.mean) / weights
    G = np.stack([tensor.shifts(np.eye(3)[:, i : i + 1] * own[i]) for i in range(3)], axis=1)
    for j in range(3):
        held = np.delete(np.arange(3), j)
        for i in range(3):
            others = np.delete(np.arange(3), i)
            correction = np.linalg.solve(G[np.ix_(held, others)], -G[held, i])  # by the other inputs
            assert array[j, i] == pytest.approx(G[j, i] / (G[j, i] + G[j, others] @ correction))


def test_steering_with_both_concepts_inputs_reaches_the_decoupled_target(gpt2, several):
    """To first order: the miss falls with the square of the target."""
    both = several[:2]
    system = depth_system(gpt2, PROMPTS)
    readouts = torch.stack([one[-1] for one in both], dim=1)
    tensor = gain_tensor(gpt2, PROMPTS, both, method="linear")
    misses = []
    for target in (0.02, 0.01):
        inputs = tensor.decoupled([target, 0.0]).inputs
        along, lengths = combined(gpt2, both, inputs)
        pushes = sum(torch.from_numpy(u)[:, None] * one[:-1] for u, one in zip(inputs, both, strict=True))
        assert torch.allclose(torch.from_numpy(lengths)[:, None] * along[:-1], pushes, atol=EXACT)
        finals = system.propagate(system.states[:, :1], inputs=pushes)[:, 0]
        shifts = (finals - system.states[:, -1]) @ readouts
        for number, text in enumerate(PROMPTS.texts):
            kept = []
            handle = gpt2.layers[-1].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0, -1]))
            with torch.no_grad(), steer(gpt2, along, lengths):
                gpt2.module(torch.tensor([gpt2.tokenizer(text)["input_ids"]]))
            handle.remove()
            assert torch.allclose(kept[0], finals[number], rtol=1e-9, atol=1e-9)
        misses.append(np.abs(shifts.mean(dim=0).numpy() - [target, 0.0]).max())
    assert misses[0] < 0.2 * 0.02 and 3 < misses[0] / misses[1] < 5


def test_combined_pushes_that_cancel_are_no_push(gpt2, several):
    inputs = np.ones((2, 4))
    opposite = [several[0], several[1]]
    inputs[:, 2] = 0
    along, lengths = combined(gpt2, opposite, inputs)
    assert lengths[2] == 0 and np.allclose(along.norm(dim=-1), 1)


def test_the_interval_holds_the_mean_and_narrows_for_twins():
    rng = np.random.default_rng(0)
    halves = rng.standard_normal((10, 2, 2, 3))
    tensor = GainTensor(np.concatenate([halves, -halves]), np.tile(np.eye(2), (3, 1, 1)), "linear", 0.0)
    low, high = tensor.interval()
    assert (low <= tensor.mean).all() and (tensor.mean <= high).all() and (low < high).all()
    paired = GainTensor(tensor.per_prompt, tensor.overlaps, "linear", 0.0, tuple(range(10)) * 2)
    assert np.allclose(paired.interval(), 0, atol=EXACT)


def test_a_tensor_comes_back_from_its_file(gpt2, several, tmp_path):
    tensor = gain_tensor(gpt2, PROMPTS, several)
    tensor.save(tmp_path / "tensor.safetensors")
    again = GainTensor.load(tmp_path / "tensor.safetensors")
    assert np.array_equal(again.per_prompt, tensor.per_prompt) and np.array_equal(again.overlaps, tensor.overlaps)
    assert (again.pairs, again.borrowed, again.amplitude) == (tensor.pairs, tensor.borrowed, 0.1)
    measured_gains(gpt2, PROMPTS, several[0]).save(tmp_path / "gains.safetensors")
    with pytest.raises(FileError, match="gain tensor"):
        GainTensor.load(tmp_path / "gains.safetensors")


def test_a_linear_tensor_takes_one_adjoint_an_output(gpt2, several, monkeypatch):
    taken, vjp = [], FrozenLayer.vjp
    monkeypatch.setattr(FrozenLayer, "vjp", lambda self, w: taken.append(w.shape[1]) or vjp(self, w))
    gain_tensor(gpt2, PROMPTS, several, method="linear")
    assert taken == [3] * 4


def test_routes_of_every_concept_are_told_once():
    """The second concept changes other routes than the first; a warning names the worst of all."""
    model = tiny_model("mixtral", num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model.module.config._experts_implementation = "eager"
    sets = [random_directions(5, 24, seed=seed) for seed in (0, 5)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tensor = gain_tensor(model, PROMPTS, sets, amplitude=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [measured_gains(model, PROMPTS, each, amplitude=0.3).metadata for each in sets]
    assert tensor.metadata["rerouted"] == [each["rerouted"] for each in alone]
    assert alone[0]["rerouted"] != alone[1]["rerouted"]
    assert tensor.metadata["suggested_amplitude"] == min(each["suggested_amplitude"] for each in alone)
    (only,) = told
    assert f"sends {np.max(tensor.metadata['rerouted']):.0%} of the prompts" in str(only.message)
    assert f"amplitude={tensor.metadata['suggested_amplitude']:g}," in str(only.message)


def test_bad_input_is_refused_by_name(gpt2, several):
    tensor, _, _ = drawn(0)
    parallel = several[1].clone()
    parallel[3] = -several[0][3] + 1e-8
    parallel[3] /= parallel[3].norm()
    alike = np.repeat(tensor.per_prompt[:, :1], 3, axis=1)
    still = tensor.per_prompt.copy()
    still[:, 1] = 0
    for error, named, call in (
        (InputError, r"directions\[0\] and directions\[2\] are parallel at state 3",
         lambda: gain_tensor(gpt2, PROMPTS, [several[0], several[1], parallel])),
        (InputError, "1 set", lambda: gain_tensor(gpt2, PROMPTS, several[:1])),
        (InputError, "list of sets", lambda: gain_tensor(gpt2, PROMPTS, 3)),
        (InputError, "directions have shape", lambda: gain_tensor(gpt2, PROMPTS, [several[0], np.eye(5)])),
        (InputError, "method", lambda: gain_tensor(gpt2, PROMPTS, several, method="guess")),
        (InputError, "single concept", lambda: GainTensor(np.ones((2, 1, 1, 4)), np.ones((4, 1, 1)), "linear", 0.0)),
        (InputError, "cosines", lambda: GainTensor(tensor.per_prompt, 2 * tensor.overlaps, "linear", 0.0)),
        (InputError, "targets", lambda: tensor.decoupled([1.0, 0.0])),
        (InputError, "all zero", lambda: tensor.decoupled([0.0, 0.0, 0.0])),
        (InputError, "weights", lambda: tensor.decoupled([1.0, 0, 0], weights=np.zeros(6))),
        (NumericalError, "move together",
         lambda: GainTensor(alike, tensor.overlaps, "linear", 0.0).decoupled([1.0, 0, 0])),
        (NumericalError, "move together",
         lambda: GainTensor(alike, tensor.overlaps, "linear", 0.0).relative_gain_array()),
        (NumericalError, "output 1", lambda: GainTensor(still, tensor.overlaps, "linear", 0.0).decoupled([1.0, 0, 0])),
        (NumericalError, "concept 1", lambda: GainTensor(still, tensor.overlaps, "linear", 0.0).relative_gain_array()),
        (InputError, "amplitude", lambda: gain_tensor(gpt2, PROMPTS, several, method="linear", amplitude=0)),
        (NumericalError, "inputs", lambda: tensor.energy(np.full((3, 6), 1e200))),
        (NumericalError, "inputs", lambda: combined(gpt2, several, np.full((3, 4), 1e308))),
        (InputError, "inputs", lambda: combined(gpt2, several, np.ones((2, 4)))),
    ):  # fmt: skip
        with pytest.raises(error, match=named):
            call()
