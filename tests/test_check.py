"""Checks that see: what a replay gets wrong is told or avoided, whatever other tokens, batches and calls there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import llvlit
from conftest import ARCHITECTURES, PROMPTS, SOFTMAX32, tiny_model
from llvlit.engine.depth import depth_system, last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.errors import ModelError
from llvlit.method.concepts import random_directions
from llvlit.prompts import Prompts

FLOAT32 = 2e-3
"""Relative: sums of float32 in another order, through four layers with large weights; and a step of 0.002."""

SMALL_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"num_key_value_heads": 2, "sliding_window": 6},
    "gpt_oss": {**SMALL_HEADS, **EXPERTS, **TWO_KINDS, "sliding_window": 6},
    "mixtral": {**SMALL_HEADS, **EXPERTS},
    "phi3": {
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 10,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 3,
            "long_factor": [4.0] * 3,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 10,
        },
    },
}


def model_of(model_type: str, **options: Any) -> LanguageModel:
    """Tiny model of a known architecture; experts one by one, since the grouped kernel has no float64."""
    model = tiny_model(model_type, **OTHERS.get(model_type, {}), **options)
    if model_type in ("gpt_oss", "mixtral"):
        model.module.config._experts_implementation = "eager"
    return model


def plain_states(model: LanguageModel, text: str) -> torch.Tensor:
    """Oracle: the last token's states after each layer, from hooks on the plain model."""
    states: list[torch.Tensor] = []

    def note(_module: nn.Module, _args: object, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handles = [layer.register_forward_hook(note) for layer in model.layers]
    with torch.no_grad():
        model.module(torch.tensor([model.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return torch.stack(states)


def massive(model: LanguageModel) -> Prompts:
    """Prompts whose first token has massive activations, as in Llama 2, Qwen 2.5 or GPT-OSS."""
    first = model.tokenizer("#")["input_ids"][0]
    with torch.no_grad():
        model.module.get_input_embeddings().weight[first] *= 1e6
    return Prompts(["#" + text for text in PROMPTS.texts], PROMPTS.labels)


def assert_gains_are_those_of_the_full_model(model: LanguageModel, prompts: Prompts) -> None:
    """Derivatives against differences of the full model, which takes no short cut."""
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    measured = llvlit.measured_gains(model, prompts, directions, amplitude=0.002).per_prompt
    adjoint = llvlit.adjoint_gains(model, prompts, directions).per_prompt
    assert abs(adjoint - measured).max() < FLOAT32 * abs(measured).max()


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *OTHERS])
def test_a_prompts_numbers_depend_neither_on_its_batch_nor_on_what_ran_before(model_type: str) -> None:
    long = Prompts([*PROMPTS.texts, "and a much longer text, which goes on and on to its end"], [*PROMPTS.labels, 1])
    together = last_token_states(model_of(model_type), long)
    model = model_of(model_type)
    for number in (2, 6, 4, 3):
        alone = last_token_states(model, long.select([number]))[0]
        assert (alone - together[number]).abs().max() < SOFTMAX32 * alone.abs().max()
        expected = plain_states(model, long.texts[number])
        assert (alone[1:] - expected).abs().max() < SOFTMAX32 * expected.abs().max()
    again = last_token_states(model, long)  # lengths that this model has seen, but not yet side by side
    assert (again - together).abs().max() < SOFTMAX32 * together.abs().max()


def test_frequencies_that_follow_earlier_calls_are_those_of_a_new_model() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    text = Prompts(["exactly sixteen."], [1])
    expected = last_token_states(model, text, max_tokens=16)
    model.module(torch.ones(1, 60, dtype=torch.long))
    before = model.module.model.rotary_emb.inv_freq.clone()
    assert torch.equal(last_token_states(model, text, max_tokens=16), expected)
    assert torch.equal(model.module.model.rotary_emb.inv_freq, before)


def test_attention_sinks_are_not_lost_beside_a_massive_activation() -> None:
    model = model_of("gpt_oss", dtype=torch.float64)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.sinks += 1.0
    assert_gains_are_those_of_the_full_model(model, massive(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_scaled_from_some_layer_on_are_seen(dtype: torch.dtype, monkeypatch: Any) -> None:
    kernel = modeling_llama.eager_attention_forward

    def scaled(module: nn.Module, *arguments: Any, scaling: float, **options: Any) -> Any:
        return kernel(module, *arguments, scaling=scaling * (1.02 if module.layer_idx >= 2 else 1.0), **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", scaled)
    model = tiny_model("llama", dtype=dtype)
    prompts = massive(model)
    system = depth_system(model, prompts)
    assert not any(batch.recording.style.frozen_context for layer in system.layers for batch in layer.batches)
    if dtype == torch.float64:
        assert_gains_are_those_of_the_full_model(model, prompts)


def test_scaled_queries_by_position_run_whole_prompts() -> None:
    options = {
        **SMALL_HEADS,
        "floor_scale": 8,
        "intermediate_size_mlp": 48,
        "moe_layers": [],
        "no_rope_layers": [1, 0, 1, 0],
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "num_local_experts": 2,
    }
    for tuning in (True, False):
        model = tiny_model("llama4_text", **options, attn_temperature_tuning=tuning)
        system = depth_system(model, PROMPTS)  # of fewer tokens than eight, and of more
        assert all(batch.recording.style.whole_prompts == tuning for batch in system.layers[0].batches)
        expected = plain_states(model, PROMPTS.texts[2])
        assert (system.states[2, 1:] - expected).abs().max() < SOFTMAX32 * expected.abs().max()


def test_what_the_last_token_hands_on_besides_its_state_is_seen() -> None:
    """Layer 0 leaves its output where layer 2 finds it: another way for the token than the residual stream."""
    model = tiny_model("gpt2")
    left: list[torch.Tensor] = []

    def leaving(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        out = type(model.layers[0]).forward(model.layers[0], hidden, *arguments, **options)
        left[:] = [out[0] if isinstance(out, tuple) else out]
        return out

    def finding(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return type(model.layers[2]).forward(model.layers[2], hidden + left[0][:, -1:].mean(), *arguments, **options)

    model.layers[0].forward, model.layers[2].forward = leaving, finding
    with pytest.raises(ModelError, match="layer 2"):
        depth_system(model, PROMPTS)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values_are_refused_by_name(model_type: str) -> None:
    options = {**SMALL_HEADS, **TWO_KINDS, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 300}
    if model_type == "gemma3n_text":
        options |= {"hidden_size_per_layer_input": 4, "laurel_rank": 4}
        options |= {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
    else:
        options |= {"hidden_size_per_layer_input": 0, "global_head_dim": 8}
    with pytest.raises(ModelError, match="layer 2: it attends to keys and values of an earlier layer"):
        depth_system(tiny_model(model_type, **options), PROMPTS)


def looks_around(layer: nn.Module, *, beyond: int) -> Callable[..., Any]:
    """The forward of a layer that adds the mean of all tokens where there are many of them."""

    def forward(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        out = type(layer).forward(layer, hidden, *arguments, **options)
        return out + hidden.mean(dim=1, keepdim=True) if hidden.shape[1] > beyond else out

    return forward


def test_a_longer_prompt_is_checked_again() -> None:
    model = tiny_model("llama")
    model.layers[1].forward = looks_around(model.layers[1], beyond=12)
    short = Prompts(["a film", "two films"], [0, 1])
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    gains = llvlit.adjoint_gains(model, short, directions).mean
    with pytest.raises(ModelError, match="layer 1"):
        llvlit.adjoint_gains(model, PROMPTS, directions)
    assert (llvlit.adjoint_gains(model, short, directions).mean == gains).all()


def test_a_shorter_prompt_is_checked_again() -> None:
    model = tiny_model("llama")
    layer = model.layers[1]
    around = looks_around(layer, beyond=0)
    layer.forward = lambda hidden, *arguments, **options: (
        around if 2 < hidden.shape[1] <= 6 else type(layer).forward.__get__(layer)
    )(hidden, *arguments, **options)
    long = Prompts(["a long film", "two long films"], [0, 1])
    depth_system(model, long)
    with pytest.raises(ModelError, match="layer 1"):
        depth_system(model, Prompts(["a film", "two long films"], [0, 1]))


class TokenMixer(nn.Module):
    """A part that looks at other tokens."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(dim=1, keepdim=True).expand_as(hidden)


@pytest.mark.parametrize("what", ["a part", "a forward"])
def test_a_part_that_is_changed_after_the_check_is_checked_again(what: str) -> None:
    model = tiny_model("llama")
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    llvlit.adjoint_gains(model, PROMPTS, directions)
    if what == "a part":
        model.layers[1].mlp = TokenMixer().eval()
    else:
        model.layers[1].forward = looks_around(model.layers[1], beyond=0)
    with pytest.raises(ModelError, match="layer 1"):
        llvlit.adjoint_gains(model, PROMPTS, directions)


def test_a_model_that_cannot_run_is_refused_by_name() -> None:
    model = tiny_model("mixtral", **OTHERS["mixtral"])
    model.layers[1].forward = lambda *_arguments, **_options: 1 / torch.zeros(3)[7]
    with pytest.raises(ModelError, match=r"MixtralForCausalLM is refused.* cannot run a prompt in torch\.float64"):
        depth_system(model, PROMPTS)
