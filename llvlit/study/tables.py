"""Tables of a study: a row an agreement, an energy or a cell; reference rows, means and differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llvlit import checks
from llvlit.errors import FileError, InputError
from llvlit.files import foreign, read_bytes, write_atomically, write_json
from llvlit.method.agreement import MEASURES
from llvlit.method.intervals import mean_over_tasks
from llvlit.study.cells import Results
from llvlit.study.grid import Grid

TABLES = ("cells", "agreement", "energy")
CELL = ("model", "task", "seed")
VARIANT = ("jacobian", "final_norm")
ABOUT = (
    *(*CELL, *VARIANT),
    *("direction", "predictor", "order", "n_operating", "amplitude"),
    *("schedule", "metric", "layers", "layer"),
)
NEEDED = {
    "cells": {*CELL, *VARIANT, "parameters", "visible"},
    "agreement": {*CELL, *VARIANT, "direction", "predictor", "order", "n_operating", "amplitude", "layers", *MEASURES},
    "energy": {*CELL, *VARIANT, "schedule", "metric", "layers", "ratio", "n_out_of_reach"},
}
"""Columns that a table cannot do without."""

WORDS = {"model", "task", "jacobian", "suffix", "direction", "predictor", "schedule", "metric", "layers", "borrowed"}
WORDS |= {f"{name}fingerprint" for name in ("model_", "data_", "concept_", "operating_")}
WORDS |= {"start_token", "finished", "device", "commit"}
"""Columns of text; all others hold numbers, or true and false."""

DASH = "\N{EN DASH}"


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """The tables ``cells``, ``agreement`` and ``energy`` of a study's results.

    Every row starts with the cell it belongs to: model, task, seed, jacobian, final_norm.
    """
    cells, agreements, energies = [], [], []
    for one in results.finished:
        asked = {key: one.cell[key] for key in (*CELL, *VARIANT)}
        first = one.experiment.directions[one.cell["settings"]["directions"][0]]
        borrowed = np.array(first["borrowed"])
        best = float(np.array(first["separation"])[~borrowed].max())
        states = " ".join(map(str, np.flatnonzero(borrowed)))
        cells.append(_cell(vars(one), best, int(borrowed.sum()), states, first["gaps"][-1]))
        agreements += [{**asked, **row} for row in one.experiment.agreements]
        energies += [{**asked, **row} for row in one.experiment.energies]
    cells += [_cell(missing) for missing in results.not_visible]
    frames = {"cells": pd.DataFrame(cells)}
    for name, rows in (("agreement", agreements), ("energy", energies)):  # numbers, each with its interval, come last
        frame = pd.DataFrame(rows)
        about = [column for column in ABOUT if column in frame]
        frames[name] = frame[[*about, *frame.columns.difference(about)]]
    return frames


def _cell(content: Mapping[str, Any], *shown: float | str) -> dict[str, Any]:
    """Row of a cell: what was asked, model, data, how well the concept shows (nothing: not at all), provenance."""
    model, data, metadata = content["model"], content["data"], content["metadata"]
    return {
        **{key: content["cell"][key] for key in (*CELL, *VARIANT, "suffix")},
        "parameters": model["parameters"],
        "n_layers": model["layers"],
        "hidden_size": model["hidden_size"],
        "model_fingerprint": model["fingerprint"],
        "data_fingerprint": data["fingerprint"],
        **{key: data[key] for key in ("concept_fingerprint", "operating_fingerprint")},
        **{key: data[key] for key in ("n_evaluation", "n_cut", "n_left_out", "length_auc")},
        **{key: data.get(key) for key in ("start_token", "chat")},
        **dict(zip(("best_separation", "n_borrowed", "borrowed", "class_gap"), shown or (None,) * 4, strict=True)),
        **{key: metadata[key] for key in ("seconds", "finished", "device", "commit")},
        "visible": bool(shown),
    }


def with_columns(argument: str, frame: object, words: Sequence[str] = (), numbers: Sequence[str] = ()) -> pd.DataFrame:
    """A frame that has some columns, those of numbers as float64; InputError names what is lacking or no number."""
    found = checks.instance(argument, frame, pd.DataFrame, "a DataFrame")
    for column in (*words, *numbers):
        if checks.text("column", column) not in found.columns:
            raise InputError(
                f"{argument} has no column {checks.shown(column)}; it has {checks.shown([*found.columns])}."
            )
    try:
        return found.assign(**{name: found[name].astype(np.float64) for name in numbers})
    except (TypeError, ValueError) as error:
        raise InputError(f"{argument} holds no numbers where {', '.join(numbers)} belong ({error}).") from None


def _names(argument: str, values: object) -> list[str]:
    """Names of columns."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray | pd.Series):
        raise checks.refuse(argument, values, "a list of columns")
    names = [checks.text(argument, name) for name in checks.sequence(argument, values, "a list of columns")]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{argument}={checks.shown(values)} must be distinct columns, at least one.")
    return names


def plain_rows(agreement: pd.DataFrame, direction: str = "mean_difference") -> pd.DataFrame:
    """Agreements of whole predictors along one kind of directions, from all operating prompts of their cell.

    Examples
    --------
    >>> from llvlit.study.tables import committed, plain_rows, read_table
    >>> sorted(plain_rows(read_table(committed("real"), "agreement"))["predictor"].unique())
    ['adjoint', 'krylov', 'null', 'pca', 'random', 'reachability']
    """
    rows = agreement[(agreement["direction"] == direction) & ~agreement["predictor"].str.contains(", ")]
    cells = rows.groupby([*CELL, *VARIANT], dropna=False)
    return rows[rows["n_operating"] == cells["n_operating"].transform("max")]


def rows_at(rows: pd.DataFrame, *, order: int, amplitude: float) -> pd.DataFrame:
    """Rows at an amplitude, each model at its largest order up to the given one: the one choice of reference rows."""
    rows = rows[np.isclose(rows["amplitude"], amplitude) & ~(rows["order"] > order)]
    return rows[rows["order"].isna() | (rows["order"] == rows.groupby("model")["order"].transform("max"))]


def told_of_cells(cells: pd.DataFrame) -> list[str]:
    """Lines for each model: what was done to its prompts, which states borrowed their direction, what was left out."""
    lines = []
    for model, rows in cells[cells["visible"]].groupby("model", sort=False):
        done = ["in its chat template"] * bool(rows["chat"].any())
        done += [f"start token {token!r}" for token in rows["start_token"].unique() if token]
        if done:
            lines.append(f"Prompts of {model}: {', '.join(done)}.")
        borrowing = rows[rows["borrowed"].fillna("") != ""]
        states = sorted({int(state) for text in borrowing["borrowed"] for state in str(text).split()})
        if told := ", ".join(map(str, states)):
            lines.append(
                f"Borrowed directions: {model}, states {told}, in {len(borrowing)} of {len(rows)} "
                "cells; the sign of such a gain means nothing (cells.csv says where)."
            )
        if n_left_out := int(rows["n_left_out"].sum()):
            lines.append(f"Left out: {n_left_out} prompts that are too short or equal for the tokenizer of {model}.")
    return lines


def summarize(
    frame: pd.DataFrame, by: Sequence[str], values: Sequence[str], *, log: bool = False, seed: int = 0
) -> pd.DataFrame:
    """Means over tasks of means over seeds, with 95 % bootstrap intervals over tasks, seeds and prompts.

    Tasks are drawn with replacement, then seeds within every drawn task, anew also where a task is drawn twice:
    what varies most is what a conclusion must survive.  Where the frame has ``VALUE_low`` and ``VALUE_high``, the
    95 % interval of each row over its prompts, every drawn seed also gets a normal error of standard deviation
    (high - low) / (2 · 1.96), of the logarithms with ``log``; a row without such an interval gets none.

    Parameters
    ----------
    frame
        Has the columns ``task`` and ``seed``, ``by`` and ``values``.  Rows of a group that share task and seed
        (several models, say) are first averaged, and so are their errors, since they share their prompts.
    log
        Geometric means, as fits ratios: of positive values only.

    Returns
    -------
    DataFrame
        ``by``, then for each value its mean, ``_low`` and ``_high``, then ``n_tasks``, the tasks that have all
        values.  Bounds lie within those of the rows (a correlation's are never beyond 1).  A group of one task and
        one seed has no interval: NaN.

    Notes
    -----
    A bootstrap over few tasks is too sure of itself.  In simulated studies whose tasks, seeds and prompts each add
    a normal error, of deviations 1, 0.5 and 0.5, the interval holds the true mean in 93 % with nine tasks of three
    seeds, 88 % with four of three, and 79 % with two of two (of 10,000; a test repeats 1,000).  Where prompts vary
    more than tasks, it is wider than it need be: the spread between seeds holds the error over prompts already.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.tables import summarize
    >>> rows = [("small", "films", 0, 0.5), ("small", "films", 1, 0.7), ("small", "books", 0, 0.8)]
    >>> frame = pd.DataFrame(rows, columns=["model", "task", "seed", "spearman"])
    >>> means = summarize(frame, by=["model"], values=["spearman"])  # of tasks, not of rows
    >>> round(float(means["spearman"][0]), 2), int(means["n_tasks"][0])
    (0.7, 2)
    """
    by, values = _names("by", by), _names("values", values)
    log = checks.flag("log", log)
    frame = with_columns("frame", frame, ["task", "seed", *by], values).reset_index(drop=True)
    generator = np.random.default_rng(checks.seed("seed", seed))
    tasks = frame.groupby("task").ngroup().to_numpy()
    cells = frame.groupby(["task", "seed"]).ngroup().to_numpy()  # those of one task side by side
    numbers = {value: frame.reindex(columns=[value, f"{value}_low", f"{value}_high"]) for value in values}
    arrays = {value: with_columns("frame", numbers[value], (), [*numbers[value]]).to_numpy().T for value in values}
    if log and any((array[0] <= 0).any() for array in arrays.values()):
        raise InputError(f"frame holds {', '.join(values)} that are not positive; they have no geometric mean.")
    rows = []
    for key, group in frame.groupby(by, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        for value, array in arrays.items():
            at = group.index[group[value].notna()]
            with np.errstate(divide="ignore"):  # of a bound that is zero
                x = np.log(array[:, at]) if log else array[:, at]
            bounds = mean_over_tasks(x, tasks[at], cells[at], generator=generator)
            row |= dict(zip((value, f"{value}_low", f"{value}_high"), np.exp(bounds) if log else bounds, strict=True))
        rows.append({**row, "n_tasks": group.dropna(subset=values)["task"].nunique()})
    names = dict.fromkeys([*by, *(name for table in numbers.values() for name in table), "n_tasks"])
    return pd.DataFrame(rows, columns=list(names))  # these also where there is no row


def summarize_energies(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Geometric means of energy ratios with 95 % intervals, and how many are censored.

    Parameters
    ----------
    frame
        The table ``energy``: a row of it has no ratio where the schedule or the optimum is out of reach.

    Returns
    -------
    DataFrame
        As of :func:`summarize`, of the rows that have a ratio; besides, for all rows, ``n_rows``, ``n_censored`` (those
        without a ratio) and ``n_out_of_reach`` (searches for an energy that found none).

    Examples
    --------
    >>> from llvlit.study.tables import committed, read_table, summarize_energies
    >>> found = summarize_energies(read_table(committed("real"), "energy"), ["schedule"])
    >>> bool((found["n_censored"] <= found["n_rows"]).all())
    True
    """
    by = _names("by", by)
    frame = with_columns("frame", frame, by, ["ratio", "n_out_of_reach"])
    ratio = frame["ratio"]
    frame = frame.assign(ratio=ratio.where(ratio > 0))  # 0: an optimum out of reach, as older files have it
    censored = frame["ratio"].isna()
    counts = frame.assign(n_rows=1, n_censored=censored.astype(int)).groupby(by, sort=False, dropna=False)
    means = summarize(frame, by, ["ratio"], log=True)
    totals = counts[["n_rows", "n_censored", "n_out_of_reach"]].sum()
    return means.assign(**{name: totals[name].to_numpy(int) for name in totals})  # groups in the same order


def write_tables(results: Results, grid: Grid, out: str | Path) -> list[Path]:
    """CSV files of the tables, to five digits, and ``provenance.json``, each written whole or not at all.

    Provenance: the grid, and versions, devices and commits of all experiments.
    """
    paths = []
    for name, frame in tables(results).items():
        if len(frame):
            path = Path(out) / f"{name}.csv"
            write_atomically(path, partial(frame.to_csv, index=False, lineterminator="\n", float_format="%.5g"))
            paths.append(path)
    metadata = pd.DataFrame([one.metadata for one in results.finished])
    facts = {key: sorted(set(metadata[key].astype(str))) for key in metadata.columns.drop(["seconds", "finished"])}
    provenance = {
        "grid": grid.name,
        "grid_fingerprint": grid.fingerprint,
        "description": grid.description,
        "n_cells": len(grid.cells()),
        "n_experiments": len(results.finished),
        "n_not_visible": len(results.not_visible),
        "seconds": round(metadata["seconds"].sum()),
        "finished": metadata["finished"].max(),
        **{key: values[0] if len(values) == 1 else values for key, values in facts.items()},
    }
    path = Path(out) / "provenance.json"
    write_json(path, provenance)
    return [*paths, path]


def read_table(folder: str | Path, name: str) -> pd.DataFrame:
    """A table of a study's report: ``cells``, ``agreement`` or ``energy``.

    Raises
    ------
    FileError
        If it is not there, cannot be read, or lacks a column.

    Examples
    --------
    >>> from llvlit.study.tables import committed, read_table
    >>> {"model", "task", "seed"} <= set(read_table(committed("real"), "agreement").columns)
    True
    """
    path, what = checks.path("folder", folder) / f"{checks.text('name', name)}.csv", "a table of a study"
    content = read_bytes(path, what)
    with foreign(path, what, remedy="Run `llvlit study --report` on that study."):
        words = dict.fromkeys(WORDS, str)
        frame = pd.read_csv(BytesIO(content), keep_default_na=False, na_values=[""], dtype=words)  # "null" is a name
        if missing := NEEDED.get(name, set()) - set(frame.columns):
            raise ValueError(f"no column {', '.join(sorted(missing))}")
        if not len(frame) or not content.endswith(b"\n"):
            raise ValueError("it is cut short")
        for column in frame.columns.difference([*WORDS]):
            values = frame[column].astype(bool if column in ("final_norm", "visible") else float)
            if not (frame[column].isna() | (np.isfinite(values) & (values == frame[column]))).all():
                raise ValueError(f"{column} holds what it cannot")
    return frame


def committed(study: str, *, start: str | Path = ".") -> Path:
    """Folder ``results/STUDY`` of the checkout around ``start``, with tables that were computed once and committed.

    Raises
    ------
    FileError
        If there is none.

    Examples
    --------
    >>> from llvlit.study.tables import committed
    >>> committed("real").name
    'real'
    """
    checks.path("study", checks.text("study", study))
    place = checks.path("start", start).resolve()
    for folder in (place, *place.parents):
        if (folder / "results" / study / "provenance.json").is_file():
            return folder / "results" / study
    raise FileError(
        f"There is no results/{study} at start={checks.shown(str(start))} or above it. Work in a checkout of llvlit, "
        "or run that study yourself."
    )


def interval(row: pd.Series, value: str, *, digits: int = 2, sign: str = "") -> str:
    """A mean with its interval in brackets, or alone where there is none.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.tables import interval
    >>> interval(pd.Series({"x": 0.5, "x_low": 0.4, "x_high": 0.7}), "x", sign="+")
    '+0.50 [+0.40, +0.70]'
    """
    digits, sign = checks.integer("digits", digits, at_least=0, at_most=15), checks.choice("sign", sign, ["", "+", " "])
    middle, low, high = _entries(row, [f"{checks.text('value', value)}{end}" for end in ("", "_low", "_high")])
    if np.isnan(middle):
        return DASH

    def told(x: float) -> str:  # never "-0.00"; many digits of a large ratio would be noise
        return f"{round(x, digits) + 0.0:{sign}.{digits}f}" if abs(x) < 10 else f"{x:{sign},.0f}"

    return told(middle) if np.isnan(low) else f"{told(middle)} [{told(low)}, {told(high)}]"


def _entries(row: object, names: Sequence[str]) -> list[float]:
    """Numbers of a row, by name; NaN where there is none."""
    values = checks.instance("row", row, pd.Series, "a row with its bounds")
    if lacking := [name for name in names if name not in values.index]:
        raise InputError(f"row has no {', '.join(map(checks.shown, lacking))}; it has {checks.shown([*values.index])}.")
    return [np.nan if pd.isna(values[name]) else checks.number(f"row[{name!r}]", values[name]) for name in names]


def means(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """As :func:`~llvlit.study.tables.summarize`, but with ``n_pairs`` (of task and seed); no interval below two tasks.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.tables import means
    >>> frame = pd.DataFrame({"model": ["m", "m"], "task": ["films", "films"], "seed": [0, 1], "x": [0.2, 0.4]})
    >>> row = means(frame, ["model"], ["x"]).iloc[0]
    >>> round(float(row["x"]), 2), float(row["x_low"]), int(row["n_pairs"])
    (0.3, nan, 2)
    """
    summary = summarize(frame, by, values)
    pairs = frame.drop_duplicates([*by, "task", "seed"]).groupby(list(by), sort=False, dropna=False).size()
    summary["n_pairs"] = pairs.to_numpy()  # groups in the same order
    bounds = [f"{value}{end}" for value in values for end in ("_low", "_high")]
    summary.loc[summary["n_tasks"] < 2, bounds] = np.nan
    return summary


def paired(
    frame: pd.DataFrame,
    column: str,
    after: Any,
    before: Any,
    *,
    cell: Sequence[str] = CELL,
    value: str = "spearman",
) -> pd.Series:
    """Mean of after minus before between two kinds of rows of the same cells.

    Its entries are ``value``, ``value_low``, ``value_high`` (NaN below two tasks), ``n_tasks`` and ``n_pairs`` (of
    task and seed).

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.tables import paired
    >>> rows = [("films", "krylov", 0.9), ("films", "random", 0.5), ("books", "krylov", 0.6), ("books", "random", 0.4)]
    >>> frame = pd.DataFrame(rows, columns=["task", "predictor", "spearman"]).assign(model="m", seed=0)
    >>> round(float(paired(frame, "predictor", "krylov", "random")["value"]), 2)
    0.3
    """
    cell = _names("cell", cell)
    if not {"task", "seed"} <= set(cell):
        raise InputError(f"cell={cell} lacks task or seed; differences are averaged over both.")
    for argument, kind in (("after", after), ("before", before)):
        if not isinstance(kind, str | int | float) or kind != kind:
            raise checks.refuse(argument, kind, f"a value of the column {checks.shown(column)}")
    frame = with_columns("frame", frame, [*cell, checks.text("column", column)], [checks.text("value", value)])
    wide = frame.pivot_table(index=cell, columns=column, values=value)
    wide = wide.reindex(columns=[after, before])
    both = (wide[after] - wide[before]).rename("value").dropna().reset_index()
    if not len(both):
        return pd.Series({"value": np.nan, "value_low": np.nan, "value_high": np.nan, "n_tasks": 0, "n_pairs": 0})
    return means(both.assign(kind=0), ["kind"], ["value"]).iloc[0]
