"""The paper's numbers beside ours, and the long tables of the appendix: frames of text, made from ``results/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llvlit import checks
from llvlit.files import read_json
from llvlit.study.comparison import agreements, families, label, setting_effects
from llvlit.study.tables import DASH, committed, interval, means, read_table, summarize_energies

STUDIES = ("real", "larger", "controls", "training", "ablations", "steps", "pretrained", "pretrained/81ec376")
MEASURES = {"spearman": "Spearman", "pearson": "Pearson", "relative_error": "Relative error"}
PREDICTORS = ("adjoint, same prompts", "adjoint", "reachability", "pca", "krylov", "random", "null")
SCHEDULES = ("uniform", "early-only", "middle-only", "last layer", "random layer", "best layer")


def paper_numbers(*, start: str | Path = ".") -> dict[str, Any]:
    """What the paper reports, as ``results/paper.json`` holds it.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import paper_numbers
    >>> [model["spearman"] for model in paper_numbers()["models"]]
    [0.77, 0.81, 0.995]
    """
    return read_json(committed("real", start=start).parent / "paper.json", "the paper's numbers")


def _of(row: pd.Series, value: str) -> str:
    """A number with its interval; three digits of a small error."""
    small = value == "relative_error" and row[value] < 0.1
    return interval(row, value, digits=3 if small else 2).replace("0.000", "<0.001")


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    found = means(rows, ["name", "predictor"], [*MEASURES]).set_index(["name", "predictor"])
    return found.reindex(list(dict.fromkeys(rows["name"])), level="name")


def sizes_table(*, start: str | Path = ".") -> pd.DataFrame:
    """A row a model: the paper's with its numbers, ours with krylov's and reachability's, without layer 0.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import sizes_table
    >>> sizes_table()["Model"].tolist()[-3:]
    ['SmolLM2-135M', 'Gemma 3 270M', 'Qwen2.5-0.5B']
    """
    rows = families(start=start)
    found, sizes = _summary(rows), rows.groupby("name")["parameters"].first()
    columns = ["Model", "Parameters", "Spearman / Pearson", "The same, reachability", "Tasks"]
    paper = [
        [
            f"{model['name']} (the paper)",
            f"{model['parameters'] / 1e6:.0f} M",
            f"{model['spearman']} / {model['pearson']}",
            DASH,
            10,
        ]
        for model in paper_numbers(start=start)["models"]
    ]
    ours = []
    for name in dict.fromkeys(rows["name"]):
        if name not in ("medium", "36x192"):
            pair = [found.loc[name, basis] for basis in ("krylov", "reachability")]
            told = [" / ".join(interval(row, key) for key in ("spearman", "pearson")) for row in pair]
            ours.append([name, f"{sizes[name] / 1e6:,.1f} M", *told, f"{pair[0]['n_tasks']:.0f}"])
    return pd.DataFrame(paper + ours, columns=columns)


def tasks_table(*, start: str | Path = ".") -> pd.DataFrame:
    """A row a task: GPT-2-large as the paper has it, krylov and reachability of two of ours; Spearman, without layer 0.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import tasks_table
    >>> tasks_table().loc[0, "Task"]
    'Amazon polarity'
    """
    named = {row["task"]: row for row in paper_numbers(start=start)["tasks"]}
    rows = families(start=start)
    seen = rows.groupby(["task", "name", "predictor"])["spearman"].mean()
    lengths = read_table(committed("real", start=start), "cells").groupby("task")["length_auc"].mean()
    models = ("large", "SmolLM2-135M", "Gemma 3 270M", "Qwen2.5-0.5B")
    table = []
    for task in [*named, *sorted(set(rows["task"]) - set(named))]:
        known = named.get(task, {})
        ours = [
            " / ".join(f"{seen[task, name, basis]:.2f}" for basis in ("krylov", "reachability"))
            if (task, name, "krylov") in seen
            else DASH
            for name in models
        ]
        length = f"{lengths[task]:.2f}" if task in lengths else DASH
        table.append([known.get("name", task), length, known.get("spearman", DASH), *ours])
    return pd.DataFrame(table, columns=["Task", "Length alone", "GPT-2-large (the paper)", *models])


def energies_table(metric: str = "absolute", *, start: str | Path = ".") -> pd.DataFrame:
    """A row a schedule: energy over that of krylov's optimum, all layers; of absolute energy also the paper's range.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import energies_table
    >>> energies_table()["Schedule"].tolist()[:2]
    ['uniform', 'early-only']
    """
    metric = checks.choice("metric", metric, ["absolute", "relative"])
    theirs = {
        entry["schedule"]: f"{entry['low']} to {entry['high']}" for entry in paper_numbers(start=start)["energies"]
    }
    columns: dict[str, Mapping[str, pd.Series]] = {}
    for study in ("real", "pretrained"):
        rows = read_table(committed(study, start=start), "energy")
        rows = rows[(rows["metric"] == metric) & (rows["layers"] == "all")]
        rows = rows.assign(name="toys" if study == "real" else rows["model"].map(label))
        for (name,), part in rows.groupby(["name"], sort=False):
            columns[name] = {row["schedule"]: row for _, row in summarize_energies(part, ["schedule"]).iterrows()}
    table = [
        [
            schedule,
            *([theirs.get(schedule, DASH)] if metric == "absolute" else []),
            *(
                interval(found[schedule], "ratio", digits=1) if schedule in found else DASH
                for found in columns.values()
            ),
        ]
        for schedule in SCHEDULES
    ]
    paper = ["GPT-2-large (the paper)"] if metric == "absolute" else []
    return pd.DataFrame(table, columns=["Schedule", *paper, *columns])


def agreement_table(*, layers: str = "not 0", start: str | Path = ".") -> pd.DataFrame:
    """A row a model and predictor: the three numbers of agreement at order 32, over the tasks that the model shows.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import agreement_table
    >>> agreement_table()["Predictor"].tolist()[:2]
    ['adjoint, same prompts', 'adjoint']
    """
    found = _summary(families(layers=layers, start=start))
    table = [
        [
            name,
            predictor,
            *(_of(found.loc[name, predictor], key) for key in MEASURES),
            f"{found.loc[name, predictor]['n_tasks']:.0f}",
        ]
        for name in dict.fromkeys(found.index.get_level_values("name"))
        for predictor in PREDICTORS
    ]
    return pd.DataFrame(table, columns=["Model", "Predictor", *MEASURES.values(), "Tasks"])


def concepts_table(*, start: str | Path = ".") -> pd.DataFrame:
    """A row a task: how well the best state of each model separates the classes, and at how many seeds it shows at all.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import concepts_table
    >>> concepts_table().set_index("Task").loc["cola", "large"]
    'none (0 of 3)'
    """
    studies = ("real", "larger", "pretrained")
    cells = pd.concat([read_table(committed(study, start=start), "cells") for study in studies], ignore_index=True)
    cells = cells.assign(name=cells["model"].map(label), visible=cells["visible"].astype(bool))

    def told(part: pd.DataFrame) -> str:
        shown = part[part["visible"]]
        best = f"{shown['best_separation'].mean():.2f}" if len(shown) else "none"
        return f"{best} ({len(shown)} of {len(part)})"

    sizes = cells.groupby("name")["parameters"].first().sort_values()
    wide = {
        name: cells[cells["name"] == name].groupby("task")[["visible", "best_separation"]].apply(told)
        for name in sizes.index
    }
    lengths = cells.groupby("task")["length_auc"].mean().map("{:.2f}".format)
    return pd.DataFrame({"Length alone": lengths, **wide}).fillna(DASH).rename_axis("Task").reset_index()


def settings_table(*, start: str | Path = ".") -> pd.DataFrame:
    """A row a change of a setting and a predictor: changes of Spearman and of the relative error, in the toys.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import settings_table
    >>> settings_table()["Setting"].iloc[0]
    'Basis: krylov to reachability'
    """
    columns = ["Setting", "Predictor", "Spearman changes by", "Relative error by", "Does the error mind?"]
    table = [
        [
            f"{row['setting']}: {row['change']}",
            row["predictor"],
            *(interval(row, value, digits=3, sign="+") for value in ("spearman", "relative_error")),
            row["says"],
        ]
        for _, row in setting_effects(start=start).iterrows()
    ]
    return pd.DataFrame(table, columns=columns)


def orders_table(*, start: str | Path = ".") -> pd.DataFrame:
    """A row a model and order: krylov's and reachability's relative error, without layer 0.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import orders_table
    >>> orders_table()["Order"].tolist()[:3]
    ['1', '2', '4']
    """
    studies = ("real", "pretrained")
    table = []
    parts = {
        order: pd.concat([agreements(study, order=order, start=start) for study in studies])
        for order in (1, 2, 4, 8, 16, 32)
    }
    found = {order: _summary(rows.assign(name=rows["model"].map(label))) for order, rows in parts.items()}
    for name in dict.fromkeys(found[1].index.get_level_values("name")):
        for order, summary in found.items():
            cells = (
                _of(summary.loc[name, basis], "relative_error") for basis in ("krylov", "reachability", "random", "pca")
            )
            table.append([name, str(order), *cells])
    return pd.DataFrame(table, columns=["Model", "Order", "krylov", "reachability", "random", "pca"])


def sources_table(*, start: str | Path = ".") -> pd.DataFrame:
    """A row a committed study: how many experiments, where, when, and of which commit.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import sources_table
    >>> sources_table()["Study"].iloc[0]
    '`results/real`'
    """

    def listed(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    table = []
    for study in STUDIES:
        folder = committed(study, start=start)
        facts, cells = read_json(folder / "provenance.json", "a study's provenance"), read_table(folder, "cells")
        models = ", ".join(dict.fromkeys(cells["model"].map(label)))
        told = [listed(facts[key]) for key in ("device", "commit", "torch", "transformers")]
        minutes = f"{facts['seconds'] / 60:.0f}"
        table.append([f"`results/{study}`", models, facts["n_experiments"], facts["n_not_visible"], minutes, *told])
    columns = ["Study", "Models", "Experiments", "Not visible", "Minutes", "Device", "Commit", "torch", "transformers"]
    return pd.DataFrame(table, columns=columns)
