"""The paper's headline numbers beside ours: what was run here, and the command for what was not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from shlex import quote

import numpy as np
import pandas as pd

from llvlit import checks
from llvlit.plots.figures import short_name
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


NEEDED: dict[str, type] = {
    **dict.fromkeys(("models", "tasks", "energies", "stable_amplitudes"), list),
    **dict.fromkeys(("setting", "claims"), dict),
    **dict.fromkeys(("tasks_of", "energies_of"), str),
}
"""The paper's numbers, as ``results/paper.json`` holds them: keys, and the kind of their values."""


def paper_command(model: str | None = None, task: str | None = None) -> str:
    """Command that computes the paper's grid, or one model or one cell of it, into ``results/paper``.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import paper_command
    >>> paper_command("gpt2")
    'llvlit study paper --models gpt2 --out study/paper-gpt2 --save results/paper'
    """
    given = {
        axis: checks.text(axis[:-1], name, may_be_empty=False)
        for axis, name in (("models", model), ("tasks", task))
        if name is not None
    }
    chosen = "".join(f" --{axis} {quote(name)}" for axis, name in given.items())
    folder = "-".join(["paper", *list(given.values())[-1:]])
    return f"llvlit study paper{chosen} --out {quote(f'study/{folder}')} --save results/paper"


def our_command() -> str:
    """Command that measures the shipped models on the paper's tasks for which no file was at hand.

    Examples
    --------
    >>> from llvlit.publishing.scoreboard import our_command
    >>> our_command()
    'llvlit study results/grids/remaining.toml --save results/remaining'
    """
    return "llvlit study results/grids/remaining.toml --save results/remaining"


def _check(paper: object, ours: Sequence[object], theirs: object, pretrained: Sequence[object] = ()) -> None:
    """Let in the paper's numbers and studies alone."""
    expected = "what results/paper.json holds"
    content = checks.instance("paper", paper, dict, expected)
    for key, kind in NEEDED.items():
        checks.instance(f"paper[{key!r}]", content.get(key), kind, expected)
    third = [theirs] if theirs is not None else []
    for argument, studies in (("ours", ours), ("theirs", third), ("pretrained", pretrained)):
        for study in studies:
            checks.instance(argument, study, StudyTables, "tables of a study, as read_study gives them")


def _absent(command: str) -> str:
    return f"{ABSENT}: `{command}`"


def _both(row: pd.Series) -> str:
    return " / ".join(interval(row, key) for key in ("spearman", "pearson"))


def _of_basis(study: StudyTables, paper: Paper) -> pd.DataFrame:
    """Agreements of ``krylov``, a reading of the paper's basis, at the paper's setting."""
    rows = at_setting(study, paper)
    return rows[rows["predictor"] == paper["setting"]["basis"]]


def size_rows(
    paper: Paper, ours: StudyTables, theirs: StudyTables | None, *, pretrained: StudyTables | None = None
) -> list[list[str]]:
    """By rank in size: the paper's model, its numbers, the same model run here, our model, its numbers, their extent.

    Below them, ``pretrained`` decoders of other families, beside none of the paper's.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import committed, read_study
    >>> from llvlit.publishing.scoreboard import size_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = size_rows(paper, read_study("real"), None)
    >>> rows[0][0], rows[0][2].partition(":")[0]
    ('GPT-2, 124 M', 'not run here')
    """
    others = [] if pretrained is None else [pretrained]
    _check(paper, [ours], theirs, others)
    run = {}
    for study in filter(None, (ours, theirs, *others)):
        for _, row in means(_of_basis(study, paper), ["model"], list(AGREEMENT)).iterrows():
            run[row["model"]] = [_both(row), extent(row["n_tasks"], row["n_pairs"])]

    def told(study: StudyTables, model: str) -> list[str]:
        return [f"{short_name(model)}, {study.parameters(model) / 1e6:.1f} M", *run[model]]

    return [
        [
            f"{model['name']}, {model['parameters'] / 1e6:.0f} M",
            f"{model['spearman']:g} / {model['pearson']:g}",
            ", ".join(run.get(model["hub"]) or [_absent(paper_command(model["hub"]))]),
            *told(ours, mine),
        ]
        for model, mine in zip(paper["models"], ours.models, strict=False)
    ] + [[DASH, DASH, DASH, *told(study, model)] for study in others for model in study.models]


def task_rows(
    paper: Paper, ours: StudyTables, theirs: StudyTables | None, *, pretrained: Sequence[StudyTables] = ()
) -> list[list[str]]:
    """By task: name, length alone, the paper's numbers, ours, seeds that show it, the paper's model run here.

    The paper's tasks come first, then ours that it does not name.  With ``pretrained``, a column more: the smallest
    decoder of the first of these studies that has the task.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import committed, read_study
    >>> from llvlit.publishing.scoreboard import task_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = task_rows(paper, read_study("real"), None)
    >>> rows[0][0], rows[-1][0]
    ('Amazon polarity', 'rotten_tomatoes')
    """
    pretrained = checks.sequence("pretrained", pretrained, "a list of studies")
    _check(paper, [ours], theirs, pretrained)
    own, again = _by_task(paper, ours, ours.models[-1]), _by_task(paper, theirs, paper["tasks_of"])
    other: dict[str, list[str]] = {}
    for study in pretrained:
        other = _by_task(paper, study, study.models[0]) | other
    named = {row["task"]: row for row in paper["tasks"]}
    lengths = pd.concat(
        study.cells.groupby("task")["length_auc"].mean().dropna()
        for study in (ours, theirs, *pretrained)
        if study is not None
    )
    lengths = lengths.groupby("task").first()
    table = []
    for task in [*named, *sorted(set(ours.cells["task"]) - set(named))]:
        row = named.get(task)
        run = again.get(task) or [_absent(paper_command(paper["tasks_of"], task)) if row else DASH]
        table.append(
            [
                row["name"] if row else task,
                f"{lengths[task]:.2f}" if task in lengths else DASH,
                f"{row['spearman']:.2f} / {row['pearson']:.2f}" if row and "spearman" in row else DASH,
                *(own.get(task) or [DASH, DASH]),
                run[0],
                *([other.get(task, [DASH])[0]] if pretrained else []),
            ]
        )
    return table


def _by_task(paper: Paper, study: StudyTables | None, model: str) -> dict[str, list[str]]:
    """Spearman and Pearson of a model on every task that it was run on, and at how many seeds it shows the concept."""
    if study is None:
        return {}
    rows = _of_basis(study, paper)
    summary = summarize(rows[rows["model"] == model], ["task"], list(AGREEMENT))
    of_task = {row["task"]: _both(row) for _, row in summary.iterrows()}
    return {
        task: [
            of_task.get(task, "concept not visible"),
            f"{part['visible'].astype(bool).sum()} of {part['seed'].nunique()}",
        ]
        for task, part in study.cells[study.cells["model"] == model].groupby("task")
    }


def energy_rows(paper: Paper, ours: StudyTables, theirs: StudyTables | None) -> list[list[str]]:
    """By schedule (absolute energy, all layers): the paper's range, its model run here, ours, in the range or not.

    Examples
    --------
    >>> import json
    >>> from llvlit.study.tables import committed, read_study
    >>> from llvlit.publishing.scoreboard import energy_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = energy_rows(paper, read_study("real"), None)
    >>> [row[0] for row in rows]
    ['uniform', 'last layer', 'random layer']
    """
    _check(paper, [ours], theirs)
    own = _ratios(ours, ours.models)
    again = {} if theirs is None else _ratios(theirs, [paper["energies_of"]])
    absent = _absent(paper_command(paper["energies_of"]))
    return [
        [
            entry["schedule"],
            f"{entry['low']} to {entry['high']}",
            interval(again[entry["schedule"]], "ratio", digits=1) if entry["schedule"] in again else absent,
            interval(own[entry["schedule"]], "ratio", digits=1),
            _place(own[entry["schedule"]], entry["low"], entry["high"]),
        ]
        for entry in paper["energies"]
    ]


def _ratios(study: StudyTables, models: Sequence[str]) -> dict[str, pd.Series]:
    """Energy ratios by schedule, as the paper counts: absolute energy, all layers."""
    rows = study.energy[study.energy["model"].isin(models)]
    rows = rows[(rows["metric"] == "absolute") & (rows["layers"] == "all")]
    return {row["schedule"]: row for _, row in summarize_energies(rows, ["schedule"]).iterrows()} if len(rows) else {}


def _place(row: pd.Series, low: float, high: float) -> str:
    """Where an interval lies to a range."""
    if np.isnan(row["ratio_low"]):
        return "no interval"
    if row["ratio_high"] < low or row["ratio_low"] > high:
        return "below" if row["ratio_high"] < low else "above"
    return "inside" if low <= row["ratio_low"] and row["ratio_high"] <= high else "overlaps"


def ablations_of(study: StudyTables, paper: Paper) -> dict[tuple[str, str], tuple[str, str, str]]:
    """By setting and comparison: change of Spearman, what it says, over how much."""
    basis, setting, told = paper["setting"]["basis"], paper["setting"], {}
    reference = at_setting(study, paper)
    for other in ("random", "reachability", "pca"):
        if other in set(reference["predictor"]):
            row = paired(reference, "predictor", basis, other)
            told["basis", f"{basis} minus {other}"] = _told(
                row, verdict(row, f"{basis} is better", f"{basis} is worse")
            )
    near = study.agreement[np.isclose(study.agreement["amplitude"], setting["amplitude"])]
    near = near[near["predictor"] == basis]
    orders = sorted(near["order"].dropna().unique())
    steps = [orders[0], *(order for order in orders if order in (setting["order"] / 2, setting["order"])), orders[-1]]
    for before, after in pairwise(steps):
        if before < after:
            row = paired(near, "order", after, before)
            told["order", f"{basis}, d = {before:g} to {after:g}"] = _told(row, verdict(row, "rises", "falls"))
    low, high = paper["stable_amplitudes"]
    for name in (basis, "adjoint"):
        part = study.agreement[(study.agreement["predictor"] == name) & study.agreement["amplitude"].between(low, high)]
        part = part[part["order"].isna() | (part["order"] == part.groupby("model")["order"].transform("max"))]
        wide = part.pivot_table(index=list(CELL), columns="amplitude", values="spearman")
        if wide.shape[1] > 1:
            change = wide.sub(wide[setting["amplitude"]], axis=0).abs().max(axis=1)
            row = mean_of(change.rename("value").reset_index())
            title = f"{name}, largest change over {', '.join(f'{a:g}' for a in wide)}"
            told["amplitude", title] = _told(row, _stable(row), sign="")
    return told


def _told(row: pd.Series, says: str, *, sign: str = "+") -> tuple[str, str, str]:
    return interval(row, "value", sign=sign), says, extent(row["n_tasks"], row["n_pairs"])


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
    >>> from llvlit.study.tables import committed, read_study
    >>> from llvlit.publishing.scoreboard import ablation_rows
    >>> paper = json.loads((committed("real").parent / "paper.json").read_text())
    >>> rows = ablation_rows(paper, [read_study("real")], None)
    >>> sorted({row[0] for row in rows})
    ['basis', 'order']
    """
    _check(paper, checks.instance("ours", ours, (list, tuple), "a list of studies"), theirs)
    again = {} if theirs is None else ablations_of(theirs, paper)
    own: dict[tuple[str, str], tuple[str, str, str]] = {}
    for study in ours:
        own = ablations_of(study, paper) | own
    run = {key: f"{change}: {says} ({over})" for key, (change, says, over) in again.items()}
    settings = list(paper["claims"])
    return [
        [*key, run.get(key) or _absent(paper_command()), *own[key]]
        for key in sorted(own, key=lambda key: settings.index(key[0]))
    ]
