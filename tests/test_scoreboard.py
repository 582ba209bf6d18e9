"""The paper's numbers beside ours: what was not run has its command, what was is shown; chapters take new studies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llvlit.cli.main import parser
from llvlit.publishing.scoreboard import ABSENT, ablation_rows, energy_rows, size_rows, task_rows
from llvlit.study.grid import change_axes, load_grid
from llvlit.study.tables import DASH, at_setting, joined, means, paired, read_study, verdict

ROOT = Path(__file__).resolve().parent.parent
PAPER = json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))
REAL = read_study("real", start=ROOT)
ABLATIONS = read_study("ablations", start=ROOT)
COMMAND = re.compile(rf"^{ABSENT}: `llvlit (.+)`$")


def write_study(results: Path, name: str, models: dict[str, tuple[str, int]], seeds=(0, 1, 2)) -> None:
    """A study made of rows of the committed ``real``, under other models' names and sizes."""
    (results / name).mkdir()
    for kind in ("cells", "agreement", "energy"):
        frame = pd.read_csv(ROOT / "results" / "real" / f"{kind}.csv", keep_default_na=False, na_values=[""])
        frame = frame[frame["model"].isin(models) & frame["seed"].isin(seeds)]
        if kind == "cells":
            frame["parameters"] = frame["model"].map({model: size for model, (_, size) in models.items()})
        frame["model"] = frame["model"].map({model: other for model, (other, _) in models.items()})
        frame.to_csv(results / name / f"{kind}.csv", index=False)
    shutil.copy(ROOT / "results" / "real" / "provenance.json", results / name)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Results as committed; besides, two of the paper's three models on one seed, and two larger ones of ours."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("paper", "larger"))
    of_paper = {"embedded/small": ("gpt2", 124_000_000), "embedded/large": ("gpt2-large", 774_000_000)}
    write_study(folder / "results", "paper", of_paper, seeds=(0,))
    larger = {"embedded/small": ("run/models/36x192", 16_832_640), "embedded/medium": ("run/models/48x256", 38_998_528)}
    write_study(folder / "results", "larger", larger)
    return folder


def all_rows(theirs):
    assert REAL and ABLATIONS
    tables = (size_rows(PAPER, REAL, theirs), task_rows(PAPER, REAL, theirs), energy_rows(PAPER, REAL, theirs))
    return [row for table in (*tables, ablation_rows(PAPER, [REAL, ABLATIONS], theirs)) for row in table]


def test_every_headline_number_stands_in_a_row_with_the_command_where_it_was_not_run():
    rows = all_rows(None)
    told = [" ".join(row) for row in rows]
    for model in PAPER["models"]:
        assert any(f"{model['spearman']:g} / {model['pearson']:g}" in row and model["name"] in row for row in told)
    for entry in (*PAPER["tasks"], *PAPER["energies"]):
        assert any(row[0] == entry.get("name", entry.get("schedule")) for row in rows)
    assert {row[0] for row in rows} >= set(PAPER["claims"])
    here = len(PAPER["models"]) + len(PAPER["tasks"]) + len(PAPER["energies"])
    assert sum(bool(COMMAND.match(cell)) for row in rows for cell in row) >= here
    assert all(ABSENT not in cell or COMMAND.match(cell) for row in rows for cell in row)


def test_the_commands_are_ours_and_cover_what_their_rows_lack(monkeypatch):
    monkeypatch.chdir(ROOT)
    for row in task_rows(PAPER, REAL, None):
        task = next((one["task"] for one in PAPER["tasks"] if one["name"] == row[0]), row[0])
        for found in filter(None, map(COMMAND.match, row)):
            options = parser().parse_args(found[1].split())
            grid = change_axes(load_grid(options.grid), {key: getattr(options, key) for key in ("models", "tasks")})
            assert task in grid.tasks and options.save == f"results/{grid.name}"
            assert grid.models == ((PAPER["tasks_of"],) if grid.name == "paper" else load_grid("real").models)
            assert len(grid.tasks) == 1 or grid == load_grid(options.grid)
    for row, model in zip(size_rows(PAPER, REAL, None), PAPER["models"], strict=True):
        assert parser().parse_args(COMMAND.match(row[2])[1].split()).models == [model["hub"]]


def test_what_was_run_of_the_paper_is_shown_and_only_the_rest_is_not(checkout):
    theirs = read_study("paper", start=checkout)
    gpt2, medium, large = size_rows(PAPER, REAL, theirs)
    assert "6 tasks, 6 pairs" in gpt2[2] and "6 tasks, 6 pairs" in large[2] and COMMAND.match(medium[2])
    rows = at_setting(theirs, PAPER).query("model == 'gpt2' and predictor == 'krylov'")
    assert gpt2[2].startswith(f"{rows['spearman'].mean():.2f} [")
    by_task = {row[0]: row for row in task_rows(PAPER, REAL, theirs)}
    assert re.fullmatch(r"-?\d\.\d\d / -?\d\.\d\d", by_task["SST-2"][5])  # one seed: no interval
    assert by_task["Civil Comments toxicity"][5] == "concept not visible"
    assert COMMAND.match(by_task["Yelp polarity"][5]) and by_task["Yelp polarity"][1] == DASH
    assert not any(ABSENT in row[2] for row in energy_rows(PAPER, REAL, theirs))
    run = {row[1]: row[2] for row in ablation_rows(PAPER, [REAL, ABLATIONS], theirs)}
    assert "6 tasks" in run["krylov minus random"] and COMMAND.match(run["krylov, d = 32 to 64"])


def test_length_stands_beside_every_task_also_where_the_concept_is_not_visible():
    lengths = {row[0]: row[1] for row in task_rows(PAPER, REAL, None)}
    cola = REAL.cells[REAL.cells["task"] == "cola"]
    assert not cola["visible"].any() and lengths["cola"] == f"{cola['length_auc'].mean():.2f}"
    without = REAL.cells.assign(length_auc=np.nan)
    unknown = type(REAL)(without, REAL.agreement, REAL.energy, REAL.provenance)
    assert {row[1] for row in task_rows(PAPER, unknown, None)} == {DASH}


def test_one_task_has_a_mean_but_neither_interval_nor_verdict():
    frame = pd.DataFrame({"task": ["a"] * 3, "seed": [0, 1, 2], "model": "m", "x": [0.1, 0.2, 0.3]})
    row = means(frame, ["model"], ["x"]).iloc[0]
    assert row["x"] == pytest.approx(0.2) and np.isnan([row["x_low"], row["x_high"]]).all() and row["n_pairs"] == 3
    both = pd.concat([frame.assign(kind="old", spearman=0.1), frame.assign(kind="new", spearman=0.5)])
    change = paired(both, "kind", "new", "old")
    assert change["value"] == pytest.approx(0.4) and verdict(change) == "too few tasks"
    two = pd.concat([both, both.assign(task="b")])
    assert verdict(paired(two, "kind", "new", "old")) == "better"
    assert paired(two[two["kind"] == "old"], "kind", "new", "old")["n_pairs"] == 0


def test_further_tasks_of_the_same_models_join_ours():
    frames = (REAL.cells, REAL.agreement, REAL.energy)
    more = type(REAL)(*(frame[frame["task"] == "imdb"].assign(task="yelp_polarity") for frame in frames), {})
    row = next(row for row in task_rows(PAPER, joined(REAL, more), None) if row[0] == "Yelp polarity")
    assert ABSENT not in row[3] and row[4] == "3 of 3"


# The chapters themselves, on other results


def run_cells(name: str, live: str) -> tuple[dict, str]:
    """Names and shown texts of a chapter's code cells, but for those that match ``live``, which run models."""
    from IPython import display as shown

    texts = []

    def keep(*things, metadata=None, **_):
        texts.extend(metadata["llvlit"]["caption"] if metadata else str(thing.data) for thing in things)

    names: dict = {"__name__": "chapter"}
    text = (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "display", keep)
        for code in re.findall(r"^```\{code-cell\} ipython3\n(?::[^\n]*\n)*(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if not re.search(live, code):
                code = code.replace("n_studies=500", "n_studies=5")  # simulated, whatever the results are
                exec(compile(code, name, "exec"), names)
    return names, "\n".join(texts)


def test_the_scoreboard_shows_the_paper_once_it_was_run(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    _, text = run_cells("scoreboard", "RUNNING|exact = ")
    assert "run here: gpt2, gpt2-large" in text and "the paper's models among them" in text
    assert "--models gpt2-medium" in text and "--models gpt2 " not in text


@pytest.fixture(scope="module")
def scaling(checkout):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        return run_cells("scaling", r"\blive\b|load_subject")


def test_larger_models_of_the_family_are_shown_once_they_were_measured(scaling):
    names, text = scaling
    assert [name.rpartition("/")[2] for name in names["family"]] == ["small", "medium", "large"]
    assert [name.rpartition("/")[2] for name in names["wider"]] == ["36x192", "48x256"]
    assert "From large to 48x256" in text and "Not measured on tasks" not in text


def test_a_checkpoint_shows_a_concept_only_where_every_seed_does(scaling):
    names, _ = scaling
    cells = pd.DataFrame(
        {
            "task": ["a"] * 4 + ["b"] * 4,
            "step": [0, 0, 1, 1] * 2,
            "seed": [0, 1] * 4,
            "visible": [True] * 5 + [False] + [True] * 2,
            "best_separation": [0.9, 0.65, 0.9, 0.64, 0.9, np.nan, 0.7, 0.7],
        }
    )
    assert names["showing"](cells, "step").to_dict() == {"a": {0: True, 1: False}, "b": {0: False, 1: True}}


def test_claims_from_one_task_get_no_verdict(scaling):
    names, _ = scaling
    verdicts = {over: verdict for _, _, over, verdict in names["claims"]}
    assert all(verdict == names["TOO_FEW"] for over, verdict in verdicts.items() if over.startswith("1 task,"))
    one = pd.Series({"n_tasks": 1, "spearman_low": np.nan, "factor_low": np.nan})
    assert names["rising"](one) == names["good"](one) == names["TOO_FEW"]
