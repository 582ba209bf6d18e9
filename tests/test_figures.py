"""Profiles name their parts; figures refuse to be mute."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from llvlit.errors import InputError
from llvlit.plots import figures
from llvlit.plots import study as study_figures
from llvlit.plots.figures import DIRECTIONS, MEASURED, METRICS, MODEL_STYLES, PREDICTORS, SCHEDULES
from llvlit.publishing.settings import RUNNING, load_settings

DARK_PAGE = "#121212"
"""The theme's ground in dark mode."""


@pytest.fixture(autouse=True)
def close_figures():
    """Figures stay in memory until they are shown, saved or closed."""
    yield
    plt.close("all")


def test_a_profile_takes_another_model_task_and_order_in_the_chapters_place():
    profile = load_settings("embedded")
    assert profile.choose() == profile
    chosen = profile.choose(model=profile.models[0], task=profile.tasks[1], order=7)
    assert chosen.models == profile.models[:1]  # the chapters take the last, and its color goes by its place
    assert chosen.tasks[0] == profile.tasks[1] and sorted(chosen.tasks) == sorted(profile.tasks)
    assert (chosen.order, chosen.evaluation) == (7, profile.evaluation)
    assert profile.choose(model="gpt2").models == (*profile.models, "gpt2")
    for order in (0, 2.0, True):
        with pytest.raises(InputError, match=r"order="):
            profile.choose(order=order)


def test_running_example_is_a_held_out_prompt_and_its_twin():
    profile = load_settings("embedded")
    for task in profile.tasks:
        assert profile.split(task).evaluation.select(RUNNING).labels == (0, 1)


def test_profiles_are_known_or_folders_of_models(tmp_path):
    assert load_settings("paper").models == ("gpt2", "gpt2-medium", "gpt2-large")
    assert len(load_settings("paper").tasks) == 10
    with pytest.raises(InputError, match="embedded"):
        load_settings("embeded")
    with pytest.raises(InputError, match="no model"):
        load_settings(str(tmp_path))
    for name, size in (("big", 20), ("little", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * size)
    models = load_settings(str(tmp_path)).models
    assert [figures.short_name(model) for model in models] == ["little", "big"]


@pytest.mark.parametrize("missing", ["name", "alt", "caption"])
def test_a_figure_without_name_alt_or_caption_is_refused(missing):
    figure, _ = figures.new()
    words = {"name": "fig-a", "alt": "A line.", "caption": "What to see.", missing: " "}
    with pytest.raises(InputError, match=missing):
        figures.show(figure, **words)


def test_measured_is_solid_predicted_dashed_and_layers_are_named():
    _, (axes,) = figures.new()
    figures.gain_profile(
        np.arange(5.0), [np.zeros(5), np.ones(5)], {"krylov": np.ones(5), "mine": np.ones(5)}, axes=axes
    )
    styles = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert styles == {"measured": "-", "krylov": "--", "mine": "--"}
    assert axes.get_xlabel() == "Layer"
    assert "Gain" in axes.get_ylabel()


def test_a_profile_can_begin_at_a_later_layer():
    _, (axes,) = figures.new()
    figures.gain_profile(np.arange(5.0), [np.zeros(5), np.ones(5)], {"krylov": np.ones(5)}, axes=axes, first=1)
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1, 2, 3, 4]] * 2
    assert axes.get_xlim() == (0.5, 4.5)


@pytest.mark.parametrize("borrowed", [[0, 2], (0, 2), np.array([True, False, True, False, False])])
def test_a_profile_marks_the_layers_whose_direction_is_borrowed(borrowed):
    for first, hollow in ((0, [0, 2]), (1, [2]), (3, [])):
        _, (axes,) = figures.new()
        figures.gain_profile(np.arange(5.0), axes=axes, first=first, borrowed=borrowed)
        marks = [line for line in axes.get_lines() if line.get_label() == "direction borrowed"]
        assert [list(line.get_xdata()) for line in marks] == ([hollow] if hollow else [])
        assert ("direction borrowed" in [text.get_text() for text in axes.get_legend().get_texts()]) == bool(hollow)
        assert all(line.get_markerfacecolor() == "white" and line.get_linestyle() == "None" for line in marks)


NAME = "modèle $\\frac$ 情感 'a' $b$ | `c`"
"""No formula: matplotlib's parser would stop at it, and read the rest as one."""


@pytest.mark.filterwarnings("ignore:Glyph")  # the shipped font has no Chinese; a reader's may
def test_names_are_drawn_letter_for_letter(tmp_path):
    rows = summary(layers="all", predictor="krylov", spearman=[0.5, 0.75], ratio=[1.0, 2.0])
    rows = rows.assign(model=[f"a/{NAME}", "b/small"], schedule="uniform", metric="absolute")
    profile, (axes,) = figures.new()
    figures.gain_profile([0.1, 0.5], predicted={NAME: [0.1, 0.4]}, axes=axes, title=NAME)
    line, (beside,) = figures.new()
    study_figures.interval_line([0, 1], rows, "spearman", axes=beside, label=NAME)
    beside.legend()
    drawn = [profile, line, study_figures.energy_summary(rows), study_figures.agreement_summary(rows, {"spearman": ""})]
    for number, figure in enumerate(drawn):
        assert figures.plain(NAME) in {text.get_text() for text in figure.findobj(Text)}
        assert figures.save(figure, tmp_path / f"{number}.png").is_file()
    _, (axes,) = figures.new()
    drawing = axes.text(0, 0, figures.plain(figures.plain("a$b$c")))
    whole, part = (axes.text(0, 0, text, parse_math=False) for text in ("a$b$c", "abc"))
    widths = [text.get_window_extent().width for text in (drawing, whole, part)]
    assert widths[0] == pytest.approx(widths[1]) and widths[1] > widths[2] + 1  # the dollars are there, escaped once


def test_a_table_reads_no_formula_out_of_a_name(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda made: shown.append(made.data))
    figures.table(["Model"], [["a$b$<c>"]])
    assert "a$b$" not in shown[0] and shown[0].count('<span class="tex2jax_ignore">$</span>') == 2
    assert "&lt;c&gt;" in shown[0]


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("measured", lambda axes: figures.gain_profile("abc", axes=axes)),
        ("measured", lambda axes: figures.gain_profile([0.1, float("nan")], axes=axes)),
        ("bounds", lambda axes: figures.gain_profile([0.1, 0.2], [[0.0], [1.0]], axes=axes)),
        ("predicted", lambda axes: figures.gain_profile([0.1, 0.2], predicted={"krylov": [1.0]}, axes=axes)),
        ("first", lambda axes: figures.gain_profile([0.1, 0.2], axes=axes, first=2)),
        ("borrowed", lambda axes: figures.gain_profile([0.1, 0.2], axes=axes, borrowed=[2])),
        ("borrowed", lambda axes: figures.gain_profile([0.1, 0.2], axes=axes, borrowed=[0.5])),
        ("borrowed", lambda axes: figures.gain_profile([0.1, 0.2], axes=axes, borrowed="01")),
        ("values", lambda axes: figures.heatmap(np.ones(3), axes=axes, x="", y="", label="", limits=(0, 1))),
        ("n_columns", lambda axes: figures.new(0)),
        ("width", lambda axes: figures.new(width=float("nan"))),
        ("height", lambda axes: figures.new(height=-1)),
        ("path", lambda axes: figures.save(axes.figure, 3)),
        ("alt", lambda axes: figures.show(axes.figure, name="a", alt=None, caption="b")),
        ("summary", lambda axes: study_figures.energy_summary([])),
        ("summary lacks schedule", lambda axes: study_figures.energy_summary(summary(layers="all"))),
        (
            "rows has no row",
            lambda axes: study_figures.interval_line(
                [], summary(spearman=[1.0, 2.0])[:0], "spearman", axes=axes, label=""
            ),
        ),
        (
            "layers='none'",
            lambda axes: study_figures.energy_summary(
                summary(schedule="a", metric="b", layers="all", ratio=[1.0, 2.0]), layers="none"
            ),
        ),
    ],
)
def test_odd_arguments_are_named(argument, call):
    _, (axes,) = figures.new()
    with pytest.raises(InputError, match=argument):
        call(axes)


def test_no_figure_is_so_wide_that_its_letters_get_too_small():
    assert [figures.new(n, width=w)[0].get_figwidth() for n, w in ((1, None), (2, None), (3, 14.0))] == [6.4, 8.0, 9.6]


def test_an_interval_in_a_table_is_not_broken(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda made: shown.append(made.data))
    figures.table(["A b"], [["0.5 [0.4, 0.6]"], ["-0.5 (-0.7 to -0.3)"], ["0.001 [0.00042, 0.00099]"]])
    assert shown[0].count("\N{NO-BREAK SPACE}") == 3  # a long one may break
    assert "<th>A b</th>" in shown[0] and "0.5 [0.4,\N{NO-BREAK SPACE}0.6]" in shown[0]


def summary(**columns):
    """Rows for two models with the intervals that `summarize` would give."""
    rows = pd.DataFrame({"model": ["a/small", "a/large"], **columns})
    for name in ("spearman", "ratio"):
        if name in rows:
            rows[f"{name}_low"], rows[f"{name}_high"] = rows[name] - 0.25, rows[name] + 0.5
    return rows


def test_agreement_is_drawn_with_its_intervals_models_in_order():
    rows = summary(predictor="krylov", layers="all", spearman=[0.5, 0.75])
    figure = study_figures.agreement_summary(rows, {"spearman": "Spearman"})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["small", "large"]
    line, _, (bars,) = axes.containers[0].lines
    assert line.get_ydata().tolist() == [0.5, 0.75] and line.get_linestyle() == "--"
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.25, 1.0], [0.5, 1.25]]


def test_a_ladder_has_no_curve_between_families_and_names_its_lines():
    names = ["small", "large", "SmolLM2-135M", "Gemma 3 270M"]
    rows = pd.DataFrame({"name": names, "predictor": "krylov", "relative_error": [0.1, 0.2, 0.3, 0.4]})
    rows = rows.assign(relative_error_low=0.05, relative_error_high=0.5)
    (axes,) = study_figures.ladder(rows, {"krylov": "the basis"}, split=2).axes
    parts = [container.lines[0] for container in axes.containers]
    assert [line.get_ydata().tolist() for line in parts] == [[0.1, 0.2], [0.3, 0.4]]
    assert [text.get_text() for text in axes.texts] == ["the basis"] and axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()][2:] == ["SmolLM2\n135M", "Gemma 3\n270M"]
    with pytest.raises(InputError, match="split"):
        study_figures.ladder(rows, {"krylov": "the basis"}, split=9)


def test_an_interval_can_be_a_band_behind_the_line():
    rows = summary(spearman=[0.5, 0.75])
    _, (axes,) = figures.new()
    study_figures.interval_line([0, 1], rows, "spearman", axes=axes, label="measured", band=True, color="black")
    (line,), (band,) = axes.get_lines(), axes.collections
    assert line.get_ydata().tolist() == [0.5, 0.75]
    assert set(map(tuple, band.get_paths()[0].vertices)) == {(0, 0.25), (0, 1.0), (1, 0.5), (1, 1.25)}


def test_what_stands_side_by_side_has_a_color_of_its_own():
    for styles in (PREDICTORS, DIRECTIONS, SCHEDULES, METRICS):
        assert len({style["color"] for style in styles.values()}) == len(styles)
        assert len({style["marker"] for style in styles.values()}) == len(styles)


def test_energies_are_drawn_on_a_log_axis_for_the_layers_asked_for():
    rows = pd.concat(
        [
            summary(schedule="uniform", metric="absolute", layers="all", ratio=[2.0, 4.0]),
            summary(schedule="uniform", metric="absolute", layers="not 0", ratio=[1.0, 1.5]),
        ]
    )
    (axes,) = study_figures.energy_summary(rows, layers="not 0").axes
    assert axes.get_xscale() == "log" and "log" in axes.get_xlabel()
    assert [box.lines[0].get_xdata().tolist() for box in axes.containers] == [[1.0], [1.5]]


def test_a_saved_figure_is_whole_or_absent(tmp_path):
    figure, _ = figures.new()
    assert figures.save(figure, tmp_path / "a" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["figure.png"]


def luminance(color):
    """Relative luminance of sRGB in [0, 1] (WCAG 2.2)."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def in_the_dark(color):
    """What the style sheet makes of it: invert(1), then hue-rotate(180deg) (Filter Effects, section 9)."""
    gray = np.array([0.213, 0.715, 0.072])
    return np.clip(2 * gray @ (1 - color) - (1 - color), 0, 1)


NAMED = [style for styles in (PREDICTORS, DIRECTIONS, SCHEDULES, METRICS) for style in styles.values()]


@pytest.mark.parametrize("color", sorted({style["color"] for style in (*NAMED, *MODEL_STYLES, MEASURED)}))
def test_colors_stand_out_on_a_light_and_on_a_dark_page(color):
    shade = np.array(to_rgb(color))
    assert contrast(shade, np.array(to_rgb("#ffffff"))) >= 3
    assert contrast(in_the_dark(shade), np.array(to_rgb(DARK_PAGE))) >= 3


def test_a_plan_is_drawn_as_bars_above_points_hollow_where_directions_are_borrowed():
    _, axes = figures.new(n_rows=2)
    figures.plan_profile([0.02, -0.05, 0.0], [3.0, 4.0, 5.0], axes=axes, borrowed=[2])
    assert [bar.get_height() for bar in axes[0].patches] == pytest.approx([2, -5, 0])
    own, borrowed = axes[1].get_lines()
    assert own.get_ydata().tolist() == [3, 4] and borrowed.get_ydata().tolist() == [5]
    assert borrowed.get_markerfacecolor() == "white" and axes[1].get_xlabel() == "Layer"
    with pytest.raises(InputError, match="axes are 1; pass two"):
        figures.plan_profile([0.1], [1.0], axes=axes[:1])


def test_shares_missed_carry_their_names_where_no_line_passes_and_rings_at_the_orders():
    figure, (axes,) = figures.new()
    shares = {"steep": [0.5, 0.04, 0.02, 0.003, 0.0004], "flat": [0.9, 0.7, 0.5, 0.2, 0.02]}
    figures.shares_missed(shares, axes=axes)
    rings = {tuple(line.get_xydata()[0]) for line in axes.get_lines() if line.get_fillstyle() == "none"}
    assert rings == {(2, 0.04), (4, 0.003), (5, 0.02)}
    texts = {text.get_text(): text for text in axes.texts}
    assert {"steep", "flat", "4", "5 %", "1 %"} <= set(texts)
    figure.draw_without_rendering()
    for name in shares:
        box = texts[name].get_window_extent().transformed(axes.transData.inverted())
        assert box.x0 >= 0 and box.x1 <= axes.get_xlim()[1]
        for values in shares.values():
            across = np.interp(np.linspace(box.x0, box.x1, 50), np.arange(1, 6), np.log10(values))
            assert (np.log10(box.y0) > across).all() or (np.log10(box.y1) < across).all()
    plt.close(figure)
