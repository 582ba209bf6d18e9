"""The depth explorer: surrogates as a small JSON document, from which a page computes any push by itself.

A page needs few numbers of a surrogate: what a unit push before each layer has become at every later state,
along the concept direction there.  All else (output, energies, the cheapest push) follows by sums.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from llvlit import checks
from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError
from llvlit.method.agreement import agreement
from llvlit.method.concepts import concept_directions
from llvlit.method.control import relative_weights
from llvlit.method.gains import measured_gains
from llvlit.method.identification import Plan, identify_all
from llvlit.method.surrogate import LLV
from llvlit.plots.figures import short_name
from llvlit.tasks.splits import Splits

FORMAT_VERSION = 1
PAGE = """\
<div class="llvlit-explorer">
<p>The depth explorer. In a browser that runs this book's scripts, sliders appear here: one push for each layer, with
the predicted shift along depth, the energy and the cheapest push beside it. It computes on this page, from
{n_cases} exported surrogates; nothing is fetched.</p>
<noscript><p><strong>JavaScript is off</strong>, so the sliders cannot move. Below stand the equations of all that they
would show, and a table with the main numbers of every surrogate.</p></noscript>
<script type="application/json">{data}</script>
</div>
"""


def responses(llv: LLV) -> np.ndarray:
    """Concept shifts G ``(n_layers + 1, n_layers)`` of unit pushes, one layer at a time, as the surrogate predicts.

    With e_1 the coordinate along v_m, and inputs u, the shift at state m, right after its own push, is (G u)_m:

        G[m, l] = e_1^T A_{m-1} ... A_{l+1} B_l  for l < m,    G[l, l] = 1,    0 for l > m.

    The last row is the output y = C^T r_L: the predicted gains, ``llv.gains()``.

    Examples
    --------
    >>> from llvlit.publishing.explorer import responses
    >>> A = np.array([[[2.0, 0], [1, 0]], [[1, 3], [0, 1]]])
    >>> bases = np.tile(np.eye(2), (3, 1, 1))
    >>> responses(llvlit.LLV(A, np.array([1.0, 0]), bases, np.array([2, 2, 2]), A[None], {}))
    array([[1., 0.],
           [2., 1.],
           [5., 1.]])
    """
    answer = llv.simulate(np.eye(llv.n_layers))
    table = answer.states[..., 0].T.copy()
    table[-1] = answer.output
    table[:-1] += np.eye(llv.n_layers)
    return table


def explorer_case(
    model: LanguageModel, task: str, splits: Splits, *, order: int, amplitude: float, seed: int
) -> dict[str, Any]:
    """What the explorer needs of one model and task, as plain lists and numbers.

    The surrogate (reachability basis) comes from the operating split, the measured gains from the evaluation
    split.

    Parameters
    ----------
    task
        Name to show.
    order
        d; at most the hidden size is taken.
    amplitude
        Of the measured gains.

    Returns
    -------
    dict
        ``response``: the rows of :func:`responses` without the zeros beyond the diagonal; ``gap``: the class
        gap at the output; ``norms``: root mean squares of |x_l| over the operating prompts, so that the weights
        of the relative energy are 1 / norms^2; ``measured``, ``low``, ``high``: the full model's gains and
        their 95 % interval; ``relative_error`` of the predicted gains; ``borrowed``; names and fingerprints.

    Raises
    ------
    InputError, NumericalError
        See :func:`llvlit.concept_directions`, :func:`llvlit.identify` and :func:`llvlit.measured_gains`.
    """
    directions = concept_directions(model, splits.concept, seed=seed)
    plan = Plan(directions, "reachability", min(order, model.hidden_size))
    found = identify_all(model, splits.operating, {"": plan}, linear=False)
    llv = found.surrogates[""]
    measured = measured_gains(model, splits.evaluation, directions, amplitude=amplitude)
    low, high = measured.interval(seed=seed)
    return {
        "model": short_name(model.name),
        "task": task,
        "n_layers": llv.n_layers,
        "order": llv.order,
        "gap": float(directions.gaps[-1]),
        "borrowed": np.flatnonzero(directions.borrowed[:-1]).tolist(),
        "response": [row[: state + 1].tolist() for state, row in enumerate(responses(llv))],
        "norms": (1 / np.sqrt(relative_weights(found.states))).tolist(),
        "measured": measured.mean.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "relative_error": agreement(llv.gains(), measured, seed=seed).relative_error,
        "n_operating": len(splits.operating),
        "n_evaluation": len(splits.evaluation),
        "model_fingerprint": model.fingerprint,
        "operating_fingerprint": splits.operating.fingerprint,
        "evaluation_fingerprint": splits.evaluation.fingerprint,
    }


def export_explorer(
    models: Iterable[LanguageModel],
    tasks: Mapping[str, Splits],
    *,
    order: int = 16,
    amplitude: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """The explorer's document: every model with every task, ready for JSON.

    Parameters
    ----------
    models
        An iterator will do: one model is held at a time.
    tasks
        Splits of each task by its name; see ``explorer_case`` for what each split serves.

    Returns
    -------
    dict
        ``format``, ``llvlit`` (the version) and ``cases``; ``llvlit.files.write_json`` writes it.

    Raises
    ------
    InputError
        If there is no model or no task, or two cases would have one name.

    Examples
    --------
    >>> from llvlit.publishing.explorer import export_explorer
    >>> document = export_explorer([model], {task.name: splits}, order=4)
    >>> document["cases"][0]["n_layers"]
    12
    """
    order, amplitude = checks.integer("order", order, at_least=1), checks.number("amplitude", amplitude, above=0)
    expected = "models, as load_model gives them"
    for task, splits in checks.instance("tasks", tasks, Mapping, "splits of each task by its name").items():
        checks.text("tasks", task)
        checks.instance("tasks", splits, Splits, "splits of each task by its name")
    cases = [
        explorer_case(
            checks.instance("models", model, LanguageModel, expected),
            task,
            splits,
            order=order,
            amplitude=amplitude,
            seed=seed,
        )
        for model in checks.iterator("models", models, expected)
        for task, splits in tasks.items()
    ]
    if not cases:
        raise InputError("models or tasks is empty; export at least one model with one task.")
    (name, _), times = Counter((case["model"], case["task"]) for case in cases).most_common(1)[0]
    if times > 1:
        raise InputError(f"models holds {name!r} twice; the explorer tells models by name. Rename one.")
    return {"format": FORMAT_VERSION, "llvlit": version("llvlit"), "cases": cases}


def explorer_html(document: Mapping[str, Any]) -> str:
    """The element that ``explorer.js`` turns into the explorer, with the document inside and words for no JavaScript.

    Raises
    ------
    InputError
        If a number is not finite: JSON has no word for it.

    Examples
    --------
    >>> from llvlit.publishing.explorer import explorer_html, export_explorer
    >>> explorer_html(export_explorer([model], {task.name: splits}, order=4))[:28]
    '<div class="llvlit-explorer"'
    """
    cases = checks.instance("document", document, Mapping, "a document, as export_explorer gives it").get("cases")
    n_cases = len(checks.instance("document['cases']", cases, list, "a list of cases, as export_explorer gives it"))
    try:
        data = json.dumps(document, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"document cannot be written as JSON: {error}. Check the surrogates and gains.") from None
    return PAGE.format(n_cases=n_cases, data=data.replace("<", "\\u003c"))
