"""The names that every fuzzed call may use: a tiny model, its prompts, what was computed from them, files.

To repeat a call by hand, from the folder ``tests``: ``from fuzzing.things import *``, then paste it.
"""

# ruff: noqa: F401 (calls use these names)
from __future__ import annotations

import collections
import copy
import datetime
import io
import json
import os
import shutil
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import llvlit
import llvlit.errors
from conftest import PROMPTS, byte_tokenizer, tiny_module
from llvlit.cli.main import main
from llvlit.engine.depth import depth_system, last_token_states
from llvlit.engine.models import wrap_model
from llvlit.method.control import energy
from llvlit.study.tables import summarize_energies

__all__ = [name for name in dir() if not name.startswith("_") and name not in ("annotations", "tiny_module", "mpl")]

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
TINY = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}

torch.set_num_threads(1)
mpl.rcParams["figure.max_open_warning"] = 0


class Hostile:
    """Every conversion raises."""

    def __float__(self) -> float:
        raise RuntimeError("no float")

    __int__ = __index__ = __bool__ = __len__ = __iter__ = __array__ = __fspath__ = __float__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


class Mute:
    """Even its repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Text(str):
    """A subclass, as some libraries return."""


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def spoiled(value: Any, number: float, place: int = 0) -> Any:
    """A copy with one number changed."""
    changed = value.clone() if isinstance(value, torch.Tensor) else np.array(value, dtype=float, order="C")
    changed.reshape(-1)[place % max(1, changed.reshape(-1).shape[0])] = number
    return changed


def axes() -> Any:
    """Fresh axes."""
    plt.close("all")
    return plt.figure().add_subplot()


def logits() -> torch.Tensor:
    """What the model says, as it stands now."""
    with torch.no_grad():
        return model.module(**model.tokenizer("the film", return_tensors="pt")).logits


def command(arguments: list[str]) -> str:
    """What a command prints, run in a folder of its own; its exit status must be 0, or 1 or 2 with words."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    out, err, place = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        quick = mock.patch("llvlit.training.family.FINAL_BATCHES", 1)  # a training takes a second
        with redirect_stdout(out), redirect_stderr(err), quick:
            try:
                status = main(arguments)
            except SystemExit as error:
                status = error.code
    finally:
        os.chdir(place)
        shutil.rmtree(folder, ignore_errors=True)
        plt.close("all")
    told = err.getvalue()
    if status not in (0, 1, 2) or "Traceback" in told or (status and not told.strip()):
        raise AssertionError(f"exit status {status}: {told[-300:]}")
    if status:
        raise llvlit.errors.LlvlitError(told)
    return out.getvalue()


def folder_of(files: dict[str, bytes | str | None]) -> Path:
    """A new folder with these files; a folder where the content is None."""
    folder = Path(tempfile.mkdtemp(dir=WORK))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cleared() -> None:
    """Remove what calls have written, fixed files aside."""
    for path in WORK.iterdir():
        if not path.name.startswith("fixed-"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def model_folder(model_type: str, **options: object) -> Path:
    """A tiny model in the hub's format, saved once."""
    folder = WORK / f"fixed-{model_type}"
    if not folder.exists():
        tiny_module(model_type, dtype=torch.float32, **{**TINY, **options}).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def close_to_linear(
    measured: Any, prompts: Any, directions: Any, amplitude: Any, max_tokens: Any, final_norm: Any
) -> bool:
    """Whether gains of a small push are those of first order."""
    options = {"max_tokens": max_tokens, "final_norm": final_norm}
    linear = llvlit.adjoint_gains(model, prompts, directions, **options).mean
    return amplitude > 0.02 or bool(np.linalg.norm(measured.mean - linear) <= 0.05 * np.linalg.norm(linear))


def reached(found: Any) -> bool:
    """Whether every search that says so has reached its target, and not far beyond it."""
    there = np.isfinite(found.scale)
    return bool(np.allclose(found.reached[there], found.target, rtol=0.25, atol=0))


def orthonormal(basis: Any, rank: int) -> bool:
    """Whether the first columns are, and the others are zero."""
    first = basis[:, :rank]
    return torch.allclose(first.T @ first, torch.eye(rank).to(first), atol=1e-6) and not basis[:, rank:].any()


def units(vectors: Any) -> bool:
    """Whether every vector has norm 1."""
    return bool(torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)).to(vectors), atol=1e-6))


torch.manual_seed(0)
model = wrap_model(tiny_module("gpt2", dtype=torch.float32, **TINY), byte_tokenizer(), name="tiny")
prompts = PROMPTS
MODEL_FOLDER = str(model_folder("gpt2"))
task = llvlit.Task(
    "tiny", "Ten films.", ("bad", "good"), tuple(f"{word} film {n}" for n in range(8) for word in ("bad", "good")),
    (0, 1) * 8, groups=tuple(n for n in range(8) for _ in (0, 1)),
)  # fmt: skip
splits = task.split(concept=3, operating=2, evaluation=2)
directions = llvlit.concept_directions(model, prompts)
system = depth_system(model, prompts)
states = last_token_states(model, prompts)
gains = llvlit.measured_gains(model, prompts, directions)
gain_matrix = llvlit.gain_matrix(model, prompts, directions)
surrogate = llvlit.identify(model, prompts, directions, order=4, basis="reachability")
law = llvlit.lqr(surrogate, 1.0)
several = [directions, llvlit.method.concepts.random_directions(5, 8)]
tensor = llvlit.gain_tensor(model, prompts, several)
shape = np.array([1.0, 2.0, 1.0, -1.0])
steering = llvlit.SteeringVectors(np.outer([0.0, 0.0, 1.0, 2.0], np.arange(8)))
matrix = torch.tensor([[0.0, 0, 1, 2], [1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.float64)
required = llvlit.required_energy(model, prompts.select([0, 1]), directions, shape, 0.1)
match = llvlit.agreement(surrogate.gains(), gains)
fisher = llvlit.fisher_metric(model, prompts, directions)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    advice = llvlit.recommend(model, prompts, directions, budget=0.02)
others = llvlit.Prompts(("a new film", "an old play"), (1, 0))
PLAN_FOLDER, FISHER_FILE = str(WORK / "fixed-plan"), str(WORK / "fixed-fisher.safetensors")
advice.save(PLAN_FOLDER)
fisher.save(FISHER_FILE)
GAINS_FILE, LLV_FILE = str(WORK / "fixed-gains.safetensors"), str(WORK / "fixed-llv.safetensors")
MATRIX_FILE = str(WORK / "fixed-matrix.safetensors")
TENSOR_FILE = str(WORK / "fixed-tensor.safetensors")
STEERING_FILE = str(WORK / "fixed-steering.json")
tensor.save(TENSOR_FILE)
llvlit.export_vectors(steering, STEERING_FILE, format="easysteer")
gains.save(GAINS_FILE)
gain_matrix.save(MATRIX_FILE)
surrogate.save(LLV_FILE)

rng = np.random.default_rng(0)
cells_of = [("m", task, seed) for task in ("a", "b", "c") for seed in (0, 1)]
frame = pd.DataFrame(cells_of, columns=["model", "task", "seed"]).assign(
    predictor=["x", "y"] * 3, x=rng.random(6), spearman=rng.random(6), value=rng.random(6)
)
agreement_rows = frame.assign(predictor="krylov", relative_error=1 + rng.random(6))
energies = frame.assign(ratio=1 + rng.random(6), n_out_of_reach=0, metric="relative", layers="all", schedule="uniform")
energy_means = summarize_energies(energies, ["model", "metric", "layers", "schedule"])
row = pd.Series({"x": 0.5, "x_low": 0.4, "x_high": 0.7, "value": 0.5, "value_low": 0.1, "value_high": 0.4})

__all__ += [name for name in dir() if not name.startswith("_") and name not in ("annotations", "tiny_module", "mpl")]
