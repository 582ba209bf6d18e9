"""What scripts in ``benchmarks/`` printed once and is kept in ``results/method/``, as tables of numbers."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import pandas as pd

from llvlit import checks
from llvlit.errors import FileError
from llvlit.files import foreign, read_bytes
from llvlit.plots.figures import short_name

REPORTS = "results/method"
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_BOUNDED = re.compile(rf"({_NUMBER})(?: \[({_NUMBER}), ({_NUMBER})\])?")


def read_report(name: str, column: str, *, under: str = "", start: str | Path = ".") -> pd.DataFrame:
    """The first table with a column in ``results/method/NAME.md``, numbers as numbers.

    A cell such as ``0.5 [0.4, 0.7]`` is a number with its interval: the column then has two more beside it,
    ``COLUMN_low`` and ``COLUMN_high``.

    Parameters
    ----------
    under
        What the heading above the table contains.

    Raises
    ------
    FileError
        If there is no such report in the checkout around ``start``, or no such table has this column.

    Examples
    --------
    >>> from llvlit.study.reports import read_report
    >>> found = read_report("optimum", "Its price")
    >>> real = found[(found["Model"] == "smollm2-135m") & (found["Energy"] == "relative")]
    >>> real[["Task", "Its price", "Its price_high"]].values.tolist()
    [['film-sentiment', 1.01, 1.02], ['tense', 1.01, 1.01]]
    """
    path = _report(f"{checks.text('name', name)}.md", start)
    checks.text("column", column), checks.text("under", under)
    heading = ""
    rows: list[list[str]] = []
    for line in [*read_bytes(path, "a report").decode("utf-8", "replace").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows and column in rows[0] and under in heading:
            break
        else:
            heading, rows = line if line.startswith("#") else heading, []
    if len(rows) < 3:
        raise FileError(f"{path} holds no table with the column {checks.shown(column)} under {checks.shown(under)}.")
    with foreign(path, "a report"):
        return _with_numbers(pd.DataFrame(rows[2:], columns=rows[0]))


def read_orders(*, start: str | Path = ".") -> pd.DataFrame:
    """Orders of depth of several models and tasks, which ``benchmarks/order.py`` wrote: a row a model and task.

    Returns
    -------
    DataFrame
        ``task``, ``model`` (without its folder), ``parameters``, ``layers``, ``untrained``; and for the shares 5 % and
        1 % the smallest order that misses no more: ``order_5``, ``order_1`` of the concept, with ``_low`` and
        ``_high``, and the medians of three nulls, ``turned_5``, ``drawn_5``, ``identity_5`` and so on.

    Raises
    ------
    FileError
        If there is no such table in the checkout around ``start``.

    Examples
    --------
    >>> from llvlit.study.reports import read_orders
    >>> orders = read_orders()
    >>> row = orders[(orders["model"] == "smollm2-135m") & (orders["task"] == "film-sentiment")].iloc[0]
    >>> int(row["order_1"]), int(row["turned_1"])
    (6, 12)
    """
    path, what = _report("order.csv", start), "a table of orders"
    content = read_bytes(path, what)
    with foreign(path, what):
        frame = _with_numbers(pd.read_csv(BytesIO(content), dtype=str, keep_default_na=False))
        names = {f"order {share}%{end}": f"order_{share}{end}" for share in (5, 1) for end in ("", "_low", "_high")}
        found = frame[["task", "model", "parameters", "layers"]].assign(
            model=[short_name(name) for name in frame["model"].str.removeprefix("untrained:")],
            untrained=frame["model"].str.startswith("untrained:"),
            **{new: frame[old] for old, new in names.items()},
        )
        for null in ("turned", "drawn", "identity"):
            found[[f"{null}_5", f"{null}_1"]] = frame[null].str.split(" / ", expand=True).astype(int)
    return found


def read_shares(*, start: str | Path = ".") -> pd.DataFrame:
    """Shares of a gain matrix that realizations of every order miss, which ``benchmarks/headline_figure.py`` wrote.

    Returns
    -------
    DataFrame
        ``model``; ``directions``: those of the ``concept``, the same ``turned`` together, ``drawn`` anew at each state,
        or the concept's in layers that are ``idle``; ``draw``; ``order``; ``missed``.

    Examples
    --------
    >>> from llvlit.study.reports import read_shares
    >>> shares = read_shares()
    >>> orders = shares[shares["missed"] <= 0.01].groupby(["directions", "draw"])["order"].min()
    >>> bool(orders["concept"].max() < orders["turned"].min())
    True
    """
    path, what = _report("headline.csv", start), "a table of shares missed"
    content = read_bytes(path, what)
    with foreign(path, what):
        frame = pd.read_csv(BytesIO(content))
        return frame[["model", "directions", "draw", "order", "missed"]]


def _report(name: str, start: str | Path) -> Path:
    """A file of ``results/method`` in the checkout around a folder."""
    place = checks.path("start", start).resolve()
    for folder in (place, *place.parents):
        if (folder / REPORTS / name).is_file():
            return folder / REPORTS / name
    raise FileError(f"There is no {REPORTS}/{name} here. Work in a checkout of llvlit.")


def _with_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """The same table with numbers for texts in columns that hold nothing else, and their bounds beside them."""
    columns: dict[str, pd.Series] = {}
    for name in frame.columns:
        parts = frame[name].str.extract(f"^{_BOUNDED.pattern}$")
        if parts[0].isna().any():
            columns[name] = frame[name]
            continue
        columns[name] = pd.to_numeric(parts[0])
        if parts[1].notna().any():
            columns |= {f"{name}_low": pd.to_numeric(parts[1]), f"{name}_high": pd.to_numeric(parts[2])}
    return pd.DataFrame(columns)
