"""The depth explorer: a JSON document from which a page computes any push, and how the full model answered to some.

Two things are told apart all through.  What the gain matrix of the operating prompts predicts for a push is arithmetic,
and the page does it.  What the full model did at held-out prompts is measured here, for presets at a set of strengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from itertools import product
from typing import Any

import numpy as np
import torch

from llvlit import checks
from llvlit.engine.depth import DepthSystem, depth_system, last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import Directions
from llvlit.method.control import relative_weights
from llvlit.method.gain_matrix import gain_matrix
from llvlit.method.intervals import mean_interval
from llvlit.method.steering import steer
from llvlit.method.trust import trust_radius
from llvlit.plots.figures import short_name
from llvlit.tasks.splits import Splits

FORMAT_VERSION = 2
STRENGTHS = (-3.0, -2.0, -1.5, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
TOLERANCE = 0.1
RELATIVE, ABSOLUTE = "relative", "absolute"
TOLD = "steps that hold a title, a text, and the name of a preset and a strength"
PAGE = """\
<div class="llvlit-explorer">
<p>The depth explorer. In a browser that runs this book's scripts, sliders appear here, one for each layer's push. It
computes on this page; nothing is fetched.</p>
<noscript><p><strong>JavaScript is off</strong>, so the sliders cannot move. This table holds what the full model did
with {model}, {task}: under each promised output shift the one that was measured, both in class gaps. A star marks
what is off by more than {percent} % of the promise.</p>
<div style="overflow-x: auto"><table class="dataframe"><thead><tr><th>Preset</th>{head}</tr></thead>
<tbody>{rows}</tbody></table></div></noscript>
<script type="application/json">{data}</script>
</div>
"""


def preset_shapes(
    gains: np.ndarray, weights: np.ndarray, *, first: int
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Shapes of inputs ``(n_layers,)`` that shift the output by one, as the gains predict, and their kinds of energy.

    ``Optimum`` is the cheapest, ``Uniform`` spends alike at every layer, ``Late third`` alike in the last third of the
    depth, and two push at one layer.  Layers before ``first`` are left alone.

    Raises
    ------
    InputError
        If some shape moves the output by nothing.

    Examples
    --------
    >>> from llvlit.publishing.explorer import preset_shapes
    >>> shapes = preset_shapes(np.array([5.0, 3.0, 0.0, 4.0]), np.array([1.0, 1.0, 1.0, 4.0]), first=1)
    >>> shapes["Best layer"]
    (('relative',), array([0.        , 0.33333333, 0.        , 0.        ]))
    """
    n_layers = len(gains)
    own = np.arange(n_layers) >= first
    kept, even, single = np.where(own, gains, 0.0), own / np.sqrt(weights), np.eye(n_layers)
    last_third = np.arange(n_layers) >= n_layers - max(1, (n_layers - first) // 3)
    shapes = {
        "Optimum": ((RELATIVE,), kept / weights),
        "Uniform": ((RELATIVE,), even),
        "Late third": ((RELATIVE,), even * last_third),
        "Best layer": ((RELATIVE,), single[np.argmax(np.abs(kept) / np.sqrt(weights))]),
        "Last layer": ((RELATIVE, ABSOLUTE), single[-1]),
        "Absolute optimum": ((ABSOLUTE,), kept),
        "Alike in absolute size": ((ABSOLUTE,), own * 1.0),
    }
    for name, (_, shape) in shapes.items():
        if not abs(kept @ shape) > 1e-9 * np.linalg.norm(kept) * np.linalg.norm(shape):
            raise InputError(f"The preset {name} moves the output by nothing, so it has no strength. Check the gains.")
    return {name: (kinds, shape / (kept @ shape)) for name, (kinds, shape) in shapes.items()}


def shifts_along(system: DepthSystem, vectors: torch.Tensor, inputs: np.ndarray) -> np.ndarray:
    """Shifts along v_k at every state k of the full model, ``(n_prompts, n_pushes, n_layers + 1)``.

    Before layer k's own push joins; the last is the output's.

    Parameters
    ----------
    inputs : (n_pushes, n_layers) array
    """
    pushes, readers = torch.as_tensor(inputs).to(vectors), vectors.to(torch.float64)
    plain = torch.einsum("nkh,kh->nk", system.states.to(torch.float64), readers)
    candidates, found = system.states[:, :1].expand(-1, len(pushes), -1), []
    for layer, vector in enumerate(vectors[:-1]):
        found.append(candidates.to(torch.float64) @ readers[layer])
        candidates = system.layers[layer].advance(candidates + pushes[:, layer, None] * vector)
    found.append(candidates.to(torch.float64) @ readers[-1])
    return (torch.stack(found, dim=-1) - plain[:, None]).cpu().numpy()


def untrusted(
    strengths: np.ndarray | Sequence[float], measured: np.ndarray, *, tolerance: float = TOLERANCE
) -> list[list[float]]:
    """Spans of strengths at which a measured output is off by more than a share of the promise.

    Between the strengths, and zero, the measured output is the line that joins them; spans end on a grid of 1/200 of
    the largest strength.

    Examples
    --------
    >>> from llvlit.publishing.explorer import untrusted
    >>> untrusted([-1.0, 1.0, 2.0], np.array([-1.0, 1.0, 1.0]))
    [[1.12, 2.0]]
    """
    largest = np.abs(strengths).max()
    grid = np.linspace(-largest, largest, 401)
    at, values = np.append(strengths, 0.0), np.append(measured, 0.0)
    order = np.argsort(at)
    grid = grid[(grid >= at.min()) & (grid <= at.max())]
    off = np.abs(np.interp(grid, at[order], values[order]) - grid) > tolerance * np.abs(grid) + 1e-9
    edges = np.flatnonzero(np.diff(np.concatenate([[False], off, [False]]).astype(int)))
    return [[round(float(grid[start]), 9), round(float(grid[stop - 1]), 9)] for start, stop in edges.reshape(-1, 2)]


def continuations(
    model: LanguageModel, vectors: torch.Tensor, inputs: np.ndarray, openings: Sequence[str], *, tokens: int
) -> list[list[str]]:
    """The likeliest words after each opening while every new token is pushed, for each row of ``(n_pushes, n_layers)``.

    All in one batch, each row by inputs of its own; padding stands on the left.
    """
    ids = [model.tokenizer.encode(opening) for opening in openings]
    width, n_pushes = max(map(len, ids)), len(inputs)
    rows = {"input_ids": [one[:1] * (width - len(one)) + one for one in ids]}  # a token that no penalty sees anew
    rows["attention_mask"] = [[0] * (width - len(one)) + [1] * len(one) for one in ids]
    batch = {name: torch.tensor(values, device=model.device).repeat(n_pushes, 1) for name, values in rows.items()}
    options = {"do_sample": False, "repetition_penalty": 1.2, "pad_token_id": 0, "max_new_tokens": tokens}
    generate: Any = model.module.generate
    with steer(model, vectors, inputs.repeat(len(ids), axis=0)), torch.no_grad():
        written = generate(**batch, **options)[:, width:]
    decoded = (str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in written)
    texts = [" ".join(text.split()) for text in decoded]
    return [texts[at : at + len(ids)] for at in range(0, len(texts), len(ids))]


def export_explorer(
    model: LanguageModel,
    splits: Splits,
    directions: Directions,
    *,
    openings: Sequence[str],
    task: str = "",
    strengths: Sequence[float] = STRENGTHS,
    tokens: int = 16,
    amplitude: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """The explorer's document, ready for JSON: predictions from the operating split, checks at the evaluation split.

    Parameters
    ----------
    openings
        Texts that the model goes on with, pushed by each preset at each strength.
    task
        Name to show.
    strengths
        Output shifts that a preset promises, in class gaps, in rising order; not zero.
    tokens
        Length of the texts.
    amplitude
        Of the gain matrix.

    Returns
    -------
    dict
        ``format``, ``llvlit`` (the version), names and fingerprints.  Of the layers from ``first`` on: ``response``,
        row by row the shift at states first + 1, ..., n_layers of a unit push before each earlier layer; ``gaps`` of
        those states; ``norms``, lengths of the states (root mean square), so that the weights of the
        relative energy are 1 / norms^2.  ``presets``, each with its ``name``, the kinds of ``energy`` that it belongs
        to, its ``inputs`` for a promise of one class gap, the ``radius`` at which the mean output was foretold to leave
        the promise by 10 % (:func:`llvlit.trust_radius`, operating prompts; None if never), and for each strength: the
        ``measured`` mean output shift and its 95 % interval (``low``, ``high``), the mean shifts ``along`` the states,
        both in class gaps, and the ``texts``; ``untrusted`` spans of strengths.  ``trusted_push``: the largest push,
        relative to its state, up to which every preset kept its promise within 10 %.

    Raises
    ------
    InputError
        If no layer has a direction of its own, there is no opening, or a strength is zero or out of order.  Further
        see :func:`llvlit.gain_matrix` and :func:`llvlit.trust_radius`.
    NumericalError
        If a strength overflows the model's numbers.

    Examples
    --------
    >>> from llvlit.publishing.explorer import export_explorer
    >>> document = export_explorer(model, splits, directions, openings=["The film was"], strengths=[-1, 1], tokens=2)
    >>> document["first"], [preset["name"] for preset in document["presets"][:2]]
    (3, ['Optimum', 'Uniform'])
    """
    checks.instance("model", model, LanguageModel, "a model, as load_model gives it")
    checks.instance("splits", splits, Splits, "splits of a task")
    openings = [
        checks.text("openings", each, may_be_empty=False) for each in checks.sequence("openings", openings, "texts")
    ]
    steps = checks.array("strengths", strengths, ("n_strengths",))
    if not openings or not len(steps) or not steps.all() or (np.diff(steps) <= 0).any():
        raise InputError("Pass an opening or more, and strengths in rising order, none of them zero.")
    checks.instance("directions", directions, Directions, "directions, as concept_directions gives them")
    first, n_layers = directions.first_own, model.n_layers
    vectors = directions.on(model)
    if first >= n_layers or not (directions.gaps[first + 1 :] > 0).all():
        raise InputError("directions have no layer of their own, or no class gaps. Find them by concept_directions.")
    task, tokens = checks.text("task", task), checks.integer("tokens", tokens, at_least=1, at_most=256)
    if max(len(model.tokenizer.encode(each)) for each in openings) + tokens > model.max_positions:
        raise InputError(
            f"openings and tokens={tokens} are more than the {model.max_positions} that {model.name} takes."
        )
    matrix = gain_matrix(model, splits.operating, directions, amplitude=amplitude)
    weights = relative_weights(last_token_states(model, splits.operating))
    norms, gap = 1 / np.sqrt(weights), float(directions.gaps[-1])
    shapes = preset_shapes(matrix.mean[:, -1], weights, first=first)
    inputs = gap * np.stack([shape for _, shape in shapes.values()])
    radii = trust_radius(model, splits.operating, directions, inputs, tolerance=TOLERANCE, coverage=0.1).of_mean

    system = depth_system(model, splits.evaluation)
    scaled = (steps[:, None] * inputs[:, None]).reshape(-1, n_layers)
    along = shifts_along(system, vectors, scaled)[..., first + 1 :] / directions.gaps[first + 1 :]
    if not np.isfinite(along).all():
        raise NumericalError(f"strengths of up to {np.abs(steps).max():g} overflow the model's numbers; lower them.")
    plain, *texts = continuations(model, vectors, np.vstack([0 * scaled[:1], scaled]), openings, tokens=tokens)
    outputs, pairs = along[..., -1], splits.evaluation.pairs
    low, high = mean_interval(outputs, pairs, level=0.95, seed=seed).reshape(2, len(shapes), -1)
    along = along.mean(axis=0).reshape(len(shapes), len(steps), -1)
    presets, held = [], []
    for place, (name, (kinds, _)) in enumerate(shapes.items()):
        off = untrusted(steps, along[place, :, -1])
        nearest = min([np.abs(steps).max(), *(0.0 if a <= 0 <= b else min(abs(a), abs(b)) for a, b in off)])
        held.append(nearest * np.abs(inputs[place] / norms).max())
        presets.append(
            {
                "name": name,
                "energy": list(kinds),
                "inputs": inputs[place, first:].tolist(),
                "radius": float(radii[place]) if np.isfinite(radii[place]) else None,
                "measured": along[place, :, -1].tolist(),
                "low": low[place].tolist(),
                "high": high[place].tolist(),
                "along": along[place].tolist(),
                "untrusted": off,
                "texts": texts[place * len(steps) :][: len(steps)],
            }
        )
    return {
        "format": FORMAT_VERSION,
        "llvlit": version("llvlit"),
        "model": short_name(model.name),
        "task": task,
        "n_layers": n_layers,
        "first": first,
        "gap": gap,
        "gaps": directions.gaps[first + 1 :].tolist(),
        "norms": norms[first:].tolist(),
        "response": [matrix.mean[first:state, state].tolist() for state in range(first + 1, n_layers + 1)],
        "tolerance": TOLERANCE,
        "trusted_push": float(min(held)),
        "strengths": steps.tolist(),
        "openings": openings,
        "plain": plain,
        "presets": presets,
        "n_operating": len(splits.operating),
        "n_evaluation": len(splits.evaluation),
        "model_fingerprint": model.fingerprint,
        "operating_fingerprint": splits.operating.fingerprint,
        "evaluation_fingerprint": splits.evaluation.fingerprint,
    }


def explorer_html(document: Mapping[str, Any], *, story: Sequence[Mapping[str, Any]] = ()) -> str:
    """The element that ``explorer.js`` turns into the explorer: the document, and a table where there is no JavaScript.

    Parameters
    ----------
    story
        Steps to follow: mappings of ``title``, ``text``, ``preset`` (a name) and ``strength``.

    Raises
    ------
    InputError
        If a step of the story has a preset or strength that the document has not, it is no document of
        :func:`export_explorer`, or a number is not finite: JSON has no word for it.

    Examples
    --------
    >>> from llvlit.publishing.explorer import explorer_html, export_explorer
    >>> document = export_explorer(model, splits, directions, openings=["The film was"], strengths=[-1, 1], tokens=2)
    >>> explorer_html(document)[:28]
    '<div class="llvlit-explorer"'
    """
    document = checks.instance("document", document, Mapping, "a document, as export_explorer gives it")
    steps = [dict(checks.instance("story", each, Mapping, TOLD)) for each in checks.sequence("story", story, TOLD)]
    try:
        strengths, presets, tolerance = document["strengths"], document["presets"], document["tolerance"]
        rows = "".join(
            f"<tr><td>{escape(preset['name'])}</td>{_cells(strengths, preset['measured'], tolerance)}</tr>"
            for preset in presets
        )
        for step in steps:
            if step.keys() != {"title", "text", "preset", "strength"}:
                raise InputError(f"story has a step with {', '.join(map(str, step))}; expected {TOLD}.")
            if (step["preset"], step["strength"]) not in product([preset["name"] for preset in presets], strengths):
                raise InputError(f"story tells of {step['preset']!r} at {step['strength']!r}, which document has not.")
        data = json.dumps({**document, "story": steps}, allow_nan=False, separators=(",", ":"))
        return PAGE.format(
            model=escape(document["model"]),
            task=escape(document["task"]),
            percent=f"{100 * tolerance:g}",
            head="".join(f"<th>{each:+g}</th>" for each in strengths),
            rows=rows,
            data=data.replace("<", "\\u003c"),
        )
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"document cannot be written ({error!r:.200}). Pass what export_explorer gives.") from None


def _cells(strengths: Sequence[float], measured: Sequence[float], tolerance: float) -> str:
    """Table cells of measured outputs, a star behind those that are off by more than the tolerance."""
    off = [
        abs(value - promised) > tolerance * abs(promised) for promised, value in zip(strengths, measured, strict=True)
    ]
    return "".join(f"<td>{value:+.2f}{'*' * far}</td>" for value, far in zip(measured, off, strict=True))
