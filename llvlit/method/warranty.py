"""Whether a recommendation does at other prompts what was expected of it: pushed there, in the full model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.errors import InputError
from llvlit.method.concepts import Directions
from llvlit.method.effects import push_effects, sources, with_continuations
from llvlit.method.outputs import Output
from llvlit.method.plans import Prediction, in_units, measured
from llvlit.prompts import Prompts

if TYPE_CHECKING:
    from llvlit.method.recommendation import Recommendation

WITHIN = 0.25
"""Relative error of the divergence that the warranty allows."""


@dataclass(frozen=True, eq=False)
class Verification:
    """What a recommendation did at other prompts, in the full model.

    Attributes
    ----------
    shift, kl : Prediction
        Measured means, and their 95 % intervals over independent units.
    held : bool
        Whether both lie where the means of so many prompts were expected.
    near : bool
        Whether the divergence is within 25 % of what was expected; of few prompts it is often not by chance.
    per_prompt : (2, n_prompts) float64 array
        Shift and divergence at each prompt.
    corrected : Recommendation
        The same shape at the strength that these prompts ask for.

    Examples
    --------
    >>> advice = llvlit.recommend(model, splits.operating, directions, budget=0.05)
    >>> check = advice.verify(model, splits.evaluation)
    >>> bool(check.kl.low <= check.kl.value <= check.kl.high)
    True
    """

    shift: Prediction
    kl: Prediction
    held: bool
    near: bool
    per_prompt: np.ndarray = field(repr=False)
    corrected: Recommendation = field(repr=False)

    def __str__(self) -> str:
        n_prompts = self.per_prompt.shape[1]
        verdict = "The warranty held" if self.held else "The warranty did NOT hold"
        within = "within" if self.near else "NOT within"
        size, unit = shift_unit(self.corrected.output, self.corrected.directions)
        shift = f"{in_units(self.shift, size)} {unit}".strip()
        return (
            f"{verdict} at {n_prompts} other prompts: shift {shift}, {self.kl} nats, {within} 25 % of what was "
            "expected."
        )


def shift_unit(output: Output | None, directions: Directions) -> tuple[float, str]:
    """What a shift is told in: the class gap of a concept, in the output's units, and its name; else one, and none."""
    gap = float(directions.gaps[-1])
    return (gap, "class gaps") if output is None and gap > 0 else (1.0, "")


def verify(advice: Recommendation, model: LanguageModel, prompts: Prompts | TokenizedPrompts) -> Verification:
    """See :meth:`llvlit.Recommendation.verify`."""
    tokens = advice.tokens(model, prompts)
    known = set(advice.metadata["token_digests"])
    if both := [tokens.prompts.texts[row] for row, ids in enumerate(tokens.ids) if text_digest(ids) in known]:
        raise InputError(
            f"prompts hold {len(both)} text(s) that the recommendation was made from, such as {both[0]!r}: it "
            "would be tested on itself. Pass others."
        )
    n_units = len(set(tokens.prompts.pairs))
    if n_units < 2:
        raise InputError("prompts are one independent one (twins count once); a mean needs two. Pass more.")
    texts = with_continuations(model, tokens, advice.horizon)
    vectors = advice.directions.on(model)
    head, source = sources(model, texts, vectors, advice.output)
    inputs = np.broadcast_to(advice.inputs, (len(texts), 1, len(advice.inputs)))
    shifts, costs = push_effects(
        head, texts, vectors, inputs, source, everywhere=advice.positions == "all", horizon=advice.horizon
    )
    per_prompt = np.stack([shifts[:, 0], costs[:, 0]])
    shift, kl = (measured(values, tokens.prompts.pairs) for values in per_prompt)
    n_known = len(set(advice.gains.pairs))
    wider = float(np.sqrt((1 / n_known + 1 / n_units) / (2 / n_known)))  # the intervals are for as many new prompts
    held = _holds(advice.shift, shift.value, wider)
    held &= _holds(_logarithm(advice.kl), _logarithm(kl).value, wider)  # as the interval was made
    near = abs(kl.value / advice.kl.value - 1) <= WITHIN
    reached = max(kl.value, np.finfo(float).tiny) if advice.aim == "kl" else shift.value or np.finfo(float).tiny
    factor = np.sqrt(advice.target / reached) if advice.aim == "kl" else advice.target / reached
    seen = replace(advice, plan=replace(advice.plan, shift=shift, kl=kl)).scaled(float(factor))
    corrected = replace(seen, target=advice.target, alternatives=())
    return Verification(shift, kl, held, near, per_prompt, corrected)


def _holds(expected: Prediction, found: float, wider: float) -> bool:
    """Whether a mean lies where it was expected, the interval some times as wide."""
    low, high = (expected.value + wider * (bound - expected.value) for bound in (expected.low, expected.high))
    return low <= found <= high


def _logarithm(prediction: Prediction) -> Prediction:
    return Prediction(*(float(np.log(max(each, np.finfo(float).tiny))) for each in vars(prediction).values()))


def text_digest(ids: tuple[int, ...]) -> str:
    """What a tokenized text is known by again."""
    return hashlib.sha256(str(ids).encode()).hexdigest()[:16]
