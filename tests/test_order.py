"""The gain matrix is the full model's; its order and its realization are exact on systems of known order."""

from __future__ import annotations

import control
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import llvlit
from conftest import EXACT, PROMPTS, affine_model, tiny_model
from llvlit.engine.depth import depth_system
from llvlit.engine.models import load_model
from llvlit.errors import FileError, InputError, NumericalError
from llvlit.method.concepts import random_directions
from llvlit.method.gain_matrix import GainMatrix, gain_matrix, noise_floor, realize
from llvlit.method.gains import adjoint_gains, measured_gains
from llvlit.method.hankel import gains_between
from llvlit.method.identification import identify
from llvlit.method.rivals import dynamic_modes, identity_matrix
from llvlit.tasks.task import load_task


@pytest.fixture(scope="module")
def directions() -> torch.Tensor:
    return random_directions(5, 24, seed=2)


def random_system(rng: np.random.Generator, n_layers: int, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        rng.standard_normal((n_layers, order, order)) / np.sqrt(order),
        rng.standard_normal((n_layers, order)),
        rng.standard_normal((n_layers + 1, order)),
    )


def of(matrix: np.ndarray) -> GainMatrix:
    return GainMatrix(matrix[None], "linear", 0.0)


def test_the_linear_matrix_is_the_chain_of_jacobians(gpt2, directions):
    system = depth_system(gpt2, PROMPTS)
    found = gain_matrix(gpt2, PROMPTS, directions, method="linear").per_prompt
    for layer in range(4):
        vector = directions[layer].expand(len(PROMPTS), -1)
        for state in range(layer + 1, 5):
            vector = torch.einsum("nij,nj->ni", system.jacobian(state - 1), vector)
            assert np.allclose(found[:, layer, state], vector @ directions[state], rtol=1e-10, atol=1e-10)
    assert not np.tril(found).any()


def test_the_measured_matrix_is_what_hooks_on_the_full_model_find(gpt2, directions):
    amplitude = 0.05
    found = gain_matrix(gpt2, PROMPTS, directions, amplitude=amplitude).per_prompt
    for layer in range(4):
        outputs = []
        for sign in (1, -1):
            inputs = np.zeros(4)
            inputs[layer] = sign * amplitude
            with llvlit.steer(gpt2, directions, inputs), torch.no_grad():
                ids = [gpt2.tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS.texts]
                runs = [gpt2.module(each, output_hidden_states=True).hidden_states for each in ids]
            outputs.append(
                [[states[0, -1] @ vector for states, vector in zip(run, directions, strict=True)] for run in runs]
            )
        plus, minus = np.array(outputs)
        expected = (plus - minus) / (2 * amplitude)
        states = slice(layer + 1, 4)  # the last hidden state of transformers is behind the final norm
        assert np.allclose(found[:, layer, states], expected[:, states], rtol=1e-9, atol=1e-9)


def test_a_matrix_from_a_state_on_keeps_the_gains_and_holds_a_hankel_block_less(gpt2, directions):
    whole = gain_matrix(gpt2, PROMPTS, directions)
    later = GainMatrix(whole.per_prompt, "measured", 0.1, borrowed=(0, 2)).from_state(1)
    assert np.array_equal(later.gains().per_prompt, whole.gains().per_prompt[:, 1:])
    assert later.borrowed == (1,) and later.n_layers == whole.n_layers - 1
    assert np.allclose(
        later.hankel_singular_values()[2], np.linalg.svd(whole.mean[1:3, 3:], compute_uv=False), atol=1e-12
    )


def test_the_last_column_is_the_gain_profile(gpt2, directions):
    matrix = gain_matrix(gpt2, PROMPTS, directions)
    assert np.allclose(matrix.gains().per_prompt, measured_gains(gpt2, PROMPTS, directions).per_prompt, atol=EXACT)
    linear = gain_matrix(gpt2, PROMPTS, directions, method="linear").gains()
    assert np.allclose(linear.per_prompt, adjoint_gains(gpt2, PROMPTS, directions).per_prompt, rtol=1e-10, atol=1e-12)
    assert linear.kind == "adjoint" and linear.pairs == matrix.pairs


def test_the_final_norm_is_told_and_not_mixed(gpt2, directions):
    plain, normed = (gain_matrix(gpt2, PROMPTS, directions, final_norm=flag) for flag in (False, True))
    assert np.allclose(normed.gains().mean, measured_gains(gpt2, PROMPTS, directions, final_norm=True).mean)
    with pytest.raises(InputError, match="final_norm True"):
        plain.missed_by(realize(normed, order=2))


def test_pushes_that_change_the_route_are_told_as_by_the_gains():
    model = tiny_model("mixtral", num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model.module.config._experts_implementation = "eager"
    along = random_directions(model.n_layers + 1, model.hidden_size)
    with pytest.warns(UserWarning, match="router of tiny-mixtral"):
        gains = measured_gains(model, PROMPTS, along, amplitude=0.3)
    with pytest.warns(UserWarning, match="router of tiny-mixtral"):
        matrix = gain_matrix(model, PROMPTS, along, amplitude=0.3)
    assert matrix.metadata["rerouted"] == gains.metadata["rerouted"]
    assert np.allclose(matrix.gains().per_prompt, gains.per_prompt, atol=1e-9)


def test_central_differences_of_the_matrix_have_order_two(gpt2, directions):
    exact = gain_matrix(gpt2, PROMPTS, directions, method="linear").mean
    errors = [np.abs(gain_matrix(gpt2, PROMPTS, directions, amplitude=a).mean - exact).max() for a in (0.02, 0.01)]
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_a_surrogates_matrix_is_that_of_its_operators(gpt2, directions):
    surrogate = identify(gpt2, PROMPTS, directions, order=3)
    inputs = np.random.default_rng(0).standard_normal(4)
    states = surrogate.simulate(inputs).states
    outputs = (states * surrogate.outputs).sum(axis=-1)
    assert np.allclose(inputs @ surrogate.matrix(), outputs, atol=EXACT)
    assert np.allclose(surrogate.matrix()[:, -1], surrogate.gains(), atol=EXACT)
    single = identify(gpt2, PROMPTS, directions, order=3, operators="per prompt")
    assert np.allclose(single.matrix()[:, -1], single.gains(), rtol=1e-5)
    affine = affine_model()
    assert np.allclose(
        identify(affine, PROMPTS, directions, order=24, basis="random").matrix(),
        gain_matrix(affine, PROMPTS, directions).mean,
        atol=1e-9,
    )


@pytest.mark.parametrize("order", [1, 2, 4])
def test_realizations_of_known_order_are_exact(order):
    rng = np.random.default_rng(order)
    for _ in range(50):
        n_layers = int(rng.integers(2 * order + 1, 20))
        matrix = of(gains_between(*random_system(rng, n_layers, order)))
        assert matrix.order(1e-9) == order
        surrogate = realize(matrix, tolerance=1e-9)
        assert surrogate.order == order
        assert matrix.missed_by(surrogate) < 1e-10
        inputs = rng.standard_normal((3, n_layers))
        assert np.allclose(surrogate.simulate(inputs).output, inputs @ matrix.mean[:, -1], rtol=1e-8)
        assert np.allclose(surrogate.gains(), matrix.mean[:, -1], rtol=1e-8, atol=1e-10)


def test_time_invariant_systems_are_those_of_the_eigensystem_realization():
    """Oracle: python-control's ERA (Juang and Pappa 1985), whose one Hankel matrix is ours at the middle state."""
    rng = np.random.default_rng(4)
    A, B, C = rng.standard_normal((3, 3)), rng.standard_normal(3), rng.standard_normal(3)
    A *= 0.9 / np.abs(np.linalg.eigvals(A)).max()
    responses = np.array(
        [0.0, *(C @ np.linalg.matrix_power(A, lag) @ B for lag in range(21))]
    )  # nothing passes at once
    matrix = np.array([[responses[max(state - layer, 0)] for state in range(22)] for layer in range(21)])
    theirs, values = control.eigensys_realization(responses[None, None], 3, m=10, n=10)
    block = of(matrix[:20, :21][:19, :20])
    assert np.allclose(block.hankel_singular_values()[10][:3], values[:3], rtol=1e-9)
    surrogate = realize(block, order=3)
    _, impulse = control.impulse_response(theirs, np.arange(20.0))
    assert np.allclose(surrogate.matrix()[0, 1:], np.ravel(impulse)[1:], atol=1e-9)
    assert np.allclose(surrogate.matrix(), block.mean, atol=1e-9)


def test_the_hankel_blocks_have_the_rank_of_the_system():
    matrix = of(gains_between(*random_system(np.random.default_rng(0), 12, 3)))
    for state, values in enumerate(matrix.hankel_singular_values()):
        assert len(values) == min(state, 13 - state)
        assert np.allclose(values[3:], 0, atol=1e-12)
        block = matrix.mean[:state, state:]
        if state:
            assert np.allclose(values, np.linalg.svd(block, compute_uv=False), atol=EXACT)


def test_the_realization_is_balanced():
    """Both Gramians of the realization are the diagonal of its singular values."""
    rng = np.random.default_rng(3)
    surrogate = realize(of(np.triu(rng.standard_normal((9, 10)), 1)), order=5)
    values = of(np.triu(rng.standard_normal((9, 10)), 1)).hankel_singular_values()
    matrix = of(surrogate.matrix())
    values = matrix.hankel_singular_values()
    reached = np.zeros((5, 0))
    for layer in range(9):
        reached = np.hstack([surrogate.A[layer] @ reached, surrogate.B[layer][:, None]])
        gramian = reached @ reached.T
        sizes = np.zeros(5)
        sizes[: len(values[layer + 1])] = values[layer + 1][:5]
        assert np.allclose(gramian, np.diag(sizes), atol=1e-10)


def test_the_error_is_at_most_twice_the_singular_values_cut():
    """Sandberg and Rantzer 2004, on a thousand systems; the norm is that of the map from inputs to outputs."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n_layers = int(rng.integers(3, 13))
        size = int(rng.integers(1, 8))
        matrix = of(gains_between(*random_system(rng, n_layers, size)))
        order = int(rng.integers(1, (n_layers + 1) // 2 + 1))
        error = np.linalg.norm(matrix.mean - realize(matrix, order=order).matrix(), 2)
        cut = sum(values[order:].sum() for values in matrix.hankel_singular_values())
        assert error <= 2 * cut * (1 + 1e-9) + 1e-9 * np.linalg.norm(matrix.mean)


def test_one_output_at_the_end_needs_order_one():
    """r_l = w_l^T x_l, with w the adjoint: r_{l+1} = r_l + h_l u_l, whatever the system."""
    matrix = gains_between(*random_system(np.random.default_rng(5), 10, 6))
    only_last = np.zeros_like(matrix)
    only_last[:, -1] = matrix[:, -1]
    blocks = [only_last[:state, state:] for state in range(1, 11)]
    assert all(np.linalg.matrix_rank(block, tol=1e-10) == 1 for block in blocks)
    A, B = np.ones((10, 1, 1)), matrix[:, -1][:, None]
    C = np.concatenate([np.zeros((10, 1)), [[1.0]]])
    assert np.allclose(gains_between(A, B, C), only_last, atol=EXACT)


def test_added_noise_leaves_the_order_where_it_is_smaller_than_the_tolerance():
    rng = np.random.default_rng(1)
    matrix = gains_between(*random_system(rng, 24, 4))
    noise = np.triu(rng.standard_normal((40, 24, 25)), 1)
    noise *= np.linalg.norm(matrix) / np.linalg.norm(noise[0])
    for size in (0.0, 1e-3, 1e-2):
        noisy = GainMatrix(matrix + size * noise, "linear", 0.0)
        assert noisy.order(0.02) == 4
        low, high = noisy.order_interval(0.02)
        assert low <= 4 <= high
    assert of(matrix + 0.3 * noise[0]).order(0.02) > 4


def test_rounding_makes_singular_values_far_below_those_of_a_model(gpt2, directions):
    floor = noise_floor(gpt2, PROMPTS, directions)
    assert floor.shape == (5,)
    assert (floor[2:4] < 1e-10 * gain_matrix(gpt2, PROMPTS, directions).hankel_singular_values()[2][0]).all()


def test_cutting_a_realization_is_realizing_at_the_smaller_order(gpt2, directions):
    matrix = gain_matrix(gpt2, PROMPTS, directions)
    large, small = realize(matrix, order=2), realize(matrix, order=1)
    assert np.allclose(large.truncate(1).matrix(), small.matrix(), atol=EXACT)


def test_results_come_back_from_files(gpt2, directions, tmp_path):
    matrix = gain_matrix(gpt2, PROMPTS, directions)
    matrix.save(tmp_path / "matrix.safetensors")
    again = GainMatrix.load(tmp_path / "matrix.safetensors")
    assert np.array_equal(again.per_prompt, matrix.per_prompt) and again.pairs == matrix.pairs
    assert again.metadata["model"] == gpt2.name
    surrogate = realize(matrix, order=2)
    surrogate.save(tmp_path / "surrogate.safetensors")
    assert np.array_equal(llvlit.LLV.load(tmp_path / "surrogate.safetensors").matrix(), surrogate.matrix())
    with pytest.raises(FileError, match="gain matrix"):
        GainMatrix.load(tmp_path / "surrogate.safetensors")


def test_bad_input_is_refused_by_name(gpt2, directions):
    matrix = np.triu(np.ones((6, 7)), 1)
    still, broken = matrix.copy(), matrix.copy()
    still[:, 3], broken[0, 3] = 0, np.nan
    surrogate = identify(gpt2, PROMPTS, directions, order=2)
    foreign = GainMatrix(matrix[None, :4, :5], "linear", 0.0, metadata={"model": "a", "model_fingerprint": "b"})
    for named, call in {
        "order=4": lambda: realize(matrix, order=4),
        "tolerance=1": lambda: realize(matrix, tolerance=1),
        "tolerance=0": lambda: of(matrix).order(0),
        "state 3": lambda: realize(still),
        "not finite": lambda: realize(broken),
        "k <= l": lambda: of(np.ones((6, 7))),
        "shape": lambda: of(np.ones((6, 6))),
        "tiny-gpt2": lambda: foreign.missed_by(surrogate),
        "amplitude=0": lambda: gain_matrix(gpt2, PROMPTS, directions, amplitude=0),
        "method": lambda: gain_matrix(gpt2, PROMPTS, directions, method="guess"),
    }.items():
        with pytest.raises(InputError, match=named):
            call()


def test_an_overflow_is_blamed_on_the_layer_where_it_happens(directions):
    model = tiny_model("gpt2")
    model.layers[2].forward = lambda states, *_, **__: torch.where(states.abs() > 1e3, torch.inf, states)
    assert np.isfinite(gain_matrix(model, PROMPTS, directions).per_prompt).all()
    with pytest.raises(NumericalError, match="not finite after layer 2 "):
        gain_matrix(model, PROMPTS, directions, amplitude=1e6)


class Operations(TorchDispatchMode):
    """Inside, floating-point operations of matrix products are counted."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_reading_on_the_way_costs_next_to_nothing():
    """By floating-point operations of products, which are what a forward pass consists of."""
    model = load_model("embedded/small", device="cpu")
    along = random_directions(model.n_layers + 1, model.hidden_size, seed=0)
    prompts = load_task("film-sentiment").split(concept=1, operating=1, evaluation=8).evaluation
    spent = {}
    for name, call in (("gains", measured_gains), ("matrix", gain_matrix)):
        call(model, prompts, along)  # checks the replay once
        with Operations() as counted:
            call(model, prompts, along)
        spent[name] = counted.total
    assert spent["gains"] <= spent["matrix"] <= 1.05 * spent["gains"]


def test_layers_that_change_nothing_have_the_identitys_matrix(directions):
    affine = gain_matrix(affine_model(), PROMPTS, directions).mean
    assert np.allclose(identity_matrix(directions), affine, atol=1e-10)


def test_one_linear_map_for_all_layers_is_found_from_states():
    """Where a single map A moves all states, dynamic modes give ``v_k^T A^(k - l) v_l``, and are nested."""
    rng = np.random.default_rng(0)
    operator, offset = rng.standard_normal((6, 6)) / 2, rng.standard_normal((6, 6))
    states = [rng.standard_normal((9, 6))]
    for layer in range(5):  # each with an offset of its own, which no gain sees
        states.append(states[-1] @ operator.T + offset[layer])
    states, vectors = torch.from_numpy(np.stack(states, axis=1)), random_directions(6, 6, seed=1)
    found = dynamic_modes(states, vectors, order=6)
    for layer in range(5):
        for state in range(layer + 1, 6):
            gain = vectors[state].numpy() @ np.linalg.matrix_power(operator, state - layer) @ vectors[layer].numpy()
            assert np.isclose(found.matrix()[layer, state], gain, rtol=1e-9, atol=1e-12)
    cut, alone = found.truncate(3), dynamic_modes(states, vectors, order=3)
    assert np.allclose(cut.A, alone.A, atol=1e-10) and np.allclose(cut.bases, alone.bases, atol=1e-10)
    with pytest.raises(InputError, match="the same for all prompts"):
        dynamic_modes(states[:1].repeat(3, 1, 1), vectors, order=2)
