"""Plots of a study: summaries over tasks and seeds, every number with its interval."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas.api.types import is_numeric_dtype

from llvlit import checks
from llvlit.errors import InputError
from llvlit.plots import figures


def agreement_summary(summary: pd.DataFrame, values: Mapping[str, str] | None = None) -> Figure:
    """Agreement of every predictor by model, one panel a number; bars are the intervals in the summary.

    Parameters
    ----------
    summary
        Columns ``model``, ``predictor``, ``layers`` and the values with ``_low`` and ``_high``, as
        :func:`llvlit.study.tables.summarize` gives them; of ``layers``, "all" is drawn.
    values
        Column and name of each panel.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> from llvlit.plots import study as study_figures
    >>> from llvlit.study.tables import committed, read_table, summarize
    >>> agreement = read_table(committed("real"), "agreement")
    >>> summary = summarize(agreement, ["model", "predictor", "layers"], ["spearman"])
    >>> len(study_figures.agreement_summary(summary, {"spearman": "Spearman"}).axes)
    1
    """
    if values is None:
        values = {"spearman": "Spearman", "pearson": "Pearson", "relative_error": "Relative error"}
    if not checks.instance("values", values, Mapping, "names of panels by column"):
        raise InputError("values is empty; name a column, and its panel.")
    for value, label in values.items():
        checks.text("values", value)
        checks.text("values", label)
    summary = _rows("summary", summary, ("model", "predictor"), values, layers="all")
    models = list(dict.fromkeys(summary["model"]))
    predictors = [name for name in figures.PREDICTORS if name in set(summary["predictor"])]
    figure, panels = figures.new(len(values), width=3.6 * len(values), height=3.6)
    for axes, (value, label) in zip(panels, values.items(), strict=True):
        for number, predictor in enumerate(predictors):
            rows = summary[summary["predictor"] == predictor].set_index("model").reindex(models)
            where = np.arange(len(models)) + 0.07 * (number - (len(predictors) - 1) / 2)
            style = {**figures.PREDICTORS[predictor], "linestyle": "-" if predictor == "null" else "--"}
            interval_line(where, rows, value, axes=axes, label=predictor, **style)
        axes.set_xticks(range(len(models)), map(figures.plain, map(figures.short_name, models)))
        axes.set_xlabel("Model")
        axes.set_title(label, loc="left")
    panels[0].set_ylabel("Agreement with measured gains")
    _shared_legend(figure, panels)
    return figure


def interval_line(
    where: Sequence[float] | np.ndarray,
    rows: pd.DataFrame,
    value: str,
    *,
    axes: Axes,
    label: str,
    band: bool = False,
    color: str | None = None,
    marker: str | None = None,
    linestyle: str = "-",
    fillstyle: Literal["full", "none"] = "full",
) -> None:
    """A column of a summary against ``where``, with bars (or a ``band``) from ``VALUE_low`` to ``VALUE_high``.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.plots import figures
    >>> from llvlit.plots import study as study_figures
    >>> rows = pd.DataFrame({"gain": [0.5, 0.7], "gain_low": [0.4, 0.6], "gain_high": [0.6, 0.9]})
    >>> figure, (axes,) = figures.new()
    >>> study_figures.interval_line([0, 1], rows, "gain", axes=axes, label="measured")
    >>> len(axes.containers)
    1
    """
    figures.check_axes(axes, value=value, label=label)
    if color is not None and not is_color_like(checks.text("color", color)):
        raise InputError(f"color={checks.shown(color)} is no color that matplotlib knows.")
    if marker is not None and checks.text("marker", marker) not in Line2D.markers:
        raise InputError(f"marker={checks.shown(marker)} is no marker that matplotlib knows.")
    checks.choice("linestyle", linestyle, ("-", "--", "-.", ":", "none"))
    checks.choice("fillstyle", fillstyle, ("full", "none"))
    rows = _rows("rows", rows, (), (value,))
    where = checks.array("where", where, (len(rows),))
    style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": linestyle, "fillstyle": fillstyle}
    style["label"] = figures.plain(label)
    if not checks.flag("band", band):
        axes.errorbar(where, rows[value], yerr=_spread(rows, value), capsize=2, elinewidth=0.9, **style)
        return
    axes.plot(where, rows[value], **style)
    axes.fill_between(where, rows[f"{value}_low"], rows[f"{value}_high"], color=color, alpha=0.15, linewidth=0)


def energy_summary(summary: pd.DataFrame, *, layers: str = "all") -> Figure:
    """Energy of every schedule over that of the first optimum, one panel a metric, one marker a model, log axis.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.plots import figures
    >>> from llvlit.plots import study as study_figures
    >>> row = {"model": "small", "layers": "all", "schedule": "uniform", "metric": "absolute"}
    >>> summary = pd.DataFrame([{**row, "ratio": 2.0, "ratio_low": 1.5, "ratio_high": 3.0}])
    >>> study_figures.energy_summary(summary).axes[0].get_xscale()
    'log'
    """
    layers = checks.text("layers", layers)
    summary = _rows("summary", summary, ("model", "schedule", "metric"), ("ratio",), layers=layers)
    schedules, metrics = list(dict.fromkeys(summary["schedule"])), list(dict.fromkeys(summary["metric"]))
    models = list(dict.fromkeys(summary["model"]))
    figure, panels = figures.new(len(metrics), width=4.6 * len(metrics), height=0.9 + 0.42 * len(schedules))
    for axes, metric in zip(panels, metrics, strict=True):
        for number, model in enumerate(models):
            chosen = (summary["metric"] == metric) & (summary["model"] == model)
            rows = summary[chosen].set_index("schedule").reindex(schedules)
            heights = np.arange(len(schedules)) + 0.2 * (number - (len(models) - 1) / 2)
            style = {**figures.model_style(number), "linestyle": "none"}
            style["label"] = figures.plain(figures.short_name(model))
            axes.errorbar(rows["ratio"], heights, xerr=_spread(rows, "ratio"), **style)
        axes.axvline(1, color="#555555", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(schedules)), schedules)
        axes.invert_yaxis()
        axes.set_xlabel("Energy over the first optimum's (log)")
        axes.set_title(f"{metric} energy", loc="left")
    _shared_legend(figure, panels)
    return figure


def _rows(
    argument: str, table: pd.DataFrame, keys: Sequence[str], values: Iterable[str], *, layers: str | None = None
) -> pd.DataFrame:
    """Rows of some ``layers``, one for each combination of the keys, which are texts; the values are numbers.

    Raises
    ------
    InputError
        If a column is missing or of another kind, no row is left, or two are of one combination.
    """
    checks.instance(argument, table, pd.DataFrame, "a table, as llvlit.study.tables.summarize gives it")
    columns = dict.fromkeys([*keys, "layers"] if layers is not None else keys, "texts")
    columns |= {f"{value}{end}": "numbers" for value in values for end in ("", "_low", "_high")}
    if missing := [column for column in columns if column not in table]:
        raise InputError(f"{argument} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    for column, kind in columns.items():
        fits = is_numeric_dtype if kind == "numbers" else _holds_texts
        if table.columns.tolist().count(column) > 1 or not fits(table[column]):
            raise InputError(f"{argument}: column {column} must be one, and hold {kind} alone.")
    rows = table if layers is None else table[table["layers"] == layers]
    if rows.empty:
        raise InputError(f"{argument} has no row{'' if layers is None else f' of layers={layers!r}'}; nothing to draw.")
    if keys and rows.duplicated(list(keys)).any():
        raise InputError(f"{argument} has several rows of the same {', '.join(keys)}; one of each can be drawn.")
    return rows


def _numbers(argument: str, table: pd.DataFrame, columns: Iterable[str]) -> None:
    for name in columns:
        if table.columns.tolist().count(name) != 1 or not is_numeric_dtype(table[name]):
            raise InputError(f"{argument}: column {name} must be one, and hold numbers alone.")


def _holds_texts(column: pd.Series) -> bool:
    return all(isinstance(text, str) for text in column)


def _spread(rows: pd.DataFrame, value: str) -> np.ndarray:
    """How far the interval reaches below and above a value, ``(2, n_rows)``."""
    middle, low, high = (rows[f"{value}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    return np.maximum([middle - low, high - middle], 0)


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)


def ladder(summary: pd.DataFrame, steps: Mapping[str, str], *, split: int = 0) -> Figure:
    """Relative error of each predictor against the models, in their order, named at the right end; a log axis.

    Parameters
    ----------
    summary
        Columns ``name`` (of a model), ``predictor`` and ``relative_error`` with its bounds.
    steps
        Predictors to draw, and what the figure calls them.
    split
        Number of models before a line that parts two families; no curve crosses it.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.plots import study as study_figures
    >>> row = {"name": "small", "predictor": "adjoint", "relative_error": 0.1}
    >>> rows = pd.DataFrame([row | {"relative_error_low": 0.05, "relative_error_high": 0.2}])
    >>> study_figures.ladder(rows, {"adjoint": "other prompts"}).axes[0].get_yscale()
    'log'
    """
    steps = checks.instance("steps", steps, Mapping, "names by predictor")
    summary = _rows("summary", summary, ("name", "predictor"), ("relative_error",))
    names = list(dict.fromkeys(summary["name"]))
    split = checks.integer("split", split, at_least=0, at_most=len(names))
    figure, (axes,) = figures.new(width=6.4, height=4.2)
    for predictor, text in steps.items():
        rows = summary[summary["predictor"] == checks.text("steps", predictor)].set_index("name").reindex(names)
        style = {"color": "#6a6a6a", "marker": "*", **figures.PREDICTORS.get(predictor, {})}
        line = "-" if predictor == "null" else "--"
        for where in filter(len, (range(split), range(split, len(names)))):
            part = rows.iloc[where]
            interval_line(where, part, "relative_error", axes=axes, label=text, linestyle=line, **style)
        end = (len(names) - 1, float(rows["relative_error"].iloc[-1]))
        beside: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(figures.plain(checks.text("steps", text)), end, color=style["color"], **beside)
    if split:
        axes.axvline(split - 0.5, color="#8a8a8a", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), [re.sub(r"[ -](?=[^ -]+$)", "\n", name) for name in names], fontsize=8)
    axes.set_xlim(-0.4, 1.3 * len(names))
    axes.set(xlabel="Model, by number of parameters", ylabel="Relative error of the gains (log)")
    return figure


def agreement_by_size(
    summary: pd.DataFrame, paper: Sequence[Mapping[str, Any]], *, predictors: Sequence[str], split: int = 0
) -> Figure:
    """Spearman's correlation of some predictors against the number of parameters, the paper's as stars; a log axis.

    Parameters
    ----------
    summary
        Columns ``name`` (of a model, in the order of size), ``parameters``, ``predictor`` and ``spearman`` with bounds.
    paper
        The paper's models, each with ``parameters`` and ``spearman``.
    split
        Number of models of the first family, whose points are joined.

    Examples
    --------
    >>> import pandas as pd
    >>> from llvlit.plots import study as study_figures
    >>> row = {"name": "small", "parameters": 1e6, "predictor": "krylov", "spearman": 0.8}
    >>> rows = pd.DataFrame([row | {"spearman_low": 0.7, "spearman_high": 0.9}])
    >>> figure = study_figures.agreement_by_size(rows, [{"parameters": 1e8, "spearman": 0.9}], predictors=["krylov"])
    >>> figure.axes[0].get_xscale()
    'log'
    """
    summary = _rows("summary", summary, ("name", "predictor"), ("spearman",))
    _numbers("summary", summary, ("parameters",))
    split = checks.integer("split", split, at_least=0)
    reported = []
    for model in checks.sequence("paper", paper, "the paper's models"):
        known = checks.instance("paper", model, Mapping, "models with parameters and spearman")
        reported.append([checks.number(f"paper[{key!r}]", known.get(key)) for key in ("parameters", "spearman")])
    figure, (axes,) = figures.new(height=4.0)
    sizes = summary.groupby("name", sort=False)["parameters"].first()
    predictors = checks.sequence("predictors", predictors, "a list of predictors")
    for number, predictor in enumerate(predictors):
        rows = summary[summary["predictor"] == checks.text("predictors", predictor)]
        if not len(rows):
            raise InputError(f"predictors: summary has no {predictor!r}.")
        style = figures.PREDICTORS.get(predictor, figures.model_style(number))
        beside = 1.05 ** (number - (len(predictors) - 1) / 2)
        for part, line in ((rows[:split], "--"), (rows[split:], "none")):
            if len(part):
                where = part["parameters"].to_numpy() * beside
                interval_line(where, part, "spearman", axes=axes, label=predictor, linestyle=line, **style)
        at = min(max(split - 1, 0), len(rows) - 1)
        place: dict[str, Any] = {"xytext": (9, -4), "textcoords": "offset points"}
        axes.annotate(
            predictor, rows[["parameters", "spearman"]].iloc[at].to_numpy(float), color=style["color"], **place
        )
    axes.plot(*np.reshape(reported, (-1, 2)).T, "*:", color="black", markersize=11)
    for size, value in reported[:1]:
        axes.annotate("the paper", (size, value), xytext=(-62, -14), textcoords="offset points")
    for name, size in sizes.items():
        axes.annotate(figures.plain(str(name)), (size, 0.02), rotation=90, ha="center", fontsize=8, color="#6a6a6a")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.06)
    axes.set(xlabel="Parameters (log)", ylabel="Spearman with measured gains")
    return figure


def straight_ranges(radii: pd.DataFrame, names: Mapping[str, int]) -> Figure:
    """Largest straight push of a layer, in % of its state, against depth: trained models, and dotted their twins.

    Parameters
    ----------
    radii
        Rows of one task, as :func:`~llvlit.study.comparison.straightness` gives them; of three neighbouring layers the
        median is drawn.
    names
        Models to draw, and the number of the style of each.

    Examples
    --------
    >>> from llvlit.plots import study as study_figures
    >>> from llvlit.study.comparison import straightness
    >>> radii = straightness().query("task == 'tense'")
    >>> study_figures.straight_ranges(radii, {"small": 0}).axes[0].get_yscale()
    'log'
    """
    checks.instance("radii", radii, pd.DataFrame, "a table, as llvlit.study.comparison.straightness gives it")
    if "name" not in radii or not _holds_texts(radii["name"]):
        raise InputError("radii must have a column name, of texts.")
    _numbers("radii", radii, ("depth", "median"))
    figure, (axes,) = figures.new(height=4.0)
    ends: list[float] = []
    for name, number in checks.instance("names", names, Mapping, "numbers of styles by model").items():
        style = figures.model_style(number) | {"markersize": 3}
        for kind, line in (("", "-"), ("untrained ", ":")):
            part = radii[radii["name"] == kind + checks.text("names", name)]
            share = 100 * part["median"].rolling(3, center=True, min_periods=1).median()
            axes.plot(part["depth"], share, label=kind + name, linestyle=line, **style)
            if not kind and len(share):
                near = sum(abs(np.log(end / share.iloc[-1])) < 0.25 for end in ends)
                ends.append(float(share.iloc[-1]))
                place: dict[str, Any] = {"xytext": (6, 12 * near), "textcoords": "offset points", "va": "center"}
                axes.annotate(figures.plain(name), (1, ends[-1]), color=style["color"], **place)
    axes.annotate("untrained twins, dotted", (0.05, 180), color="#6a6a6a")
    axes.set_xlim(-0.02, 1.35)
    axes.set_xticks([0, 0.5, 1], ["first layer", "middle", "last layer"])
    axes.set_yscale("log")
    axes.set_ylabel("Push that bends by 10 %, % of the state (log)")
    return figure
