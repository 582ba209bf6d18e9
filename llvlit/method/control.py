"""Optimal control in closed form: the cheapest push over all layers that reaches a target, and its rivals."""

from __future__ import annotations

import numpy as np
import torch

from llvlit.errors import InputError, NumericalError
from llvlit.method.gains import Gains


def minimum_energy(gains: Gains | np.ndarray, target: float, *, weights: np.ndarray | None = None) -> np.ndarray:
    """Inputs u* ``(n_layers,)`` of least energy ``u^T W u`` among all with ``h^T u = target``.

    The least-norm solution ``u* = target W^-1 h / (h^T W^-1 h)``; without weights, ``target h / |h|^2``
    (arXiv 2603.12541; Cauchy and Schwarz).

    Parameters
    ----------
    gains : Gains or (n_layers,) array
        h: predicted, adjoint or measured.
    weights : (n_layers,) array, optional
        Diagonal of W, positive.

    Raises
    ------
    InputError
        If the target, the gains or the weights are not finite, or a weight is not positive.
    NumericalError
        If all gains are zero: no input moves the output.

    Examples
    --------
    >>> llvlit.minimum_energy(np.array([3.0, 4.0, 0.0]), 5.0)
    array([0.6, 0.8, 0. ])
    """
    h = _profile(gains)
    if not np.isfinite(target):
        raise InputError(f"target={target} must be finite.")
    inverse = 1 / _weights(weights, len(h))
    denominator = float(h @ (inverse * h))
    if denominator == 0:
        raise NumericalError("All gains are zero: no input moves the output, and no target but 0 can be reached.")
    return target * inverse * h / denominator


def relative_weights(states: torch.Tensor) -> np.ndarray:
    """Weights of the relative energy, ``1 / mean |x_l|^2``, ``(n_layers,)``: a push in units of the state it joins.

    Parameters
    ----------
    states : (n_prompts, n_layers + 1, hidden_size) tensor

    Examples
    --------
    >>> from llvlit.method.control import relative_weights
    >>> relative_weights(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))  # one prompt, one layer
    array([0.04])
    """
    squares = states[:, :-1].to("cpu", torch.float64).pow(2).sum(-1).mean(0)
    if not (squares > 0).all() or not torch.isfinite(squares).all():
        raise InputError("states must be finite, and none of them zero at every prompt.")
    return (1 / squares).numpy()


def energy(inputs: np.ndarray, *, weights: np.ndarray | None = None) -> float:
    """Energy ``u^T W u`` of inputs ``(n_layers,)``.

    Examples
    --------
    >>> from llvlit.method.control import energy
    >>> energy(np.array([3.0, 4.0]))
    25.0
    """
    inputs = np.asarray(inputs, dtype=np.float64)
    return float(inputs @ (_weights(weights, len(inputs)) * inputs))


def schedules(gains: Gains | np.ndarray, *, weights: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Named input shapes ``(n_layers,)``, each of energy ``u^T W u = 1``.

    ``optimal`` follows ``W^-1 h``; ``uniform`` spends alike everywhere; ``last layer`` and ``layer 0``, ``layer 1``,
    ... push once; ``random layer`` is one of them, drawn from the seed; ``random`` is a random shape.

    Examples
    --------
    >>> shapes = llvlit.schedules(np.array([3.0, 4.0, 0.0]))
    >>> shapes["optimal"], shapes["last layer"]
    (array([0.6, 0.8, 0. ]), array([0., 0., 1.]))
    """
    h = _profile(gains)
    n_layers = len(h)
    generator = np.random.default_rng(seed)
    single = np.eye(n_layers)
    shapes = {
        "optimal": minimum_energy(h, 1.0, weights=weights),
        "uniform": 1 / np.sqrt(_weights(weights, n_layers)),
        "last layer": single[-1],
        "random layer": single[generator.integers(n_layers)],
        "random": generator.standard_normal(n_layers),
    }
    shapes |= {f"layer {layer}": single[layer] for layer in range(n_layers)}
    return {name: shape / np.sqrt(energy(shape, weights=weights)) for name, shape in shapes.items()}


def _profile(gains: Gains | np.ndarray) -> np.ndarray:
    h = gains.mean if isinstance(gains, Gains) else np.asarray(gains, dtype=np.float64)
    if h.ndim != 1 or not len(h) or not np.isfinite(h).all():
        raise InputError(f"gains have shape {h.shape}; expected (n_layers,), all finite.")
    return h


def _weights(weights: np.ndarray | None, n_layers: int) -> np.ndarray:
    if weights is None:
        return np.ones(n_layers)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (n_layers,) or not np.isfinite(weights).all() or not (weights > 0).all():
        raise InputError(f"weights have shape {weights.shape}; expected ({n_layers},), all positive and finite.")
    return weights
