"""Prompts as tokens: tokenized once, for one model; too short or equal ones told by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import llvlit
from conftest import PROMPTS, tiny_model
from llvlit.engine.depth import last_token_states, sweep
from llvlit.engine.models import LanguageModel, wrap_model
from llvlit.engine.tokens import tokenize, usable_prompts
from llvlit.errors import InputError
from llvlit.method.concepts import random_directions
from llvlit.prompts import Prompts


def test_tokens_take_the_place_of_prompts(gpt2: LanguageModel) -> None:
    tokens = tokenize(gpt2, PROMPTS, max_tokens=8)
    assert tokens.prompts == PROMPTS and tokens.n_cut == 5
    expected = last_token_states(gpt2, PROMPTS, max_tokens=8)
    assert torch.equal(last_token_states(gpt2, tokens, max_tokens=8), expected)
    system = llvlit.depth_system(gpt2, tokens, max_tokens=8)
    assert torch.equal(system.states, expected) and system.n_cut == 5
    assert [layer.index for layer in sweep(gpt2, tokens, max_tokens=8)] == [0, 1, 2, 3]


def test_selected_tokens_are_those_of_selected_prompts(gpt2: LanguageModel) -> None:
    tokens = tokenize(gpt2, PROMPTS, max_tokens=8)
    for indices in ([4, 0], np.array(PROMPTS.labels) == 1, np.array([-1])):
        assert tokens.select(indices) == tokenize(gpt2, PROMPTS.select(indices), max_tokens=8)
    with pytest.raises(InputError, match="below 6"):
        tokens.select([6])


def test_tokens_of_another_model_or_length_are_refused(gpt2: LanguageModel) -> None:
    tokens = tokenize(gpt2, PROMPTS)
    with pytest.raises(InputError, match="tokenized for another model than tiny-gpt2"):
        llvlit.depth_system(tiny_model("gpt2", seed=1), tokens)
    with pytest.raises(InputError, match="max_tokens=128, and max_tokens=16 is asked for"):
        llvlit.depth_system(gpt2, tokens, max_tokens=16)


def test_identity_covers_weights_configuration_and_tokenizer(gpt2: LanguageModel) -> None:
    same = wrap_model(gpt2.module, gpt2.tokenizer, name="another name")
    assert same.identity == gpt2.identity
    gpt2.tokenizer("a text", truncation=True, max_length=2)
    assert replace(same).identity == gpt2.identity
    others = [tiny_model("gpt2", seed=1), tiny_model("gpt2", activation_function="relu"), tiny_model("gpt2")]
    others[2].tokenizer.add_tokens(["film"])
    assert others[2].fingerprint == gpt2.fingerprint
    assert len({other.identity for other in others} | {gpt2.identity}) == 4


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.7)


def by_new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.7


@pytest.mark.parametrize("change", [in_place, by_new_data])
def test_changed_weights_are_another_model(change: Callable[[nn.Parameter], None]) -> None:
    model = tiny_model("gpt2")
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    tokens, before = tokenize(model, PROMPTS), model.identity
    first = llvlit.measured_gains(model, tokens, directions)
    change(model.layers[2].mlp.c_fc.weight)
    now = wrap_model(model.module, model.tokenizer)
    second = llvlit.measured_gains(model, PROMPTS, directions)
    assert second.metadata["model_fingerprint"] == now.fingerprint != first.metadata["model_fingerprint"]
    assert model.identity == now.identity != before
    with pytest.raises(InputError, match="tokenized for another model"):
        llvlit.measured_gains(model, tokens, directions)


def test_prompts_of_one_token_are_named_or_left_out(gpt2: LanguageModel) -> None:
    prompts = Prompts(["a film", "a", "", "a film too"], [1, 0, 1, 0])
    with pytest.raises(InputError, match=r"texts\[1\]='a' has fewer than two tokens"):
        tokenize(gpt2, prompts)
    tokens, left_out = usable_prompts(gpt2, prompts)
    assert tokens == tokenize(gpt2, prompts.select([0, 3]))
    assert left_out == {"fewer than two tokens": (1, 2)}
    with pytest.raises(InputError, match="None of the 1 prompts can be used"):
        usable_prompts(gpt2, Prompts(["a"], [1]))


def test_prompts_that_are_equal_after_cutting_are_named_or_left_out(gpt2: LanguageModel) -> None:
    texts = ["a good film", "a long film", "one good film", "a bad film", "the bad film", "good"]
    prompts = Prompts(texts, [1, 0, 1, 1, 0, 1])
    with pytest.raises(InputError, match=r"texts\[2\]='one good film' has the same tokens as an earlier prompt"):
        tokenize(gpt2, prompts.select([0, 1, 2]), max_tokens=9)
    with pytest.raises(InputError, match=r"texts\[0\]='a bad film' .* other label \(texts\[1\]='the bad film'\)"):
        tokenize(gpt2, prompts.select([3, 4]), max_tokens=9)
    tokens, left_out = usable_prompts(gpt2, prompts, max_tokens=9)
    assert tokens.prompts == prompts.select([0, 1, 5])
    assert sorted(left_out.values()) == [(2,), (3, 4)]
    assert usable_prompts(gpt2, prompts) == (tokenize(gpt2, prompts), {})


def test_texts_passed_twice_are_taken_twice(gpt2: LanguageModel) -> None:
    assert len(tokenize(gpt2, Prompts(["a film", "a film"], [1, 1]), max_tokens=3)) == 2
