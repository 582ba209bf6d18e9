"""The paper's grid would run: the same path over a hub on the loopback, and on folders of the real shapes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import client_environment, serve, write_task_repositories
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import byte_tokenizer, tiny_module
from llvlit.cli.main import main
from llvlit.study.cells import load_results
from llvlit.study.estimate import PAPER_SHAPES
from llvlit.study.grid import load_grid

SHAPES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20)}
"""Layers, hidden size, heads, as in the published configurations."""


TWO_RUNS = """
import io, shutil, sys
from contextlib import redirect_stderr
from pathlib import Path
from llvlit.cli.main import main

home, out, aside, weights, *command = sys.argv[1:]
with redirect_stderr(io.StringIO()) as told:
    assert main(command) == 1, "a model lacks its weights"
assert "gpt2-large" in told.getvalue() and not Path(out).exists(), told.getvalue()
Path(aside).rename(weights)
shutil.rmtree(home)  # where the clients remember what a commit lacks
sys.exit(main(command))
"""


def test_the_whole_grid_runs_through_the_hub(tmp_path):
    """Real clients, nothing patched; small models under the three names, two data sets, one torn transfer, one gap."""
    hub_folder = tmp_path / "hub"
    write_task_repositories(hub_folder, n_per_class=24)
    for number, name in enumerate(SHAPES):
        folder = hub_folder / "models" / "openai-community" / name
        tiny_module("gpt2", seed=number).float().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    weights = hub_folder / "models" / "openai-community" / "gpt2-large" / "model.safetensors"
    aside = weights.rename(tmp_path / "aside")  # one weight file is missing: said by name before anything has run
    home, out = tmp_path / "home", tmp_path / "out"
    command = [sys.executable, "-c", TWO_RUNS, *map(str, (home, out, aside, weights))]
    command += ["study", "paper", "--prompts", "4", "--device", "cpu", "--json"]
    command += ["--tasks", "sst2", "civil_comments", "--out", str(out)]
    with serve(hub_folder) as hub:
        hub.drops["openai-community/gpt2-large/model.safetensors"] = 1
        environment = client_environment(hub, home)
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert found.returncode == 0, found.stderr
        assert hub.drops["openai-community/gpt2-large/model.safetensors"] == 0  # it did break off, once
        assert any("/api/datasets/stanfordnlp/sst2" in line for line in hub.requests)
    results = load_results(out)
    cells = [one.cell for one in results.finished] + [one["cell"] for one in results.not_visible]
    assert len(cells) == 6 and {cell["model"] for cell in cells} == set(SHAPES)
    assert results.finished and {row["predictor"] for row in json.loads(found.stdout)["agreement"]} >= {"krylov"}
    for one in results.finished:
        assert {row["amplitude"] for row in one.experiment.agreements} == set(load_grid("paper").settings.amplitudes)
        assert {row["schedule"] for row in one.experiment.energies} >= {"optimal, krylov", "uniform", "best layer"}


N_LAYERS = 4
"""Of the real shapes below: memory grows with the layers by their weights alone, and time by much more."""

MEASURED_RUN = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from llvlit.study.estimate import count_memory, model_shape
from llvlit.study.grid import load_grid
from llvlit.study.cells import load_subject, run_study

def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, changes = sys.argv[1], eval(sys.argv[2])
grid = load_grid("paper")
grid = replace(
    grid, models=(folder,), tasks=("film-sentiment",), per_task={}, settings=replace(grid.settings, **changes)
)
before = status("VmRSS")
shape = model_shape(load_subject(folder, device="cpu"))
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of reading the file
outcome = run_study(grid, Path(folder) / "out", device="cpu", progress=False)
assert len(outcome.done) == 1, outcome
cell = grid.cells()[0]
predicted = count_memory(cell, shape, cell.settings.max_tokens, device=torch.device("cpu"))
print((status("VmHWM") - before) / predicted)
"""


def real_config(name, n_layers):
    _, hidden_size, n_heads = SHAPES[name]
    return GPT2Config(
        n_layer=n_layers, n_embd=hidden_size, n_head=n_heads, vocab_size=50257, bos_token_id=0, eos_token_id=0
    )


@pytest.mark.parametrize(("name", "energy_prompts"), [("gpt2", 1), ("gpt2-medium", 0)])
def test_a_model_of_the_real_width_runs_from_a_local_folder_within_the_memory_foretold(name, energy_prompts, tmp_path):
    """Random weights, four prompts a split; the order of the paper, with energies in the smallest."""
    folder = tmp_path / name
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        GPT2LMHeadModel(real_config(name, N_LAYERS)).half().save_pretrained(folder)  # float32 once loaded
    byte_tokenizer().save_pretrained(folder)
    changes = {"concept": 2, "operating": 2, "evaluation": 2, "max_tokens": 48, "energy_prompts": energy_prompts}
    changes |= {"directions": ("mean_difference",), "bases": ("krylov",), "orders": (32,), "amplitudes": (0.1,)}
    command = [sys.executable, "-c", MEASURED_RUN, str(folder), repr(changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert 0.7 < float(done.stdout) < 1.3
    (one,) = load_results(folder / "out").finished
    assert {row["order"] for row in one.experiment.agreements} - {None} == {32}
    assert bool(one.experiment.energies) == bool(energy_prompts)
    assert (one.model["layers"], one.model["hidden_size"]) == (N_LAYERS, SHAPES[name][1])
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_that_a_dry_run_goes_by_are_the_real_ones(name):
    with torch.device("meta"):  # shapes without numbers
        module = GPT2LMHeadModel(real_config(name, SHAPES[name][0]))
    predicted = PAPER_SHAPES[name]
    assert (predicted.n_layers, predicted.hidden_size) == SHAPES[name][:2]
    assert predicted.layer_parameters == sum(p.numel() for p in module.transformer.h[0].parameters() if p.ndim > 1)
    assert predicted.parameters == pytest.approx(sum(p.numel() for p in module.parameters()), rel=1e-3)


def test_a_dry_run_of_the_papers_grid_lists_every_cell_without_the_hub(capsys):
    assert main(["study", "paper", "--dry-run", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 30 and all(min(row["tflop"], row["gigabytes"], row["minutes"]) > 0 for row in rows)
    costs = {name: sum(row["tflop"] for row in rows if row["cell"].startswith(f"{name}--")) for name in SHAPES}
    assert costs["gpt2"] < costs["gpt2-medium"] < costs["gpt2-large"]
