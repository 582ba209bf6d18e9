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


def test_the_whole_grid_runs_through_the_hub(tmp_path):
    """Real clients, nothing patched; small models under the three names, ten data sets, one torn transfer, one gap."""
    hub_folder = tmp_path / "hub"
    write_task_repositories(hub_folder, n_per_class=24)
    for number, name in enumerate(SHAPES):
        folder = hub_folder / "models" / "openai-community" / name
        tiny_module("gpt2", seed=number).float().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    weights = hub_folder / "models" / "openai-community" / "gpt2-large" / "model.safetensors"
    command = [sys.executable, "-m", "llvlit", "study", "paper", "--prompts", "4", "--device", "cpu", "--json"]
    command += ["--tasks", "sst2", "amazon_polarity", "civil_comments", "--out", str(tmp_path / "out")]
    with serve(hub_folder) as hub:

        def study(home):  # the clients remember what a commit lacks, so each gets a cache of its own
            environment = client_environment(hub, tmp_path / home)
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

        kept = weights.rename(tmp_path / "aside")
        refused = study("first")  # one weight file is missing: said by name before anything has run
        assert refused.returncode == 1 and "gpt2-large" in refused.stderr and not (tmp_path / "out").exists()
        kept.rename(weights)
        hub.drops["openai-community/gpt2-large/model.safetensors"] = 1
        found = study("second")
        assert found.returncode == 0, found.stderr
        assert hub.drops["openai-community/gpt2-large/model.safetensors"] == 0  # it did break off, once
        assert any("/api/datasets/stanfordnlp/sst2" in line for line in hub.requests)
    results = load_results(tmp_path / "out")
    cells = [one.cell for one in results.finished] + [one["cell"] for one in results.not_visible]
    assert len(cells) == 9 and {cell["model"] for cell in cells} == set(SHAPES)
    assert results.finished and {row["predictor"] for row in json.loads(found.stdout)["agreement"]} >= {"krylov"}
    for one in results.finished:
        assert {row["amplitude"] for row in one.experiment.agreements} == set(load_grid("paper").settings.amplitudes)
        assert {row["schedule"] for row in one.experiment.energies} >= {"optimal, krylov", "uniform", "best layer"}


SHORT = {"orders": (2, 4), "amplitudes": (0.1,), "energy_prompts": 0}
AS_IN_THE_PAPER = {"directions": ("mean_difference",), "bases": ("krylov",), "orders": (32,), "amplitudes": (0.1,)}
SMALLER = {  # what keeps each short; of the largest, energies alone would take minutes
    "gpt2": {**AS_IN_THE_PAPER, "energy_prompts": 1},
    "gpt2-medium": SHORT,
    "gpt2-large": {**AS_IN_THE_PAPER, "energy_prompts": 0},
}
MEASURED_RUN = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch
from llvlit.study.estimate import PAPER_SHAPES, count_memory, model_shape
from llvlit.study.grid import load_grid
from llvlit.study.cells import load_subject, run_study

def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

name, folder, changes = sys.argv[1], sys.argv[2], eval(sys.argv[3])
grid = load_grid("paper")
grid = replace(
    grid, models=(folder,), tasks=("film-sentiment",), per_task={}, settings=replace(grid.settings, **changes)
)
before = status("VmRSS")
layer_parameters = model_shape(load_subject(folder, device="cpu")).layer_parameters
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of reading the file
outcome = run_study(grid, Path(folder) / "out", device="cpu", progress=False)
assert len(outcome.done) == 1, outcome
cell = grid.cells()[0]
predicted = count_memory(cell, PAPER_SHAPES[name], cell.settings.max_tokens, device=torch.device("cpu"))
print(json.dumps({"ratio": (status("VmHWM") - before) / predicted, "layer_parameters": layer_parameters}))
"""


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_the_real_shape_runs_from_a_local_folder_within_the_memory_foretold(name, tmp_path):
    """Random weights, four prompts a split; the order of the paper, with energies in the smallest."""
    n_layers, hidden_size, n_heads = SHAPES[name]
    folder = tmp_path / name
    config = GPT2Config(
        n_layer=n_layers, n_embd=hidden_size, n_head=n_heads, vocab_size=50257, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).half().save_pretrained(folder)  # float32 once loaded
    byte_tokenizer().save_pretrained(folder)
    changes = {"concept": 2, "operating": 2, "evaluation": 2, "max_tokens": 48, **SMALLER[name]}
    command = [sys.executable, "-c", MEASURED_RUN, name, str(folder), repr(changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.7 < found["ratio"] < 1.3
    (one,) = load_results(folder / "out").finished
    assert {row["order"] for row in one.experiment.agreements} - {None} == set(changes["orders"])
    assert bool(one.experiment.energies) == bool(changes["energy_prompts"])
    assert (one.model["layers"], one.model["hidden_size"]) == (n_layers, hidden_size)
    predicted = PAPER_SHAPES[name]  # what a dry run without the hub goes by
    assert (predicted.n_layers, predicted.hidden_size) == (n_layers, hidden_size)
    assert predicted.layer_parameters == found["layer_parameters"]
    assert predicted.parameters == pytest.approx(one.model["parameters"], rel=1e-3)
    shutil.rmtree(folder)


def test_a_dry_run_of_the_papers_grid_lists_every_cell_without_the_hub(capsys):
    assert main(["study", "paper", "--dry-run", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 30 and all(min(row["tflop"], row["gigabytes"], row["minutes"]) > 0 for row in rows)
    costs = {name: sum(row["tflop"] for row in rows if row["cell"].startswith(f"{name}--")) for name in SHAPES}
    assert costs["gpt2"] < costs["gpt2-medium"] < costs["gpt2-large"]
