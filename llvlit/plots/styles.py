"""One style for all plots: solid is measured, dashed predicted; one color and marker per predictor and model."""

from __future__ import annotations

from typing import Any

STYLE: Any = {
    "figure.figsize": (6.4, 3.6),
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d4d4d4",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "llvlit",
    "svg.fonttype": "path",
}
"""For a white page.  The book shows figures on its own ground, and turns their lightness round in dark mode."""

MEASURED: dict[str, Any] = {"color": "#000000", "linestyle": "-", "marker": "o"}
PREDICTORS: dict[str, dict[str, Any]] = {
    "adjoint": {"color": "#2f8fc6", "marker": "D"},
    "krylov": {"color": "#d55e00", "marker": "s"},
    "reachability": {"color": "#009e73", "marker": "^"},
    "random": {"color": "#8a8a8a", "marker": "x"},
    "pca": {"color": "#0072b2", "marker": "v"},
    "null": {"color": "#c46a99", "marker": "."},
}
MODEL_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "marker": "o"},
    {"color": "#b87d00", "marker": "s"},
    {"color": "#009e73", "marker": "^"},
    {"color": "#c46a99", "marker": "D"},
    {"color": "#7a6a58", "marker": "v"},
)
DIRECTIONS: dict[str, dict[str, Any]] = {
    "mean_difference": {"color": "#7a5195", "marker": "o"},
    "lda": {"color": "#b4572a", "marker": "s"},
    "logistic": {"color": "#4d7c0f", "marker": "^"},
    "principal_component": {"color": "#0e7490", "marker": "D"},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "optimal": {"color": "#2f8fc6", "marker": "D"},
    "optimal, not layer 0": {"color": "#0e7490", "marker": "v"},
    "optimal, krylov": {"color": "#d55e00", "marker": "s"},
    "uniform": {"color": "#7a5195", "marker": "^"},
    "last layer": {"color": "#b4572a", "marker": "o"},
    "best layer": {"color": "#4d7c0f", "marker": "P"},
    "random layer": {"color": "#8a8a8a", "marker": "x"},
}
METRICS: dict[str, dict[str, Any]] = {
    "absolute": {"color": "#8250c4", "marker": "o"},
    "relative": {"color": "#0f8b8d", "marker": "s"},
}


def short_name(model: str) -> str:
    """A model's name without its folder.

    Examples
    --------
    >>> from llvlit.plots.styles import short_name
    >>> short_name("embedded/large")
    'large'
    """
    return model.rstrip("/").rpartition("/")[2]
