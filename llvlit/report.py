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
from llvlit.grid import Grid
from llvlit.study import Results

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
    """Means over tasks and seeds, with 95 % bootstrap intervals.

    Tasks are drawn with replacement, then seeds within each: what varies most is what a conclusion must
    survive.  With one task the interval is over its seeds.

    Parameters
    ----------
    frame
        Has the columns ``task`` and ``seed``, ``by`` and ``values``.
    log
        Geometric means, as fits ratios: of positive values only.

    Returns
    -------
    DataFrame
        ``by``, then for each value its mean, ``_low`` and ``_high``, then ``n_tasks``, the tasks that have all
        values.

    Notes
    -----
    A bootstrap over few tasks is too sure of itself: of intervals over nine tasks about nine in ten hold the
    mean, over four tasks seventeen in twenty, over two tasks two in three.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.report import summarize
    >>> rows = [("small", "films", 0, 0.5), ("small", "films", 1, 0.7), ("small", "books", 0, 0.8)]
    >>> frame = pd.DataFrame(rows, columns=["model", "task", "seed", "spearman"])
    >>> means = summarize(frame, by=["model"], values=["spearman"])  # of tasks, not of rows
    >>> round(float(means["spearman"][0]), 2), int(means["n_tasks"][0])
    (0.7, 2)
    """
    generator = np.random.default_rng(seed)
    rows = []
    for key, group in frame.groupby(list(by), sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        for value in values:
            tasks = [part[value].dropna().to_numpy(float) for _, part in group.groupby("task", sort=True)]
            tasks = [np.log(part) if log else part for part in tasks if len(part)]
            if not tasks:
                row |= {value: np.nan, f"{value}_low": np.nan, f"{value}_high": np.nan}
                continue
            draws = np.empty((N_BOOTSTRAP, len(tasks)))
            for number, part in enumerate(tasks):
                draws[:, number] = part[generator.integers(len(part), size=(N_BOOTSTRAP, len(part)))].mean(axis=1)
            chosen = generator.integers(len(tasks), size=(N_BOOTSTRAP, len(tasks)))
            means = np.take_along_axis(draws, chosen, axis=1).mean(axis=1)
            found = np.array([np.mean([part.mean() for part in tasks]), *np.quantile(means, [0.025, 0.975])])
            row |= dict(zip((value, f"{value}_low", f"{value}_high"), np.exp(found) if log else found, strict=True))
        used = group.dropna(subset=list(values), how="any")["task"].nunique()
        rows.append({**row, "n_tasks": used})
    return pd.DataFrame(rows)


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
    >>> from llvlit.report import committed, read_table
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
    >>> from llvlit.report import committed
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
