"""Tables of a study: one row an agreement, an energy or a cell; means with intervals over tasks and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llvlit.errors import FileError
from llvlit.files import write_atomically, write_json
from llvlit.study.cells import Results
from llvlit.study.grid import Grid

TABLES = ("cells", "agreement", "energy")
CELL = ("model", "task", "seed", "jacobian", "final_norm")
FIRST_COLUMNS = (
    *("model", "task", "seed", "jacobian", "final_norm"),
    *("direction", "predictor", "order", "n_operating", "amplitude"),
    *("schedule", "metric", "layers", "layer"),
)
N_BOOTSTRAP = 2000
DIGITS = 5


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """The tables ``cells``, ``agreement`` and ``energy`` of a study's results.

    Every row starts with the cell it belongs to: model, task, seed, jacobian, final_norm.
    """
    cells, agreements, energies = [], [], []
    for one in results.experiments:
        asked = {key: one.cell[key] for key in CELL}
        first = one.directions[one.cell["settings"]["directions"][0]]
        own = np.array(first["separation"])[~np.array(first["borrowed"])]
        shown = {
            "best_separation": float(own.max()),
            "n_borrowed": int(np.sum(first["borrowed"])),
            "class_gap": first["gaps"][-1],
        }
        cells.append(_cell(one.content(), shown))
        agreements += [{**asked, **row} for row in one.agreements]
        energies += [{**asked, **row} for row in one.energies]
    absent = dict.fromkeys(("best_separation", "n_borrowed", "class_gap"))
    cells += [_cell(missing, absent) for missing in results.not_visible]
    frames = (pd.DataFrame(rows) for rows in (cells, agreements, energies))
    return {name: _ordered(frame) for name, frame in zip(TABLES, frames, strict=True)}


def _cell(content: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """Row of a cell: what was asked, model, data, how well the concept shows (``None``: not at all), provenance."""
    model, data, metadata = content["model"], content["data"], content["metadata"]
    return {
        **{key: content["cell"][key] for key in (*CELL, "suffix")},
        "parameters": model["parameters"],
        "n_layers": model["layers"],
        "hidden_size": model["hidden_size"],
        "model_fingerprint": model["fingerprint"],
        "data_fingerprint": data["fingerprint"],
        "concept_fingerprint": data["concept_fingerprint"],
        "operating_fingerprint": data["operating_fingerprint"],
        "n_evaluation": data["n_evaluation"],
        "n_cut": data["n_cut"],
        "length_auc": data["length_auc"],
        **shown,
        **{key: metadata[key] for key in ("seconds", "finished", "device", "commit")},
        "visible": content["kind"] == "experiment",
    }


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that say what a row is about first, then the numbers, each with its interval."""
    first = [name for name in FIRST_COLUMNS if name in frame.columns]
    rest = [name for name in frame.columns if name not in first]
    return frame[first + (rest if "suffix" in rest else sorted(rest))]


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
    generator = np.random.default_rng(seed)
    tasks = frame.groupby("task").ngroup().to_numpy()
    cells = frame.groupby(["task", "seed"]).ngroup().to_numpy()  # those of one task side by side
    numbers = {value: frame.reindex(columns=[value, f"{value}_low", f"{value}_high"]) for value in values}
    arrays = {value: numbers[value].to_numpy(float).T for value in values}
    grouped = frame.groupby(list(by), sort=False, dropna=False)
    groups = grouped.ngroup().to_numpy()
    rows = []
    for number, (key, _) in enumerate(grouped):
        inside = groups == number
        row: dict[str, Any] = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        complete = inside.copy()
        for value, array in arrays.items():
            known = inside & ~np.isnan(array[0])
            complete &= known
            with np.errstate(divide="ignore"):  # of a bound that is zero
                x = np.log(array[:, known]) if log else array[:, known]
            found = _mean_and_interval(tasks[known], cells[known], x, generator)
            row |= dict(zip((value, f"{value}_low", f"{value}_high"), np.exp(found) if log else found, strict=True))
        rows.append({**row, "n_tasks": len(np.unique(tasks[complete]))})
    return pd.DataFrame(rows)


def _mean_and_interval(
    tasks: np.ndarray, cells: np.ndarray, rows: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Mean of rows and the bounds of its 95 % interval; NaN where there is none.

    ``rows`` (3, n_rows) are the values and their own bounds over prompts (NaN: unknown), ``tasks`` and ``cells`` the
    numbers of their task and of their pair of task and seed.
    """
    x, low, high = rows
    if not len(x):
        return np.full(3, np.nan)
    _, first, cell = np.unique(cells, return_index=True, return_inverse=True)
    n_rows = np.bincount(cell)
    means = np.bincount(cell, x) / n_rows
    widths = np.where(np.isfinite(high - low), high - low, 0)
    deviations = np.bincount(cell, widths / (2 * 1.96)) / n_rows
    _, starts, n_seeds = np.unique(tasks[first], return_index=True, return_counts=True)
    middle = (np.add.reduceat(means, starts) / n_seeds).mean()
    if len(means) == 1:
        return np.array([middle, np.nan, np.nan])
    chosen = generator.integers(len(starts), size=(N_BOOTSTRAP, len(starts), 1))  # tasks
    shape = (N_BOOTSTRAP, len(starts), n_seeds.max())
    drawn = starts[chosen] + (generator.random(shape) * n_seeds[chosen]).astype(int)  # more seeds than some tasks have
    draws = means[drawn]
    if deviations.any():
        draws += deviations[drawn] * generator.standard_normal(shape)
    draws[np.arange(shape[-1]) >= n_seeds[chosen]] = 0.0
    bounds = np.quantile((draws.sum(axis=2) / n_seeds[chosen[..., 0]]).mean(axis=1), [0.025, 0.975])
    return np.array([middle, *np.clip(bounds, np.nanmin([x, low]), np.nanmax([x, high]))])


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
    ratio = frame["ratio"].astype(float)
    frame = frame.assign(ratio=ratio.where(ratio > 0))  # 0: an optimum out of reach, as older files have it
    censored = frame["ratio"].isna()
    counts = frame.assign(n_rows=1, n_censored=censored.astype(int)).groupby(list(by), sort=False, dropna=False)
    found = summarize(frame, by, ["ratio"], log=True)
    totals = counts[["n_rows", "n_censored", "n_out_of_reach"]].sum()
    return found.assign(**{name: totals[name].to_numpy(int) for name in totals})  # groups in the same order


def write_tables(results: Results, grid: Grid, out: str | Path) -> list[Path]:
    """CSV files of the tables, and ``provenance.json``, each written whole or not at all."""
    paths = []
    for name, frame in tables(results).items():
        if len(frame):
            path = Path(out) / f"{name}.csv"
            write_atomically(path, partial(_short(frame).to_csv, index=False, lineterminator="\n"))
            paths.append(path)
    path = Path(out) / "provenance.json"
    write_json(path, _provenance(results, grid))
    return [*paths, path]


def read_table(folder: str | Path, name: str) -> pd.DataFrame:
    """A table of a study's report: ``cells``, ``agreement`` or ``energy``.

    Raises
    ------
    FileError
        If it is not there or cannot be read.

    Examples
    --------
    >>> from llvlit.study.tables import committed, read_table
    >>> {"model", "task", "seed"} <= set(read_table(committed("real"), "agreement").columns)
    True
    """
    path = Path(folder) / f"{name}.csv"
    try:
        return pd.read_csv(path, keep_default_na=False, na_values=[""])  # "null" is the name of a predictor
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}). Run `llvlit study --report` on that study.") from error


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
    for folder in (Path(start).resolve(), *Path(start).resolve().parents):
        if (folder / "results" / study / "provenance.json").is_file():
            return folder / "results" / study
    raise FileError(f"There is no results/{study} here. Work in a checkout of llvlit, or run that study yourself.")


def _short(frame: pd.DataFrame) -> pd.DataFrame:
    """The same numbers with five digits; whole numbers stay whole where some are missing."""
    short = frame.copy()
    for column in short.columns:
        if short[column].dtype == float:
            known = short[column].dropna()
            if len(known) and (known == known.round()).all():
                short[column] = short[column].astype("Int64")
            else:
                short[column] = short[column].map(lambda value: float(f"{value:.{DIGITS}g}"))
    return short


def _provenance(results: Results, grid: Grid) -> dict[str, Any]:
    """Grid, versions, devices and commits of all experiments."""
    keys = sorted({key for one in results.experiments for key in one.metadata} - {"seconds", "finished"})
    found = {key: sorted({str(one.metadata.get(key)) for one in results.experiments}) for key in keys}
    return {
        "grid": grid.name,
        "grid_fingerprint": grid.fingerprint,
        "description": grid.description,
        "n_cells": len(grid.cells()),
        "n_experiments": len(results.experiments),
        "n_not_visible": len(results.not_visible),
        "seconds": round(sum(one.metadata["seconds"] for one in results.experiments)),
        "finished": max(one.metadata["finished"] for one in results.experiments),
        **{key: values[0] if len(values) == 1 else values for key, values in found.items()},
    }
