"""Minimum-energy inputs are the least-norm solution; the full model confirms what a schedule costs."""

from __future__ import annotations

import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import (
    ARCHITECTURES,
    EXACT,
    PROMPTS,
    SOFTMAX32,
    WHOLE_PROMPTS,
    affine_model,
    byte_tokenizer,
    tiny_model,
)
from llvlit.engine.architectures import tiny_config, tiny_module
from llvlit.engine.depth import depth_system
from llvlit.engine.models import wrap_model
from llvlit.errors import InputError, ModelError, NumericalError
from llvlit.method import verification
from llvlit.method.concepts import Directions, random_directions
from llvlit.method.control import early_and_middle, energy, minimum_energy, relative_weights, schedules
from llvlit.method.gains import Gains, adjoint_gains, measured_gains
from llvlit.method.steering import steer
from llvlit.method.verification import OUT_OF_REACH, REACHED, output_shifts, required_energy

GAINS = arrays(np.float64, 6, elements=st.floats(-3, 3).map(lambda x: x if abs(x) > 1e-3 else 0.5))
WEIGHTS = arrays(np.float64, 6, elements=st.floats(0.1, 10))


@given(GAINS, WEIGHTS, GAINS)
@settings(max_examples=100, deadline=None)
def test_no_feasible_input_is_cheaper(gains, weights, other):
    best = minimum_energy(gains, 2.0, weights=weights)
    assert gains @ best == pytest.approx(2.0)
    feasible = best + other - gains * (gains @ other) / (gains @ gains)  # same output
    assert gains @ feasible == pytest.approx(2.0, abs=1e-9)
    assert energy(best, weights=weights) <= energy(feasible, weights=weights) * (1 + 1e-9)


@given(GAINS, WEIGHTS)
@settings(max_examples=50, deadline=None)
def test_minimum_energy_is_the_least_norm_solution(gains, weights):
    """Oracle: least squares in the coordinates W^{1/2} u."""
    root = np.sqrt(weights)
    scaled = np.linalg.lstsq((gains / root)[None], np.array([1.5]), rcond=None)[0]
    assert np.allclose(minimum_energy(gains, 1.5, weights=weights), scaled / root, rtol=1e-9)


def test_schedules_have_unit_energy_and_the_optimal_one_the_largest_output():
    gains = np.array([0.3, -1.0, 2.0, 0.5])
    weights = np.array([1.0, 4.0, 0.5, 2.0])
    shapes = schedules(gains, weights=weights, seed=3)
    assert {"optimal", "uniform", "last layer", "random layer", "random", "layer 0", "layer 3"} <= set(shapes)
    assert np.array_equal(shapes["early-only"], shapes["layer 0"])
    middle = shapes["middle-only"] * np.sqrt(weights)  # alike in the units of W
    assert np.flatnonzero(middle).tolist() == [1, 2] and middle[1] == pytest.approx(middle[2])
    for shape in shapes.values():
        assert energy(shape, weights=weights) == pytest.approx(1)
        assert abs(gains @ shape) <= gains @ shapes["optimal"] + EXACT
    assert np.array_equal(shapes["random"], schedules(gains, weights=weights, seed=3)["random"])
    assert not np.array_equal(shapes["random"], schedules(gains, weights=weights, seed=4)["random"])


@pytest.mark.parametrize("n_layers", range(1, 40))
def test_early_and_middle_are_thirds_that_never_are_empty(n_layers):
    for first in range(n_layers):
        early, middle = early_and_middle(n_layers, first=first).values()
        late = middle[first:][::-1]  # as many before the middle as behind it
        assert np.array_equal(middle[first:], late) and not (early | middle)[:first].any()
        n = n_layers - first
        assert early.sum() == max(n // 3, 1) and middle.sum() == n - 2 * (n // 3)
        assert early[first] and (n < 3 or not (early & middle).any())


def test_required_energy_on_an_affine_network_is_the_closed_form():
    """Every layer is x + b there, so the gain is v_L . v_l and the scale target / (h . u)."""
    model = affine_model()
    vectors = random_directions(5, 24, seed=3)
    gains = (vectors[:-1] @ vectors[-1]).numpy()
    for shape in (gains, -gains, np.array([0, 0, 0, 1.0])):
        result = required_energy(model, PROMPTS, vectors, shape, -2.0, weights=np.ones(4), relative_tolerance=1e-6)
        relative = required_energy(model, PROMPTS, vectors, shape, -2.0, relative_tolerance=1e-6)
        lengths = depth_system(model, PROMPTS).states[:, :-1].norm(dim=-1).numpy()
        assert np.allclose(relative.energy, ((relative.scale[:, None] * shape / lengths) ** 2).sum(axis=1), rtol=1e-9)
        assert np.array_equal(relative.scale, result.scale) and result.status == REACHED
        assert np.allclose(result.scale, -2.0 / (gains @ shape), rtol=1e-5)
        assert np.allclose(result.energy, (2.0 / (gains @ shape)) ** 2 * (shape @ shape), rtol=1e-5)
        assert np.allclose(result.reached, -2.0, rtol=1e-5)


def test_required_energy_is_verified_by_hooks_on_the_full_model(gpt2):
    vectors = random_directions(5, 24, seed=5)
    gains = adjoint_gains(gpt2, PROMPTS, vectors).mean
    shape = schedules(gains)["optimal"]
    result = required_energy(gpt2, PROMPTS, vectors, shape, 0.5)
    assert result.status == REACHED and result.n_out_of_reach == 0
    for number, text in enumerate(PROMPTS.texts):
        tokens = torch.tensor([gpt2.tokenizer(text)["input_ids"]])
        outputs = []
        for scale in (0.0, result.scale[number]):
            kept = []
            handle = gpt2.layers[-1].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0, -1]))
            with torch.no_grad(), steer(gpt2, vectors, scale * shape):
                gpt2.module(tokens)
            handle.remove()
            outputs.append(float(kept[0] @ vectors[-1]))
        shift = outputs[1] - outputs[0]
        assert shift == pytest.approx(result.reached[number], rel=1e-9)
        assert shift >= 0.5 and shift == pytest.approx(0.5, rel=0.02)  # bracket of 1e-3 on a smooth curve


def test_a_target_out_of_reach_is_a_status(gpt2):
    """The final norm bounds the state, and with it the output."""
    vectors = random_directions(5, 24, seed=5)
    result = required_energy(gpt2, PROMPTS, vectors, np.ones(4), 1e6, final_norm=True)
    assert result.status == OUT_OF_REACH and result.n_out_of_reach == len(PROMPTS)
    assert np.isinf(result.energy).all() and np.isnan(result.scale).all()
    assert "Lower the target" in result.help


def test_relative_weights_are_inverse_squared_norms(gpt2):
    system = depth_system(gpt2, PROMPTS)
    expected = 1 / system.states[:, :4].norm(dim=-1).pow(2).mean(0).numpy()
    assert np.allclose(relative_weights(system.states), expected, rtol=1e-12)


@pytest.mark.parametrize("of", [measured_gains, adjoint_gains])
def test_gains_of_a_model_ask_for_the_least_relative_energy(gpt2, of, tmp_path):
    gains = of(gpt2, PROMPTS, random_directions(5, 24))
    gains.save(tmp_path / "gains.safetensors")
    weights = relative_weights(depth_system(gpt2, PROMPTS).states)
    expected = minimum_energy(gains.mean, 2.0, weights=weights)
    assert not np.allclose(expected, minimum_energy(gains.mean, 2.0), rtol=0.05)  # else the test could not fail
    for each in (gains, Gains.load(tmp_path / "gains.safetensors")):
        assert np.allclose(minimum_energy(each, 2.0), expected, rtol=1e-9)
        shapes = schedules(each)
        assert energy(shapes["uniform"], weights=weights) == pytest.approx(1)
        assert np.allclose(schedules(gains.mean, weights=weights)["optimal"], shapes["optimal"], rtol=1e-9)
    late = minimum_energy(gains.select(slice(2, None)), 2.0)
    assert np.allclose(late, minimum_energy(gains.mean[2:], 2.0, weights=weights[2:]), rtol=1e-9)
    assert np.allclose(minimum_energy(gains, 2.0, weights=np.ones(4)), minimum_energy(gains.mean, 2.0), rtol=1e-12)


def test_gains_that_know_no_states_want_weights(gpt2):
    gains = adjoint_gains(gpt2, PROMPTS, random_directions(5, 24), positions="all")
    for call in (lambda: minimum_energy(gains, 1.0), lambda: schedules(gains)):
        with pytest.raises(InputError, match=r"gains hold no weights.*relative_weights"):
            call()


def test_steering_equals_propagation_and_ends_with_the_block(gpt2):
    vectors = random_directions(5, 24, seed=6)
    inputs = np.array([0.5, 0.0, -1.0, 2.0])
    text = PROMPTS.texts[0]
    tokens = torch.tensor([gpt2.tokenizer(text)["input_ids"]])
    before = gpt2.module(tokens).logits
    with pytest.raises(KeyError), steer(gpt2, vectors, inputs):
        steered = gpt2.module(tokens, output_hidden_states=False).logits
        raise KeyError
    assert torch.equal(before, gpt2.module(tokens).logits)
    system = depth_system(gpt2, PROMPTS.select([0]), final_norm=True)
    shift = output_shifts(system, vectors, inputs[None, None])
    state = system.propagate(system.states[:, :1], inputs=torch.from_numpy(inputs)[:, None] * vectors[:-1])
    assert torch.allclose(gpt2.module.lm_head(state)[0, 0], steered[0, -1], atol=1e-10)
    assert torch.allclose(before[0, :-1], steered[0, :-1], atol=EXACT)  # earlier tokens never saw the push
    assert shift.shape == (1, 1)


def test_steering_acts_on_every_token_that_is_generated(gpt2):
    vectors = random_directions(5, 24, seed=6)
    tokens = torch.tensor([gpt2.tokenizer("the film")["input_ids"]])
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(tokens),
    }
    inputs = np.array([0.0, 0.0, 0.0, 30.0])
    plain = gpt2.module.generate(tokens, **options)
    with steer(gpt2, vectors, inputs):
        steered = gpt2.module.generate(tokens, **options)
    expected = tokens
    for _ in range(6):
        with steer(gpt2, vectors, inputs), torch.no_grad():
            following = gpt2.module(expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
        if following.item() == 0:
            break
    assert steered[0, : expected.shape[1]].tolist()[:9] == expected[0].tolist()[:9]
    assert steered.tolist() != plain.tolist()
    assert gpt2.module.generate(tokens, **options).tolist() == plain.tolist()


ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
PUSHES = np.array([0.5, 0.0, -1.0, 2.0])


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of the rows, padded on one side with a token that is none of padding elsewhere."""
    longest = max(map(len, ROWS))
    ids, mask = torch.full((len(ROWS), longest), 42), torch.zeros(len(ROWS), longest, dtype=torch.long)
    for row, tokens in enumerate(ROWS):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *WHOLE_PROMPTS])
def test_a_padded_batch_is_steered_where_each_prompt_alone_is(model_type):
    """On the right of the prompts; then one token more, behind padding that lies in the cache."""
    model, vectors = tiny_model(model_type), random_directions(5, 24, seed=6)
    ids, mask = padded("right")
    one, grown = torch.tensor([[20], [21], [22]]), torch.cat([mask, torch.ones(len(ROWS), 1).long()], dim=1)
    with torch.no_grad():
        plain = model.module(ids, attention_mask=mask, use_cache=True)
        with steer(model, vectors, PUSHES):
            together = model.module(ids, attention_mask=mask).logits
            for row, tokens in enumerate(ROWS):
                alone = model.module(torch.tensor([tokens])).logits[0]
                assert (together[row, : len(tokens)] - alone).abs().max() < SOFTMAX32 * alone.abs().max()
                assert (alone[-1] - plain.logits[row, len(tokens) - 1]).abs().max() > 0.1
            whole = model.module(torch.cat([ids, one], dim=1), attention_mask=grown).logits[:, -1]
            step = model.module(one, attention_mask=grown, past_key_values=plain.past_key_values).logits[:, -1]
            assert (step - whole).abs().max() < SOFTMAX32 * whole.abs().max()


@pytest.mark.parametrize("positions", ["prompt", "last", "all"])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "opt"])
def test_generation_from_left_padding_is_that_of_each_prompt_alone(model_type, positions):
    """Cached passes give one token, and a mask of all: the numbers of every step are compared.

    In float32, since padding on the left gives NaN in float64 where transformers takes the softmax in float32.
    """
    model, vectors = tiny_model(model_type, dtype=torch.float32), random_directions(5, 24, seed=6)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 42}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ids, mask = padded("left")
    with steer(model, vectors, PUSHES, positions=positions):
        together = model.module.generate(ids, attention_mask=mask, **options)
        for row, tokens in enumerate(ROWS):
            one = torch.tensor([tokens])
            alone = model.module.generate(one, attention_mask=torch.ones_like(one), **options)
            assert together.sequences[row, -4:].tolist() == alone.sequences[0, -4:].tolist()
            for mine, own in zip(together.logits, alone.logits, strict=True):
                assert (mine[row] - own[0]).abs().max() < 1e-5 * own.abs().max()


@pytest.mark.parametrize("positions", ["prompt", "last", "all"])
def test_rows_may_have_inputs_of_their_own(gpt2, positions):
    vectors, ids = random_directions(5, 24, seed=6), torch.tensor([ROWS[0], ROWS[0], ROWS[0]])
    own = np.array([1.0, 0.0, -2.0])[:, None] * PUSHES
    with torch.no_grad():
        with steer(gpt2, vectors, own, positions=positions):
            together = gpt2.module(ids).logits
            with pytest.raises(InputError, match="inputs are of 3 prompts, and the pass has 1"):
                gpt2.module(ids[:1])
        for row, inputs in enumerate(own):
            with steer(gpt2, vectors, inputs, positions=positions):
                assert (gpt2.module(ids[:1]).logits[0] - together[row]).abs().max() < 1e-10
    with pytest.raises(InputError, match=r"inputs has shape \(3, 5\); expected \(n_prompts, 4\)"):
        steer(gpt2, vectors, np.ones((3, 5))).__enter__()


RECURRENT = ["mamba", "qwen3_5_text", "recurrent_gemma"]
"""Their caches hold a state, beside keys and values or without; the last one keeps it in its layers."""


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *WHOLE_PROMPTS, *RECURRENT])
def test_a_push_at_the_prompts_last_token_alone_reaches_the_text_through_the_cache(model_type):
    """Oracle: the whole text at once, without a cache, pushed by hooks at that place."""
    if model_type in RECURRENT:
        model = wrap_model(tiny_module(tiny_config(model_type)), byte_tokenizer(), name=model_type)
    else:
        model = tiny_model(model_type)
    vectors = random_directions(model.n_layers + 1, model.hidden_size, seed=6)
    inputs = np.resize(PUSHES, model.n_layers)
    ids = torch.tensor(ROWS[:1])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 42}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    with steer(model, vectors, inputs, positions="prompt"):
        written = model.module.generate(ids, **options)

    def hook(push):
        def at_the_prompt(_module, args):
            return (args[0].index_add(1, torch.tensor([ids.shape[1] - 1]), push.expand(1, 1, -1)), *args[1:])

        return at_the_prompt

    handles = [
        layer.register_forward_pre_hook(hook(push))
        for layer, push in zip(model.layers, torch.from_numpy(inputs)[:, None] * vectors[:-1], strict=True)
    ]
    with torch.no_grad():
        expected = model.module(written.sequences[:, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :]
    for handle in handles:
        handle.remove()
    found = torch.cat(written.logits)
    assert (found - expected).abs().max() < SOFTMAX32 * expected.abs().max()
    assert (found - torch.cat(model.module.generate(ids, **options).logits)).abs().amax(dim=-1).min() > 1e-3


def test_a_pass_that_goes_on_is_left_alone_where_the_prompt_is_pushed(gpt2):
    """Behind padding on the right, too."""
    vectors, (ids, mask) = random_directions(5, 24, seed=6), padded("right")
    one, grown = torch.tensor([[20], [21], [22]]), torch.cat([mask, torch.ones(len(ROWS), 1).long()], dim=1)
    with torch.no_grad():
        with steer(gpt2, vectors, PUSHES):
            expected = gpt2.module(ids, attention_mask=mask, use_cache=True)
        with steer(gpt2, vectors, PUSHES, positions="prompt"):
            first = gpt2.module(ids, attention_mask=mask, use_cache=True)
            assert torch.equal(first.logits, expected.logits)
            step = gpt2.module(one, attention_mask=grown, past_key_values=first.past_key_values).logits
            assert torch.equal(gpt2.module(ids, attention_mask=mask).logits, expected.logits)  # a pass of its own
        plain = gpt2.module(one, attention_mask=grown, past_key_values=expected.past_key_values).logits
    assert torch.equal(step, plain)


def test_a_mask_tells_the_last_token_however_the_model_is_called(gpt2):
    vectors, (ids, mask) = random_directions(5, 24, seed=6), padded("right")
    with torch.no_grad():
        plain = gpt2.module.transformer(ids).last_hidden_state
        with steer(gpt2, vectors, PUSHES):
            expected = gpt2.module.transformer(ids, attention_mask=mask).last_hidden_state
            for given in (mask.bool(), mask.double()):
                assert torch.equal(gpt2.module.transformer(ids, attention_mask=given).last_hidden_state, expected)
            assert torch.equal(gpt2.module.transformer(ids, None, mask).last_hidden_state, expected)
            none = gpt2.module.transformer(ids).last_hidden_state
            blank = gpt2.module.transformer(ids, attention_mask=mask * torch.tensor([[1], [0], [1]]))
            with pytest.raises(InputError, match=r"attention_mask=\(3, 1, 7, 7\) does not tell which of 7 tokens"):
                gpt2.module(ids, attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))
            with pytest.raises(InputError, match=r"attention_mask=\(3, 6\)"):
                gpt2.module(ids, attention_mask=mask[:, 1:])
            assert torch.equal(gpt2.module.transformer(ids).last_hidden_state, none)  # that mask is forgotten
    changed = [(one != plain).any(dim=-1) for one in (expected, none, blank.last_hidden_state)]
    first = torch.arange(7) >= torch.tensor([[6], [1], [3]])
    assert torch.equal(changed[0] & mask.bool(), first & mask.bool())
    assert torch.equal(changed[1], (torch.arange(7) == 6).expand(3, 7))
    assert changed[2][[0, 2]].any() and torch.isfinite(blank.last_hidden_state).all()


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_bad_targets_are_errors(gpt2, target):
    with pytest.raises(InputError, match="target"):
        minimum_energy(np.ones(3), target)
    with pytest.raises(InputError, match="target"):
        required_energy(gpt2, PROMPTS, random_directions(5, 24), np.ones(4), target)


def test_other_bad_input_is_named(gpt2):
    with pytest.raises(InputError, match="target=0"):
        required_energy(gpt2, PROMPTS, random_directions(5, 24), np.ones(4), 0.0)
    with pytest.raises(InputError, match="shape"):
        required_energy(gpt2, PROMPTS, random_directions(5, 24), np.zeros(4), 1.0)
    with pytest.raises(NumericalError, match="zero"):
        minimum_energy(np.zeros(3), 1.0)
    with pytest.raises(InputError, match="weights"):
        minimum_energy(np.ones(3), 1.0, weights=np.array([1.0, 0.0, 1.0]))
    with pytest.raises(InputError, match="inputs"), steer(gpt2, random_directions(5, 24), np.ones(3)):
        pass


def test_weights_that_do_not_fit_are_refused_before_the_model_runs(gpt2, monkeypatch):
    monkeypatch.setattr("llvlit.method.verification.depth_system", lambda *_arguments, **_options: pytest.fail("ran"))
    with pytest.raises(InputError, match=r"weights, one for each of the inputs, has shape \(3,\); expected \(4,\)"):
        required_energy(gpt2, PROMPTS, random_directions(5, 24), np.ones(4), 0.5, weights=np.ones(3))


def interrupt(at: int):
    """Trace function that raises KeyboardInterrupt at the given line of the module of steering, counted as they run."""
    left = [at]

    def trace(frame, event, _arg):
        if not frame.f_code.co_filename.endswith("steering.py"):
            return None
        if event == "line":
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        return trace

    return trace, left


def test_no_interrupt_leaves_a_hook():
    """At any line on entering and on leaving."""
    gpt2 = tiny_model()  # of its own: a trace may stop between a block's end and its lock's release, a signal does not
    vectors, before = random_directions(5, 24, seed=6), sys.gettrace()
    for at in range(1, 400):
        trace, left = interrupt(at)
        sys.settrace(trace)
        try:
            with steer(gpt2, vectors, np.ones(4)):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        left_behind = [
            name for part in gpt2.module.modules() for name, kept in vars(part).items() if "_forward_" in name and kept
        ]
        assert not left_behind, at
        if left[0] > 0:
            break
    assert 20 < at < 399  # every line of them was interrupted


def test_a_steered_model_gives_no_numbers(gpt2):
    """Inside, the gains would be those of the pushed model: of other size, even of another sign."""
    vectors = random_directions(5, 24, seed=6)
    with steer(gpt2, vectors, np.ones(4)):
        for numbers in (
            lambda: measured_gains(gpt2, PROMPTS, vectors),
            lambda: adjoint_gains(gpt2, PROMPTS, vectors),
            lambda: required_energy(gpt2, PROMPTS, vectors, np.ones(4), 0.5),
            lambda: steer(gpt2, vectors, np.ones(4)).__enter__(),
        ):
            with pytest.raises(ModelError, match="steer"):
                numbers()
    assert measured_gains(gpt2, PROMPTS, vectors).per_prompt.shape == (6, 4)


def test_inputs_that_overflow_are_told(gpt2):
    vectors = random_directions(5, 24, seed=6)
    with pytest.raises(NumericalError, match="overflow"), steer(gpt2, vectors, np.full(4, 1e300)):
        gpt2.module(torch.tensor([[1, 2, 3]]))
    with pytest.raises(NumericalError, match="overflow"):
        output_shifts(depth_system(gpt2, PROMPTS), vectors, np.full((6, 1, 4), 1e300))
    with pytest.raises(NumericalError, match="largest number"):
        minimum_energy(np.full(3, 1e-200), 1e200)
    with pytest.raises(NumericalError, match="largest number"):
        energy(np.full(3, 1e200))
    assert np.allclose(minimum_energy(np.array([3e-200, 4e-200]), 5.0), [6e199, 8e199])  # their squares are zero
    assert np.allclose(minimum_energy(np.array([3e200, 4e200]), 5.0), [6e-201, 8e-201])  # their squares are infinite


@pytest.mark.parametrize(("argument", "value"), [("target", 1e-8), ("relative_tolerance", 1e-9)])
def test_targets_and_tolerances_below_rounding_are_refused(argument, value):
    """In float32: such a target was "reached" at a large multiple of its energy."""
    model = tiny_model("gpt2", dtype=torch.float32)
    options = {"target": 0.5, "relative_tolerance": 1e-3, argument: value}
    with pytest.raises(InputError, match=f"{argument}=.* drowns in rounding.*smallest usable"):
        required_energy(model, PROMPTS, random_directions(5, 24), np.ones(4), **options)


@pytest.mark.parametrize("tolerance", [float("nan"), float("inf"), 0.0, -1e-3, 1.0, "small"])
def test_tolerances_that_end_no_bisection_are_refused(gpt2, tolerance):
    with pytest.raises(InputError, match="relative_tolerance"):
        required_energy(gpt2, PROMPTS, random_directions(5, 24), np.ones(4), 0.5, relative_tolerance=tolerance)


def test_energies_of_several_shapes_are_those_of_each_and_name_what_was_borrowed(gpt2):
    vectors = random_directions(5, 24, seed=5)
    borrowed = np.array([True, True, False, False, False])
    directions = Directions(vectors, np.ones(5), np.zeros(5), borrowed, "mean_difference")
    shapes = {("all", 0): np.ones(4), ("late", 1): np.array([0, 1.0, 1, 1])}
    together = required_energy(gpt2, PROMPTS, directions, shapes, 0.5)
    for key, shape in shapes.items():
        alone = required_energy(gpt2, PROMPTS, directions, shape, 0.5)
        assert np.allclose(together[key].scale, alone.scale, rtol=2e-3)  # other brackets end the bisection
    assert together["all", 0].borrowed == (0, 1) and str(together["all", 0]).endswith("borrowed directions: 0, 1")
    assert together["late", 1].borrowed == (1,)


def test_all_schedules_are_searched_in_the_passes_of_one(gpt2):
    """Shapes, signs and scales go through depth side by side: the layers run as often for many shapes as for few."""
    vectors = random_directions(5, 24, seed=2)
    gains = adjoint_gains(gpt2, PROMPTS, vectors).mean
    every = schedules(gains)
    two = {name: every[name] for name in ("optimal", "last layer")}

    def rounds(shapes):
        with patch.object(verification, "_shifts", wraps=verification._shifts) as passes:
            required_energy(gpt2, PROMPTS, vectors, shapes, 0.5)
        return passes.call_count

    assert rounds(every) <= rounds(two) + 6 <= 24  # an awkward shape takes a few more trials, for itself alone
