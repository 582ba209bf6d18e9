"""All plots: one style, one color and marker per model and per predictor, solid measured, dashed predicted."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llvlit import checks
from llvlit.errors import InputError
from llvlit.files import write_atomically

Styles = dict[str, dict[str, Any]]

_DATA = files("llvlit") / "data"
_STYLES = json.loads((_DATA / "styles.json").read_text(encoding="utf-8"))
STYLE = mpl.rc_params_from_file(str(_DATA / "llvlit.mplstyle"), use_default_template=False)
MEASURED: dict[str, Any] = _STYLES["measured"]
MODEL_STYLES: list[dict[str, Any]] = _STYLES["models"]
PREDICTORS: Styles = _STYLES["predictors"]
DIRECTIONS: Styles = _STYLES["directions"]
SCHEDULES: Styles = _STYLES["schedules"]
METRICS: Styles = _STYLES["metrics"]
WIDEST = 9.6
"""Inches, of a figure: in the book's column, letters then keep two thirds of their size."""


def show(figure: Figure, *, name: str, alt: str, caption: str) -> None:
    """Show a figure in a notebook as SVG, with its label, its alt text and its caption.

    The book's build turns them into a numbered figure.

    Raises
    ------
    InputError
        If name, alt or caption is empty.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, _ = figures.new()
    >>> figures.show(figure, name="fig-line", alt="", caption="It rises.")
    Traceback (most recent call last):
    llvlit.errors.InputError: alt is empty; every figure has a name, an alt text and a caption.
    """
    checks.instance("figure", figure, Figure, "a figure, as llvlit.plots.figures.new gives it")
    for argument, value in (("name", name), ("alt", alt), ("caption", caption)):
        if not checks.text(argument, value).strip():
            raise InputError(f"{argument} is empty; every figure has a name, an alt text and a caption.")
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    from IPython.display import display  # comes with a notebook, not with the package

    data = {"image/svg+xml": buffer.getvalue(), "text/plain": alt}
    display(data, raw=True, metadata={"llvlit": {"name": name, "alt": alt, "caption": caption}})


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all: as SVG if the name says so, else as PNG."""
    checks.instance("figure", figure, Figure, "a figure, as llvlit.plots.figures.new gives it")
    path = checks.path("path", path)
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    with mpl.rc_context(STYLE):
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150, bbox_inches="tight"))
    plt.close(figure)
    return path


def check_axes(axes: object, **texts: object) -> None:
    """InputError unless these are axes, and the named texts are texts."""
    checks.instance("axes", axes, Axes, "axes, as llvlit.plots.figures.new gives them")
    for argument, text in texts.items():
        checks.text(argument, text)


def new(
    n_columns: int = 1, *, n_rows: int = 1, height: float = 3.6, width: float | None = None
) -> tuple[Figure, list[Axes]]:
    """Figure in the project's style with some axes side by side; never so wide that letters get too small to read.

    Axes of several rows come row by row, and share their axes of x.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, axes = figures.new(2)
    >>> len(axes)
    2
    """
    n_columns = checks.integer("n_columns", n_columns, at_least=1, at_most=100)
    n_rows = checks.integer("n_rows", n_rows, at_least=1, at_most=100)
    if width is None:
        width = 6.4 if n_columns == 1 else 4.0 * n_columns
    size = min(checks.number("width", width, above=0), WIDEST), checks.number("height", height, above=0, at_most=100)
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=size, layout="constrained")
        axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=n_rows > 1)
    return figure, list(axes.flat)


_WHOLE = re.compile(  # such as [0.1, 0.2], (0.1 to 0.2), 3 tasks
    r"\[[^][]*\d[^][]*\]|\([-+\d.]+ (?:to|of) [-+\d.]+\)|\b\d+ (?:task|pair)s?\b"
)


def _unbroken(found: re.Match[str]) -> str:
    return found[0].replace(" ", "\N{NO-BREAK SPACE}") if len(unescape(found[0])) < 18 else found[0]


def _code(found: re.Match[str]) -> str:
    """Code of a table; a whole command asks for more room than a name."""
    return f'<code class="command">{found[1]}</code>' if " " in found[1] else f"<code>{found[1]}</code>"


def _cell(argument: str, content: object) -> str:
    """A table's cell as HTML: intervals unbroken, code between backticks, and dollars that start no formula."""
    try:
        words = str(content)
    except Exception:  # of a foreign object, anything
        raise checks.refuse(argument, content, "cells that can be written") from None
    text = re.sub("`([^`]+)`", _code, _WHOLE.sub(_unbroken, escape(words)))
    return text.replace("$", '<span class="tex2jax_ignore">$</span>')


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table in a notebook; the build gives it the book's style.  What stands between `…` is code.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figures.table(["Layer", "Gain"], [[0, 0.5], [1, 0.7]])
    <IPython.core.display.HTML object>
    """
    from IPython.display import HTML, display

    def line(argument: str, cells: object, tag: str) -> str:
        texts = [_cell(argument, cell) for cell in checks.sequence(argument, cells, "a list of cells")]
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"

    head = line("header", header, "th")
    body = "".join(line("rows", row, "td") for row in checks.sequence("rows", rows, "rows of cells"))
    display(HTML(f'<table class="dataframe"><thead>{head}</thead><tbody>{body}</tbody></table>'))


def short_name(model: str) -> str:
    """A model's name without its folder.

    Examples
    --------
    >>> from llvlit.plots.figures import short_name
    >>> short_name("embedded/large")
    'large'
    """
    return checks.text("model", model).rstrip("/").rpartition("/")[2]


def plain(text: str) -> str:
    r"""Text as a figure shows it letter for letter: a dollar sign starts no formula.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figures.plain("a$b$c")
    'a\\$b\\$c'
    """
    return re.sub(r"(?<!\\)\$", r"\$", checks.text("text", text))


def model_style(number: int) -> dict[str, Any]:
    """Color and marker of the model of that rank in size, the same in every chapter.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figures.model_style(0)["color"]
    '#0072b2'
    """
    return dict(MODEL_STYLES[checks.integer("number", number, at_least=0) % len(MODEL_STYLES)])


def layer_axis(axes: Axes, n_layers: int, *, label: str, title: str = "", states: bool = False) -> None:
    """Name the axes: layers (or states) on x, whole numbers only; what is shown on y.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, (axes,) = figures.new()
    >>> figures.layer_axis(axes, 12, label="Gain")
    >>> axes.get_xlabel()
    'Layer'
    """
    check_axes(axes, label=label, title=title)
    n_layers = checks.integer("n_layers", n_layers, at_least=1)
    axes.set(xlabel="State (before layer)" if checks.flag("states", states) else "Layer", ylabel=label)
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=9))
    axes.set_xlim(-0.5, n_layers - 0.5)


def gain_profile(
    measured: Sequence[float] | np.ndarray,
    bounds: Sequence[Sequence[float]] | np.ndarray | None = None,
    predicted: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    *,
    axes: Axes,
    title: str = "",
    first: int = 0,
    borrowed: Sequence[int] | Sequence[bool] = (),
) -> None:
    """Measured gains (solid, with their interval as a band) and predictions (dashed) from layer ``first`` on.

    Layers in ``borrowed``, numbers or a mask, were pushed along a direction borrowed from a later state: their markers
    are hollow, and the legend says so.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, (axes,) = figures.new()
    >>> figures.gain_profile([0.2, 0.5], predicted={"krylov": [0.1, 0.4]}, axes=axes, borrowed=[0])
    >>> [line.get_label() for line in axes.get_lines()]
    ['measured', 'krylov', 'direction borrowed']
    """
    check_axes(axes, title=title)
    gains = checks.array("measured", measured, ("n_layers",))
    first = checks.integer("first", first, at_least=0, at_most=len(gains) - 1)
    layers = np.arange(first, len(gains))
    axes.plot(layers, gains[first:], label="measured", zorder=3, **MEASURED)
    if bounds is not None:
        low, high = checks.array("bounds", bounds, (2, len(gains)))
        axes.fill_between(layers, low[first:], high[first:], color="black", alpha=0.15, linewidth=0)
    spare = cycle(MODEL_STYLES)
    predicted = {} if predicted is None else checks.instance("predicted", predicted, Mapping, "gains by name")
    for name, values in predicted.items():
        checks.text("predicted", name)
        style = PREDICTORS.get(name) or next(spare)
        line = checks.array(f"predicted[{name!r}]", values, (len(gains),))
        axes.plot(layers, line[first:], linestyle="--", label=plain(name), **style)
    mask = _mask("borrowed", borrowed, len(gains))
    if hollow := [layer for layer in layers if mask[layer]]:
        style = {"linestyle": "none", "markerfacecolor": "white", "label": "direction borrowed", "zorder": 4}
        axes.plot(hollow, gains[hollow], **(MEASURED | style))
    layer_axis(axes, len(gains), label="Gain (output per input)", title=plain(title))
    axes.set_xlim(left=first - 0.5)
    axes.legend()


def plan_profile(
    pushes: Sequence[float] | np.ndarray,
    efficiency: Sequence[float] | np.ndarray,
    *,
    axes: Sequence[Axes],
    title: str = "",
    borrowed: Sequence[int] | Sequence[bool] = (),
) -> None:
    """Pushes of a plan as bars, relative to the state; below, each layer's shift per root of divergence as points.

    Efficiency is ``|h_l| / sqrt(F_ll)``.  Points of layers in ``borrowed``, numbers or a mask, are hollow.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, axes = figures.new(n_rows=2)
    >>> figures.plan_profile([0.02, 0.05], [1.0, 4.0], axes=axes, borrowed=[0])
    >>> [each.get_ylabel() for each in axes]
    ['Push (% of the state)', 'Shift per root of 2 KL']
    """
    pair = checks.sequence("axes", axes, "two axes, one above the other")
    if len(pair) != 2:
        raise InputError(f"axes are {len(pair)}; pass two, as llvlit.plots.figures.new(n_rows=2) gives them.")
    for each in pair:
        check_axes(each, title=title)
    relative = checks.array("pushes", pushes, ("n_layers",))
    points, style = checks.array("efficiency", efficiency, relative.shape), model_style(0)
    above, below = pair
    layers, mask = np.arange(len(relative)), _mask("borrowed", borrowed, len(relative))
    above.bar(layers, 100 * relative, color=style["color"])
    above.axhline(0, color="black", linewidth=0.8)
    marked = {"linestyle": "none", "marker": style["marker"], "color": style["color"]}
    below.plot(layers[~mask], points[~mask], label="own direction", **marked)
    if mask.any():
        below.plot(layers[mask], points[mask], label="direction borrowed", markerfacecolor="white", **marked)
        below.legend()
    below.set_ylim(bottom=0)
    layer_axis(above, len(relative), label="Push (% of the state)", title=plain(title))
    layer_axis(below, len(relative), label="Shift per root of 2 KL")
    above.set_xlabel("")


def hankel_spectrum(
    singular_values: Sequence[Sequence[float] | np.ndarray], *, axes: Axes, floor: float | None = None, title: str = ""
) -> None:
    """Singular values of the Hankel block at every state, on a scale of decades; a floor below which they are rounding.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, (axes,) = figures.new()
    >>> figures.hankel_spectrum([[], [2.0], [1.5, 0.1]], axes=axes, floor=1e-4)
    >>> axes.get_yscale()
    'log'
    """
    check_axes(axes, title=title)
    given = checks.sequence("singular_values", singular_values, "values of each state")
    states = [np.ravel(checks.array(f"singular_values[{state}]", each)) for state, each in enumerate(given)]
    colors = mpl.colormaps["viridis"](np.linspace(0.9, 0, len(states)))
    largest = max((values.max() for values in states if len(values)), default=1.0)
    floor = None if floor is None else checks.number("floor", floor, at_least=0)
    bottom = max(floor, 1e-12 * largest) if floor else 1e-6 * largest
    for state, values in enumerate(states):
        axes.plot(np.arange(1, len(values) + 1), np.maximum(values, bottom / 3), color=colors[state], linewidth=1)
    axes.set_yscale("log")
    if floor:
        axes.axhline(bottom, color="black", linestyle=":")
        axes.text(1, bottom, "rounding", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set(xlabel="Number", ylabel="Singular value, a line a state")
    axes.set_title(plain(title), loc="left")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=9))


def shares_missed(
    missed: Mapping[str, Sequence[float] | np.ndarray],
    *,
    axes: Axes,
    tolerances: Sequence[float] = (0.05, 0.01),
    title: str = "",
) -> None:
    """Share of a gain matrix that realizations of order 1, 2, ... miss, by name; tolerances as lines across.

    A ring marks the order at each tolerance, the first point on or below its line, and a number the order at the
    smallest; each line carries its name.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, (axes,) = figures.new()
    >>> figures.shares_missed({"measured": [0.4, 0.03, 0.001]}, axes=axes)
    >>> axes.get_xlabel()
    'Order'
    """
    check_axes(axes, title=title)
    given = checks.instance("missed", missed, Mapping, "shares by name")
    names = [checks.text("missed", name) for name in given]
    lines = [np.maximum(checks.array(f"missed[{name!r}]", given[name], ("order",)), 1e-12) for name in names]
    levels = [
        checks.number("tolerances", share, above=0) for share in checks.sequence("tolerances", tolerances, "shares")
    ]
    longest = max((len(values) for values in lines), default=1)
    bottom = min((0.2 * share for share in levels), default=1e-4)
    for share in levels:
        axes.axhline(share, color="black", linestyle=":", linewidth=1)
        axes.text(1, share, f"{100 * share:g} %", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    for number, (name, values) in enumerate(zip(names, lines, strict=True)):
        style = model_style(number)
        axes.plot(np.arange(1, len(values) + 1), values, label=plain(name), **style)
        for share in levels:
            if (reached := np.flatnonzero(values <= share)).size and values[reached[0]] > bottom:
                at = (reached[0] + 1, values[reached[0]])
                ring: dict[str, Any] = {"marker": "o", "markersize": 11, "fillstyle": "none", "color": style["color"]}
                axes.plot(*at, linestyle="none", markeredgewidth=1.4, **ring)
                if share == min(levels):
                    bold: dict[str, Any] = {"color": style["color"], "weight": "bold"}
                    axes.annotate(f"{at[0]}", at, xytext=(6, 5), textcoords="offset points", **bold)
    axes.set(xlabel="Order", ylabel="Share of the matrix missed", yscale="log", ylim=(bottom, 1.5))
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set_xlim(0, longest + 0.6)
    axes.set_title(plain(title), loc="left")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, nbins=9))
    _name_lines(axes, names, lines, levels)


def _name_lines(axes: Axes, names: Sequence[str], lines: Sequence[np.ndarray], levels: Sequence[float]) -> None:
    """Write each falling line's name where no line passes: above it on its right, or below it on its left.

    Lines are values at 1, 2, ... on a scale of decades, in the colors of :func:`model_style`; levels are lines across.
    """
    bottom, top = np.log10(axes.get_ylim())
    longest = max((len(values) for values in lines), default=1)
    grid = axes.get_subplotspec()
    inches = axes.figure.bbox.width / axes.figure.dpi / (grid.get_gridspec().ncols if grid else 1)
    panel = max(inches - 0.9, 0.5)
    fine = np.linspace(1, longest, 8 * longest)
    heights = [np.log10(np.maximum(values, 10 ** (bottom - 1))) for values in lines]
    curves = [np.interp(fine, np.arange(1, len(height) + 1), height) for height in heights]
    passing = np.array([*curves, *(np.full(len(fine), np.log10(level)) for level in levels)])
    for number, name in enumerate(names):
        width, half = 0.066 * len(name) / panel * longest + 0.3, 0.05 * (top - bottom)
        best: tuple[float, int, int] = (-np.inf, 1, 1)
        for place, own in enumerate(heights[number], start=1):
            for side in (1, -1):
                middle, end = own + side * half, place + side * width
                inside = min(place, end) >= 0.25 and max(place, end) <= longest + 0.6
                if not inside or not bottom + half < middle < top - half:
                    continue
                covered = (fine >= min(place, end)) & (fine <= max(place, end))
                if (clear := float(np.abs(passing[:, covered] - middle).min())) > best[0]:
                    best = clear, place, side
        _, place, side = best
        align: dict[str, Any] = {"ha": "left", "va": "bottom"} if side > 0 else {"ha": "right", "va": "top"}
        at, shift = (place, 10 ** heights[number][place - 1]), (5 * side, 3 * side)
        color = model_style(number)["color"]
        axes.annotate(plain(name), at, xytext=shift, textcoords="offset points", color=color, **align)


def _mask(argument: str, chosen: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """Mask ``(size,)`` of what is chosen, which is a mask already or numbers from 0."""
    given = checks.sequence(argument, chosen, f"numbers below {size}, or a mask of {size}")
    if len(given) == size and all(isinstance(entry, bool | np.bool_) for entry in given):
        return np.array(given)
    mask = np.zeros(size, dtype=bool)
    mask[[checks.integer(argument, number, at_least=0, at_most=size - 1) for number in given]] = True
    return mask


def heatmap(
    values: np.ndarray,
    *,
    axes: Axes,
    x: str,
    y: str,
    label: str,
    title: str = "",
    limits: tuple[float, float],
    bar: bool = True,
) -> None:
    """Matrix as colors; NaN stays white.  ``bar`` adds the scale, which panels of one scale need only once.

    Examples
    --------
    >>> from llvlit.plots import figures
    >>> figure, (axes,) = figures.new()
    >>> figures.heatmap(np.eye(3), axes=axes, x="To", y="Order", label="Error", limits=(0, 1))
    >>> axes.get_ylabel()
    'Order'
    """
    check_axes(axes, x=x, y=y, label=label, title=title)
    low, high = checks.array("limits", limits, (2,))
    matrix = checks.array("values", values, ("n_rows", "n_columns"), finite=False)
    image = axes.imshow(matrix, origin="lower", cmap="viridis", vmin=low, vmax=high, aspect="auto")
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left")
    axes.grid(visible=False)
    if checks.flag("bar", bar):
        axes.figure.colorbar(image, ax=axes, label=label)
