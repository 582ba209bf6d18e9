"""What committed studies say: agreement by model, and paired changes from one model or setting to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llvlit import checks
from llvlit.errors import FileError, InputError
from llvlit.files import foreign
from llvlit.study.tables import CELL, committed, means, read_table, with_columns

PAIR = ("task", "seed")
SAME = "adjoint, same prompts"
LABELS = {
    "smollm2-135m": "SmolLM2-135M",
    "SmolLM2-135M-Instruct-Q4_1": "SmolLM2-135M",
    "gemma-3-270m-Q4_K_M": "Gemma 3 270M",
    "Qwen2.5-Coder-0.5B-Instruct-Q4": "Qwen2.5-0.5B",
}
REFERENCE = {"direction": "mean_difference", "jacobian": "jvp", "final_norm": False, "amplitude": 0.1}
"""What all pages compare at, unless they say otherwise."""

SHOWN = 0.65
"""Area under the ROC curve from which a checkpoint counts as showing a concept."""

MATTERS = 0.05
"""Change of a correlation or of a relative error below which a setting does not matter."""

CONTROLS = {  # in the study controls, but for the last: the shapes are layers x width
    "small: untrained to trained": ("untrained:embedded/small", "embedded/small"),
    "medium: untrained to trained": ("untrained:embedded/medium", "embedded/medium"),
    "large: untrained to trained": ("untrained:embedded/large", "embedded/large"),
    "depth 12 to 24, width 64": ("embedded/small", "run/models/24x64"),
    "depth 12 to 24, width 128": ("run/models/12x128", "embedded/large"),
    "width 64 to 128, depth 12": ("embedded/small", "run/models/12x128"),
    "width 64 to 128, depth 24": ("run/models/24x64", "embedded/large"),
}

SETTINGS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("Basis", "krylov to reachability", {"predictor": "krylov"}, {"predictor": "reachability"}),
    ("Basis", "krylov to random", {"predictor": "krylov"}, {"predictor": "random"}),
    ("Basis", "krylov to pca", {"predictor": "krylov"}, {"predictor": "pca"}),
    ("Order", "8 to 32", {"order": 8}, {"order": 32}),
    ("Operating prompts", "400 to 50", {"n_operating": 400}, {"n_operating": 50}),
    ("Operating prompts", "400 to 10", {"n_operating": 400}, {"n_operating": 10}),
    ("Direction", "mean difference to LDA", {}, {"direction": "lda"}),
    ("Direction", "mean difference to logistic", {}, {"direction": "logistic"}),
    ("Direction", "mean difference to first component", {}, {"direction": "principal_component"}),
    ("Amplitude", "0.1 to 0.01", {}, {"amplitude": 0.01}),
    ("Amplitude", "0.1 to 0.5", {}, {"amplitude": 0.5}),
    ("Amplitude", "0.1 to 10", {}, {"amplitude": 10.0}),
    ("Operators", "mean to per prompt", {}, {"per_prompt": True}),
    ("Jacobian", "exact to differences", {}, {"jacobian": "central"}),
    ("Last step", "without to with final norm", {}, {"final_norm": True}),
]
"""Settings of the studies ablations and steps: what, from where to where, and the rows before and after."""


def label(model: str) -> str:
    """A model's name as pages write it.

    Examples
    --------
    >>> from llvlit.study.comparison import label
    >>> label("run/models/gemma-3-270m-Q4_K_M.gguf"), label("untrained:embedded/large")
    ('Gemma 3 270M', 'untrained large')
    """
    kind, _, place = checks.text("model", model).rpartition(":")
    name = place.rpartition("/")[2].removesuffix(".gguf")
    return f"{kind} {LABELS.get(name, name)}".strip()


def _rows(study: str, layers: str, start: str | Path) -> pd.DataFrame:
    """Agreements of a study with the sizes of their models; whole and single prompts' operators told apart."""
    folder = committed(study, start=start)
    rows, cells = read_table(folder, "agreement"), read_table(folder, "cells")
    rows = rows[rows["layers"] == checks.choice("layers", layers, ["not 0", "all"])]
    rows = rows.assign(
        per_prompt=rows["predictor"].str.endswith(", per prompt"),
        predictor=rows["predictor"].str.removesuffix(", per prompt"),
    )
    same = rows["predictor"] == SAME  # an error on the very prompts that are measured has no error over prompts
    bounds = [name for name in rows if name.endswith(("_low", "_high"))]
    rows.loc[same, bounds] = np.nan
    sizes = ["parameters", "n_layers", "hidden_size"]
    found = with_columns("cells", cells, ["model", *sizes]).groupby("model")[sizes].first()
    return rows.join(found, on="model")


def _at(rows: pd.DataFrame, values: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of these values; of each model's largest order up to the one asked for, and of all prompts unless told."""
    values = {**REFERENCE, "per_prompt": False, **values}
    order, n_operating = values.pop("order", np.inf), values.pop("n_operating", None)
    for column, value in values.items():
        rows = rows[rows[column] == value]
    cells = rows.groupby([*CELL, "predictor"])
    most = cells["n_operating"].transform("max") if n_operating is None else n_operating
    rows = rows[(rows["n_operating"] == most) & ~(rows["order"] > order)]
    return rows[rows["order"].isna() | (rows["order"] == rows.groupby("model")["order"].transform("max"))]


def agreements(study: str, *, order: int = 32, layers: str = "not 0", start: str | Path = ".") -> pd.DataFrame:
    """Agreements of a committed study at the reference setting: a row for each cell and predictor.

    Mean-difference directions, exact products, no final norm, a push of 0.1, all operating prompts, mean operators.

    Parameters
    ----------
    order
        Each model's largest up to this one.
    layers
        ``"not 0"``, or ``"all"`` with layer 0, which has a page of its own in the book.

    Returns
    -------
    DataFrame
        ``model``, ``task``, ``seed``, ``predictor``, the three numbers of agreement with their bounds over prompts,
        ``parameters``, ``n_layers``, ``hidden_size``, among others.

    Raises
    ------
    FileError
        If there is no such study around ``start``.

    Examples
    --------
    >>> from llvlit.study.comparison import agreements
    >>> rows = agreements("real")
    >>> rows["order"].dropna().unique().tolist(), rows.duplicated(["model", "task", "seed", "predictor"]).any().item()
    ([32.0], False)
    """
    return _at(_rows(study, layers, start), {"order": checks.integer("order", order, at_least=1)})


def families(*, layers: str = "not 0", start: str | Path = ".") -> pd.DataFrame:
    """Agreements of all models that were studied on real data: the toys, a larger one, and three pretrained decoders.

    Examples
    --------
    >>> from llvlit.study.comparison import families
    >>> sorted(families()["name"].unique())
    ['36x192', 'Gemma 3 270M', 'Qwen2.5-0.5B', 'SmolLM2-135M', 'large', 'medium', 'small']
    """
    studies = {name: agreements(name, layers=layers, start=start) for name in ("real", "larger", "pretrained")}
    older = agreements("pretrained/81ec376", layers=layers, start=start)
    rows = pd.concat([*studies.values(), older[older["model"].str.startswith("Qwen")]], ignore_index=True)
    return rows.assign(name=rows["model"].map(label)).sort_values("parameters", kind="stable")


def shared(rows: pd.DataFrame, models: Sequence[str]) -> pd.DataFrame:
    """Rows of these models, of the pairs of task and seed that every one of them shows.

    Examples
    --------
    >>> from llvlit.study.comparison import agreements, shared
    >>> both = shared(agreements("real"), ["embedded/small", "embedded/large"])
    >>> both.groupby("model")["task"].nunique().tolist()
    [7, 7]
    """
    models = checks.sequence("models", models, "a list of names")
    rows = with_columns("rows", rows, ["model", *PAIR])
    rows = rows[rows["model"].isin(models)]
    return rows[rows.groupby([*PAIR])["model"].transform("nunique") == len(set(models))]


def changes(before: pd.DataFrame, after: pd.DataFrame, *, on: Sequence[str] = PAIR) -> pd.DataFrame:
    """Paired changes by predictor, with 95 % intervals over tasks and seeds (none below two tasks).

    Parameters
    ----------
    before, after
        As :func:`~llvlit.study.comparison.agreements` gives them.
    on
        What a row of one has in common with its partner in the other, besides the predictor.

    Returns
    -------
    DataFrame
        By predictor: ``spearman`` and ``relative_error``, the mean differences after minus before; ``factor``, the
        geometric mean of the ratio of the errors; each with ``_low`` and ``_high``; ``n_tasks`` and ``n_pairs``.

    Examples
    --------
    >>> from llvlit.study.comparison import agreements, changes
    >>> rows = agreements("real")
    >>> small, large = (rows[rows["model"] == f"embedded/{size}"] for size in ("small", "large"))
    >>> int(changes(small, large).loc["krylov", "n_tasks"])
    7
    """
    keys, values = ["predictor", *checks.sequence("on", on, "a list of columns")], ["spearman", "relative_error"]
    if not {*PAIR} <= set(keys):
        raise InputError(f"on={checks.shown([*on])} lacks task or seed; changes are averaged over both.")
    two = [with_columns(name, rows, keys, values) for name, rows in (("before", before), ("after", after))]
    both = two[0].merge(two[1], on=keys, suffixes=("_before", "_after"))
    frame = both[keys].assign(
        **{value: both[f"{value}_after"] - both[f"{value}_before"] for value in values},
        factor=np.log(both["relative_error_after"] / both["relative_error_before"]),
    )
    found = means(frame, ["predictor"], [*values, "factor"]).set_index("predictor")
    bounds = ["factor", "factor_low", "factor_high"]
    return found.assign(**{name: np.exp(found[name]) for name in bounds})


def control_changes(*, layers: str = "not 0", start: str | Path = ".") -> pd.DataFrame:
    """Changes from untrained to trained toys, with depth and width one at a time, and to more layers than the order.

    Examples
    --------
    >>> from llvlit.study.comparison import control_changes
    >>> found = control_changes()
    >>> bool((found.loc["krylov", "factor_low"][:3] > 1).all())  # training makes gains harder to predict
    True
    """
    rows, larger = agreements("controls", layers=layers, start=start), agreements("larger", layers=layers, start=start)
    steps = {name: [rows[rows["model"] == model] for model in models] for name, models in CONTROLS.items()}
    real = agreements("real", layers=layers, start=start)
    steps["24x128 to 36x192: L > d"] = [real[real["model"] == "embedded/large"], larger]
    return (
        pd.concat({name: changes(*pair) for name, pair in steps.items()}, names=["step"])
        .swaplevel()
        .sort_index(level=0, sort_remaining=False, kind="stable")
    )


def course(*, start: str | Path = ".") -> pd.DataFrame:
    """Relative errors of the smallest toy along its training, by task, step and predictor.

    Returns
    -------
    DataFrame
        ``relative_error``, its mean over seeds, with ``low`` and ``high``, the smallest and the largest; ``shown``:
        every seed shows the concept there, and separates its classes by 0.65 or more.

    Examples
    --------
    >>> from llvlit.study.comparison import course
    >>> sorted(course().query("shown and step == 1800")["task"].unique())
    ['amazon_polarity', 'jigsaw_toxicity', 'sst2']
    """
    rows, cells = agreements("training", start=start), read_table(committed("training", start=start), "cells")
    rows, cells = (
        frame.assign(step=frame["model"].str.extract(r"-(\d+)$")[0].fillna("1800").astype(int))
        for frame in (rows, cells)
    )
    cells["shown"] = cells["visible"].astype(bool) & (cells["best_separation"] >= SHOWN)
    shown = cells.groupby(["task", "step"])["shown"].all()
    by = ["task", "step", "predictor"]
    found = rows.groupby(by)["relative_error"].agg(["mean", "min", "max"]).reset_index()
    return found.rename(columns={"mean": "relative_error", "min": "low", "max": "high"}).join(
        shown, on=["task", "step"]
    )


def setting_effects(*, layers: str = "not 0", start: str | Path = ".") -> pd.DataFrame:
    """What a change of one setting does to krylov, reachability and the adjoint, in the toys; see ``changes``.

    Returns
    -------
    DataFrame
        ``setting``, ``change``, ``predictor``, the changes with their bounds, and ``says`` of the error: ``no`` where
        the interval lies within 0.05 of zero, ``better`` or ``worse`` where it lies beyond, else ``cannot tell``.

    Examples
    --------
    >>> from llvlit.study.comparison import setting_effects
    >>> found = setting_effects().set_index(["setting", "change", "predictor"])
    >>> found.loc[("Basis", "krylov to reachability", "krylov"), "says"]
    'better'
    """
    tables = {name: _rows(name, layers, start) for name in ("ablations", "steps")}
    parts = []
    for setting, change, before, after in SETTINGS:
        rows = tables["steps" if setting in ("Jacobian", "Last step") else "ablations"]
        order = {"order": 32} if setting in ("Basis", "Direction") else {}
        two = [_at(rows, order | values) for values in (before, after)]
        if setting == "Basis":  # other rows, but of one predictor
            two = [frame.assign(predictor="krylov") for frame in two]
        found = changes(*two, on=CELL).reset_index()
        parts.append(
            found[found["predictor"].isin(["krylov", "reachability", "adjoint"])].assign(setting=setting, change=change)
        )
    effects = pd.concat(parts, ignore_index=True)
    effects = effects[(effects["setting"] != "Order") | (effects["predictor"] != "adjoint")]
    low, high = effects["relative_error_low"], effects["relative_error_high"]
    says = np.select(
        [(low > -MATTERS) & (high < MATTERS), high <= -MATTERS, low >= MATTERS],
        ["no", "better", "worse"],
        "cannot tell",
    )
    return effects.assign(says=says)


def straightness(*, start: str | Path = ".") -> pd.DataFrame:
    """How far single layers can be pushed until a shift is 10 % off its tangent, by ``benchmarks/straightness.py``.

    Returns
    -------
    DataFrame
        A row a model, task and layer that has a direction of its own: ``depth`` (layer over layers), ``of_mean``
        (of the mean shift) and ``median`` (of single prompts), both as shares of the state's length; ``trained``.

    Examples
    --------
    >>> from llvlit.study.comparison import straightness
    >>> sorted(straightness()["task"].unique())
    ['film-sentiment', 'tense']
    """
    path, what = (
        committed("real", start=start).parent / "method" / "straightness.csv",
        "what benchmarks/straightness.py found",
    )
    if not path.is_file():
        raise FileError(f"There is no {path}. Run benchmarks/straightness.py --csv {path}.")
    with foreign(path, what, remedy="Run benchmarks/straightness.py again."):
        rows = pd.read_csv(path)
        rows = rows[rows["own"]].assign(
            depth=rows["layer"] / rows["n_layers"],
            trained=~rows["model"].str.startswith("untrained:"),
            name=rows["model"].map(label),
        )
    return rows
