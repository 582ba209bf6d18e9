"""What a layer does to the concept and the next token, what stands in its place, and that nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from conftest import PROMPTS, affine_model, tiny_model
from llvlit.engine.depth import depth_system
from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError, ModelError, NumericalError
from llvlit.method.concepts import random_directions
from llvlit.method.gain_matrix import gain_matrix
from llvlit.method.skipping import (
    LowOrderLayer,
    concept_effects,
    fit_layers,
    logit_effects,
    replace_layers,
    token_losses,
)

ROUNDING = 1e-9
"""Sums over a hundred tokens in float64, through an inverse of a covariance whose condition is some 1e4."""


@pytest.fixture(scope="module")
def directions() -> torch.Tensor:
    return random_directions(5, 24, seed=2)


def logits_of(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module(**model.tokenizer("what a lovely day", return_tensors="pt")).logits


def with_linear_layer(order: int) -> LanguageModel:
    """A tiny model whose layer 2 adds a constant and a linear map of an order, and nothing else."""
    model = tiny_model("gpt2", seed=3)
    layer, generator = model.layers[2], torch.Generator().manual_seed(1)
    U, V = torch.randn(2, 24, order, generator=generator, dtype=torch.float64) / 5
    layer.forward = lambda states, *_, **__: states + 0.3 + states @ V @ U.T
    return model


def without_layer(model: LanguageModel, layer: int) -> LanguageModel:
    """The same model with a layer whose weights out are zero, so that it is the identity."""
    with torch.no_grad():
        for part in (model.layers[layer].attn.c_proj, model.layers[layer].mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
    return model


def test_the_concept_effect_is_the_change_of_the_chain_of_jacobians(gpt2, directions):
    system, vectors = depth_system(gpt2, PROMPTS), directions.numpy()
    A = np.stack([system.jacobian(layer).numpy() for layer in range(4)])

    def chain(skipped: int | None) -> np.ndarray:
        matrix = np.zeros((len(PROMPTS), 4, 5))
        for layer in range(4):
            reached = np.broadcast_to(vectors[layer], (len(PROMPTS), 24))
            for state in range(layer + 1, 5):
                if state - 1 != skipped:
                    reached = np.einsum("nij,nj->ni", A[state - 1], reached)
                matrix[:, layer, state] = reached @ vectors[state]
        return matrix.mean(axis=0)

    whole = chain(None)
    assert np.allclose(whole, gain_matrix(gpt2, PROMPTS, directions, method="linear").mean)
    expected = [np.linalg.norm(chain(layer) - whole) / np.linalg.norm(whole) for layer in range(4)]
    assert np.allclose(concept_effects(gpt2, PROMPTS, directions).values, expected, rtol=1e-10)


def test_a_layer_that_is_the_identity_ranks_first_and_is_not_missed(directions):
    model = without_layer(tiny_model("gpt2", seed=1), 1)
    for effects in (concept_effects(model, PROMPTS, directions).mean, logit_effects(model, PROMPTS).mean):
        assert effects.argmin() == 1 and effects[1] < 1e-12 and np.delete(effects, 1).min() > 1e-6
    before = logits_of(model)
    with replace_layers(model, {1: None}):
        assert torch.equal(logits_of(model), before)


def test_layers_that_add_constants_matter_to_the_next_token_alone(directions):
    model = affine_model()
    assert np.abs(concept_effects(model, PROMPTS, directions).values).max() < 1e-12
    assert logit_effects(model, PROMPTS).values.min() > 1e-6


def test_a_dropped_layer_is_one_that_is_not_there(gpt2):
    with replace_layers(gpt2, {2: None, 0: None}):
        dropped = logits_of(gpt2)
    assert torch.allclose(dropped, logits_of(without_layer(without_layer(tiny_model("gpt2"), 2), 0)), rtol=1e-12)


def test_divergence_and_losses_are_those_of_each_prompt_alone(gpt2):
    effects, losses = logit_effects(gpt2, PROMPTS).values, token_losses(gpt2, PROMPTS, {1: None})
    for row, text in enumerate(PROMPTS.texts):
        ids = gpt2.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = gpt2.module(ids).logits[0].log_softmax(-1)
            with replace_layers(gpt2, {1: None}):
                without = gpt2.module(ids).logits[0].log_softmax(-1)
        assert np.isclose(
            effects[row, 1], nn.functional.kl_div(without, whole, reduction="sum", log_target=True) / len(whole)
        )
        assert np.isclose(losses[row], nn.functional.nll_loss(without[:-1], ids[0, 1:]))


@pytest.mark.parametrize("order", [3, 5])
def test_a_linear_layer_of_smaller_order_is_replaced_exactly(order):
    model = with_linear_layer(3)
    fitted = fit_layers(model, PROMPTS, [2], order=order)
    before = logits_of(model)
    with replace_layers(model, fitted):
        assert torch.allclose(logits_of(model), before, rtol=ROUNDING, atol=ROUNDING)
    assert np.allclose(token_losses(model, PROMPTS, fitted), token_losses(model, PROMPTS), rtol=ROUNDING)
    with replace_layers(model, fit_layers(model, PROMPTS, [2], order=2)):
        assert not torch.allclose(logits_of(model), before, rtol=1e-3)


def test_no_map_of_the_order_comes_nearer_to_the_layer(gpt2):
    fitted = fit_layers(gpt2, PROMPTS, [1], order=2)[1]
    seen = []
    hook = gpt2.layers[1].register_forward_hook(lambda _, args, output: seen.append((args[0][0], output[0])))
    try:
        with torch.no_grad():
            for text in PROMPTS.texts:
                gpt2.module(**gpt2.tokenizer(text, return_tensors="pt"))
    finally:
        hook.remove()
    states, targets = (torch.cat(each) for each in zip(*seen, strict=True))
    assert targets.shape == states.shape

    def error(layer: LowOrderLayer) -> float:
        return float((((layer(states) - targets) / states.norm(dim=1, keepdim=True)) ** 2).sum())

    rng, least = np.random.default_rng(0), error(fitted)
    for name in ("U", "V", "constant", "mean"):
        for _ in range(20):
            parts = dict(vars(fitted))
            parts[name] = parts[name] + 1e-3 * rng.standard_normal(parts[name].shape)
            assert error(LowOrderLayer(**parts)) > least


def test_a_layer_that_is_put_in_its_own_place_of_full_order_beats_dropping_it(gpt2):
    errors = [error_of(gpt2, fit_layers(gpt2, PROMPTS, [1], order=order)[1]) for order in (1, 4, 24)]
    assert errors[0] > errors[1] > errors[2]


def error_of(model: LanguageModel, layer: LowOrderLayer) -> float:
    system = depth_system(model, PROMPTS)
    return float((layer(system.states[:, 1]) - system.states[:, 2]).norm())


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gemma3_text", "phi", "gpt_neo"])
def test_other_architectures(model_type):
    model = tiny_model(model_type)
    before = logits_of(model)
    losses = [token_losses(model, PROMPTS, each) for each in ({}, {1: None}, fit_layers(model, PROMPTS, [1]))]
    assert not np.allclose(losses[0], losses[1]) and not np.allclose(losses[1], losses[2])
    assert torch.equal(logits_of(model), before)


def test_generating_with_a_cache_gives_the_same_words(gpt2):
    prompt = gpt2.tokenizer("what a lovely day", return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with replace_layers(gpt2, fit_layers(gpt2, PROMPTS, [1, 2])):
        cached, plain = (gpt2.module.generate(**prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_the_model_is_as_it_was_after_an_exception_and_refused_inside(gpt2, directions):
    before, hooks = logits_of(gpt2), [dict(layer._forward_hooks) for layer in gpt2.layers]
    with pytest.raises(KeyError), replace_layers(gpt2, {1: None}):
        assert not torch.equal(logits_of(gpt2), before)
        for call in (
            lambda: concept_effects(gpt2, PROMPTS, directions),
            lambda: token_losses(gpt2, PROMPTS),
            lambda: replace_layers(gpt2, {2: None}).__enter__(),
        ):
            with pytest.raises(ModelError, match="skipping"):
                call()
        raise KeyError
    assert torch.equal(logits_of(gpt2), before)
    assert [dict(layer._forward_hooks) for layer in gpt2.layers] == hooks


WIDE = LowOrderLayer(np.ones((3, 1)), np.ones((3, 1)), np.ones(3), np.ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: replace_layers(model, {4: None}).__enter__(), "layer=4 must be at most 3"),
        (lambda model: replace_layers(model, {1: WIDE}).__enter__(), r"replacements\[1\].mean has shape \(3,\)"),
        (lambda model: replace_layers(model, {1: "none"}).__enter__(), r"replacements\[1\]='none'"),
        (lambda model: replace_layers(model, [1]).__enter__(), "replacements"),
        (lambda model: fit_layers(model, PROMPTS, [1], order=25), "order=25 must be at most 24"),
        (lambda model: fit_layers(model, PROMPTS, [-1]), "layer=-1 must be at least 0"),
        (lambda model: fit_layers(model, PROMPTS.select([0]), [1]), "too few to fit maps of 24 numbers"),
        (lambda model: LowOrderLayer(np.ones((3, 1)), np.ones((3, 2)), np.ones(3), np.ones(3)), "V has shape"),
    ],
)
def test_what_does_not_fit_is_refused(gpt2, call: Callable[[LanguageModel], object], message: str):
    with pytest.raises(InputError, match=message):
        call(gpt2)


def test_an_overflow_is_told(gpt2):
    huge = LowOrderLayer(np.full((24, 1), 1e300), np.full((24, 1), 1e300), np.zeros(24), np.zeros(24))
    with pytest.raises(NumericalError, match="replaces its layers"):
        token_losses(gpt2, PROMPTS, {1: huge})
