"""Concept directions: at every depth, the line along which the two classes' states differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata

from llvlit.engine.depth import MAX_TOKENS, last_token_states
from llvlit.engine.models import LanguageModel
from llvlit.errors import ConceptNotVisibleError, InputError, unknown_name
from llvlit.prompts import Prompts

METHODS = ("mean_difference", "lda", "logistic", "principal_component")
N_PERMUTATIONS = 200
CHANCE_QUANTILE = 0.95
FEWEST_TO_PERMUTE = 10


@dataclass(frozen=True)
class Directions:
    """Unit concept directions v_0 .. v_L, one before each layer and one after the last.

    Attributes
    ----------
    vectors : (n_layers + 1, hidden_size) float64 tensor
        Unit norm; they point from class 0 to class 1.
    gaps : (n_layers + 1,) float64 array
        Distance of the class means along each direction, in the residual stream's units.
    chance_gaps : (n_layers + 1,) float64 array
        The distance that permuted labels reach (their 95 % quantile); 0 where there are too few prompts.
    borrowed : (n_layers + 1,) bool array
        Where the gap is no larger than under permuted labels; such a direction is that of the next state
        whose gap is larger, and its gap is measured along the borrowed direction.
    method : str

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


def concept_directions(
    model: LanguageModel,
    prompts: Prompts,
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
        ``principal_component``: the first one of the differences between prompts of class 1 and class 0.
    seed
        Of the label permutations that tell a gap from chance.

    Raises
    ------
    InputError
        If a class is missing or the method unknown.
    ConceptNotVisibleError
        If no state separates the classes better than permuted labels do.

    Examples
    --------
    >>> directions = llvlit.concept_directions(model, splits.concept)
    >>> tuple(directions.vectors.shape)
    (13, 64)
    """
    if method not in METHODS:
        raise InputError(unknown_name("method", method, METHODS))
    labels = np.asarray(prompts.labels)
    for label in (0, 1):
        if not (labels == label).any():
            raise InputError(
                f"prompts hold no prompt of class {label} ({len(labels)} of class {1 - label}); "
                "a direction needs both classes."
            )
    states = last_token_states(model, prompts, max_tokens=max_tokens, final_norm=final_norm)
    return directions_of_states(states, labels, method=method, seed=seed)


def mean_difference(states: torch.Tensor, labels: np.ndarray, *, seed: int = 0) -> Directions:
    """Mean-difference directions; see :func:`directions_of_states`."""
    return directions_of_states(states, labels, method="mean_difference", seed=seed)


def directions_of_states(
    states: torch.Tensor, labels: np.ndarray, *, method: str = "mean_difference", seed: int = 0
) -> Directions:
    """Directions from states ``(n_prompts, n_states, hidden_size)`` and labels ``(n_prompts,)`` in {0, 1}.

    Whether a state shows the concept is asked of the class means, whatever the method: its gap must beat 95 % of
    those under permuted labels, and the largest gap of all states 95 % of the largest under permuted labels.

    Raises
    ------
    InputError
        If the method is unknown.
    ConceptNotVisibleError
        If no state separates the classes better than permuted labels do.

    Examples
    --------
    >>> from llvlit.method.concepts import directions_of_states
    >>> states = torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]])  # two prompts, one state each
    >>> found = directions_of_states(states, np.array([0, 1]))
    >>> found.vectors.tolist(), found.gaps.tolist()
    ([[0.0, 1.0]], [2.0])
    """
    if method not in METHODS:
        raise InputError(unknown_name("method", method, METHODS))
    states = states.detach().to("cpu", torch.float64)
    contrast = _contrasts(labels[None, :])
    differences = torch.einsum("cn,nsh->sh", contrast, states)
    gaps = differences.norm(dim=-1)
    chance = torch.zeros_like(gaps)
    norms = gaps.new_zeros(len(gaps), 0)
    if min((labels == 0).sum(), (labels == 1).sum()) >= FEWEST_TO_PERMUTE:
        generator = np.random.default_rng(seed)
        permuted = _contrasts(np.stack([generator.permutation(labels) for _ in range(N_PERMUTATIONS)]))
        norms = torch.stack([(permuted @ states[:, index]).norm(dim=-1) for index in range(states.shape[1])])
        chance = norms.quantile(CHANCE_QUANTILE, dim=1)
    floor = 1e-6 * states.norm(dim=-1).mean(dim=0)
    borrowed = ((gaps <= chance) | (gaps <= floor)).numpy()
    if borrowed.all() or not _any_visible(gaps, norms, chance):
        raise ConceptNotVisibleError(
            "No state separates the classes better than permuted labels do: the concept is not visible in the "
            "last token. Use more prompts, another task, or a suffix that asks for the concept."
        )
    vectors = differences / gaps.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
    sound = np.flatnonzero(~borrowed)
    if method != "mean_difference":
        for index in sound:
            vectors[index] = _fitted(states[:, index].numpy(), labels, differences[index].numpy(), method)
    for index in np.flatnonzero(borrowed):
        later = sound[sound > index]
        vectors[index] = vectors[later[0] if len(later) else sound[-1]]
    along = torch.einsum("sh,sh->s", differences, vectors)
    return Directions(vectors, along.numpy(), chance.numpy(), borrowed, method)


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


def _fitted(states: np.ndarray, labels: np.ndarray, difference: np.ndarray, method: str) -> torch.Tensor:
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
        n_pairs = min((labels == 0).sum(), (labels == 1).sum())
        pairs = states[labels == 1][:n_pairs] - states[labels == 0][:n_pairs]
        found = np.linalg.svd(pairs, full_matrices=False)[2][0]  # the sign of a pair is arbitrary: no centring
    found = found * np.sign(found @ difference or 1.0)
    return torch.from_numpy(found / np.linalg.norm(found))


def _contrasts(labels: np.ndarray) -> torch.Tensor:
    """Weights ``(n_labelings, n_prompts)`` whose product with states is the difference of class means."""
    ones = labels.astype(np.float64)
    return torch.from_numpy(ones / ones.sum(-1, keepdims=True) - (1 - ones) / (1 - ones).sum(-1, keepdims=True))


def direction_vectors(directions: Directions | torch.Tensor | np.ndarray, model: LanguageModel) -> torch.Tensor:
    """Vectors ``(n_layers + 1, hidden_size)`` in the model's type and on its device.

    Raises
    ------
    InputError
        If the shape does not fit the model, or a vector is zero or not finite.
    """
    vectors = directions.vectors if isinstance(directions, Directions) else torch.as_tensor(directions)
    expected = (model.n_layers + 1, model.hidden_size)
    if tuple(vectors.shape) != expected:
        raise InputError(
            f"directions have shape {tuple(vectors.shape)}; {model.name} needs (n_layers + 1, hidden_size), "
            f"which is {expected}."
        )
    norms = vectors.to(torch.float64).norm(dim=-1)
    bad = (~torch.isfinite(norms) | (norms == 0)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"directions[{bad[0]}] is zero or not finite; a push along it would mean nothing.")
    return vectors.to(model.device, model.dtype)


def random_directions(n_states: int, hidden_size: int, *, seed: int = 0) -> torch.Tensor:
    """The null: unit directions ``(n_states, hidden_size)`` drawn uniformly from the sphere, float64.

    Examples
    --------
    >>> from llvlit.method.concepts import random_directions
    >>> null = random_directions(13, 64, seed=1)
    >>> tuple(null.shape), torch.allclose(null.norm(dim=1), torch.ones(13).double())
    ((13, 64), True)
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n_states, hidden_size, generator=generator, dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def separation(states: torch.Tensor, labels: np.ndarray, vectors: torch.Tensor) -> np.ndarray:
    """Area under the ROC curve of each state's projection on its direction, ``(n_states,)``; 0.5 is chance.

    Computed from ranks (Mann and Whitney), ties counted half.

    Examples
    --------
    >>> from llvlit.method.concepts import separation
    >>> states = torch.tensor([[[0.0, 5.0]], [[1.0, 5.0]], [[2.0, 5.0]], [[3.0, 5.0]]])
    >>> separation(states, np.array([0, 0, 1, 1]), torch.tensor([[1.0, 0.0]])).tolist()
    [1.0]
    """
    labels = np.asarray(labels)
    scores = torch.einsum("nsh,sh->ns", states.to("cpu", torch.float64), vectors.to("cpu", torch.float64)).numpy()
    n_positive, n_negative = int((labels == 1).sum()), int((labels == 0).sum())
    if not n_positive or not n_negative:
        raise InputError("labels hold one class only; a ROC curve needs both.")
    rank_sums = rankdata(scores, axis=0)[labels == 1].sum(axis=0)
    return (rank_sums - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
