"""The shipped family: whole, small enough, deep enough, and trained."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from llvlit.engine.depth import last_token_states
from llvlit.engine.models import EMBEDDED_FOLDER, LanguageModel, embedded_names, load_model
from llvlit.method.concepts import concept_directions, separation
from llvlit.tasks.task import load_task
from llvlit.training.corpus import RATINGS, SUFFIX
from llvlit.training.recipe import SIZES

LARGEST_SHIPMENT = 25e6
FEWEST_LAYERS = {"small": 12, "medium": 18, "large": 24}
READABLE = 0.9
CLEARLY = 0.02
"""Nats per token by which a model must beat the next smaller one, on the same held-out windows."""

each = pytest.mark.parametrize("size", FEWEST_LAYERS)


@cache
def model_of(size: str) -> LanguageModel:
    return load_model(f"embedded/{size}", device="cpu")


@cache
def training_of(size: str) -> dict[str, Any]:
    return json.loads((EMBEDDED_FOLDER / size / "training.json").read_text(encoding="utf-8"))


def test_three_models_are_shipped() -> None:
    assert embedded_names() == tuple(f"embedded/{size}" for size in FEWEST_LAYERS)


def test_shipment_is_small() -> None:
    files = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST_SHIPMENT
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


@each
def test_folder_is_whole_and_in_half_precision(size: str) -> None:
    folder = EMBEDDED_FOLDER / size
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "training.json"):
        assert isinstance(json.loads((folder / name).read_text(encoding="utf-8")), dict)
    with safe_open(folder / "model.safetensors", framework="np") as stored:
        tensors = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118 (not a dict)
    assert all(tensor.dtype == np.float16 and np.isfinite(tensor).all() for tensor in tensors)


@each
def test_shape_is_that_of_its_size(size: str) -> None:
    model = model_of(size)
    assert (model.n_layers, model.hidden_size) == (SIZES[size].n_layers, SIZES[size].hidden_size)
    assert model.n_layers >= FEWEST_LAYERS[size]
    assert model.module.config.model_type == "gpt2"


@each
def test_training_is_told(size: str) -> None:
    training = training_of(size)
    assert {"curve", "held_out", "recipe", "command", "corpus", "environment", "seconds"} <= set(training)
    assert f"--sizes {size}" in training["command"] and f"--seed {training['recipe']['seed']}" in training["command"]
    assert training["curve"][-1]["step"] == training["recipe"]["steps"]  # to the end, not an interim checkpoint
    assert "interim" not in training
    steps = [point["step"] for point in training["curve"]]
    assert steps == sorted(set(steps)) and len(steps) >= 10


def test_recipe_is_the_same_for_all() -> None:
    trainings = [training_of(size) for size in FEWEST_LAYERS]
    for key in ("recipe", "corpus"):
        assert all(training[key] == trainings[0][key] for training in trainings)
    tokenizers = {(EMBEDDED_FOLDER / size / "tokenizer.json").read_bytes() for size in FEWEST_LAYERS}
    assert len(tokenizers) == 1


def test_larger_models_predict_better() -> None:
    losses = [training_of(size)["held_out"]["plain"] for size in FEWEST_LAYERS]
    assert all(larger < smaller - CLEARLY for smaller, larger in pairwise(losses)), losses
    assert losses[0] < 0.6 * np.log(model_of("small").module.config.vocab_size)  # a uniform guess: 8.3


@each
def test_verdicts_are_single_tokens_after_the_suffix(size: str) -> None:
    tokenizer = model_of(size).tokenizer
    verdicts = [tokenizer(f" {rating}")["input_ids"] for rating in RATINGS]
    assert all(len(tokens) == 1 for tokens in verdicts) and len({tokens[0] for tokens in verdicts}) == len(RATINGS)
    suffix = tokenizer(SUFFIX)["input_ids"]
    assert tokenizer.decode(suffix[-1:]).endswith(":")
    for text in ("A dull film", "A dull film.", 'She said "never again"', "Why?!"):
        assert tokenizer(text + SUFFIX)["input_ids"][-len(suffix) :] == suffix
        whole = tokenizer(f"{text}{SUFFIX} 9/10")["input_ids"]
        assert whole[: -len(tokenizer(" 9/10")["input_ids"])] == tokenizer(text + SUFFIX)["input_ids"]


def test_sentiment_is_readable_from_the_last_token_of_the_largest() -> None:
    """Mean-difference direction from 100 prompts per class, judged on 100 others per class."""
    model = model_of("large")
    splits = load_task("film-sentiment").split(100, 1, 100)
    directions = concept_directions(model, splits.concept)
    states = last_token_states(model, splits.evaluation)
    auc = separation(states, np.array(splits.evaluation.labels), directions.vectors)
    assert auc.max() > READABLE, np.round(auc, 2)
    assert auc[0] == pytest.approx(0.5, abs=0.15)  # before layer 0 every prompt is the same colon
