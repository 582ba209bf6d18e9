"""The surrogate is the projected mean chain; gains agree with their oracles, in value and in order."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from conftest import EXACT, PROMPTS, affine_model, tiny_model
from llvlit.engine.depth import depth_system, last_token_states
from llvlit.engine.models import load_model
from llvlit.engine.tokens import tokenize
from llvlit.errors import FileError, InputError
from llvlit.files import load_tensors, save_tensors
from llvlit.method.agreement import agreement
from llvlit.method.bases import BASES
from llvlit.method.concepts import Directions, concept_directions, random_directions
from llvlit.method.feedback import closed_loop, lqr
from llvlit.method.gain_matrix import gain_matrix
from llvlit.method.gains import Gains, adjoint_gains, measured_gains
from llvlit.method.hankel import balance
from llvlit.method.identification import JACOBIANS, Plan, identify, identify_all
from llvlit.method.optimum import true_optimum
from llvlit.method.several_concepts import gain_tensor
from llvlit.method.skipping import concept_effects, logit_effects
from llvlit.method.surrogate import LLV
from llvlit.method.trust import trust_radius
from llvlit.method.verification import required_energy
from llvlit.prompts import Prompts
from llvlit.tasks.task import load_task

FLOAT32 = 2e-6
"""Single prompts' operators are stored in float32."""


@pytest.fixture(scope="module")
def directions():
    return random_directions(5, 24, seed=2)


@pytest.fixture(scope="module")
def jacobians(gpt2):
    """(n_prompts, n_layers, H, H)"""
    system = depth_system(gpt2, PROMPTS)
    return torch.stack([system.jacobian(layer) for layer in range(4)], dim=1)


def chain_gains(matrices: torch.Tensor, directions: torch.Tensor) -> np.ndarray:
    """Oracle: c^T A_{L-1} ... A_l v_l, each product formed on its own."""
    gains = []
    for layer in range(len(matrices)):
        vector = directions[layer]
        for matrix in matrices[layer:]:
            vector = matrix @ vector
        gains.append(float(directions[-1] @ vector))
    return np.array(gains)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("order", [1, 3, 7])
def test_operators_are_the_projected_mean_jacobians(gpt2, directions, jacobians, basis, order):
    llv = identify(gpt2, PROMPTS, directions, order=order, basis=basis)
    mean = jacobians.mean(0).numpy()
    for layer in range(4):
        P, P_next = llv.bases[layer], llv.left_bases[layer + 1]
        assert np.allclose(llv.A[layer], P_next.T @ mean[layer] @ P, atol=EXACT)
        assert np.allclose(llv.B[layer], P_next.T @ mean[layer] @ directions[layer].numpy(), atol=EXACT)
        for number in range(len(PROMPTS)):
            own = P_next.T @ jacobians[number, layer].numpy() @ P
            assert np.allclose(llv.per_prompt[number, layer], own, atol=FLOAT32 * np.abs(own).max())
    assert np.allclose(llv.C, llv.bases[-1].T @ directions[-1].numpy(), atol=EXACT)


@pytest.mark.parametrize("basis", ("krylov", "krylov-shifted", "reachability", "random"))  # pca: few columns
def test_full_order_is_the_full_chain(gpt2, directions, jacobians, basis):
    llv = identify(gpt2, PROMPTS, directions, order=24, basis=basis)
    assert np.allclose(llv.gains(), chain_gains(jacobians.mean(0), directions), rtol=1e-9)
    if basis == "reachability":  # spans what the mean chain reaches, and one prompt's chain leaves it
        return
    each = np.stack([chain_gains(one, directions) for one in jacobians])
    assert np.allclose(llv.per_prompt_gains(), each, rtol=1e-4, atol=1e-5)  # float32 storage, four products


def test_reachability_is_exact_on_the_mean_chain_once_the_order_exceeds_the_horizon(gpt2, directions, jacobians):
    expected = chain_gains(jacobians.mean(0), directions)
    assert np.allclose(identify(gpt2, PROMPTS, directions, order=5, basis="reachability").gains(), expected, rtol=1e-9)
    short = identify(gpt2, PROMPTS, directions, order=2, basis="reachability").gains()
    krylov = identify(gpt2, PROMPTS, directions, order=5, basis="krylov").gains()
    assert not np.allclose(short, expected, rtol=1e-3)
    assert not np.allclose(krylov, expected, rtol=1e-3)


def test_krylov_holds_the_powers_of_the_mean_jacobian(gpt2, directions, jacobians):
    llv = identify(gpt2, PROMPTS, directions, order=4, basis="krylov")
    mean = jacobians.mean(0)[1]
    power = directions[1]
    P = torch.from_numpy(llv.bases[1])
    for _ in range(4):
        assert (power - P @ (P.T @ power)).norm() < 1e-9 * power.norm()
        power = mean @ power


def test_krylov_shifted_holds_the_powers_on_what_the_push_before_has_become(gpt2, directions, jacobians):
    """P_{l+1} = [v_{l+1}, K(J_{l+1}, J_l v_l)]; before layer 0 no push has come yet, and it is krylov's."""
    llv = identify(gpt2, PROMPTS, directions, order=5, basis="krylov-shifted")
    krylov = identify(gpt2, PROMPTS, directions, order=5, basis="krylov")
    assert np.allclose(llv.bases[0], krylov.bases[0], atol=1e-10)
    mean = jacobians.mean(0).numpy()
    for state in (1, 2, 3):
        vector, P = mean[state - 1] @ directions[state - 1].numpy(), llv.bases[state]
        assert np.allclose(P.T @ P, np.eye(5), atol=EXACT)
        assert np.allclose(P[:, 0], directions[state])
        for n_columns in range(2, 6):  # nested: w lies in the first two, J w in the first three
            rest = vector - P[:, :n_columns] @ (P[:, :n_columns].T @ vector)
            assert np.linalg.norm(rest) < 1e-9 * np.linalg.norm(vector)
            vector = mean[state] @ vector


def mean_chain_matrix(mean, inputs, outputs):
    """Oracle: v_k^T J_{k-1} ... J_l v_l, each product formed on its own."""
    matrix = np.zeros((len(mean), len(mean) + 1))
    for layer in range(len(mean)):
        vector = inputs[layer]
        for state in range(layer + 1, len(mean) + 1):
            vector = mean[state - 1] @ vector
            matrix[layer, state] = outputs[state] @ vector
    return matrix


@pytest.fixture(scope="module")
def deep():
    """A model of seven layers, directions, its Jacobians ``(n_prompts, n_layers, H, H)``."""
    model, vectors = tiny_model("gpt2", num_hidden_layers=7), random_directions(8, 24, seed=2)
    system = depth_system(model, PROMPTS)
    return model, vectors, torch.stack([system.jacobian(layer) for layer in range(7)], dim=1).numpy()


@pytest.mark.parametrize("has_output", [False, True])
def test_the_balanced_reduction_is_the_balanced_realization_of_the_mean_chain(deep, has_output):
    model, vectors, jacobians = deep
    output = 3 * random_directions(1, 24, seed=5)[0] if has_output else None
    outputs = vectors.numpy().copy()
    outputs[-1] = output if has_output else outputs[-1]
    mean = jacobians.mean(0)
    expected = balance(mean_chain_matrix(mean, vectors.numpy(), outputs))
    llv = identify(model, PROMPTS, vectors, order=6, basis="balanced", output=output)  # of which four are needed
    assert llv.orders.tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    for order in (1, 2, 3, 4):
        cut = llv.truncate(order)
        assert np.allclose(cut.A, expected.A[:, :order, :order], atol=1e-10)
        assert np.allclose(cut.matrix(), expected.matrix(order), atol=1e-10)
        assert np.allclose(cut.C, cut.bases[-1].T @ outputs[-1], atol=1e-10)
    for state in range(8):
        kept = np.diag(np.arange(6) < llv.orders[state])
        assert np.allclose(llv.left_bases[state].T @ llv.bases[state], kept, atol=1e-10)  # an oblique projection
        assert np.allclose(llv.outputs[state] * (state > 0), llv.bases[state].T @ outputs[state], atol=1e-10)
    assert np.allclose(llv.matrix(), mean_chain_matrix(mean, vectors.numpy(), outputs), atol=1e-10)


def test_both_gramians_of_the_mean_chain_become_the_hankel_singular_values(deep):
    model, vectors, jacobians = deep
    llv, mean, v = identify(model, PROMPTS, vectors, order=4, basis="balanced"), jacobians.mean(0), vectors.numpy()
    values = balance(mean_chain_matrix(mean, v, v)).singular_values
    reached, seen = np.zeros((24, 0)), np.outer(v[7], v[7])
    for layer in range(7):
        reached = mean[layer] @ np.column_stack([reached, v[layer]])
        in_left = llv.left_bases[layer + 1].T @ reached
        assert np.allclose(in_left @ in_left.T, np.diag(values[layer + 1]), atol=1e-9)
    for layer in reversed(range(1, 7)):
        seen = mean[layer].T @ seen @ mean[layer] + np.outer(v[layer], v[layer])
        assert np.allclose(llv.bases[layer].T @ seen @ llv.bases[layer], np.diag(values[layer]), atol=1e-9)


def test_a_balanced_surrogate_survives_saving(deep, tmp_path):
    model, vectors, _ = deep
    llv = identify(model, PROMPTS, vectors, order=4, basis="balanced")
    llv.save(tmp_path / "llv.safetensors")
    again = LLV.load(tmp_path / "llv.safetensors")
    for name in ("A", "B", "outputs", "bases", "left_bases", "per_prompt", "per_prompt_inputs"):
        assert np.array_equal(getattr(again, name), getattr(llv, name))
    assert not np.allclose(llv.left_bases, llv.bases)
    one_sided = identify(model, PROMPTS, vectors, order=4)
    assert np.array_equal(one_sided.left_bases, one_sided.bases)


def test_adjoint_gains_are_the_chain_of_each_prompts_jacobians(gpt2, directions, jacobians):
    expected = np.stack([chain_gains(one, directions) for one in jacobians])
    assert np.allclose(
        adjoint_gains(gpt2, PROMPTS, directions).per_prompt, expected, atol=1e-10 * np.abs(expected).max()
    )


def test_adjoint_gains_of_several_directions_are_those_of_each(gpt2, directions):
    several = [directions, random_directions(5, 24, seed=8)]
    for vectors, together in zip(several, adjoint_gains(gpt2, PROMPTS, several), strict=True):
        alone = adjoint_gains(gpt2, PROMPTS, vectors).per_prompt
        assert np.allclose(together.per_prompt, alone, atol=EXACT * np.abs(alone).max())
    with pytest.raises(InputError, match="directions is empty"):
        adjoint_gains(gpt2, PROMPTS, [])


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_one_sweep_gives_what_single_identifications_give(gpt2, directions, jacobian):
    """Many plans make the sweep form Jacobians (order 4 x 9 > 24); one plan goes through the layer."""
    others = random_directions(5, 24, seed=8)
    plans = {
        (basis, seed): Plan(vectors, basis, 4) for basis in BASES for seed, vectors in ((2, directions), (8, others))
    }
    found = identify_all(gpt2, PROMPTS, plans, jacobian=jacobian)
    for (basis, _), plan in ((key, plans[key]) for key in plans):
        alone = identify(gpt2, PROMPTS, plan.directions, order=4, basis=basis, jacobian=jacobian)
        together = found.surrogates[basis, _]
        size = np.abs(alone.A).max()
        # central differences along other columns round differently; their own error is about 1e-5
        assert np.allclose(together.A, alone.A, atol=size * (1e-9 if jacobian == "jvp" else 1e-3))
        assert together.metadata == alone.metadata
    assert torch.equal(found.states, last_token_states(gpt2, PROMPTS))


@pytest.mark.parametrize("bases", [BASES, ("krylov",)], ids=["dense", "products"])
def test_full_order_products_forward_are_the_adjoint_gains(gpt2, directions, bases):
    found = identify_all(gpt2, PROMPTS, {basis: Plan(directions, basis, 8) for basis in bases})
    expected = adjoint_gains(gpt2, PROMPTS, directions).per_prompt
    for gains in found.linear.values():
        assert np.allclose(gains.per_prompt, expected, atol=1e-10 * np.abs(expected).max())


def test_the_linear_gains_read_out_what_the_plan_says(gpt2, directions, jacobians):
    output = random_directions(1, 24, seed=5)[0]
    found = identify_all(
        gpt2, PROMPTS, {"own": Plan(directions, "random", 24, output), "v": Plan(directions, "random", 24)}
    )
    vectors = torch.cat([directions[:-1], output[None]])
    expected = np.stack([chain_gains(one, vectors) for one in jacobians])
    assert np.allclose(found.linear["own"].per_prompt, expected, atol=1e-10 * np.abs(expected).max())
    assert not np.allclose(found.linear["v"].per_prompt, expected, rtol=1e-3)


@pytest.mark.parametrize("basis", ("krylov", "krylov-shifted", "reachability", "pca", "balanced"))
def test_a_truncated_surrogate_is_the_one_of_smaller_order(gpt2, directions, basis):
    cut = identify(gpt2, PROMPTS, directions, order=5, basis=basis).truncate(3)
    alone = identify(gpt2, PROMPTS, directions, order=3, basis=basis)
    assert np.allclose(cut.A, alone.A, atol=1e-10) and np.allclose(cut.gains(), alone.gains(), atol=1e-10)
    assert cut.order == 3 and cut.metadata == alone.metadata and (cut.orders == alone.orders).all()
    for order in (0, 6):
        with pytest.raises(InputError, match="order"):
            identify(gpt2, PROMPTS, directions, order=5).truncate(order)


def test_pushes_measured_together_are_those_measured_alone(gpt2, directions):
    others = random_directions(5, 24, seed=8)
    read_out_else = torch.cat([directions[:-1], others[-1:]])
    sets = [(directions, 0.1), (directions, 1.0), (others, 0.5), (read_out_else, 1.0)]
    together = measured_gains(gpt2, PROMPTS, [one for one, _ in sets], amplitude=[size for _, size in sets])
    for gains, (vectors, amplitude) in zip(together, sets, strict=True):
        alone = measured_gains(gpt2, PROMPTS, vectors, amplitude=amplitude)
        assert np.allclose(gains.per_prompt, alone.per_prompt, rtol=1e-9) and gains.amplitude == amplitude
    with pytest.raises(InputError, match="directions is empty"):
        measured_gains(gpt2, PROMPTS, [])
    with pytest.raises(InputError, match="3 sets of directions came with 2 amplitudes"):
        measured_gains(gpt2, PROMPTS, [directions] * 3, amplitude=[0.1, 0.2])


def test_measured_gains_tend_to_adjoint_gains_with_second_order(gpt2, directions):
    exact = adjoint_gains(gpt2, PROMPTS, directions).per_prompt
    amplitudes = np.array([4e-2, 2e-2, 1e-2])
    errors = [
        np.linalg.norm(measured_gains(gpt2, PROMPTS, directions, amplitude=a).per_prompt - exact) for a in amplitudes
    ]
    assert abs(np.polyfit(np.log(amplitudes), np.log(errors), 1)[0] - 2) < 0.1


def test_measured_gains_equal_brute_force_with_hooks(gpt2, directions):
    gains = measured_gains(gpt2, PROMPTS, directions, amplitude=0.1)
    for number, text in enumerate(PROMPTS.texts):
        tokens = torch.tensor([gpt2.tokenizer(text)["input_ids"]])
        for layer in range(4):
            outputs = []
            for sign in (1, -1):

                def push(_module, args, layer=layer, sign=sign):
                    hidden = args[0].clone()
                    hidden[:, -1] += sign * 0.1 * directions[layer]
                    return (hidden, *args[1:])

                kept = []
                handles = [
                    gpt2.layers[layer].register_forward_pre_hook(push),
                    gpt2.layers[-1].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0, -1])),
                ]
                with torch.no_grad():
                    gpt2.module(tokens)
                for handle in handles:
                    handle.remove()
                outputs.append(float(kept[0] @ directions[-1]))
            assert gains.per_prompt[number, layer] == pytest.approx((outputs[0] - outputs[1]) / 0.2, rel=1e-9)


def test_an_affine_network_is_reproduced_exactly():
    """Layer norms of weight zero leave constants: every layer is x + b, its Jacobian the identity."""
    model = affine_model()
    vectors = random_directions(5, 24, seed=3)
    expected = (vectors[:-1] @ vectors[-1]).numpy()
    system = depth_system(model, PROMPTS)
    assert torch.allclose(system.jacobian(2), torch.eye(24, dtype=torch.float64).expand(6, -1, -1), atol=EXACT)
    for gains in (
        adjoint_gains(model, PROMPTS, vectors).per_prompt,
        measured_gains(model, PROMPTS, vectors, amplitude=3.0).per_prompt,
    ):
        assert np.allclose(gains, expected, atol=1e-11)  # outputs of size 30, divided by twice the amplitude
    krylov = identify(model, PROMPTS, vectors, order=4, basis="krylov")
    assert krylov.orders[:4].tolist() == [1, 1, 1, 1]  # A v = v: the Krylov space is a line


def test_simulation_superposes_the_markov_parameters(gpt2, directions, generator):
    llv = identify(gpt2, PROMPTS, directions, order=3, basis="reachability")
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64).numpy()
    trajectory = llv.simulate(inputs)
    assert np.allclose(trajectory.output, inputs @ llv.gains(), atol=EXACT)
    state = np.zeros(3)
    for layer in range(4):
        state = llv.A[layer] @ state + llv.B[layer] * inputs[2, layer]
        assert np.allclose(trajectory.states[2, layer + 1], state, atol=EXACT)


def test_central_differences_give_nearly_the_same_surrogate(gpt2, directions):
    exact = identify(gpt2, PROMPTS, directions, order=4, basis="reachability")
    central = identify(gpt2, PROMPTS, directions, order=4, basis="reachability", jacobian="central")
    assert np.allclose(exact.gains(), central.gains(), rtol=1e-3)
    assert not np.array_equal(exact.gains(), central.gains())


def test_agreement_is_scipys_and_sees_a_wrong_scale(generator):
    measured = Gains(np.random.default_rng(0).normal(size=(40, 8)) + np.arange(8), "measured", 0.1)
    predicted = 2 * measured.mean
    result = agreement(predicted, measured)
    assert result.spearman == pytest.approx(spearmanr(predicted, measured.mean).statistic)
    assert result.pearson == pytest.approx(pearsonr(predicted, measured.mean).statistic)
    assert result.relative_error == pytest.approx(1)
    for name, value in result.row().items():
        low, high = result.intervals[name]
        assert low <= value + 1e-9 and low <= high
    assert np.isnan(agreement(np.ones(8), measured).pearson)
    low, high = measured.interval()
    assert (low < measured.mean).all() and (measured.mean < high).all()


def test_operators_per_prompt_give_the_mean_of_the_prompts_own_responses(gpt2, directions, tmp_path):
    llv = identify(gpt2, PROMPTS, directions, order=3, operators="per prompt")
    mean = identify(gpt2, PROMPTS, directions, order=3)
    assert np.array_equal(llv.per_prompt, mean.per_prompt) and not np.allclose(llv.gains(), mean.gains(), rtol=1e-6)
    assert np.allclose(llv.gains(), mean.per_prompt_gains().mean(axis=0))
    found = llv.simulate(np.eye(4))
    assert np.allclose(found.output, llv.gains(), rtol=1e-6) and found.states.shape == (4, 5, 3)
    llv.save(tmp_path / "llv.safetensors")
    assert np.allclose(LLV.load(tmp_path / "llv.safetensors").gains(), llv.gains(), rtol=1e-12)  # other strides


def test_results_survive_saving_and_broken_files_do_not_load(gpt2, directions, tmp_path):
    llv = identify(gpt2, PROMPTS, directions, order=3)
    llv.save(tmp_path / "llv.safetensors")
    again = LLV.load(tmp_path / "llv.safetensors")
    assert np.array_equal(llv.A, again.A) and np.array_equal(llv.per_prompt, again.per_prompt)
    assert llv.metadata.items() <= again.metadata.items() and again.metadata["commit"]
    assert again.metadata["model_fingerprint"] == gpt2.fingerprint
    gains = adjoint_gains(gpt2, PROMPTS, directions)
    gains.save(tmp_path / "gains.safetensors")
    assert np.array_equal(Gains.load(tmp_path / "gains.safetensors").per_prompt, gains.per_prompt)
    with pytest.raises(FileError, match="gains"):
        LLV.load(tmp_path / "gains.safetensors")
    whole = (tmp_path / "llv.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="whole"):
        LLV.load(tmp_path / "cut.safetensors")
    (tmp_path / "old.safetensors").write_bytes(whole.replace(b'\\"format\\": 2', b'\\"format\\": 7'))
    with pytest.raises(FileError, match="format 7"):
        LLV.load(tmp_path / "old.safetensors")
    with pytest.raises(FileError, match="no file"):
        LLV.load(tmp_path / "absent.safetensors")


def test_a_failed_save_keeps_the_old_file(gpt2, directions, tmp_path, monkeypatch):
    path = tmp_path / "gains.safetensors"
    gains = adjoint_gains(gpt2, PROMPTS, directions)
    gains.save(path)
    before = path.read_bytes()

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(FileError, match="No space"):
        gains.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"order": 0}, "order=0"),
        ({"order": 25}, "order=25"),
        ({"basis": "krilov"}, "'krylov'"),
        ({"jacobian": "jpv"}, "'jvp'"),
        ({"output": np.zeros(24)}, "output"),
    ],
)
def test_bad_settings_of_identify_are_named(gpt2, directions, options, named):
    with pytest.raises(InputError, match=r"model=.*expected a model"):
        identify({}, PROMPTS, directions)
    with pytest.raises(InputError, match=named):
        identify(gpt2, PROMPTS, directions, **{"order": 3, **options})


@pytest.mark.parametrize("amplitude", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_amplitudes_are_errors(gpt2, directions, amplitude):
    with pytest.raises(InputError, match="amplitude"):
        measured_gains(gpt2, PROMPTS, directions, amplitude=amplitude)


def test_gains_do_not_depend_on_the_batch(gpt2, directions):
    together = measured_gains(gpt2, PROMPTS, directions)
    alone = measured_gains(gpt2, Prompts(PROMPTS.texts[2:3], (1,)), directions)
    assert np.allclose(together.per_prompt[2], alone.per_prompt[0], rtol=1e-9)


@pytest.fixture(scope="module")
def gpt2_float32():
    return tiny_model("gpt2", dtype=torch.float32)


@pytest.mark.parametrize("amplitude", [1e-8, 1e-6])
def test_an_amplitude_below_rounding_is_refused_and_the_smallest_usable_said(gpt2_float32, gpt2, directions, amplitude):
    """In float32 its gains would be off a hundredfold."""
    with pytest.raises(InputError, match=r"amplitude=.* drowns in rounding.* smallest usable is") as refusal:
        measured_gains(gpt2_float32, PROMPTS, directions, amplitude=amplitude)
    smallest = float(re.search(r"usable is (.*)[.] Take", str(refusal.value))[1])
    gains = measured_gains(gpt2_float32, PROMPTS, directions, amplitude=smallest)
    exact = adjoint_gains(gpt2_float32, PROMPTS, directions)  # no difference is taken there
    assert agreement(gains, exact).relative_error < 0.05
    assert measured_gains(gpt2, PROMPTS, directions, amplitude=amplitude).amplitude == amplitude  # in float64


class Products(TorchDispatchMode):
    """How many matrix products run inside."""

    def __enter__(self):
        self.total = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += function._overloadpacket in flop_registry
        return function(*args, **(kwargs or {}))


def test_an_amplitude_below_rounding_is_refused_after_the_first_batch(gpt2_float32, directions):
    """A large model would be run on all prompts in vain."""
    prompts = Prompts(["a film that was as good as a long day of rain, truly lovely"] * 1200, [0, 1] * 600)  # 5 batches
    measured_gains(gpt2_float32, prompts, directions)  # whose replay is checked once
    with Products() as whole:
        measured_gains(gpt2_float32, prompts, directions)
    with Products() as refused, pytest.raises(InputError, match="drowns in rounding"):
        measured_gains(gpt2_float32, prompts, directions, amplitude=1e-8)
    assert 0 < refused.total < 0.3 * whole.total


@pytest.mark.parametrize("task", ["film-sentiment", "tense"])
def test_gains_at_the_smallest_amplitude_are_as_well_resolved_as_said(task):
    """What `measured_gains` says of single prompts and of means, in its documentation."""
    model = load_model("embedded/small", device="cpu")
    splits = load_task(task).split(concept=100, operating=2, evaluation=50)
    directions = concept_directions(model, splits.concept)
    exact = adjoint_gains(model, splits.evaluation, directions).per_prompt
    with pytest.raises(InputError, match="drowns in rounding") as refusal:
        measured_gains(model, splits.evaluation, directions, amplitude=1e-9)
    smallest = float(re.search(r"usable is (.*)[.] Take", str(refusal.value))[1])
    at_smallest, larger = (
        gains.per_prompt - exact
        for gains in measured_gains(model, splits.evaluation, [directions] * 2, amplitude=[smallest, 32 * smallest])
    )
    assert 0.01 < np.sqrt((at_smallest**2).mean()) < 0.07 and np.abs(at_smallest).max() < 0.3
    assert np.abs(at_smallest.mean(axis=0)).max() < 0.03
    assert np.abs(larger).max() < 0.01 and np.abs(larger.mean(axis=0)).max() < 0.001


def with_borrowed(vectors, borrowed):
    chosen = np.isin(np.arange(len(vectors)), borrowed)
    return Directions(vectors, np.ones(len(vectors)), np.zeros(len(vectors)), chosen, "mean_difference")


def test_results_name_the_borrowed_directions_they_used(gpt2, directions, tmp_path):
    some = with_borrowed(directions, [0, 2])
    measured, linear = measured_gains(gpt2, PROMPTS, some), adjoint_gains(gpt2, PROMPTS, some)
    surrogate = identify(gpt2, PROMPTS, some, order=3)
    for result in (measured, linear, surrogate, agreement(surrogate.gains(), measured), agreement(linear, np.ones(4))):
        assert result.borrowed == (0, 2) and str(result).endswith("; borrowed directions: 0, 2")
    assert measured.select(slice(1, None)).borrowed == (1,)  # counted within the layers that are left
    own = measured_gains(gpt2, PROMPTS, directions)
    assert own.borrowed == () and "borrowed" not in str(own)
    for result in (measured, surrogate):
        result.save(tmp_path / "result.safetensors")
        again = type(result).load(tmp_path / "result.safetensors")
        assert again.borrowed == (0, 2)
    linear.save(tmp_path / "result.safetensors")
    assert Gains.load(tmp_path / "result.safetensors").pairs == linear.pairs == tuple(range(6))


def test_every_result_says_what_it_is_about_and_which_directions_it_borrowed(gpt2, directions):
    some, other = with_borrowed(directions, [0, 2]), with_borrowed(random_directions(5, 24, seed=8), [1])
    system, shape = depth_system(gpt2, PROMPTS), np.array([1.0, 0.5, 0.0, 0.2])  # layer 2 is not pushed
    tensor = gain_tensor(gpt2, PROMPTS, [some, other], method="linear")
    law = lqr(identify(gpt2, PROMPTS.select([0, 1]), some, order=3), 0.01)
    loop = closed_loop(system, law, some)
    effects = concept_effects(gpt2, PROMPTS, some), logit_effects(gpt2, PROMPTS)
    found = {
        "0": [
            trust_radius(gpt2, PROMPTS, some, shape, coverage=0.5),
            required_energy(gpt2, PROMPTS, some, shape, 0.01),
        ],
        "0, 2": [true_optimum(system, some, 0.01), loop, effects[0], gain_matrix(gpt2, PROMPTS, some)],
        "0, 2 of concept 0; 1 of concept 1": [tensor, tensor.decoupled([0.01, 0.0])],
        "": [effects[1]],
    }
    expected = measured_gains(gpt2, PROMPTS, some).metadata
    for borrowed, results in found.items():
        for result in results:
            assert str(result).endswith(f"; borrowed directions: {borrowed}" if borrowed else "6 prompts"), result
            assert expected.items() <= result.metadata.items(), result
    assert loop.metadata["surrogate"]["n_prompts"] == 2  # other prompts than those that the law ran on


def broken(arrays):
    """Every array with a number that is none, with an axis less, and left out."""
    for name, values in arrays.items():
        spoilt = values.clone()
        if spoilt.is_floating_point():
            spoilt.view(-1)[0] = torch.nan
            yield arrays | {name: spoilt}
        yield arrays | {name: values[0]}
        yield {key: value for key, value in arrays.items() if key != name}


def test_a_file_that_holds_no_whole_result_is_an_error_of_the_file(gpt2, directions, tmp_path):
    """Also where the checksum is right, as in a file that another program wrote."""
    path, spoilt = tmp_path / "result.safetensors", tmp_path / "spoilt.safetensors"
    results = {"llv": identify(gpt2, PROMPTS, directions, order=3), "gains": adjoint_gains(gpt2, PROMPTS, directions)}
    for kind, result in results.items():
        result.save(path)
        arrays, header = load_tensors(path, kind=kind)
        headers = [{key: value for key, value in header.items() if key != name} for name in ("metadata", "borrowed")]
        headers += [{**header, "metadata": 3}, {**header, "borrowed": "ab"}, {**header, "borrowed": [99]}]
        cases = [(one, header) for one in broken(arrays)] + [(arrays, one) for one in headers]
        for content, words in cases:
            save_tensors(spoilt, content, words)
            with pytest.raises(FileError):
                type(result).load(spoilt)


def test_no_flipped_bit_goes_unseen(gpt2, directions, tmp_path):
    path = tmp_path / "gains.safetensors"
    adjoint_gains(gpt2, PROMPTS, directions).save(path)
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for bit in draw.integers(8 * len(whole), size=400).tolist():
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(FileError):
            Gains.load(path)


def test_results_that_are_not_whole_cannot_be_made(gpt2, directions):
    gains, surrogate = adjoint_gains(gpt2, PROMPTS, directions), identify(gpt2, PROMPTS, directions, order=3)
    for named, make in {
        "per_prompt": lambda: replace(gains, per_prompt=np.full((2, 4), np.nan)),
        "pairs": lambda: replace(gains, pairs=(0, 1)),
        "borrowed": lambda: replace(gains, borrowed=(4,)),
        "kind": lambda: replace(gains, kind="guessed"),
        "amplitude": lambda: replace(gains, amplitude=-1.0),
        "A has": lambda: replace(surrogate, A=surrogate.A[:, :2]),
        "C has": lambda: replace(surrogate, C=surrogate.C[:2]),
        "bases": lambda: replace(surrogate, bases=surrogate.bases[1:]),
        "orders": lambda: replace(surrogate, orders=surrogate.orders + 9),
        "length 2": lambda: with_borrowed(2 * directions, []),
        "gaps": lambda: Directions(directions, np.ones(4), np.zeros(5), np.zeros(5, dtype=bool), "given"),
    }.items():
        with pytest.raises(InputError, match=named):
            make()


def test_directions_that_are_not_of_unit_length_would_scale_gains_and_are_refused(gpt2, directions):
    with pytest.raises(InputError, match=r"vectors\[0\] of the directions has length 2"):
        identify(gpt2, PROMPTS, 2 * directions)


def test_tokens_stand_in_for_prompts(gpt2, directions):
    tokens = tokenize(gpt2, PROMPTS)
    shape = np.ones(4)
    for function in (
        measured_gains,
        adjoint_gains,
        lambda *arguments: identify(*arguments, order=3),
        lambda *arguments: required_energy(*arguments, shape, 0.5),
    ):
        for name, value in vars(function(gpt2, PROMPTS, directions)).items():
            again = getattr(function(gpt2, tokens, directions), name)
            assert np.array_equal(value, again) if isinstance(value, np.ndarray) else value == again
    assert torch.equal(concept_directions(gpt2, tokens).vectors, concept_directions(gpt2, PROMPTS).vectors)
