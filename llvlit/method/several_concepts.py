"""Several concepts at once: what a push along one does to all, and the cheapest way to move one and leave the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from llvlit.checks import array, choice, number, sequence
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import Directions, DirectionsLike, borrowed_of, sets_of
from llvlit.method.gains import adjoint_gains, measured_gains
from llvlit.method.intervals import mean_interval
from llvlit.method.results import Result, load_result, measured_parts, numbers_of, save_result, settle
from llvlit.prompts import Prompts

METHODS = ("measured", "linear")
PARALLEL = 1e-6
"""Sine of the angle below which two directions count as one."""
DEPENDENT = 1e-9
"""Smallest singular value of the outputs' rows, each of norm 1, with which they can still be set apart."""


@dataclass(frozen=True)
class Decoupled(Result):
    """The cheapest inputs with every output's shift prescribed, and what the prescription costs.

    Attributes
    ----------
    inputs : (n_concepts, n_layers) float64 array
        ``u_l^(i)``, along concept i before layer l.
    energy : float
        Weighted squared length of the pushes, ``sum_l w_l |sum_i u_l^(i) v_l^(i)|^2``.
    price : float
        The energy over that of ``free``; at least 1, and 1 where no target is zero.
    free : (n_concepts, n_layers) float64 array
        The cheapest inputs that reach the same targets where outputs with a target of zero may move as they like.
    borrowed, metadata
        Those of the tensor.

    Examples
    --------
    >>> both = [directions, llvlit.method.concepts.random_directions(13, 64)]
    >>> found = llvlit.gain_tensor(model, splits.evaluation, both).decoupled([2.0, 0.0])
    >>> found.inputs.shape, found.price >= 1
    ((2, 12), True)
    """

    inputs: np.ndarray
    energy: float
    price: float
    free: np.ndarray = field(repr=False)

    def _about(self) -> str:
        return f"decoupled inputs of energy {self.energy:.3g}, {self.price:.3g} times that of the targets alone"


@dataclass(frozen=True)
class GainTensor(Result):
    """Gains of every concept's output for pushes along every concept, prompt by prompt.

    Attributes
    ----------
    per_prompt : (n_prompts, n_concepts, n_concepts, n_layers) float64 array
        ``[p, j, i, l]``: shift of output ``v_L^(j)T x_L`` per unit of input along ``v_l^(i)`` before layer l.
    overlaps : (n_layers, n_concepts, n_concepts) float64 array
        Cosines of the concepts' directions before each layer: pushes along parallel directions add their lengths,
        along opposite ones they cancel, so the energy is ``sum_l w_l u_l^T M_l u_l`` with these M_l.
    kind : str
        ``measured`` (central differences of the full model) or ``linear`` (adjoints).
    amplitude : float
        Length of the pushes, in the residual stream's units; 0 for linear ones.
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt, which intervals resample.
    borrowed : tuple of tuples of int, one for each concept
        Layers whose direction is that of a later state.
    metadata : dict
        Model and prompts, by name, fingerprint and number.  Of a mixture of experts, ``rerouted`` holds for each
        concept what it holds of its gains (:func:`llvlit.measured_gains`).

    Raises
    ------
    InputError
        If a number is not finite, there is a single concept, or the parts do not fit each other.

    Examples
    --------
    >>> tense = llvlit.load_task("tense").split(concept=40).concept
    >>> both = [directions, llvlit.concept_directions(model, tense)]
    >>> tensor = llvlit.gain_tensor(model, splits.evaluation, both)
    >>> tensor.mean.shape
    (2, 2, 12)
    >>> bool(np.allclose(tensor.relative_gain_array().sum(axis=0), 1))
    True
    """

    per_prompt: np.ndarray
    overlaps: np.ndarray
    kind: str
    amplitude: float
    pairs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        parts = measured_parts(self, ("n_prompts", "n_concepts", "n_concepts", "n_layers"), METHODS)
        n_prompts, m, _, n_layers = parts["per_prompt"].shape
        array("per_prompt", parts["per_prompt"], (n_prompts, m, m, n_layers))
        if m < 2:
            raise InputError("per_prompt holds a single concept; for one, measured_gains and adjoint_gains do it.")
        overlaps = array("overlaps", self.overlaps, (n_layers, m, m))
        if not np.allclose(overlaps, overlaps.swapaxes(1, 2)) or not np.allclose(np.diagonal(overlaps, 0, 1, 2), 1):
            raise InputError("overlaps are not cosines of unit vectors: symmetric, with ones on the diagonal.")
        borrowed = sequence("borrowed", self.borrowed, "a tuple of whole numbers for each concept") or [()] * m
        if len(borrowed) != m:
            raise InputError(f"borrowed has {len(borrowed)} entries; there are {m} concepts.")
        checked = tuple(numbers_of("borrowed", one, last=n_layers - 1) for one in borrowed)
        settle(self, {**parts, "overlaps": overlaps, "borrowed": checked})

    def _about(self) -> str:
        n_prompts, m, _, n_layers = self.per_prompt.shape
        return f"{self.kind} gains among {m} concepts, {n_layers} layers, {n_prompts} prompts"

    @property
    def n_concepts(self) -> int:
        """Number of concepts m."""
        return self.per_prompt.shape[1]

    @property
    def n_layers(self) -> int:
        """Horizon L."""
        return self.per_prompt.shape[3]

    @property
    def mean(self) -> np.ndarray:
        """Mean over the prompts ``(n_concepts, n_concepts, n_layers)``: output j, input i, layer l."""
        return self.per_prompt.mean(axis=0)

    def interval(self, *, level: float = 0.95, seed: int = 0) -> np.ndarray:
        """Bootstrap interval of the mean over independent units, ``(2, n_concepts, n_concepts, n_layers)``."""
        return mean_interval(self.per_prompt, self.pairs, level=level, seed=seed)

    def shifts(self, inputs: np.ndarray) -> np.ndarray:
        """Predicted shift of every output ``(n_concepts,)`` under inputs ``(n_concepts, n_layers)``, to first order."""
        return np.einsum("jil,il->j", self.mean, array("inputs", inputs, (self.n_concepts, self.n_layers)))

    def energy(self, inputs: np.ndarray, *, weights: np.ndarray | None = None) -> float:
        """Weighted squared length of the pushes, ``sum_l w_l |sum_i u_l^(i) v_l^(i)|^2``."""
        inputs = array("inputs", inputs, (self.n_concepts, self.n_layers))
        with np.errstate(over="ignore", invalid="ignore"):
            spent = float(np.einsum("il,lij,jl,l->", inputs, self.overlaps, inputs, self._weights(weights)))
        if not np.isfinite(spent):
            raise NumericalError(
                f"The energy of inputs of up to {np.abs(inputs).max():.3g} is beyond the largest number."
            )
        return spent

    def relative_gain_array(self, *, weights: np.ndarray | None = None) -> np.ndarray:
        """Relative gain array ``G * inv(G)^T`` (Bristol 1966), ``(n_concepts, n_concepts)``: output j, input i.

        The layers are taken together by each concept's own cheapest input: concept i is pushed in the shape
        ``u^(i) = W^-1 h_ii / |W^(-1/2) h_ii|``, of energy one, where ``h_ji`` are the gains of output j along concept
        i, and ``G_ji = h_ji^T u^(i)``.  Entry (j, i) is the gain of output j for input i alone, over the same gain
        while the other inputs hold all other outputs still.  Rows and columns sum to one, and the units of inputs
        and outputs cancel.  Near the identity the concepts do not disturb each other; large entries say that
        small errors in the gains will spoil any decoupling.

        Raises
        ------
        NumericalError
            If no push along a concept moves its own output, or G is singular.
        """
        mean, weights = self.mean, self._weights(weights)
        own = np.einsum("iil->il", mean) / weights
        sizes = np.sqrt((own * weights * own).sum(axis=1))
        if not sizes.all():
            raise NumericalError(f"No push along concept {int(np.argmin(sizes))} moves its own output; leave it out.")
        G = np.einsum("jil,il->ji", mean, own / sizes[:, None])
        _apart(G)
        return np.asarray(G * np.linalg.inv(G).T)

    def decoupled(self, targets: np.ndarray, *, weights: np.ndarray | None = None) -> Decoupled:
        """The cheapest inputs that shift every output by its target, such as ``[2.0, 0.0]``: one moves, one stays.

        With ``H`` the gains of all outputs for all ``n_concepts * n_layers`` inputs, and W the quadratic form of the
        energy, ``u = W^-1 H^T (H W^-1 H^T)^-1 t``.  Where only output j has a target, holding the others still costs
        ``1 / (1 - R^2)`` times the energy, with R the correlation of row j of ``H W^(-1/2)`` with its best
        combination of the other rows.

        Parameters
        ----------
        targets : (n_concepts,) array
            Output units, not all zero.
        weights : (n_layers,) array, optional
            ``w_l``, positive; such as :func:`~llvlit.method.control.relative_weights` gives.

        Raises
        ------
        InputError
            If the targets or weights do not fit, or all targets are zero.
        NumericalError
            If the rows of H depend on each other, so that the outputs cannot be set apart.

        Examples
        --------
        >>> both = [directions, llvlit.method.concepts.random_directions(13, 64)]
        >>> tensor = llvlit.gain_tensor(model, splits.evaluation, both, method="linear")
        >>> bool(np.allclose(tensor.shifts(tensor.decoupled([2.0, 0.0]).inputs), [2.0, 0.0]))
        True
        """
        m, n_layers = self.n_concepts, self.n_layers
        targets, weights = array("targets", targets, (m,)), self._weights(weights)
        wanted = np.flatnonzero(targets)
        if not len(wanted):
            raise InputError("targets are all zero, which no input reaches best; give a concept a target of its own.")
        cosines, axes = np.linalg.eigh(self.overlaps)
        sizes = np.where(cosines > np.finfo(float).eps * m, cosines, np.inf)  # dependent ones carry nothing
        root = axes / np.sqrt(sizes)[:, None] @ axes.swapaxes(1, 2) / np.sqrt(weights)[:, None, None]
        whitened = np.einsum("jil,lik->jkl", self.mean, root).reshape(m, -1)
        solved = [_least_norm(whitened, targets, rows) for rows in (np.arange(m), wanted)]
        inputs, free = (np.einsum("lik,kl->il", root, one.reshape(m, n_layers)) for one in solved)
        energy, least = (float(one @ one) for one in solved)
        return Decoupled(inputs, energy, energy / least, free, borrowed=self.borrowed, metadata=self.metadata)

    def save(self, path: str | Path) -> None:
        """Write the tensor as safetensors, and what it was computed with; FileError if it cannot be written."""
        save_result(self, path, "gain tensor")

    @classmethod
    def load(cls, path: str | Path) -> GainTensor:
        """Read what :meth:`save` wrote; FileError if it is cut short, changed, of another kind or version."""
        return load_result(cls, path, "gain tensor")

    def _weights(self, weights: np.ndarray | None) -> np.ndarray:
        if weights is None:
            return np.ones(self.n_layers)
        return array("weights", weights, (self.n_layers,), positive=True)


def _apart(rows: np.ndarray) -> np.ndarray:
    """Norms of rows that do not depend on each other."""
    sizes = np.linalg.norm(rows, axis=1)
    if not sizes.all():
        raise NumericalError(f"No push moves output {int(np.argmin(sizes))}, so no target of it can be reached.")
    least = np.linalg.svd(rows / sizes[:, None], compute_uv=False)[-1]
    if least < DEPENDENT:
        raise NumericalError(
            f"The {len(rows)} outputs move together under every push (smallest singular value {least:.1g}), so they "
            "cannot be set apart. Leave one of the concepts out."
        )
    return sizes


def _least_norm(H: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Least-norm solution of ``H z = targets`` in some rows."""
    sizes = _apart(H[rows])
    solution = np.linalg.lstsq(H[rows] / sizes[:, None], targets[rows] / sizes, rcond=None)[0]
    return np.asarray(solution)


def gain_tensor(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: Sequence[DirectionsLike],
    *,
    amplitude: float = 0.1,
    method: str = "measured",
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> GainTensor:
    """Gains of every concept's output for pushes along every concept, from one pass of the prompts.

    Parameters
    ----------
    directions
        Two sets of directions or more; they may come from other prompts than these.
    amplitude
        a > 0, the length of the push in the residual stream's units; of no use where the method is linear.
    method
        ``measured``: ``2 n_concepts`` pushed states a layer, each read along every concept at the end.  ``linear``:
        the outputs' adjoints, from one sweep back.

    Raises
    ------
    InputError
        If there are fewer than two sets, two of them are parallel (to 1e-6) at some state, a set does not fit the
        model, or the amplitude is not positive or drowns in rounding.

    Examples
    --------
    >>> both = [directions, llvlit.method.concepts.random_directions(13, 64)]
    >>> tensor = llvlit.gain_tensor(model, splits.evaluation, both)
    >>> gains = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> bool(np.allclose(tensor.mean[0, 0], gains.mean, atol=0.01))
    True
    """
    number("amplitude", amplitude, above=0)
    several, vectors = _apart_sets(model, directions)
    m, tokens = len(several), tokens_of(model, prompts, max_tokens)
    sets = [
        torch.cat([vectors[i, :-1], vectors[j, -1:]]) for j in range(m) for i in range(m)
    ]  # those of one i differ in their readout alone, and share their pushes
    if choice("method", method, METHODS) == "linear":
        results = adjoint_gains(model, tokens, sets, max_tokens=max_tokens, final_norm=final_norm)
    else:
        results = measured_gains(model, tokens, sets, amplitude=amplitude, max_tokens=max_tokens, final_norm=final_norm)
    per_prompt = np.stack([one.per_prompt for one in results], axis=1).reshape(len(tokens), m, m, model.n_layers)
    overlaps = torch.einsum("ilh,jlh->lij", vectors[:, :-1], vectors[:, :-1]).numpy()
    borrowed = tuple(borrowed_of(one, True) for one in several)
    metadata = origin(model, tokens, final_norm=final_norm)
    told = [one.metadata for one in results[:m]]  # the first output's, of pushes along every concept
    if "rerouted" in told[0]:
        metadata["rerouted"] = [one["rerouted"] for one in told]
    if suggested := [one["suggested_amplitude"] for one in told if "suggested_amplitude" in one]:
        metadata["suggested_amplitude"] = min(suggested)
    amplitude, pairs = results[0].amplitude, tokens.prompts.pairs
    return GainTensor(per_prompt, overlaps, method, amplitude, pairs, borrowed=borrowed, metadata=metadata)


def _apart_sets(model: LanguageModel, directions: Sequence[DirectionsLike]) -> tuple[list[Directions], torch.Tensor]:
    """Sets of directions that differ everywhere, and their vectors ``(n_concepts, n_layers + 1, hidden_size)``.

    Vectors are float64, of exact length 1.
    """
    several = sets_of(sequence("directions", directions, "a list of sets of directions"))
    if len(several) < 2:
        raise InputError(f"directions holds {len(several)} set; pass two or more, or use measured_gains for one.")
    for one in several:
        one.on(model)
    vectors = torch.stack([one.vectors.detach().to("cpu", torch.float64) for one in several])
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    for j in range(len(several)):
        for i in range(j):
            cosine = (vectors[i] * vectors[j]).sum(dim=-1, keepdim=True)
            sine = (vectors[j] - cosine * vectors[i]).norm(dim=-1)
            for state in (sine <= PARALLEL).nonzero().flatten().tolist():
                raise InputError(
                    f"directions[{i}] and directions[{j}] are parallel at state {state} (sine {sine[state]:.1g}): "
                    "as one concept they cannot be set apart. Leave one of them out."
                )
    return several, vectors


def combined(
    model: LanguageModel, directions: Sequence[DirectionsLike], inputs: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """Directions ``(n_layers + 1, hidden_size)`` and one input a layer that push as several sets do together.

    ``sum_i u_l^(i) v_l^(i)`` is a vector: its direction, and its length as the input ``(n_layers,)``.  The readout is
    the first set's.

    Parameters
    ----------
    directions
        Two sets or more, as in :func:`llvlit.gain_tensor`.
    inputs : (n_concepts, n_layers) array

    Raises
    ------
    InputError, NumericalError
        If directions or inputs do not fit, or the pushes overflow.

    Examples
    --------
    >>> from llvlit.method.several_concepts import combined
    >>> both = [directions, llvlit.method.concepts.random_directions(13, 64)]
    >>> with llvlit.steer(model, *combined(model, both, np.ones((2, 12)))):
    ...     logits = model.module(**model.tokenizer("The plot was thin", return_tensors="pt")).logits
    """
    _, vectors = _apart_sets(model, directions)
    inputs = array("inputs", inputs, (len(vectors), model.n_layers))
    pushes = torch.einsum("il,ilh->lh", torch.from_numpy(inputs), vectors[:, :-1])
    lengths = pushes.norm(dim=-1, keepdim=True)
    if not torch.isfinite(lengths).all():
        raise NumericalError(f"inputs of up to {np.abs(inputs).max():.3g} overflow when they are added; lower them.")
    along = torch.where(lengths > 0, pushes / lengths.clamp_min(torch.finfo(torch.float64).tiny), vectors[0, :-1])
    return torch.cat([along, vectors[0, -1:]]), lengths[:, 0].numpy()
