"""Which layers, how strong: a plan of inputs for a budget of divergence or a shift of the output, with its warranty.

Gains h and Fisher metric F of single prompts predict, to second order, what any inputs do and cost.  Shapes of inputs
compete: ``argmax h^T u - u^T (F + regularization) u / 2`` and what others do by hand.  Each is made from some of the
prompts and pushed, in the full model, at the others; so its strength and what it will do are known before a new prompt
is seen; and what is foretold of the best is read at prompts that it was not chosen on, either.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, choice, instance, integer, number, sequence, shown
from llvlit.checks import path as checked_path
from llvlit.engine.depth import DepthSystem, depth_system, last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.engine.precision import HALVES
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, tokenize, tokens_of
from llvlit.errors import FileError, InputError
from llvlit.files import finished
from llvlit.method.concepts import Directions, DirectionsLike, as_directions
from llvlit.method.control import relative_weights
from llvlit.method.effects import push_effects, sources, with_continuations
from llvlit.method.exchange import FIRST_LAYER, FORMATS, SteeringVectors, check_replaceable, export_vectors
from llvlit.method.fisher import FisherMetric, make_metric, pulled_back, responses
from llvlit.method.gains import (
    POSITIONS,
    PROMPTS_AT_ONCE,
    Gains,
    check_resolution,
    checked_positions,
    make_gains,
    smallest_step,
)
from llvlit.method.outputs import Output
from llvlit.method.plans import (
    Plan,
    Prediction,
    SecondOrder,
    competing_plans,
    held_out_in_turn,
    in_units,
    scaled_plan,
)
from llvlit.method.results import own_content
from llvlit.method.routing import RARE, has_routes, rerouted_tokens
from llvlit.method.saved_plans import KIND, read_plan, write_plan
from llvlit.method.trust import coefficients, radius
from llvlit.method.warranty import Verification, shift_unit, text_digest, verify
from llvlit.prompts import Prompts

PUSH = "relative size of the plan's largest push"
TOWARDS = ("positive", "negative")
SMALLEST_BUDGET = 1e-8
"""In nats: below it the divergence drowns in the rounding of logits."""
DROWNED = 100.0
"""The same in squares of the numbers' epsilon, which is more in 16 bits: there logits are some 20 to 40 of them off."""
STEP = 0.25
"""Of the plan, the smallest part whose shift tells how far a straight line can be trusted; of a weak one more, and of
one whose pushes are longer than the states, of these."""
FAR_OFF = 3.0
"""How many times too weak for its numbers one prompt must have all plans for the others not to be asked."""
MATTERS = 0.05
"""Share of the largest relative push from which on a layer is named."""


@dataclass(frozen=True, eq=False)
class Recommendation:
    """Inputs for a budget, with what they are expected to do, and what else was considered.

    Attributes
    ----------
    plan : Plan
        The one that is recommended.
    alternatives : tuple of Plan
        The others that were considered, at the same divergence (or, for a wanted shift, the same shift), best first.
    aim : str
        ``kl`` or ``shift``: what the strength was set for.
    target : float
        In nats, or in the output's units.
    trust_radius : float
        How many times as strong the plan may be until the linear prediction of its mean shift is off by 10 %: what
        :class:`llvlit.TrustRadius` calls ``of_mean``.
    gains : Gains
        Of the output, prompt by prompt.
    fisher : FisherMetric
    sizes : (n_layers,) float64 array
        Length of the state before each layer (root mean square over the prompts).
    directions : Directions
        Their gaps are NaN where plain vectors were given.
    positions : str
        ``last`` or ``all``: which tokens are pushed.
    horizon : int
        How many tokens are read: 1, the next; else that many of the model's own continuation, each pushed as it comes.
    output : TokenContrast, LogitReadout or None
        None: the concept along its last direction.
    metadata : dict
        Model and prompts, and what was asked for.  Of a mixture of experts, ``rerouted`` holds the share of prompts
        that the plan sends to other experts.

    Examples
    --------
    >>> advice = llvlit.recommend(model, splits.evaluation, directions, budget=0.05)
    >>> advice.inputs.shape, advice.kl.low <= 0.05 <= advice.kl.high
    ((12,), True)
    """

    plan: Plan
    alternatives: tuple[Plan, ...] = field(repr=False)
    aim: str
    target: float
    trust_radius: float
    gains: Gains = field(repr=False)
    fisher: FisherMetric = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    directions: Directions = field(repr=False)
    positions: str = "last"
    horizon: int = 1
    output: Output | None = None
    metadata: dict[str, Any] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        n_layers = self.gains.per_prompt.shape[1]
        array("sizes", self.sizes, (n_layers,), positive=True)
        for plan in (self.plan, *self.alternatives):
            array("inputs", plan.inputs, (n_layers,))
        choice("aim", self.aim, ("kl", "shift"))
        choice("positions", self.positions, POSITIONS)
        object.__setattr__(self, "horizon", integer("horizon", self.horizon, at_least=1))
        object.__setattr__(self, "target", number("target", self.target, nonzero=True))

    @property
    def inputs(self) -> np.ndarray:
        """U ``(n_layers,)``, as :func:`llvlit.steer` takes them."""
        return self.plan.inputs

    @property
    def shift(self) -> Prediction:
        """Expected shift of the output."""
        return self.plan.shift

    @property
    def kl(self) -> Prediction:
        """Expected divergence of the next token's distribution, in nats."""
        return self.plan.kl

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers before which the plan pushes by at least a twentieth of its largest push, relative to the state."""
        relative = np.abs(self.inputs) / self.sizes
        return tuple(np.flatnonzero(relative >= MATTERS * relative.max()).tolist())

    def __str__(self) -> str:
        relative = np.abs(self.inputs) / self.sizes
        named = list(self.layers)
        least, most = (f"{bound:.2g}" for bound in (100 * relative[named].min(), 100 * relative[named].max()))
        sizes = f"{most} %" if most == least else f"{least} to {most} %"
        faint = [layer for layer in np.flatnonzero(relative).tolist() if layer not in named]
        more = f", and {before(faint)} by {100 * relative[faint].max():.2g} % at most" if faint else ""
        what = "the concept's reading" if self.output is None else f"the {self.output}"
        moves = "rise" if self.shift.value > 0 else "fall"
        size, unit = shift_unit(self.output, self.directions)
        by = _with_error(in_units(self.shift, size))
        told = f"{by} {unit} ({_with_error(self.shift)} in its own units)" if unit else by
        where = {"all": "every token"}.get(self.positions, "each new token" if self.horizon > 1 else "the last token")
        over = "" if self.horizon == 1 else f" on average over {self.horizon} new tokens"
        left = list(self.gains.borrowed)
        alone = (
            f" Nothing is pushed {before(left)}: the two classes part there no more than shuffled labels would."
            if left
            else ""
        )
        return (
            f"Push {before(named)} at {where}, by {sizes} of the state's length{more}; "
            f"expect {what} to {moves} by {told} at {_with_error(self.kl, positive=True)} nats{over}. "
            f"The linear prediction holds to 10 % up to {self.trust_radius:.2g} times this push.{alone}"
            f"{_rerouted(self)}"
        )

    def verify(self, model: LanguageModel, prompts: Prompts | TokenizedPrompts) -> Verification:
        """Push other prompts as recommended, in the full model, and compare with what was expected.

        Parameters
        ----------
        prompts
            Others than those that the recommendation was made from.

        Raises
        ------
        InputError
            If the model is another one, or the prompts hold one that the recommendation was made from.
        """
        return verify(self, model, prompts)

    def tokens(self, model: LanguageModel, prompts: Prompts | TokenizedPrompts) -> TokenizedPrompts:
        """Prompts as tokens, with what was done to those that the recommendation was made from.

        Raises
        ------
        InputError
            If the model is another one, or the prompts are in a chat, or another of their tokens is read, and that was
            not so there; or the other way round.

        Warns
        -----
        UserWarning
            If they end in another suffix.
        """
        self.check_model(model)
        length, chat = int(self.metadata["max_tokens"]), bool(self.metadata["chat"])
        if not isinstance(prompts, TokenizedPrompts):
            index = int(self.metadata.get("token_index", -1))
            prompts = tokenize(model, prompts, max_tokens=length, chat=chat, token_index=index)
        tokens = tokens_of(model, prompts, length)
        for name in ("chat", "token_index", "suffix"):
            theirs, ours = tokens.metadata.get(name), self.metadata.get(name)
            if theirs != ours:
                told = (
                    f"prompts have {name}={theirs!r}, and those that the recommendation was made from {name}={ours!r}"
                )
                if name != "suffix":
                    raise InputError(f"{told}. Pass such ones, or make another for these.")
                warnings.warn(f"{told}: what was expected there need not hold here.", stacklevel=3)
        return tokens

    def scaled(self, factor: float) -> Recommendation:
        """The same shapes, ``factor`` times as strong, their effects predicted to second order from what they were."""
        factor = number("factor", factor, nonzero=True)
        plan, *others = (scaled_plan(each, factor) for each in (self.plan, *self.alternatives))
        target = self.target * (factor * factor if self.aim == "kl" else factor)
        radius = self.trust_radius / abs(factor)
        return replace(self, plan=plan, alternatives=tuple(others), target=target, trust_radius=radius)

    def save(self, folder: str | Path) -> None:
        """Write the recommendation into a folder of its own: safetensors, and a manifest that people can read.

        Raises
        ------
        FileError
            If the folder holds anything else than a recommendation, or cannot be written.
        """
        write_plan(self, checked_path("folder", folder))

    @property
    def vectors(self) -> SteeringVectors:
        """The pushes themselves, as other runtimes take them."""
        pushes = self.inputs[:, None] * self.directions.vectors[:-1].numpy()
        told = {"shift": vars(self.shift), "kl": vars(self.kl), "model": self.metadata["model"]}
        told |= {"model_fingerprint": self.metadata["model_fingerprint"], "horizon": self.horizon}
        return SteeringVectors(pushes, self.positions, str(self.metadata["model_type"]), told)

    def export(
        self,
        path: str | Path,
        *,
        format: str = "gguf",
        model: LanguageModel | None = None,
        prompts: Prompts | TokenizedPrompts | None = None,
    ) -> Recommendation:
        """Write the plan for another runtime; what its format cannot say is solved away first.

        A file of steering vectors that is there already is replaced.  llama.cpp and repeng push every token, and not
        before the first layers.  Where the plan does otherwise, the model and its prompts are asked for a new one that
        does not, for the same aim.

        Parameters
        ----------
        format
            ``gguf``, ``repeng`` or ``easysteer``; see :func:`llvlit.export_vectors`.
        model, prompts
            As for :func:`llvlit.recommend`; needed where a new plan is.

        Returns
        -------
        Recommendation
            Of what was written: this one, or the new one with its own predictions.

        Raises
        ------
        InputError
            If the format cannot say the plan and no model was given, or nothing meets the aim within it.
        FileError
            See :func:`llvlit.export_vectors`.

        Examples
        --------
        >>> import tempfile
        >>> advice = llvlit.recommend(model, splits.evaluation, directions, budget=0.05)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = advice.export(f"{folder}/push.gguf", model=model, prompts=splits.evaluation)
        >>> written.positions, written.inputs[:2].tolist()
        ('all', [0.0, 0.0])
        """
        first = FIRST_LAYER[choice("format", format, FORMATS)]
        check_replaceable(path := checked_path("path", path))
        positions = self.positions if format == "easysteer" else "all"
        told = self
        if positions != self.positions or self.inputs[:first].any():
            if model is None or prompts is None:
                raise InputError(
                    f"The format {format} cannot say positions={self.positions!r} with pushes before layer "
                    f"{np.flatnonzero(self.inputs)[0]}. Pass model and prompts, to make a plan that it can say; or "
                    f"recommend with layers=({first}, {len(self.inputs) - 1}) and positions={positions!r}."
                )
            lowest, highest = self.metadata["layers"]
            aim: dict[str, Any] = {"budget": self.target} if self.aim == "kl" else {"shift": self.target}
            told = recommend(
                model,
                self.tokens(model, prompts),
                self.directions,
                output=self.output,
                layers=(max(first, lowest), highest),
                limit=self.metadata["limit"],
                positions=positions,
                horizon=self.horizon,
                towards="positive" if self.shift.value > 0 else "negative",
                max_tokens=int(self.metadata["max_tokens"]),
                **aim,
            )
        export_vectors(told.vectors, path, format=format)
        return told

    def check_model(self, model: LanguageModel) -> None:
        """InputError if a model is another than the one that this is for."""
        instance("model", model, LanguageModel, "a model, as load_model gives it")
        if model.fingerprint != self.metadata["model_fingerprint"]:
            made, loaded = re.split("[,;]", self.metadata["precision"])[0], str(model.dtype).removeprefix("torch.")
            if model.name == self.metadata["model"] and made != loaded:
                raise InputError(
                    f"The recommendation was made in {made}, and {model.name} is loaded in {loaded}, which has other "
                    f"weights. Load it in {made}, or make one in {loaded}."
                )
            raise InputError(
                f"The recommendation is for {self.metadata['model']} with other weights than {model.name} has. Make "
                "one for this model."
            )


def load_recommendation(folder: str | Path) -> Recommendation:
    """Read what :meth:`llvlit.Recommendation.save` wrote.

    Raises
    ------
    FileError
        If the folder is no recommendation, is not complete, or was changed.

    Examples
    --------
    >>> import tempfile
    >>> advice = llvlit.recommend(model, splits.evaluation, directions, budget=0.05)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     advice.save(f"{folder}/plan")
    ...     loaded = llvlit.load_recommendation(f"{folder}/plan")
    >>> str(loaded) == str(advice)
    True
    """
    folder = checked_path("folder", folder)
    if finished(folder, KIND) is None:
        raise FileError(
            f"{folder} is no complete recommendation of llvlit's. Make it with recommend(...).save(folder)."
        )
    with own_content(folder):
        return Recommendation(**read_plan(folder))


def recommend(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    budget: float = 0.2,
    shift: float | None = None,
    output: Output | None = None,
    layers: tuple[int, int] | None = None,
    positions: str = "last",
    horizon: int = 1,
    limit: float | None = None,
    towards: str = "positive",
    max_tokens: int = MAX_TOKENS,
) -> Recommendation:
    """Which layers to push, and how strongly, for a budget of divergence or a wanted shift.

    Parameters
    ----------
    prompts
        Like those that will be steered, at least four independent ones; labels are not needed.
    budget
        Mean ``KL(unpushed || pushed)`` of the next token's distribution, in nats.
    shift
        Wanted mean shift of the output in place of a budget, in its units; not zero.
    output
        What is to move: a :class:`~llvlit.TokenContrast`, a :class:`~llvlit.LogitReadout`, or by default the concept
        along its last direction.
    layers
        First and last layer that may be pushed.  Layers without a direction of their own are left alone.
    positions
        ``last``: the last token is pushed, and in generation every new one.  ``all``: every token, which is what
        llama.cpp and vLLM do.
    horizon
        Tokens that are read: 1, the next one; more, those of the model's own continuation, with pushes at each of
        them, keys and values included.
    limit
        Largest push, relative to the length of the state that it joins: its root mean square over the prompts' last
        tokens, whichever are pushed.
    towards
        Which way a budget moves the output; a wanted shift has its own sign.

    Returns
    -------
    Recommendation

    Raises
    ------
    InputError
        If the arguments do not fit, there are too few prompts, no plan meets the aim within the limits, or its pushes
        drown in the rounding of the model's numbers.
    NumericalError
        If a pushed logit is not finite.

    Warns
    -----
    UserWarning
        If the plan is beyond its trust radius: the linear prediction is off by more than 10 %.  What is expected of
        it was measured all the same.  Or if it sends more than 5 % of the prompts to other experts.

    Notes
    -----
    Costs, beside the responses (``n_layers / 2`` products with Jacobians a layer), a few pushed states of each prompt.
    Read at many tokens, each pushed state is a forward pass of its text.

    Examples
    --------
    >>> advice = llvlit.recommend(model, splits.operating, directions, budget=0.05)
    >>> check = advice.verify(model, splits.evaluation)
    >>> check.per_prompt.shape, check.corrected.aim
    ((2, 8), 'kl')
    """
    along = as_directions(directions)
    along = replace(along, vectors=torch.from_numpy(array("directions", along.vectors)))
    if output is None and along.borrowed[-1]:
        raise InputError(
            "directions have none of their own at the last state, so there is no readout v_L. Find them from more "
            "prompts, or pass an output."
        )
    max_tokens, horizon = integer("max_tokens", max_tokens), integer("horizon", horizon, at_least=1)
    vectors, tokens = along.on(model), tokens_of(model, prompts, max_tokens)
    choice("towards", towards, TOWARDS)
    everywhere = checked_positions(positions)
    if shift is None:
        aim, target = "kl", number("budget", budget, at_least=SMALLEST_BUDGET)
        if target < (least := DROWNED * torch.finfo(model.dtype).eps ** 2):
            raise InputError(
                f"budget={target:g} drowns in the rounding of {str(model.dtype).removeprefix('torch.')}, where the "
                f"smallest usable is {float(f'{least:.1e}') * 1.01:.2g}. Take a larger one, or float32."
            )
        sign = 1.0 if towards == "positive" else -1.0
    else:
        aim, target = "shift", number("shift", shift, nonzero=True)
        sign = float(np.sign(target))
    if limit is not None:
        limit = number("limit", limit, above=0)
        check_resolution("limit", limit, 1.0, model.dtype)
    allowed = _allowed(model, along, layers)
    folds = held_out_in_turn(tokens.prompts.pairs)
    texts = with_continuations(model, tokens, horizon)
    head, source = sources(model, texts, vectors, output)
    few = not everywhere and horizon == 1 and len(tokens) <= PROMPTS_AT_ONCE  # then they are recorded once
    system = depth_system(model, tokens, max_tokens=max_tokens) if few else None
    states = system.states if system else last_token_states(model, tokens, max_tokens=max_tokens)
    if shift is not None:
        sizes = states[:, -1].norm(dim=-1) if output is None else 1 + source.values(states[:, -1]).abs()
        check_resolution("shift", target, sizes.mean().item(), model.dtype)
    weights = relative_weights(states)

    def first_order(some: TokenizedPrompts, system: DepthSystem | None = None) -> tuple[np.ndarray, np.ndarray]:
        gains = np.empty((len(some), model.n_layers))
        metric = np.empty((len(some), model.n_layers, model.n_layers))
        every = responses(model, some, vectors, everywhere=everywhere, horizon=horizon, system=system)
        for rows, read, tangents in every:
            slopes = source.gradients(read.flatten(0, 1)).view_as(read)
            gains[rows] = torch.einsum("nth,ntlh->nl", slopes.double(), tangents.double()).cpu().numpy() / horizon
            metric[rows] = pulled_back(head, read, tangents)
        return gains, metric

    if model.dtype in HALVES:  # most plans drown in their rounding; one prompt tells before all are computed
        one = SecondOrder(*first_order(texts.select([0])), weights, allowed, sign)
        all_of_it = np.ones(1, dtype=bool)
        pushes = [one.strength(shape, all_of_it, aim, target) * shape for shape in one.shapes(all_of_it).values()]
        size = float((np.abs(pushes) * np.sqrt(weights)).max())
        if FAR_OFF * size < smallest_step(1.0, model.dtype):
            check_resolution(PUSH, size, 1.0, model.dtype)
    gains, metric = first_order(texts, system)
    made = make_gains(model, tokens, gains, along, weights=weights)
    fisher = make_metric(model, tokens, metric, along, positions, horizon=horizon)
    made.metadata.update({**source.metadata, "positions": positions, "horizon": horizon})
    local = SecondOrder(gains, metric, weights, allowed, sign)

    def effects(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return push_effects(head, texts, vectors, inputs, source, everywhere=everywhere, horizon=horizon, system=system)

    plans = competing_plans(local, folds, aim, target, limit or np.inf, tokens.prompts.pairs, effects)
    metadata = {
        "budget": target if aim == "kl" else None,
        "max_tokens": max_tokens,
        "model_type": str(getattr(model.module.config, "model_type", "")),
        "token_digests": [text_digest(ids) for ids in tokens.ids],
        "layers": list(_bounds(model, layers)),
        "limit": limit,
        **source.metadata,
    }
    most_relative = float((np.abs(plans[0].inputs) * np.sqrt(weights)).max())
    check_resolution(PUSH, most_relative, 1.0, model.dtype)
    step = max(STEP / max(1.0, most_relative), torch.finfo(model.dtype).eps ** 0.25 / most_relative)
    radius = _trust(plans[0].inputs, step, effects, len(texts))
    if has_routes(model):
        changed = rerouted_tokens(model, texts, vectors, plans[0].inputs, horizon=horizon, everywhere=everywhere)
        metadata["rerouted"] = float(changed.mean())
    found = Recommendation(
        plan=plans[0],
        alternatives=tuple(plans[1:]),
        aim=aim,
        target=target,
        trust_radius=radius,
        gains=made,
        fisher=fisher,
        sizes=1 / np.sqrt(weights),
        directions=along,
        positions=positions,
        horizon=horizon,
        output=output,
        metadata={**fisher.metadata, **metadata},
    )
    if metadata.get("rerouted", 0) > RARE:
        warnings.warn(
            f"{_rerouted(found).strip()} The output jumps there: no straight line tells of it, and the trust radius is "
            "that of no curve. What is expected was measured in the full model.",
            stacklevel=2,
        )
    if told := beyond_trust(found):
        warnings.warn(told, stacklevel=2)
    return found


def beyond_trust(found: Recommendation) -> str:
    """What is told of a plan that is stronger than its linear prediction holds for; nothing of another."""
    if found.trust_radius >= 1:
        return ""
    size, unit = shift_unit(found.output, found.directions)
    in_units = f" ({found.target / size:.3g} {unit})" if unit else ""
    told = f"budget={found.target:.3g} nats" if found.aim == "kl" else f"shift={found.target:.3g}{in_units}"
    return (
        f"{told} is beyond the trust radius: the linear prediction of the shift holds to 10 % up to "
        f"{found.trust_radius:.2g} times this push. What is expected was measured in the full model; beyond it text "
        "suffers first. Ask for less, or verify."
    )


def _bounds(model: LanguageModel, layers: tuple[int, int] | None) -> tuple[int, int]:
    """First and last layer that may be pushed."""
    bounds = sequence("layers", (0, model.n_layers - 1) if layers is None else layers, "two whole numbers")
    if len(bounds) != 2:
        raise InputError(f"layers={shown(layers)} is not the first and the last layer. Pass two whole numbers.")
    first = integer("layers[0]", bounds[0], at_least=0, at_most=model.n_layers - 1)
    return first, integer("layers[1]", bounds[1], at_least=first, at_most=model.n_layers - 1)


def _allowed(model: LanguageModel, along: Directions, layers: tuple[int, int] | None) -> np.ndarray:
    first, last = _bounds(model, layers)
    places = np.arange(model.n_layers)
    allowed = (places >= first) & (places <= last) & ~along.borrowed[:-1]
    if not allowed.any():
        raise InputError(
            f"layers={first} to {last} have no direction of their own to push along. Name others, or find the "
            "directions from more prompts."
        )
    return np.asarray(allowed)


def _trust(
    inputs: np.ndarray, step: float, effects: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], n: int
) -> float:
    """How many times as strong inputs may be until the mean shift leaves its linear prediction by 10 %.

    From pushes of one step and two, in both directions.
    """
    scales = step * np.array([1.0, -1.0, 2.0, -2.0])
    shifts, _ = effects(np.broadcast_to(scales[:, None] * inputs, (n, 4, len(inputs))))
    slope, second, third = coefficients(np.array(step), shifts.mean(axis=0))
    return float(radius(slope, second, third, 0.1))


def _rerouted(advice: Recommendation) -> str:
    """What is told of a mixture of experts whose routes the plan changes."""
    share = advice.metadata.get("rerouted")
    return (
        f" The router of {advice.metadata['model']} sends {share:.0%} of the prompts to other experts." if share else ""
    )


def _with_error(prediction: Prediction, *, positive: bool = False) -> str:
    """Size and half its interval, which has two digits; the interval where half of it would reach below zero."""
    half = (prediction.high - prediction.low) / 2
    if positive and half >= prediction.value:
        return str(prediction)
    digits = max(0, 1 - int(np.floor(np.log10(half)))) if half > 0 else 3
    return f"{abs(prediction.value):.{digits}f} ± {half:.{digits}f}"


def before(layers: list[int]) -> str:
    """Where pushes are: ``before layers 3, 5 to 8``."""
    return f"before layer{'s' * (len(layers) > 1)} {_ranges(layers)}"


def _ranges(layers: list[int]) -> str:
    """Layers as people write them: ``3, 5 to 8``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
