"""What became of recommendations: whether promises were kept, and whether the choice of layers was a good one."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llvlit import checks
from llvlit.errors import InputError

KEPT = ("within 25 %", "kl expected", "shift expected", "corrected within 10 %")
CELL = ("model", "task", "output")
"""What is independent of other rows: splits, seeds and budgets of one share model and prompts."""

KEYS = (*CELL, "family", "seed", "budget", "commit")


def _frame(argument: str, given: object, columns: tuple[str, ...]) -> pd.DataFrame:
    table = checks.instance(argument, given, pd.DataFrame, "a table, as benchmarks/warranty.py writes it")
    if lacking := [name for name in columns if name not in table.columns]:
        raise InputError(f"{argument} has no column {lacking[0]!r}. Pass a table, as benchmarks/warranty.py writes it.")
    if table.empty:
        raise InputError(f"{argument} has no row. Pass a table, as benchmarks/warranty.py writes it.")
    return table


def promises_kept(trials: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Share of first trials that kept each promise, in groups; one row a group.

    Parameters
    ----------
    trials
        A row each: ``kl over budget``, ``kl expected`` and ``shift expected`` (whether the measured mean lay where it
        was expected), ``corrected over budget`` (after one correction of the strength).
    by
        Column that makes the groups, such as ``budget`` or ``model``.

    Raises
    ------
    InputError
        If a column is missing, or there is no row.

    Examples
    --------
    >>> from llvlit.study.warranty import promises_kept
    >>> import pandas as pd
    >>> row = {"budget": 0.1, "kl over budget": 1.2, "kl expected": True, "shift expected": True}
    >>> promises_kept(pd.DataFrame([{**row, "corrected over budget": 1.01}]), by="budget")["within 25 %"].tolist()
    [1.0]
    """
    names = ("kl over budget", "kl expected", "shift expected", "corrected over budget", checks.text("by", by))
    table = _frame("trials", trials, names)
    told = table.assign(
        **{
            "within 25 %": (table["kl over budget"] - 1).abs() <= 0.25,
            "corrected within 10 %": (table["corrected over budget"] - 1).abs() <= 0.1,
        }
    )
    columns = {name: (name, "mean") for name in KEPT} | {"trials": ("kl over budget", "size")}
    return told.groupby(by).agg(**columns).reset_index()


def shares_of_oracle(choices: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """What each choice of layers reaches of the best single layer's shift, and how far ``recommended`` is ahead of it.

    The unit is a model with a task and an output; seeds are averaged within.

    Parameters
    ----------
    choices
        A row for each split, with a column for each choice: its share of what an oracle reaches at equal divergence.

    Returns
    -------
    DataFrame
        ``choice``, ``cells``, ``mean``, ``least``, ``ahead`` with the 95 % interval ``low`` to ``high``; worst first.

    Raises
    ------
    InputError
        If there is no column ``recommended``, or no row.

    Examples
    --------
    >>> from llvlit.study.warranty import shares_of_oracle
    >>> import pandas as pd
    >>> cell = {"model": "m", "output": "concept", "seed": 0, "budget": 0.1, "recommended": 1.0, "uniform": 0.8}
    >>> shares_of_oracle(pd.DataFrame([{**cell, "task": task} for task in "ab"]))["ahead"].round(2).tolist()
    [0.2, 0.0]
    """
    table = _frame("choices", choices, (*CELL, "recommended"))
    names = [name for name in table.columns if name not in KEYS]
    cells = table.groupby(list(CELL))[names].mean()
    generator = np.random.default_rng(checks.integer("seed", seed, at_least=0))
    rows = []
    for name in names:
        ahead = (cells["recommended"] - cells[name]).dropna().to_numpy()
        if not len(ahead):
            continue
        draws = ahead[generator.integers(len(ahead), size=(2000, len(ahead)))].mean(axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        reached = cells[name].dropna()
        rows.append((name, len(ahead), reached.mean(), reached.min(), ahead.mean(), low, high))
    columns = ["choice", "cells", "mean", "least", "ahead", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("mean").reset_index(drop=True)
