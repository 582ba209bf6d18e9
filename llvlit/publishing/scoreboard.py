"""The paper's headline numbers beside ours: what was run here, and the command for what was not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from llvlit.plots.styles import short_name
from llvlit.study.tables import (
    AGREEMENT,
    CELL,
    DASH,
    Paper,
    StudyTables,
    at_setting,
    extent,
    interval,
    mean_of,
    means,
    paired,
    summarize,
    summarize_energies,
    verdict,
)

ABSENT = "not run here"
STABLE = 0.05
"""Change of Spearman's correlation below which an amplitude counts as making no difference."""


def paper_command(model: str | None = None, task: str | None = None) -> str:
    """Command that computes the paper's grid, or one model or one cell of it, into ``results/paper``.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import paper_command
    >>> paper_command("gpt2")
    'llvlit study paper --models gpt2 --out study/paper-gpt2 --save results/paper'
    """
    chosen = "".join(f" --{axis} {name}" for axis, name in (("models", model), ("tasks", task)) if name)
    name = "-".join(["paper", *filter(None, [task or model])])
    return f"llvlit study paper{chosen} --out study/{name} --save results/paper"


def our_command() -> str:
    """Command that measures the shipped models on the paper's tasks that need the hub.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import our_command
    >>> our_command()
    'llvlit study results/grids/remaining.toml --save results/remaining'
    """
    return "llvlit study results/grids/remaining.toml --save results/remaining"


def _absent(command: str) -> str:
    return f"{ABSENT}: `{command}`"


def _both(row: pd.Series) -> str:
    return " / ".join(interval(row, key) for key in ("spearman", "pearson"))


def size_rows(paper: Paper, ours: StudyTables, theirs: StudyTables | None) -> list[list[str]]:
    """By rank in size: the paper's model, its numbers, the same model run here, our model, its numbers, their extent.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import committed
    >>> from llvlit.study.tables import read_study
    >>> from llvlit.publishing.scoreboard import size_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = size_rows(paper, read_study("real"), None)
    >>> rows[0][0], rows[0][2].partition(":")[0]
    ('GPT-2, 124 M', 'not run here')
    """
    found = {}
    for study in filter(None, (ours, theirs)):
        rows = at_setting(study, paper)
        rows = rows[rows["predictor"] == paper["setting"]["basis"]]
        for _, row in means(rows, ["model"], list(AGREEMENT)).iterrows():
            found[row["model"]] = _both(row), extent(row["n_tasks"], row["n_pairs"])
    table = []
    for model, mine in zip(paper["models"], ours.models, strict=False):
        table.append(
            [
                f"{model['name']}, {model['parameters'] / 1e6:.0f} M",
                f"{model['spearman']:g} / {model['pearson']:g}",
                ", ".join(found[model["hub"]]) if model["hub"] in found else _absent(paper_command(model["hub"])),
                f"{short_name(mine)}, {ours.parameters(mine) / 1e6:.1f} M",
                *found[mine],
            ]
        )
    return table


def task_rows(paper: Paper, ours: StudyTables, theirs: StudyTables | None) -> list[list[str]]:
    """By task: name, length alone, the paper's numbers, ours, seeds that show it, the paper's model run here.

    The paper's tasks come first, then ours that it does not name.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import read_study
    >>> from llvlit.study.tables import committed
    >>> from llvlit.publishing.scoreboard import task_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = task_rows(paper, read_study("real"), None)
    >>> rows[0][0], rows[-1][0]
    ('Amazon polarity', 'tweeteval_offensive')
    """
    mine = ours.models[-1]
    own, same = (_by_task(paper, study, model) for study, model in ((ours, mine), (theirs, paper["tasks_of"])))
    named = {row["task"]: row for row in paper["tasks"]}
    others = sorted(set(ours.cells["task"]) - set(named))
    table = []
    for task in [*named, *others]:
        row = named.get(task)
        lengths = [
            study.cells.loc[study.cells["task"] == task, "length_auc"].mean() for study in (ours, theirs) if study
        ]
        length = next((f"{x:.2f}" for x in lengths if not np.isnan(x)), DASH)
        theirs_now = same[task] if task in same else (_absent(paper_command(paper["tasks_of"], task)), "")
        told = own.get(task) or (_absent(our_command()), DASH)
        table.append(
            [
                row["name"] if row else task,
                length,
                f"{row['spearman']:.2f} / {row['pearson']:.2f}" if row else DASH,
                *told,
                theirs_now[0] if row or task in same else DASH,
            ]
        )
    return table


def _by_task(paper: Paper, study: StudyTables | None, model: str) -> dict[str, tuple[str, str]]:
    """Spearman and Pearson of a model on every task that it was run on, and at how many seeds it shows the concept."""
    if study is None:
        return {}
    rows = at_setting(study, paper)
    rows = rows[(rows["model"] == model) & (rows["predictor"] == paper["setting"]["basis"])]
    of_task = {row["task"]: row for _, row in summarize(rows, ["task"], list(AGREEMENT)).iterrows()}
    cells = study.cells[study.cells["model"] == model]
    return {
        task: (
            _both(of_task[task]) if task in of_task else "concept not visible",
            f"{part['visible'].astype(bool).sum()} of {part['seed'].nunique()}",
        )
        for task, part in cells.groupby("task")
    }


def energy_rows(paper: Paper, ours: StudyTables, theirs: StudyTables | None) -> list[list[str]]:
    """By schedule (absolute energy, all layers): the paper's range, its model run here, ours, in the range or not.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import read_study
    >>> from llvlit.study.tables import committed
    >>> from llvlit.publishing.scoreboard import energy_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = energy_rows(paper, read_study("real"), None)
    >>> [row[0] for row in rows]
    ['uniform', 'last layer', 'random layer']
    """
    own = _ratios(ours, ours.models)
    same = _ratios(theirs, [paper["energies_of"]]) if theirs is not None else {}
    table = []
    for entry in paper["energies"]:
        key = ("absolute", "all", entry["schedule"])
        run = interval(same[key], "ratio", digits=1) if key in same else _absent(paper_command(paper["energies_of"]))
        row = own[key]
        table.append(
            [
                entry["schedule"],
                f"{entry['low']} to {entry['high']}",
                run,
                interval(row, "ratio", digits=1),
                _place(row, entry["low"], entry["high"]),
            ]
        )
    return table


def _ratios(study: StudyTables, models: Sequence[str]) -> dict[tuple[str, str, str], pd.Series]:
    """Energy ratios by metric, layers and schedule."""
    rows = study.energy[study.energy["model"].isin(models)]
    if not len(rows):
        return {}
    found = summarize_energies(rows, ["metric", "layers", "schedule"])
    return {(row["metric"], row["layers"], row["schedule"]): row for _, row in found.iterrows()}


def _place(row: pd.Series, low: float, high: float) -> str:
    """Where an interval lies to a range."""
    if np.isnan(row["ratio_low"]):
        return "no interval"
    if row["ratio_high"] < low or row["ratio_low"] > high:
        return "below" if row["ratio_high"] < low else "above"
    return "inside" if low <= row["ratio_low"] and row["ratio_high"] <= high else "overlaps"


def ablations_of(study: StudyTables, paper: Paper) -> dict[tuple[str, str], tuple[str, str, str]]:
    """By setting and comparison: change of Spearman, what it says, over how much."""
    basis, setting, found = paper["setting"]["basis"], paper["setting"], {}
    reference = at_setting(study, paper)
    for other in ("random", "reachability", "pca"):
        if other in set(reference["predictor"]):
            row = paired(reference, "predictor", basis, other)
            found["basis", f"{basis} minus {other}"] = row, verdict(row, f"{basis} is better", f"{basis} is worse")
    near = study.agreement[np.isclose(study.agreement["amplitude"], setting["amplitude"])]
    near = near[near["predictor"] == basis]
    orders = sorted(near["order"].dropna().unique())
    steps = [orders[0], *(order for order in orders if order in (setting["order"] / 2, setting["order"])), orders[-1]]
    for before, after in pairwise(steps):
        if before < after:
            row = paired(near, "order", after, before)
            found["order", f"{basis}, d = {before:g} to {after:g}"] = row, verdict(row, "rises", "falls")
    low, high = paper["stable_amplitudes"]
    for name in (basis, "adjoint"):
        part = study.agreement[(study.agreement["predictor"] == name) & study.agreement["amplitude"].between(low, high)]
        part = part[part["order"].isna() | (part["order"] == part.groupby("model")["order"].transform("max"))]
        wide = part.pivot_table(index=list(CELL), columns="amplitude", values="spearman")
        if wide.shape[1] > 1:
            change = wide.sub(wide[setting["amplitude"]], axis=0).abs().max(axis=1).rename("value").reset_index()
            row = mean_of(change)
            title = f"{name}, largest change over {', '.join(f'{a:g}' for a in wide)}"
            found["amplitude", title] = row, _stable(row)
    return {
        key: (
            interval(row, "value", sign="" if key[0] == "amplitude" else "+"),
            so,
            extent(row["n_tasks"], row["n_pairs"]),
        )
        for key, (row, so) in found.items()
    }


def _stable(row: pd.Series) -> str:
    if np.isnan(row["value_low"]):
        return "too few tasks"
    return "stable" if row["value_high"] < STABLE else "on average" if row["value"] < STABLE else "not stable"


def ablation_rows(paper: Paper, ours: Sequence[StudyTables], theirs: StudyTables | None) -> list[list[str]]:
    """By comparison: setting, what is compared, its change on the paper's models run here, on ours, verdict, extent.

    Where several of our studies make a comparison, the first of them is shown.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import read_study
    >>> from llvlit.study.tables import committed
    >>> from llvlit.publishing.scoreboard import ablation_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = ablation_rows(paper, [read_study("real")], None)
    >>> sorted({row[0] for row in rows})
    ['basis', 'order']
    """
    same = ablations_of(theirs, paper) if theirs is not None else {}
    run = {key: f"{change}: {so} ({over})" for key, (change, so, over) in same.items()}
    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    for study in ours:
        found = ablations_of(study, paper) | found
    order = list(paper["claims"])
    return [
        [*key, run.get(key) or _absent(paper_command()), *found[key]]
        for key in sorted(found, key=lambda key: order.index(key[0]))
    ]
