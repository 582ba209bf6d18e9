"""What committed studies say, and the tables of the appendix: paired changes, reference rows, the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llvlit.errors import FileError, InputError
from llvlit.publishing import scoreboard
from llvlit.study import comparison
from llvlit.study.comparison import SAME, agreements, changes, families, setting_effects, shared
from llvlit.study.tables import committed, means, paired, read_table

ROOT = Path(__file__).resolve().parent.parent
PAPER = scoreboard.paper_numbers(start=ROOT)
REAL = agreements("real", start=ROOT)


def test_reference_rows_are_one_a_cell_and_predictor_at_the_papers_setting():
    assert not REAL.duplicated(["model", "task", "seed", "predictor"]).any()
    assert set(REAL["order"].dropna()) == {32} and set(REAL["amplitude"]) == {0.1}
    table = read_table(committed("real", start=ROOT), "agreement")
    named = (table["model"] == "embedded/large") & (table["task"] == "sst2") & (table["seed"] == 1)
    named &= (table["predictor"] == "krylov") & (table["order"] == 32) & (table["layers"] == "not 0")
    mine = REAL.query("model == 'embedded/large' and task == 'sst2' and seed == 1 and predictor == 'krylov'")
    assert mine["relative_error"].item() == table.loc[named, "relative_error"].item()
    assert set(agreements("real", order=8, start=ROOT)["order"].dropna()) == {8}


def test_an_error_on_the_prompts_that_are_measured_has_no_interval_over_them():
    same = REAL[REAL["predictor"] == SAME]
    assert len(same) and same[["relative_error_low", "relative_error_high"]].isna().all(axis=None)
    assert REAL[REAL["predictor"] == "adjoint"]["relative_error_low"].notna().all()


def test_shared_rows_are_of_pairs_that_every_model_shows():
    rows = shared(REAL, ["embedded/small", "embedded/medium", "embedded/large"])
    pairs = rows.groupby("model")[["task", "seed"]].apply(lambda part: set(part.itertuples(index=False, name=None)))
    assert len(pairs) == 3 and len({frozenset(each) for each in pairs}) == 1 and len(pairs.iloc[0]) == 19


def test_a_change_is_paired_and_a_factor_is_a_ratio_of_errors():
    large = REAL[REAL["model"] == "embedded/large"]
    still = changes(large, large)
    assert (still[["spearman", "relative_error"]] == 0).all(axis=None) and (still["factor"] == 1).all()
    doubled = large.assign(relative_error=2 * large["relative_error"], spearman=large["spearman"] - 0.25)
    shuffled = changes(large, doubled.sample(frac=1, random_state=0))  # pairs are found, whatever the order of rows
    assert np.allclose(shuffled[["factor", "factor_low", "factor_high"]], 2)
    assert np.allclose(shuffled[["spearman", "spearman_low", "spearman_high"]], -0.25)
    one = large[large["task"] == "sst2"]
    assert changes(one, one.assign(spearman=0.5))["spearman_low"].isna().all()
    with pytest.raises(InputError, match="lacks task or seed"):
        changes(large, large, on=["model"])


def test_one_task_has_a_mean_but_no_interval():
    frame = pd.DataFrame({"task": ["a"] * 3, "seed": [0, 1, 2], "model": "m", "x": [0.1, 0.2, 0.3]})
    row = means(frame, ["model"], ["x"]).iloc[0]
    assert row["x"] == pytest.approx(0.2) and np.isnan([row["x_low"], row["x_high"]]).all() and row["n_pairs"] == 3
    both = pd.concat([frame.assign(kind="old", spearman=0.1), frame.assign(kind="new", spearman=0.5)])
    change = paired(both, "kind", "new", "old")
    assert change["value"] == pytest.approx(0.4) and np.isnan(change["value_low"])
    assert paired(both[both["kind"] == "old"], "kind", "new", "old")["n_pairs"] == 0


def test_effects_of_settings_are_those_of_the_equation_and_their_words_follow_the_line():
    effects = setting_effects(start=ROOT)
    rows = agreements("ablations", start=ROOT)
    wide = rows.pivot_table("relative_error", ["task", "seed", "model"], "predictor")
    by_hand = (wide["random"] - wide["krylov"]).groupby(["task", "seed"]).mean().groupby("task").mean().mean()
    named = effects.set_index(["setting", "change", "predictor"])
    assert named.loc[("Basis", "krylov to random", "krylov"), "relative_error"] == pytest.approx(by_hand)
    assert {"Basis", "Order", "Amplitude", "Direction", "Jacobian"} <= set(effects["setting"])
    low, high = effects["relative_error_low"], effects["relative_error_high"]
    assert ((effects["says"] == "no") == ((low > -0.05) & (high < 0.05))).all()
    assert (low[effects["says"] == "worse"] >= 0.05).all() and (high[effects["says"] == "better"] <= -0.05).all()


def test_a_checkpoint_shows_a_concept_only_where_every_seed_does():
    cells = read_table(committed("training", start=ROOT), "cells")
    clear = cells["visible"].astype(bool) & (cells["best_separation"] >= 0.65)
    last = cells[clear & (cells["model"] == "run/models/small-1200")].groupby("task").size()
    course = comparison.course(start=ROOT)
    assert set(course.query("step == 1200 and shown")["task"]) == set(last[last == 3].index)
    assert (course["low"] <= course["relative_error"]).all() and (course["relative_error"] <= course["high"]).all()


def test_controls_say_what_each_step_holds_fixed():
    found = comparison.control_changes(start=ROOT)
    cells = read_table(committed("controls", start=ROOT), "cells").groupby("model")[["n_layers", "hidden_size"]].first()
    for step, (before, after) in comparison.CONTROLS.items():
        same = cells.loc[before] == cells.loc[after]
        assert same.tolist() == ([True, True] if "trained" in step else [step[:5] == "width", step[:5] == "depth"])
    assert len(found.loc["krylov"]) == len(comparison.CONTROLS) + 1
    larger = families(start=ROOT).query("name == '36x192'")
    assert (larger["n_layers"] > 32).all()  # the step to more layers than the order


def test_straightness_is_of_layers_with_a_direction_of_their_own(tmp_path):
    rows = comparison.straightness(start=ROOT)
    assert rows["own"].all() and rows["depth"].between(0, 1).all() and (rows["low"] <= rows["high"]).all()
    assert set(rows.query("trained")["name"]) == {"small", "medium", "large", "SmolLM2-135M", "Gemma 3 270M"}
    (tmp_path / "results" / "real").mkdir(parents=True)
    (tmp_path / "results" / "real" / "provenance.json").write_text("{}")
    with pytest.raises(FileError, match="straightness"):
        comparison.straightness(start=tmp_path)


def test_every_headline_number_of_the_paper_stands_in_a_table():
    sizes, tasks = scoreboard.sizes_table(start=ROOT), scoreboard.tasks_table(start=ROOT)
    for model in PAPER["models"]:
        row = sizes[sizes["Model"].str.startswith(f"{model['name']} ")].iloc[0]
        assert row["Spearman / Pearson"] == f"{model['spearman']} / {model['pearson']}"
    assert len(sizes) <= 8
    for task in PAPER["tasks"]:
        assert tasks.set_index("Task").loc[task["name"], "GPT-2-large (the paper)"] == task.get(
            "spearman", "\N{EN DASH}"
        )
    energies = scoreboard.energies_table(start=ROOT).set_index("Schedule")["GPT-2-large (the paper)"]
    for entry in PAPER["energies"]:
        assert energies[entry["schedule"]] == f"{entry['low']} to {entry['high']}"


@pytest.mark.parametrize(
    "make",
    [
        *(scoreboard.sizes_table, scoreboard.tasks_table, scoreboard.energies_table, scoreboard.agreement_table),
        *(scoreboard.concepts_table, scoreboard.orders_table, scoreboard.settings_table, scoreboard.sources_table),
    ],
)
def test_tables_are_whole_and_their_numbers_numbers(make):
    frame = make(start=ROOT)
    texts = frame.astype(str)
    assert len(frame) and not texts.isin(["nan", ""]).any(axis=None)
    assert not texts.apply(lambda column: column.str.contains("nan|inf", regex=True)).any(axis=None)


def test_a_table_tells_the_mean_of_its_cells():
    rows = families(start=ROOT).query("name == 'SmolLM2-135M' and predictor == 'krylov'")
    table = scoreboard.agreement_table(start=ROOT).set_index(["Model", "Predictor"])
    assert table.loc[("SmolLM2-135M", "krylov"), "Spearman"].startswith(f"{rows['spearman'].mean():.2f} [")
