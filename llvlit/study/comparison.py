"""Tables of committed studies side by side: rows at one setting, paired differences, means that say what is behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llvlit.checks import checked
from llvlit.errors import FileError
from llvlit.study.tables import committed, read_table, summarize

CELL = ("model", "task", "seed")
AGREEMENT = {"spearman": "Spearman", "pearson": "Pearson", "relative_error": "Relative error"}
DASH = "\N{EN DASH}"
Paper = Mapping[str, Any]
"""What ``results/paper.json`` holds."""


@dataclass(frozen=True)
class StudyTables:
    """Tables of a committed study.

    Attributes
    ----------
    cells, energy : DataFrame
        As written; energy has no rows where none was asked for.
    agreement : DataFrame
        Mean-difference directions, exact products, no final norm, all layers, all operating prompts: the rows that
        the paper's numbers are of.
    provenance : dict
        Grid, versions, devices.

    Examples
    --------
    >>> from llvlit.study.comparison import read_study
    >>> read_study("real").parameters("embedded/small")
    872320
    """

    cells: pd.DataFrame
    agreement: pd.DataFrame
    energy: pd.DataFrame
    provenance: dict[str, Any]

    @property
    def models(self) -> list[str]:
        """Models that show some concept, from small to large."""
        seen = self.cells[self.cells["visible"].astype(bool)]
        return list(seen.groupby("model")["parameters"].first().sort_values(kind="stable").index)

    @checked
    def parameters(self, model: str) -> int:
        """Number of parameters of a model."""
        return int(self.cells.loc[self.cells["model"] == model, "parameters"].dropna().iloc[0])


@checked
def read_study(name: str, *, start: str | Path = ".") -> StudyTables | None:
    """Tables of ``results/NAME`` in the checkout around ``start``; None where that study is not there.

    Examples
    --------
    >>> from llvlit.study.comparison import read_study
    >>> read_study("real").models
    ['embedded/small', 'embedded/medium', 'embedded/large']
    >>> read_study("nothing of this name") is None
    True
    """
    try:
        folder = committed(name, start=start)
    except FileError:
        return None
    cells, rows = read_table(folder, "cells"), read_table(folder, "agreement")
    fits = (rows["jacobian"] == "jvp") & ~rows["final_norm"] & (rows["layers"] == "all")
    fits &= (rows["direction"] == "mean_difference") & ~rows["predictor"].str.contains(", ")
    fits &= rows["n_operating"] == rows.groupby(list(CELL))["n_operating"].transform("max")
    has_energy = (folder / "energy.csv").is_file()
    energy = read_table(folder, "energy") if has_energy else pd.DataFrame(columns=["model", "metric", "layers"])
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    return StudyTables(cells, rows[fits], energy, provenance)


@checked
def joined(first: StudyTables, second: StudyTables | None) -> StudyTables:
    """Two studies of the same models as one, with the first one's provenance.

    Examples
    --------
    >>> from llvlit.study.comparison import joined, read_study
    >>> real = read_study("real")
    >>> joined(real, None) is real
    True
    """
    if second is None:
        return first

    def both(name: str) -> pd.DataFrame:
        return pd.concat([getattr(first, name), getattr(second, name)], ignore_index=True)

    return StudyTables(both("cells"), both("agreement"), both("energy"), first.provenance)


@checked
def at_setting(study: StudyTables, paper: Paper) -> pd.DataFrame:
    """Agreements at the paper's amplitude, at each model's largest order that is no larger than the paper's.

    Examples
    --------
    >>> from llvlit.study.comparison import at_setting, read_study
    >>> rows = at_setting(read_study("real"), {"setting": {"order": 32, "amplitude": 0.1}})
    >>> rows["order"].dropna().unique().tolist()
    [32.0]
    """
    rows, setting = study.agreement, paper["setting"]
    rows = rows[np.isclose(rows["amplitude"], setting["amplitude"]) & ~(rows["order"] > setting["order"])]
    return rows[rows["order"].isna() | (rows["order"] == rows.groupby("model")["order"].transform("max"))]


@checked
def interval(row: pd.Series, value: str, *, digits: int = 2, sign: str = "") -> str:
    """A mean with its interval in brackets, or alone where there is none.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.comparison import interval
    >>> interval(pd.Series({"x": 0.5, "x_low": 0.4, "x_high": 0.7}), "x", sign="+")
    '+0.50 [+0.40, +0.70]'
    """
    middle, low, high = (float(row[f"{value}{end}"]) for end in ("", "_low", "_high"))
    if np.isnan(middle):
        return DASH

    def told(x: float) -> str:  # never "-0.00"; many digits of a large ratio would be noise
        return f"{round(x, digits) + 0.0:{sign}.{digits}f}" if abs(x) < 10 else f"{x:{sign},.0f}"

    return told(middle) if np.isnan(low) else f"{told(middle)} [{told(low)}, {told(high)}]"


@checked
def means(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """As :func:`llvlit.study.tables.summarize`, but with ``n_pairs`` (of task and seed) and no interval below two tasks.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.comparison import means
    >>> frame = pd.DataFrame({"model": ["m", "m"], "task": ["films", "films"], "seed": [0, 1], "x": [0.2, 0.4]})
    >>> row = means(frame, ["model"], ["x"]).iloc[0]
    >>> round(float(row["x"]), 2), float(row["x_low"]), int(row["n_pairs"])
    (0.3, nan, 2)
    """
    found = summarize(frame, by, values)
    pairs = frame.drop_duplicates([*by, "task", "seed"]).groupby(list(by), sort=False, dropna=False).size()
    found["n_pairs"] = pairs.to_numpy()  # groups in the same order
    bounds = [f"{value}{end}" for value in values for end in ("_low", "_high")]
    found.loc[found["n_tasks"] < 2, bounds] = np.nan
    return found


@checked
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
    >>> from llvlit.study.comparison import paired
    >>> rows = [("films", "krylov", 0.9), ("films", "random", 0.5), ("books", "krylov", 0.6), ("books", "random", 0.4)]
    >>> frame = pd.DataFrame(rows, columns=["task", "predictor", "spearman"]).assign(model="m", seed=0)
    >>> round(float(paired(frame, "predictor", "krylov", "random")["value"]), 2)
    0.3
    """
    wide = frame.pivot_table(index=list(cell), columns=column, values=value)
    wide = wide.reindex(columns=[after, before])
    both = (wide[after] - wide[before]).rename("value").dropna().reset_index()
    return mean_of(both)


@checked
def mean_of(frame: pd.DataFrame) -> pd.Series:
    """Mean of the column ``value`` of such a frame, as :func:`llvlit.study.comparison.paired` gives it.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.comparison import mean_of
    >>> float(mean_of(pd.DataFrame({"task": ["films"], "seed": [0], "value": [0.5]}))["value"])
    0.5
    """
    if not len(frame):
        return pd.Series({"value": np.nan, "value_low": np.nan, "value_high": np.nan, "n_tasks": 0, "n_pairs": 0})
    return means(frame.assign(kind=0), ["kind"], ["value"]).iloc[0]


@checked
def verdict(row: pd.Series, more: str = "better", less: str = "worse", same: str = "no sure difference") -> str:
    """What the interval of a difference says; nothing where there is none.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.study.comparison import verdict
    >>> verdict(pd.Series({"value_low": 0.1, "value_high": 0.4}))
    'better'
    """
    if np.isnan(row["value_low"]):
        return "too few tasks"
    return more if row["value_low"] > 0 else less if row["value_high"] < 0 else same


@checked
def extent(n_tasks: float, n_pairs: float) -> str:
    """How much stands behind a mean.

    Examples
    --------
    >>> from llvlit.study.comparison import extent
    >>> extent(4, 12), extent(1, 1)
    ('4 tasks, 12 pairs', '1 task, 1 pair')
    """
    return f"{n_tasks:.0f} task{'' if n_tasks == 1 else 's'}, {n_pairs:.0f} pair{'' if n_pairs == 1 else 's'}"
