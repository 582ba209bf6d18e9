"""Freezing the context is exact, for every architecture; derivatives are right; memory is that of one layer."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from conftest import ARCHITECTURES, EXACT, PROMPTS, SOFTMAX32, WHOLE_PROMPTS, tiny_model
from llvlit.engine import layer as frozen
from llvlit.engine.depth import depth_system, last_token_states, propagate_beside, sweep
from llvlit.engine.fast import NAME, attend
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import ReplayStyle, first_output
from llvlit.engine.tokens import tokenize
from llvlit.errors import InputError, NumericalError
from llvlit.prompts import Prompts


def hooked_forward(model: LanguageModel, text: str, inputs: torch.Tensor) -> torch.Tensor:
    """Oracle: the plain model on one prompt, inputs (n_layers, H) added to the last token before each layer."""
    states = []

    def before(layer):
        def hook(_module, args):
            hidden = args[0].clone()
            hidden[:, -1] += inputs[layer]
            return (hidden, *args[1:])

        return hook

    def after(_module, _args, output):
        states.append(first_output(output)[0, -1].clone())

    handles = [m.register_forward_pre_hook(before(i)) for i, m in enumerate(model.layers)]
    handles += [m.register_forward_hook(after) for m in model.layers]
    tokens = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        model.module(tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(states)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *WHOLE_PROMPTS])
def test_frozen_context_equals_the_hooked_full_forward(model_type, generator):
    model = tiny_model(model_type)
    tolerance = EXACT if model_type in ("gpt2", "bloom") else SOFTMAX32
    inputs = torch.randn(model.n_layers, model.hidden_size, generator=generator, dtype=torch.float64)
    system = depth_system(model, PROMPTS)
    first = system.states[:, :1]
    quiet = torch.zeros_like(inputs)
    for number, text in enumerate(PROMPTS.texts):
        expected = hooked_forward(model, text, quiet)
        scale = expected.abs().max().item()
        assert (system.states[number, 1:] - expected).abs().max() < tolerance * scale
    for start in range(model.n_layers):
        late = torch.where(torch.arange(model.n_layers)[:, None] < start, 0.0, inputs)
        moved = system.propagate(system.states[:, start : start + 1], start, inputs=late)
        for number, text in enumerate(PROMPTS.texts):
            expected = hooked_forward(model, text, late)[-1]
            assert (moved[number, 0] - expected).abs().max() < tolerance * expected.abs().max()
            assert (expected - system.states[number, -1]).abs().max() > 0.1  # the input does something
    assert first.shape == (len(PROMPTS), 1, model.hidden_size)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "gemma2"])
def test_attention_to_a_frozen_context_is_that_of_the_layers_own_kernel(model_type, generator):
    """Windows, grouped keys and capped scores included; prompts of several lengths, so that some are padded."""
    model = tiny_model(model_type)
    layers = depth_system(model, PROMPTS).layers
    own = ReplayStyle(n_outputs=0)
    candidates = torch.randn(len(PROMPTS), 5, 24, generator=generator, dtype=torch.float64)
    tolerance = EXACT if model_type == "gpt2" else SOFTMAX32
    for layer in layers:
        assert all(batch.recording.style.frozen_context for batch in layer.batches)
        slow = replace(
            layer, batches=tuple(replace(b, recording=replace(b.recording, style=own)) for b in layer.batches)
        )
        expected = slow.step(candidates)
        assert (layer.step(candidates) - expected).abs().max() < tolerance * expected.abs().max()
        expected = slow.vjp(candidates)
        assert (layer.vjp(candidates) - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("fault", ["other numbers", "other arguments"])
def test_an_attention_that_cannot_be_frozen_runs_through_its_own_kernel(monkeypatch, fault, generator):
    def other(*arguments: object, scaling: float = 1.0, **rest: object) -> object:
        if fault == "other arguments":
            raise TypeError("an argument that nobody knows")
        return attend(*arguments, scaling=1.01 * scaling, **rest)

    candidates = torch.randn(len(PROMPTS), 3, 24, generator=generator, dtype=torch.float64)
    expected = depth_system(tiny_model("llama"), PROMPTS).step(2, candidates)
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, other)
    model = tiny_model("llama")
    system = depth_system(model, PROMPTS)
    assert not any(batch.recording.style.frozen_context for batch in system.layers[2].batches)
    assert (system.step(2, candidates) - expected).abs().max() < SOFTMAX32 * expected.abs().max()
    assert model.module.config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_candidates_do_not_see_each_other(model_type, generator):
    model = tiny_model(model_type)
    system = depth_system(model, PROMPTS)
    many = system.states[:, 1:2] + torch.randn(len(PROMPTS), 9, 24, generator=generator, dtype=torch.float64)
    together = system.step(1, many)
    alone = torch.cat([system.step(1, many[:, [i]]) for i in range(9)], dim=1)
    tolerance = EXACT if model_type == "gpt2" else SOFTMAX32
    assert (together - alone).abs().max() < tolerance * alone.abs().max()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_candidates_behind_the_tokens_move_as_in_the_replay(model_type, generator):
    model = tiny_model(model_type)
    tokenized = tokenize(model, PROMPTS, max_tokens=64)
    pushes = torch.randn(model.n_layers, 24, generator=generator, dtype=torch.float64)
    beside = propagate_beside(model, tokenized, lambda layer, states: (states + pushes[layer])[:, None])
    system = depth_system(model, PROMPTS)
    tolerance = EXACT if model_type == "gpt2" else SOFTMAX32
    for layer in range(model.n_layers):
        alone = system.propagate(system.states[:, [layer]] + pushes[layer], layer)
        assert (beside[:, [layer]] - alone).abs().max() < 10 * tolerance * alone.abs().max()


@pytest.mark.parametrize("model_type", WHOLE_PROMPTS)
def test_architectures_that_mask_on_their_own_run_whole_prompts_and_stay_as_they_are(model_type):
    model = tiny_model(model_type)
    tokens = torch.tensor([[5, 6, 7, 8]])
    before = model.module(tokens).logits
    system = depth_system(model, PROMPTS)
    assert all(batch.recording.style.whole_prompts for layer in system.layers for batch in layer.batches)
    assert torch.equal(before, model.module(tokens).logits)


def test_a_prompts_numbers_do_not_depend_on_its_batch(gpt2):
    together = last_token_states(gpt2, PROMPTS)
    for number, text in enumerate(PROMPTS.texts):
        alone = last_token_states(gpt2, Prompts((text,), (0,)))
        assert (alone[0] - together[number]).abs().max() < EXACT * together.abs().max()


def test_jvp_is_second_order_limit_of_central_differences(gpt2, generator):
    """log error against log step has slope 2 until rounding takes over."""
    system = depth_system(gpt2, PROMPTS)
    tangent = torch.randn(len(PROMPTS), 3, 24, generator=generator, dtype=torch.float64)
    exact = system.jvp(2, tangent)
    steps = np.array([1e-2, 5e-3, 2.5e-3, 1.25e-3])
    point = system.states[:, 2:3]
    errors = [
        ((system.step(2, point + h * tangent) - system.step(2, point - h * tangent)) / (2 * h) - exact).norm().item()
        for h in steps
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - 2) < 0.05
    assert (system.jvp(2, tangent, method="central") - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("rows", [6, 4096], ids=["in pieces", "at once"])
def test_products_are_those_of_forward_mode(model_type, rows, generator, monkeypatch):
    """Two passes back, pieces of one size, against torch's forward mode through the same step."""
    monkeypatch.setattr(frozen, "ROWS_PER_CALL", rows)
    monkeypatch.setattr(frozen, "ROWS_PER_JVP", rows)
    system = depth_system(tiny_model(model_type), PROMPTS)
    point = system.states[:, 1:2].expand(-1, 3, -1).contiguous()
    tangents, cotangents = torch.randn(2, *point.shape, generator=generator, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: system.step(1, x), (point,), (tangents,))[1]
    layer = system.layers[1].linearize(3)
    size = expected.abs().max()
    for products in (system.jvp(1, tangents), layer.jvp(tangents), layer.jvp(tangents)):
        assert (products - expected).abs().max() < SOFTMAX32 * size
    one = layer.jvp(tangents[:, :1].contiguous())
    assert (one - expected[:, :1]).abs().max() < SOFTMAX32 * size
    both = torch.stack([(layer.vjp(cotangents) * tangents).sum(-1), (cotangents * expected).sum(-1)])
    assert (both[0] - both[1]).abs().max() < SOFTMAX32 * both.abs().max()


def test_taylor_remainder_is_of_second_order(gpt2, generator):
    system = depth_system(gpt2, PROMPTS)
    tangent = torch.randn(len(PROMPTS), 1, 24, generator=generator, dtype=torch.float64)
    point, exact = system.states[:, 1:2], system.jvp(1, tangent)
    steps = np.array([1e-2, 5e-3, 2.5e-3])
    remainders = [
        (system.step(1, point + h * tangent) - system.states[:, 2:3] - h * exact).norm().item() for h in steps
    ]
    assert abs(np.polyfit(np.log(steps), np.log(remainders), 1)[0] - 2) < 0.05


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_vjp_is_the_transpose_and_the_jacobian_holds_both(model_type, generator):
    system = depth_system(tiny_model(model_type), PROMPTS)
    tangent, cotangent = torch.randn(2, len(PROMPTS), 4, 24, generator=generator, dtype=torch.float64)
    forward = (cotangent * system.jvp(1, tangent)).sum(-1)
    backward = (system.vjp(1, cotangent) * tangent).sum(-1)
    assert (forward - backward).abs().max() < SOFTMAX32 * forward.abs().max()
    dense = torch.einsum("nij,nkj->nki", system.jacobian(1), tangent)
    assert (dense - system.jvp(1, tangent)).abs().max() < SOFTMAX32 * dense.abs().max()


def test_final_norm_is_part_of_the_last_step(gpt2):
    system = depth_system(gpt2, PROMPTS, final_norm=True)
    plain = depth_system(gpt2, PROMPTS)
    expected = gpt2.module.transformer.ln_f(plain.states[:, -1])
    assert torch.allclose(system.states[:, -1], expected, atol=EXACT)
    assert torch.allclose(system.step(3, plain.states[:, 3:4])[:, 0], expected, atol=EXACT)


def test_a_sweep_holds_one_layer_at_a_time(gpt2):
    """Without the garbage collector's help: a context in a reference cycle would pile up."""
    contexts = []
    depth_system(gpt2, PROMPTS)  # the architecture's check is done before
    gc.collect()
    gc.disable()
    try:
        for layer in sweep(gpt2, PROMPTS):
            contexts.append(weakref.ref(layer.batches[0].context))
            del layer
            assert sum(ref() is not None for ref in contexts) <= 2
    finally:
        gc.enable()


def test_the_model_is_bit_equal_before_and_after(gpt2):
    tokens = torch.tensor([gpt2.tokenizer(PROMPTS.texts[0])["input_ids"]])
    before = gpt2.module(tokens).logits
    depth_system(gpt2, PROMPTS).jvp(0, torch.ones(len(PROMPTS), 1, 24, dtype=torch.float64))
    assert torch.equal(before, gpt2.module(tokens).logits)
    assert all("forward" not in vars(module) for module in gpt2.module.modules())


def test_long_prompts_are_cut_on_the_left_and_counted(gpt2):
    long = Prompts(("x" * 100 + " the end", "short one"), (0, 1))
    system = depth_system(gpt2, long, max_tokens=8)
    assert system.n_cut == 2
    end = depth_system(gpt2, Prompts((" the end",), (0,)))
    assert torch.allclose(system.states[0], end.states[0], atol=EXACT)


@pytest.mark.parametrize("max_tokens", [0, 1, 129])
def test_max_tokens_outside_the_context_is_an_error(gpt2, max_tokens):
    with pytest.raises(InputError, match="max_tokens"):
        depth_system(gpt2, PROMPTS, max_tokens=max_tokens)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_prompt_without_context_is_an_error(gpt2, text):
    with pytest.raises(InputError, match=r"texts\[1\]"):
        tokenize(gpt2, Prompts(("fine text", text), (0, 1)), max_tokens=16)


def test_a_nan_is_reported_with_its_layer():
    model = tiny_model("gpt2", seed=3)
    with torch.no_grad():
        model.layers[2].mlp.c_proj.bias[0] = float("nan")
    with pytest.raises(NumericalError, match="layer 2"):
        depth_system(model, PROMPTS)


def test_wrong_shapes_and_layers_name_the_argument(gpt2):
    system = depth_system(gpt2, PROMPTS)
    with pytest.raises(InputError, match="candidates"):
        system.step(0, torch.zeros(len(PROMPTS), 24, dtype=torch.float64))
    with pytest.raises(InputError, match="layer=4"):
        system.step(4, system.states[:, :1])
    with pytest.raises(InputError, match="stop=9"):
        system.propagate(system.states[:, :1], 0, 9)
    with pytest.raises(InputError, match="method"):
        system.jvp(0, system.states[:, :1], method="magic")


def test_a_layer_that_counts_its_tokens_runs_whole_prompts():
    """What a candidate adds would depend on the number of candidates."""
    model = tiny_model("gpt2", seed=5)
    layer = model.layers[1]
    layer.forward = lambda hidden, *args, **kwargs: (
        type(layer).forward(layer, hidden, *args, **kwargs) + hidden.shape[1]
    )
    system = depth_system(model, PROMPTS)
    for number, text in enumerate(PROMPTS.texts):
        expected = hooked_forward(model, text, torch.zeros(model.n_layers, model.hidden_size, dtype=torch.float64))
        assert (system.states[number, 1:] - expected).abs().max() < EXACT * expected.abs().max()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("model", lambda model, system: depth_system("gpt2", PROMPTS)),
        ("prompts", lambda model, system: depth_system(model, ["a film", "one"])),
        ("max_tokens", lambda model, system: depth_system(model, PROMPTS, max_tokens="8")),
        ("max_tokens", lambda model, system: depth_system(model, PROMPTS, max_tokens=True)),
        ("final_norm", lambda model, system: depth_system(model, PROMPTS, final_norm=3)),
        ("layer", lambda model, system: system.layer(-1)),
        ("layer", lambda model, system: system.jacobian(1.5)),
        ("candidates", lambda model, system: system.step(0, np.zeros((6, 1, 24)))),
        ("candidates", lambda model, system: system.step(0, torch.zeros(6, 1, 24, dtype=torch.long))),
        ("candidates", lambda model, system: system.propagate(torch.zeros(6, 0, 24))),
        ("inputs", lambda model, system: system.propagate(system.states[:, :1], inputs=torch.zeros(3, 24))),
        ("start", lambda model, system: system.propagate(system.states[:, :1], start=3, stop=2)),
        ("tangents", lambda model, system: system.jvp(0, torch.zeros(6, 1, 23))),
        ("cotangents", lambda model, system: system.vjp(0, None)),
        ("method", lambda model, system: system.layers[0].dense(method=None)),
        ("n_products", lambda model, system: system.layers[0].linearize(0)),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_by_name(argument, call, gpt2):
    with pytest.raises(InputError, match=rf"^{argument}\b"):
        call(gpt2, depth_system(gpt2, PROMPTS))


def test_vectors_of_another_type_are_taken_in_the_models(gpt2):
    system = depth_system(gpt2, PROMPTS)
    out = system.step(1, system.states[:, 1:2].float())
    assert out.dtype == torch.float64
    assert (out[:, 0] - system.states[:, 2]).abs().max() < 1e-4 * out.abs().max()
