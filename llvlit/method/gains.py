"""Gain profiles: how strongly a push before each layer moves the concept at the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.engine.depth import MAX_TOKENS, propagate_beside, sweep
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import tokenize
from llvlit.errors import InputError
from llvlit.files import load_tensors, save_tensors
from llvlit.method.concepts import Directions, direction_vectors
from llvlit.method.intervals import bootstrap_means, compare
from llvlit.method.origin import origin
from llvlit.prompts import Prompts

PROMPTS_PER_ADJOINT = 32


@dataclass(frozen=True)
class Gains:
    """Gain profiles of single prompts.

    Attributes
    ----------
    per_prompt : (n_prompts, n_layers) float64 array
        Output units per unit of input: ``g_l = (y(+a) - y(-a)) / 2a`` for measured gains, ``w_l^T v_l`` for adjoint.
    kind : str
        ``measured`` or ``adjoint``.
    amplitude : float
        a, in the residual stream's units; 0 for adjoint gains (the limit of small amplitudes).

    Examples
    --------
    >>> gains = llvlit.adjoint_gains(model, splits.evaluation, directions)
    >>> gains.mean.shape, gains.interval().shape
    ((12,), (2, 12))
    """

    per_prompt: np.ndarray
    kind: str
    amplitude: float
    metadata: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def mean(self) -> np.ndarray:
        """Gain profile, the mean over prompts ``(n_layers,)``."""
        return self.per_prompt.mean(axis=0)

    def interval(self, *, level: float = 0.95, seed: int = 0) -> np.ndarray:
        """Bootstrap interval of the mean over prompts: lower and upper bound, ``(2, n_layers)``."""
        means = bootstrap_means(self.per_prompt, seed=seed)
        return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)

    def select(self, layers: slice) -> Gains:
        """The same gains at some layers only, such as ``slice(1, None)`` for all but layer 0."""
        return Gains(self.per_prompt[:, layers], self.kind, self.amplitude, self.metadata)

    def head(self, n_prompts: int) -> Gains:
        """The same gains of the first prompts only."""
        return Gains(self.per_prompt[:n_prompts], self.kind, self.amplitude, self.metadata)

    def save(self, path: str | Path) -> None:
        """Write the gains as safetensors, whole or not at all; FileError if they cannot be written."""
        header = {"gains": self.kind, "amplitude": self.amplitude, "metadata": self.metadata}
        save_tensors(path, {"per_prompt": self.per_prompt}, {"kind": "gains", **header})

    @classmethod
    def load(cls, path: str | Path) -> Gains:
        """Read what :meth:`save` wrote; FileError if it is cut short, of another kind or version."""
        tensors, header = load_tensors(path, kind="gains")
        return cls(tensors["per_prompt"].numpy(), header["gains"], header["amplitude"], header["metadata"])


def measured_gains(
    model: LanguageModel,
    prompts: Prompts,
    directions: Directions | torch.Tensor | np.ndarray,
    *,
    amplitude: float = 0.1,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Gains:
    """Gains of the full model: central differences of the output over an input before one layer at a time.

    Every prompt's 2 L pushed states travel through depth behind its tokens, joining at the layer where they
    are pushed, so that the whole profile costs about one forward pass of the prompts and a fifth.

    Parameters
    ----------
    amplitude
        a > 0, the length of the push in the residual stream's units.

    Raises
    ------
    InputError
        If the amplitude is not positive and finite, or the directions do not fit.

    Examples
    --------
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> measured.per_prompt.shape
    (8, 12)
    """
    push = (direction_vectors(directions, model), amplitude)
    return measured_gains_of(model, prompts, [push], max_tokens=max_tokens, final_norm=final_norm)[0]


def measured_gains_of(
    model: LanguageModel,
    prompts: Prompts,
    pushes: Sequence[tuple[Directions | torch.Tensor | np.ndarray, float]],
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> list[Gains]:
    """Measured gains of several kinds of push, each directions and an amplitude, from one pass of the prompts.

    Raises
    ------
    InputError
        If there is no push, an amplitude is not positive and finite, or directions do not fit.

    Examples
    --------
    >>> from llvlit.method.gains import measured_gains_of
    >>> pushes = [(directions, 0.1), (directions, 10.0)]
    >>> small, large = measured_gains_of(model, splits.evaluation, pushes)
    >>> small.amplitude, large.amplitude
    (0.1, 10.0)
    """
    if not pushes:
        raise InputError("pushes is empty; pass at least one pair of directions and amplitude.")
    kinds = []
    for directions, amplitude in pushes:
        if not (np.isfinite(amplitude) and amplitude > 0):
            raise InputError(f"amplitude={amplitude} must be positive and finite; the paper uses 0.1.")
        kinds.append((direction_vectors(directions, model), float(amplitude)))
    tokenized = tokenize(model, prompts, max_tokens=max_tokens)

    def push(layer: int, states: torch.Tensor) -> torch.Tensor:
        steps = [amplitude * vectors[layer] for vectors, amplitude in kinds]
        return torch.stack([states + sign * step for step in steps for sign in (1, -1)], dim=1)

    pushed = propagate_beside(model, tokenized, push, final_norm=final_norm, description="measured gains")
    finals = pushed.to(torch.float64).view(len(prompts), model.n_layers, len(kinds), 2, -1)
    metadata = origin(model, tokenized)
    found = []
    for number, (vectors, amplitude) in enumerate(kinds):
        readouts = finals[:, :, number] @ vectors[-1].to(torch.float64)
        gains = (readouts[..., 0] - readouts[..., 1]) / (2 * amplitude)
        found.append(Gains(gains.cpu().numpy(), "measured", amplitude, metadata))
    return found


def adjoint_gains(
    model: LanguageModel,
    prompts: Prompts,
    directions: Directions | torch.Tensor | np.ndarray,
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Gains:
    """First-order gains of the full model, all layers from one backward pass.

    The adjoint ``w_L = c``, ``w_l = A_l^T w_{l+1}`` gives ``g_l = w_l^T v_l``: the full-order linear
    reference that every surrogate is judged against.

    Raises
    ------
    InputError
        If the directions do not fit.

    Examples
    --------
    >>> linear = llvlit.adjoint_gains(model, splits.evaluation, directions)
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> bool(np.allclose(linear.mean, measured.mean, rtol=0.05))
    True
    """
    return adjoint_gains_of(model, prompts, [directions], max_tokens=max_tokens, final_norm=final_norm)[0]


def adjoint_gains_of(
    model: LanguageModel,
    prompts: Prompts,
    several: Sequence[Directions | torch.Tensor | np.ndarray],
    *,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> list[Gains]:
    """Adjoint gains along several kinds of directions, their outputs side by side in one backward pass.

    Raises
    ------
    InputError
        If there are no directions, or they do not fit.
    """
    if not several:
        raise InputError("several is empty; pass at least one kind of directions.")
    vectors = torch.stack([direction_vectors(directions, model) for directions in several], dim=1)
    tokenized = tokenize(model, prompts, max_tokens=max_tokens)
    gains = np.empty((len(several), len(prompts), model.n_layers))
    for members in np.array_split(np.arange(len(prompts)), -(-len(prompts) // PROMPTS_PER_ADJOINT)):
        part = tokenized.select(members)
        layers = tuple(sweep(model, part, max_tokens=max_tokens, final_norm=final_norm, description="adjoint gains"))
        adjoints = vectors[-1].expand(len(members), -1, -1)
        for layer in reversed(layers):
            adjoints = layer.vjp(adjoints)
            products = torch.einsum("nkh,kh->kn", adjoints.to(torch.float64), vectors[layer.index].to(torch.float64))
            gains[:, members, layer.index] = products.cpu().numpy()
    metadata = origin(model, tokenized)
    return [Gains(one, "adjoint", 0.0, metadata) for one in gains]


@dataclass(frozen=True)
class Agreement:
    """How well a predicted profile fits a measured one.

    Attributes
    ----------
    spearman, pearson : float
        Rank and linear correlation over layers; NaN if a profile is constant.
    relative_error : float
        ``|h - g| / |g|``: unlike the correlations, it sees a wrong scale.
    intervals : dict
        95 % bootstrap interval over prompts of each of the three, if single prompts' gains were given.

    Examples
    --------
    >>> found = llvlit.agreement(np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0]))
    >>> print(found)
    spearman 1, pearson 1, relative error 0.5
    """

    spearman: float
    pearson: float
    relative_error: float
    intervals: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        """The three numbers with their intervals, to three digits."""
        parts = []
        for name, value in self.row().items():
            bounds = "[{:.3g}, {:.3g}]".format(*self.intervals[name]) if name in self.intervals else ""
            parts.append(f"{name.replace('_', ' ')} {value:.3g} {bounds}".rstrip())
        return ", ".join(parts)

    def row(self) -> dict[str, float]:
        """The three numbers."""
        return {key: value for key, value in asdict(self).items() if key != "intervals"}


def agreement(predicted: Gains | np.ndarray, measured: Gains | np.ndarray, *, seed: int = 0) -> Agreement:
    """Agreement of two gain profiles over layers.

    Parameters
    ----------
    predicted, measured : Gains or (n_layers,) array
        Gains with single prompts give intervals (those of ``measured`` are resampled).

    Raises
    ------
    InputError
        If the profiles differ in length, have fewer than three layers, or are not finite.

    Examples
    --------
    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=16)
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> llvlit.agreement(surrogate.gains(), measured).spearman > 0.5
    True
    """
    h = predicted.mean if isinstance(predicted, Gains) else np.asarray(predicted, dtype=np.float64)
    g = measured.mean if isinstance(measured, Gains) else np.asarray(measured, dtype=np.float64)
    if h.shape != g.shape or h.ndim != 1 or len(h) < 3:
        raise InputError(f"predicted {h.shape} and measured {g.shape} must be profiles of one length, at least 3.")
    if not (np.isfinite(h).all() and np.isfinite(g).all()):
        raise InputError("predicted or measured gains are not finite.")
    intervals = {}
    if isinstance(measured, Gains) and len(measured.per_prompt) > 1:
        means = bootstrap_means(measured.per_prompt, seed=seed)
        draws = np.stack(compare(np.broadcast_to(h, means.shape), means), axis=-1)
        bounds = np.quantile(draws, [0.025, 0.975], axis=0)
        intervals = {
            name: (float(bounds[0, column]), float(bounds[1, column]))
            for column, name in enumerate(("spearman", "pearson", "relative_error"))
        }
    spearman, pearson, error = (float(value[0]) for value in compare(h[None], g[None]))
    return Agreement(spearman, pearson, error, intervals)
