"""Concept directions: at every depth, the line along which the two classes' states differ."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, choice, instance, integer, text
from llvlit.checks import seed as checked_seed
from llvlit.engine.depth import DepthSystem, last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, tokens_of
from llvlit.errors import ConceptNotVisibleError, InputError
from llvlit.prompts import Prompts, auc

METHODS = ("mean_difference", "lda", "logistic", "principal_component")
N_PERMUTATIONS = 200
CHANCE_QUANTILE = 0.95
FEWEST_TO_PERMUTE = 10
TELLING = 0.99
"""Area under the ROC curve from which on the last token alone is said to tell the label."""
UNIT_TOLERANCE = 1e-4
"""How far a direction's length may be from 1: what rounding to half precision does is less."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit concept directions v_0 .. v_L, one before each layer and one after the last.

    Attributes
    ----------
    vectors : (n_layers + 1, hidden_size) tensor
        Unit norm; they point from class 0 to class 1.
    gaps : (n_layers + 1,) float64 array
        Distance of the class means along each direction, in the residual stream's units; NaN where nobody measured it.
    chance_gaps : (n_layers + 1,) float64 array
        The distance that permuted labels reach (their 95 % quantile); 0 where there are too few prompts.
    borrowed : (n_layers + 1,) bool array
        Where the gap is no larger than under permuted labels; such a direction is that of the next state
        whose gap is larger, and its gap is measured along the borrowed direction.
    method : str

    Raises
    ------
    InputError
        If the shapes do not agree, or a vector is not finite or not of length 1.

    Examples
    --------
    The word that decides is not in the last token before the first layer, so that direction is borrowed:

    >>> bool(directions.borrowed[0]), bool(directions.borrowed[-1])
    (True, False)
    """

    vectors: torch.Tensor
    gaps: np.ndarray
    chance_gaps: np.ndarray
    borrowed: np.ndarray
    method: str

    def __post_init__(self) -> None:
        instance("vectors", self.vectors, torch.Tensor, "a tensor")
        text("method", self.method)
        n_states, _ = array("vectors", self.vectors, ("n_layers + 1", "hidden_size")).shape
        norms = self.vectors.detach().to(torch.float64).norm(dim=-1)
        for state in ((norms - 1).abs() > UNIT_TOLERANCE).nonzero().flatten().tolist():
            raise InputError(
                f"vectors[{state}] of the directions has length {norms[state]:.6g}; gains are per unit push, so "
                "it must be 1. Divide each direction by its norm (none may be zero)."
            )
        object.__setattr__(self, "chance_gaps", array("chance_gaps", self.chance_gaps, (n_states,)))
        if not (isinstance(self.gaps, np.ndarray) and self.gaps.dtype == np.float64 and np.isnan(self.gaps).all()):
            object.__setattr__(self, "gaps", array("gaps", self.gaps, (n_states,)))
        borrowed = instance("borrowed", self.borrowed, np.ndarray, "an array of True and False")
        if borrowed.shape != self.chance_gaps.shape or borrowed.dtype != bool:
            raise InputError(
                f"borrowed has shape {borrowed.shape}, type {borrowed.dtype}; pass a bool for every state."
            )

    @property
    def first_own(self) -> int:
        """The first state from which on every state has a direction of its own: gains are worth showing from there.

        Examples
        --------
        >>> directions.first_own, bool(directions.borrowed[directions.first_own :].any())
        (3, False)
        """
        return int(np.flatnonzero(np.append(True, self.borrowed)).max())

    def on(self, model: LanguageModel | DepthSystem) -> torch.Tensor:
        """Vectors in the type and on the device of a model or a system; InputError if their shape does not fit it."""
        instance("model", model, (LanguageModel, DepthSystem), "a model, as load_model gives it, or a depth system")
        if isinstance(model, LanguageModel):
            name, device, dtype = model.name, model.device, model.dtype
            expected = (model.n_layers + 1, model.hidden_size)
        else:
            name, device, dtype = "the system", model.states.device, model.states.dtype
            expected = (model.n_layers + 1, model.states.shape[2])
        if tuple(self.vectors.shape) != expected:
            raise InputError(
                f"directions have shape {tuple(self.vectors.shape)}; {name} needs (n_layers + 1, hidden_size), "
                f"which is {expected}."
            )
        return self.vectors.detach().to(device, dtype)


DirectionsLike = Directions | torch.Tensor | np.ndarray


def as_directions(directions: DirectionsLike) -> Directions:
    """Directions as they are; vectors ``(n_layers + 1, hidden_size)`` as directions whose gaps are not known.

    Examples
    --------
    >>> from llvlit.method.concepts import as_directions
    >>> as_directions(np.eye(3)).method
    'given'
    """
    if isinstance(directions, Directions):
        return directions
    vectors = array("directions", directions, ("n_layers + 1", "hidden_size"))
    nothing = np.zeros(len(vectors))
    return Directions(torch.from_numpy(vectors), nothing + np.nan, nothing, nothing.astype(bool), "given")


def sets_of(directions: Any) -> list[Directions]:
    """Sets of directions, of one or several, each in the one form."""
    several = [as_directions(one) for one in (directions if isinstance(directions, list | tuple) else [directions])]
    if not several:
        raise InputError("directions is empty; pass at least one set.")
    return several


def borrowed_of(directions: Directions, pushed: np.ndarray | bool | None = None) -> tuple[int, ...]:
    """States whose direction is borrowed; with ``pushed``, which layers are ``(n_layers,)``, those of them alone."""
    used = directions.borrowed if pushed is None else directions.borrowed[:-1] & pushed
    return tuple(np.flatnonzero(used).tolist())


def concept_directions(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    *,
    method: str = "mean_difference",
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
    seed: int = 0,
) -> Directions:
    """Directions v_l, normalized, from the concept split.

    Parameters
    ----------
    prompts
        Labelled prompts, some of each class.
    method
        ``mean_difference`` of the classes; ``lda``: the same, whitened by the covariance within classes
        (shrunk after Ledoit and Wolf); ``logistic``: weights of a logistic probe on standardized states;
        ``principal_component``: the first one of the differences between twins, and between the prompts of class 1
        and class 0 without a twin as they come.
    seed
        Of the label permutations that tell a gap from chance.

    Raises
    ------
    InputError
        If a class is missing or the method unknown.
    ConceptNotVisibleError
        If no state separates the classes better than permuted labels do, or the last one, whose direction is the
        readout, does not: a readout is never borrowed.

    Warns
    -----
    UserWarning
        If the last token alone tells the label, as an answer's letter does: before the first layer, where nothing
        else was read, prompts held out are told apart with an area under the ROC curve of 0.99 or more.

    Examples
    --------
    >>> directions = llvlit.concept_directions(model, splits.concept)
    >>> tuple(directions.vectors.shape)
    (13, 64)
    """
    choice("method", method, METHODS)
    checked_seed("seed", seed)
    labelled = prompts.prompts if isinstance(prompts, TokenizedPrompts) else prompts
    _check_classes(labelled)
    tokens = tokens_of(model, prompts, max_tokens)
    states = last_token_states(model, tokens, max_tokens=max_tokens, final_norm=final_norm)
    directions = directions_of_states(states, labelled, method=method, seed=seed)
    area = 0.5 if directions.borrowed[0] else _held_out_auc(states[:, 0].double().cpu(), labelled)
    if area >= TELLING:
        told = (
            f"before layer 0, where no other token was read, prompts held out are told apart with an AUC of {area:.2f}"
        )
        if len({ids[-1] for ids in tokens.ids}) == 1:  # learned positions are part of the embedding
            said = f"The last token's position alone tells the label: {told}, though all end alike. Make the classes' "
            said += "prompts equally long."
        else:
            said = f"The last token alone tells the label: {told}. {_ends(model, tokens)}. Such a direction is the "
            said += "tokens', not a concept's. Read an earlier token (token_index of tokenize), or end all prompts "
            said += "alike (a suffix)."
        warnings.warn(said, stacklevel=2)
    return directions


def _held_out_auc(states: torch.Tensor, prompts: Prompts) -> float:
    """Area under the ROC curve of states ``(n_prompts, hidden_size)`` along the difference of the class means.

    Each unit (twins together) is held out in turn, so that tokens seen once tell nothing.
    """
    labels, (_, unit) = torch.tensor(prompts.labels), np.unique(prompts.pairs, return_inverse=True)
    own = torch.from_numpy(unit[:, None] == unit).to(states)
    means = []
    for label in (0, 1):
        weights = (1 - own) * (labels == label)
        if not (weights.sum(dim=1) > 0).all():
            return 0.5
        means.append(weights @ states / weights.sum(dim=1, keepdim=True))
    scores = ((states - (means[0] + means[1]) / 2) * (means[1] - means[0])).sum(dim=1)
    return float(auc(scores.numpy(), prompts.labels))


def _ends(model: LanguageModel, tokens: TokenizedPrompts) -> str:
    """The tokens that the classes end in most often."""
    told = []
    for label in (0, 1):
        ends = Counter(ids[-1] for ids, one in zip(tokens.ids, tokens.prompts.labels, strict=True) if one == label)
        most = " and ".join(repr(model.tokenizer.decode([token])) for token, _ in ends.most_common(2))
        told.append(f"class {label} ends in {most}")
    return "Most often " + ", ".join(told)


def directions_of_states(
    states: torch.Tensor, prompts: Prompts, *, method: str = "mean_difference", seed: int = 0
) -> Directions:
    """Directions from states ``(n_prompts, n_states, hidden_size)`` of labelled prompts.

    Whether a state shows the concept is asked of the class means, whatever the method: its gap must beat 95 % of
    those under permuted labels, and the largest gap of all states 95 % of the largest under permuted labels.  Labels
    are permuted as the prompts were drawn: within twins, else among all prompts.

    Raises
    ------
    InputError, ConceptNotVisibleError
        See :func:`llvlit.concept_directions`.

    Examples
    --------
    >>> from llvlit.method.concepts import directions_of_states
    >>> states = torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]])  # two prompts, one state each
    >>> found = directions_of_states(states, llvlit.Prompts(["a waste", "a joy"], [0, 1]))
    >>> found.vectors.tolist(), found.gaps.tolist()
    ([[0.0, 1.0]], [2.0])
    """
    choice("method", method, METHODS)
    seed = checked_seed("seed", seed)
    _check_classes(prompts)
    labels = np.array(prompts.labels)
    states = torch.from_numpy(array("states", states, (len(labels), "n_states", "hidden_size")))
    differences = torch.einsum("cn,nsh->sh", _contrasts(labels[None, :]), states)
    gaps = differences.norm(dim=-1)
    chance = torch.zeros_like(gaps)
    norms = gaps.new_zeros(len(gaps), 0)
    if min((labels == 0).sum(), (labels == 1).sum()) >= FEWEST_TO_PERMUTE:
        permuted = _contrasts(_permuted_labels(labels, prompts.pairs, seed))
        norms = torch.stack([(permuted @ states[:, index]).norm(dim=-1) for index in range(states.shape[1])])
        chance = norms.quantile(CHANCE_QUANTILE, dim=1)
    floor = 1e-6 * states.norm(dim=-1).mean(dim=0)
    borrowed = ((gaps <= chance) | (gaps <= floor)).numpy()
    if borrowed.all() or not _any_visible(gaps, norms, chance):
        raise ConceptNotVisibleError(
            "No state separates the classes better than permuted labels do: the concept is not visible in the "
            "last token. Use more prompts, another task, or a suffix that asks for the concept."
        )
    if borrowed[-1]:
        raise ConceptNotVisibleError(
            f"The last state, which is read out, separates the classes no better than permuted labels do (gap "
            f"{gaps[-1]:.3g}, by chance {chance[-1]:.3g}), so there is no readout v_L. Use more than {len(labels)} "
            "prompts, a suffix that asks for the concept, or another output."
        )
    vectors = differences / gaps.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
    sound = np.flatnonzero(~borrowed)
    if method != "mean_difference":
        partners = _partners(prompts)
        for index in sound:
            vectors[index] = _fitted(states[:, index].numpy(), labels, differences[index].numpy(), method, partners)
    for index in np.flatnonzero(borrowed):
        vectors[index] = vectors[sound[sound > index][0]]
    along = torch.einsum("sh,sh->s", differences, vectors)
    return Directions(vectors, along.numpy(), chance.numpy(), borrowed, method)


def _check_classes(prompts: Prompts) -> None:
    labels = instance("prompts", prompts, Prompts, "labelled prompts").labels
    for label in {0, 1} - set(labels):
        raise InputError(
            f"prompts hold no prompt of class {label} ({len(labels)} of class {1 - label}); "
            "a direction needs both classes."
        )


def _permuted_labels(labels: np.ndarray, pairs: tuple[int, ...], seed: int) -> np.ndarray:
    """Labels ``(200, n_prompts)`` as they could have come: twins swap theirs, the other prompts any of theirs.

    Twins differ in the concept alone, so labels that cross pairs would count what differs between pairs as chance.
    """
    _, unit = np.unique(pairs, return_inverse=True)
    n_positive = np.bincount(unit, labels)
    has_both = (n_positive > 0) & (n_positive < np.bincount(unit))
    strata = np.where(has_both[unit], unit, -1)
    ordered = np.argsort(strata, kind="stable")
    generator = np.random.default_rng(seed)
    permuted = np.empty((N_PERMUTATIONS, len(labels)), dtype=labels.dtype)
    for row in permuted:
        shuffled = generator.permutation(len(labels))
        row[ordered] = labels[shuffled[np.argsort(strata[shuffled], kind="stable")]]
    return permuted


def _any_visible(gaps: torch.Tensor, permuted: torch.Tensor, chance: torch.Tensor) -> bool:
    """Whether the largest gap over all states, each relative to chance, beats that of permuted labels.

    Many states get many chances; the maximum over states holds the rate of false alarms of them all at 5 %
    (Westfall and Young 1993).
    """
    varies = chance > 0
    if not varies.any():
        return True
    largest = (permuted[varies] / chance[varies, None]).amax(dim=0)
    return bool((gaps[varies] / chance[varies]).max() > largest.quantile(CHANCE_QUANTILE))


def _partners(prompts: Prompts) -> np.ndarray:
    """Positions ``(2, n)`` of prompts of class 1, and of the prompt of class 0 that each is compared with: its twin.

    Prompts without a twin follow in their order, as many as both classes have.
    """
    position_of: tuple[dict[tuple[int, int], int], ...] = ({}, {})  # by class; a pair may hold several of each
    seen: Counter[tuple[int, int]] = Counter()
    for position, unit in enumerate(zip(prompts.labels, prompts.pairs, strict=True)):
        label, pair = unit
        position_of[label][pair, seen[unit]] = position
        seen[unit] += 1
    zeros, ones = position_of
    twins = [(ones[key], zeros[key]) for key in ones if key in zeros]
    single_ones = [position for key, position in ones.items() if key not in zeros]
    single_zeros = [position for key, position in zeros.items() if key not in ones]
    return np.array([*twins, *zip(single_ones, single_zeros, strict=False)]).T


def _fitted(
    states: np.ndarray, labels: np.ndarray, difference: np.ndarray, method: str, partners: np.ndarray
) -> torch.Tensor:
    """Unit direction ``(hidden_size,)`` of one state by scikit-learn, on the side of class 1."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # here, since it is slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if method == "lda":
        found = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(states, labels).coef_[0]
    elif method == "logistic":
        scaler = StandardScaler().fit(states)
        found = LogisticRegression(max_iter=2000).fit(scaler.transform(states), labels).coef_[0] / scaler.scale_
    else:
        ones, zeros = partners
        differences = states[ones] - states[zeros]
        found = np.linalg.svd(differences, full_matrices=False)[2][0]  # the sign of a pair is arbitrary: no centring
    found = found * np.sign(found @ difference or 1.0)
    return torch.from_numpy(found / np.linalg.norm(found))


def _contrasts(labels: np.ndarray) -> torch.Tensor:
    """Weights ``(n_labelings, n_prompts)`` whose product with states is the difference of class means."""
    ones = labels.astype(np.float64)
    return torch.from_numpy(ones / ones.sum(-1, keepdims=True) - (1 - ones) / (1 - ones).sum(-1, keepdims=True))


def random_directions(n_states: int, hidden_size: int, *, seed: int = 0) -> torch.Tensor:
    """The null: unit directions ``(n_states, hidden_size)`` drawn uniformly from the sphere, float64.

    Examples
    --------
    >>> from llvlit.method.concepts import random_directions
    >>> null = random_directions(13, 64, seed=1)
    >>> tuple(null.shape), torch.allclose(null.norm(dim=1), torch.ones(13).double())
    ((13, 64), True)
    """
    generator = torch.Generator().manual_seed(checked_seed("seed", seed))
    n_states = integer("n_states", n_states, at_least=1, at_most=10**6)
    hidden_size = integer("hidden_size", hidden_size, at_least=1, at_most=10**6)
    vectors = torch.randn(n_states, hidden_size, generator=generator, dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def separation(states: torch.Tensor, labels: np.ndarray, vectors: torch.Tensor) -> np.ndarray:
    """Area under the ROC curve of each state's projection on its direction, ``(n_states,)``; 0.5 is chance.

    Examples
    --------
    >>> from llvlit.method.concepts import separation
    >>> states = torch.tensor([[[0.0, 5.0]], [[1.0, 5.0]], [[2.0, 5.0]], [[3.0, 5.0]]])
    >>> separation(states, np.array([0, 0, 1, 1]), torch.tensor([[1.0, 0.0]])).tolist()
    [1.0]
    """
    projected = array("states", states, ("n_prompts", "n_states", "hidden_size"))
    scores = np.einsum("nsh,sh->ns", projected, array("vectors", vectors, projected.shape[1:]))
    return auc(scores, labels)
