"""Any decoder: exact against hooks on the full forward, or refused by name with the reason; none silently wrong."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llvlit
from conftest import PROMPTS, tiny_model
from llvlit.cli.main import main
from llvlit.engine.architectures import check_all, check_variant, model_types, tiny_config
from llvlit.engine.depth import DepthSystem
from llvlit.engine.oracle import EXACT
from llvlit.errors import InputError
from llvlit.method.concepts import as_directions, random_directions

ROOT = Path(__file__).resolve().parent.parent
WANTED = [
    *("llama", "llama4_text", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "gemma3", "phi3", "gpt_oss", "olmo2", "smollm3", "granite", "cohere2", "stablelm", "falcon"),
    *("gptj", "mpt", "deepseek_v3"),
]
MENDED = ["mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "dbrx", "jamba", "qwen3_5_text", "bloom", "gpt_neo"]
MENDED += ["openai-gpt"]
REFUSED = {
    "bert": "is not a causal decoder",
    "gemma3n_text": "keys and values of an earlier layer",
    "hrm_text": "has no list of 4 layers",
    "qwen4_exp_text": "128 numbers a token, not the hidden size 32",
}


@pytest.mark.parametrize("model_type", [*WANTED, *MENDED])
def test_values_and_derivatives_are_those_of_hooks_on_the_full_forward(model_type: str) -> None:
    row = check_variant(model_type)
    assert row["status"] == "exact", row
    assert max(float(row["value"]), float(row["derivative"])) < EXACT / 5


@pytest.mark.parametrize("variant", ["massive first token", "long rope"])
def test_massive_activations_and_thresholds_that_are_passed_change_nothing(variant: str) -> None:
    for model_type in ("phi3", "qwen2", "moshi"):  # moshi chooses its frequencies inside the layer
        assert check_variant(model_type, variant)["status"] == "exact"


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_exact_is_refused_by_its_reason(model_type: str) -> None:
    row = check_variant(model_type)
    assert row["status"] == "refused" and REFUSED[model_type] in row["reason"], row


def test_an_encoder_that_is_told_to_be_a_decoder_is_one() -> None:
    assert [(row["variant"], row["status"]) for row in check_all(["bert"])] == [
        ("plain", "refused"),
        ("decoder", "exact"),
    ]


@pytest.mark.parametrize(("call", "deviation"), [("propagate", "value_deviation"), ("vjp", "derivative_deviation")])
def test_the_oracle_sees_what_the_systems_own_check_does_not(monkeypatch: Any, call: str, deviation: str) -> None:
    model = tiny_model("gpt2")
    assert llvlit.check_architecture(model).status == "exact"
    right = getattr(DepthSystem, call)
    monkeypatch.setattr(DepthSystem, call, lambda *arguments, **options: 1.001 * right(*arguments, **options))
    found = llvlit.check_architecture(model)
    assert found.status == "wrong" and getattr(found, deviation) > EXACT


def test_an_unknown_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'mamba'"):
        list(check_all(["mambaa"]))


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "found.csv"
    assert main(["architectures", "gpt2", "--json", "--save", str(path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    with path.open(encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == rows
    assert main(["architectures", "gpt2", "--save", str(tmp_path / "found.txt")]) == 2


def test_the_committed_table_is_whole_and_the_page_counts_it() -> None:
    with (ROOT / "results" / "architectures.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert not [row for row in rows if row["status"] in ("wrong", "fault")]
    assert {row["type"] for row in rows if row["variant"] == "plain"} >= {*WANTED, *MENDED, *REFUSED}
    assert all(max(float(row["value"]), float(row["derivative"])) < EXACT for row in rows if row["status"] == "exact")
    counts = Counter(row["status"] for row in rows if row["variant"] == "plain")
    page = (ROOT / "book" / "architectures.md").read_text(encoding="utf-8")
    told = re.search(r"Of the (\d+) model types, (\d+) are exact, (\d+) are refused and (\d+) cannot be built", page)
    assert told
    numbers = (sum(counts.values()), counts["exact"], counts["refused"], counts["not built"])
    assert tuple(map(int, told.groups())) == numbers
    assert f"{len(rows)} variants" in page and f"transformers {rows[0]['transformers']}" in page


def chosen_experts(model: llvlit.LanguageModel, ids: tuple[int, ...], start: int, push: torch.Tensor) -> list[Any]:
    """Oracle: the experts of the last token in each layer of the full model, pushed before one of them."""
    chosen: list[Any] = []
    handles = [
        model.layers[start].register_forward_pre_hook(
            lambda _, args: (torch.cat([args[0][:, :-1], args[0][:, -1:] + push], dim=1), *args[1:])
        )
    ]
    handles += [
        part.register_forward_hook(lambda _, __, out: chosen.append(sorted(out[-1].view(len(ids), -1)[-1].tolist())))
        for part in model.module.modules()
        if type(part).__name__ == "MixtralTopKRouter"
    ]
    with torch.no_grad():
        model.module(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    assert len(chosen) == model.n_layers
    return chosen


def test_pushes_that_change_the_route_are_counted_and_a_smaller_amplitude_is_named() -> None:
    model = tiny_model("mixtral", num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model.module.config._experts_implementation = "eager"
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    vectors = as_directions(directions).on(model)
    with pytest.warns(UserWarning, match="router of tiny-mixtral"):
        gains = llvlit.measured_gains(model, PROMPTS, directions, amplitude=1.0)
    ids = [tuple(model.tokenizer(text)["input_ids"]) for text in PROMPTS.texts]
    for start in range(model.n_layers):
        routes = [[chosen_experts(model, one, start, sign * vectors[start]) for sign in (0, 1, -1)] for one in ids]
        changed = [any(route[start:] != pushed[0][start:] for route in pushed) for pushed in routes]
        assert gains.metadata["rerouted"][start] == sum(changed) / len(changed)
    adjoint = llvlit.adjoint_gains(model, PROMPTS, directions).per_prompt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = llvlit.measured_gains(model, PROMPTS, directions, amplitude=1e-4)
    assert set(small.metadata["rerouted"]) == {0.0} and "suggested_amplitude" not in small.metadata
    assert abs(small.per_prompt - adjoint).max() < 1e-3 * abs(adjoint).max()
    assert abs(gains.per_prompt - adjoint).max() > 0.1 * abs(adjoint).max()
    assert gains.metadata["suggested_amplitude"] < 0.1


def test_a_trust_radius_tells_how_many_prompts_its_pushes_send_to_other_experts() -> None:
    model = tiny_model("mixtral", num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model.module.config._experts_implementation = "eager"
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    vectors = as_directions(directions).on(model)
    states = llvlit.depth_system(model, PROMPTS).states
    with pytest.warns(UserWarning, match="radius is that of no curve") as told:
        radius = llvlit.trust_radius(model, PROMPTS, directions, np.eye(4), coverage=0.5)
    assert len(told) == 1
    ids = [tuple(model.tokenizer(text)["input_ids"]) for text in PROMPTS.texts]
    shares = []
    for start in range(model.n_layers):
        changed = []
        for row, one in enumerate(ids):
            step = 0.02 * states[row, start].norm() * vectors[start]
            routes = [chosen_experts(model, one, start, scale * step) for scale in (0, 1, -1, 2, -2)]
            changed.append(any(route[start:] != routes[0][start:] for route in routes))
        shares.append(sum(changed) / len(changed))
    assert radius.metadata["rerouted"] == shares and max(shares) > 0
    assert f"sends {max(shares):.0%} of the prompts" in str(told[0].message)


@pytest.mark.filterwarnings("ignore:.*trust radius")
def test_a_recommendation_tells_how_many_prompts_its_plan_sends_to_other_experts() -> None:
    model = tiny_model("mixtral", num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model.module.config._experts_implementation = "eager"
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    vectors = as_directions(directions).on(model)
    shares = []
    for budget, options in ((1e-6, {}), (0.1, {}), (0.1, {"positions": "all"})):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            advice = llvlit.recommend(model, PROMPTS, directions, budget=budget, layers=(2, 2), **options)
        shares.append(advice.metadata["rerouted"])
        warned = [str(each.message) for each in told if "router of" in str(each.message)]
        assert len(warned) == (shares[-1] > 0.05)
        assert (f"tiny-mixtral sends {shares[-1]:.0%} of the prompts" in str(advice)) == (shares[-1] > 0)
        if not options:
            push = advice.inputs[2] * vectors[2]
            ids = [tuple(model.tokenizer(text)["input_ids"]) for text in PROMPTS.texts]
            changed = [
                chosen_experts(model, one, 2, push)[2:] != chosen_experts(model, one, 2, 0 * push)[2:] for one in ids
            ]
            assert shares[-1] == sum(changed) / len(changed)
    assert shares[0] < shares[1] <= shares[2]
    assert "its own experts" in str(advice.fisher)


def test_a_model_without_experts_has_no_routes(gpt2: llvlit.LanguageModel) -> None:
    directions = random_directions(gpt2.n_layers + 1, gpt2.hidden_size)
    assert "rerouted" not in llvlit.measured_gains(gpt2, PROMPTS, directions).metadata


def test_every_type_has_a_tiny_configuration_with_all_kinds_of_layers() -> None:
    assert len(model_types()) > 150
    assert len(set(tiny_config("qwen3_next").layer_types)) == 2
