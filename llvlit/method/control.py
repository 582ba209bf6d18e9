"""Optimal control in closed form: the cheapest push over all layers that reaches a target, and its rivals."""

from __future__ import annotations

import numpy as np
import torch

from llvlit.checks import array, integer, number
from llvlit.checks import seed as checked_seed
from llvlit.errors import InputError, NumericalError
from llvlit.method.gains import Gains, profile, weights_of
from llvlit.method.limits import cheapest_within, checked_limits


def minimum_energy(
    gains: Gains | np.ndarray,
    target: float,
    *,
    weights: np.ndarray | None = None,
    limit: float | np.ndarray | None = None,
    sign: str | None = None,
    layers: tuple[int, int] | None = None,
    most_layers: int | None = None,
) -> np.ndarray:
    """Inputs u* ``(n_layers,)`` of least energy ``u^T W u`` among all with ``h^T u = target``.

    The least-norm solution ``u* = target W^-1 h / (h^T W^-1 h)``; with weights of one, ``target h / |h|^2``
    (arXiv 2603.12541; Cauchy and Schwarz).  With limits, the cheapest inputs within them, to rounding: layers that
    would go beyond their limit stay there, and the others share the rest in the same proportion as before.

    Parameters
    ----------
    gains : Gains or (n_layers,) array
        h: predicted, adjoint or measured.
    weights : (n_layers,) array, optional
        Diagonal of W, positive.  None: of :class:`~llvlit.Gains` theirs, the relative energy, which weighs a push
        against the state that it joins.  Bare numbers know no states: there None is ones, the paper's absolute energy,
        which spends most where states are short and soon breaks a text that is steered;
        :func:`~llvlit.method.control.relative_weights` makes weights of states.
    limit : number or (n_layers,) array, optional
        Largest size of each input; infinite for none.
    sign : str, optional
        ``+``: no input below zero; ``-``: none above.
    layers : two whole numbers, optional
        First and last layer that may be pushed.
    most_layers : int, optional
        How many layers may be pushed.

    Raises
    ------
    InputError
        If the target, the gains or the weights are not finite, a weight is not positive, the gains hold no weights and
        none are given, or the target is out of reach within the limits: the message says how far they reach, and how
        far without each of them.
    NumericalError
        If all gains are zero, so that no input moves the output; or the inputs are beyond the largest number.

    Examples
    --------
    >>> llvlit.minimum_energy(np.array([3.0, 4.0, 0.0]), 5.0)
    array([0.6, 0.8, 0. ])
    >>> llvlit.minimum_energy(np.array([3.0, 4.0, 1.0]), 5.0, limit=0.75)
    array([0.6 , 0.75, 0.2 ])
    """
    h, target = profile("gains", gains), number("target", target)
    diagonal = _weights(_given(weights, gains), "gains", h)
    limits = checked_limits(len(h), limit, sign, layers, most_layers)
    size = np.abs(h).max()
    if size == 0:
        raise NumericalError("All gains are zero: no input moves the output, and no target but 0 can be reached.")
    with np.errstate(over="ignore", invalid="ignore"):
        if limits.names():
            inputs = cheapest_within(h, diagonal, target, limits)
        else:
            h, inverse = h / size, 1 / diagonal  # so that no square of the gains is beyond the range of numbers
            inputs = np.asarray(target / size * inverse * h / (h @ (inverse * h)))
    if not np.isfinite(inputs).all():
        raise NumericalError(f"target={target:g} needs inputs beyond the largest number; gains reach {size:g}.")
    return inputs


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
    values = array("states", states, ("n_prompts", "n_layers + 1", "hidden_size"))
    weights = weights_of([torch.from_numpy(norms) for norms in np.linalg.norm(values[:, :-1], axis=-1).T])
    if weights is None or not len(weights):
        raise InputError("states are zero at every prompt before some layer; a push has no size relative to them.")
    return weights


def energy(inputs: np.ndarray, *, weights: np.ndarray | None = None) -> float:
    """Energy ``u^T W u`` of inputs ``(n_layers,)``.

    Examples
    --------
    >>> from llvlit.method.control import energy
    >>> energy(np.array([3.0, 4.0]))
    25.0
    """
    inputs = array("inputs", inputs, ("n_layers",))
    with np.errstate(over="ignore"):
        spent = float(inputs @ (_weights(weights, "inputs", inputs) * inputs))
    if not np.isfinite(spent):
        raise NumericalError(f"The energy of inputs of up to {np.abs(inputs).max():.3g} is beyond the largest number.")
    return spent


def schedules(gains: Gains | np.ndarray, *, weights: np.ndarray | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Named input shapes ``(n_layers,)``, each of energy ``u^T W u = 1``, with W as in :func:`~llvlit.minimum_energy`.

    ``optimal`` follows ``W^-1 h``; ``uniform`` spends alike everywhere, ``early-only`` and ``middle-only`` alike in a
    third of the depth (:func:`~llvlit.method.control.early_and_middle`); ``last layer`` and ``layer 0``,
    ``layer 1``, ... push once; ``random layer`` is one of them, drawn from the seed; ``random`` is a random shape.

    Examples
    --------
    >>> shapes = llvlit.schedules(np.array([3.0, 4.0, 0.0]))
    >>> shapes["optimal"], shapes["last layer"]
    (array([0.6, 0.8, 0. ]), array([0., 0., 1.]))
    """
    h = profile("gains", gains)
    weights = _weights(_given(weights, gains), "gains", h)
    n_layers = len(h)
    generator = np.random.default_rng(checked_seed("seed", seed))
    single = np.eye(n_layers)
    shapes = {
        "optimal": minimum_energy(h / (np.abs(h).max() or 1.0), 1.0, weights=weights),
        "uniform": (uniform := 1 / np.sqrt(weights)),
        **{name: np.where(part, uniform, 0) for name, part in early_and_middle(n_layers).items()},
        "last layer": single[-1],
        "random layer": single[generator.integers(n_layers)],
        "random": generator.standard_normal(n_layers),
    }
    shapes |= {f"layer {layer}": single[layer] for layer in range(n_layers)}
    return {name: shape / np.sqrt(energy(shape, weights=weights)) for name, shape in shapes.items()}


def early_and_middle(n_layers: int, *, first: int = 0) -> dict[str, np.ndarray]:
    """Layers of the schedules ``early-only`` and ``middle-only``, ``(n_layers,)`` bool each, none of them empty.

    Of the n layers from ``first`` on, the early ones are the first n // 3 (at least one), the middle ones what lies
    between the first n // 3 and the last n // 3.  The paper names both heuristics, not their layers: thirds are our
    reading, and ``layer l`` of :func:`~llvlit.schedules` is the other one, a single layer.

    Examples
    --------
    >>> from llvlit.method.control import early_and_middle
    >>> {name: np.flatnonzero(part).tolist() for name, part in early_and_middle(12).items()}
    {'early-only': [0, 1, 2, 3], 'middle-only': [4, 5, 6, 7]}
    """
    n_layers = integer("n_layers", n_layers, at_least=1)
    first = integer("first", first, at_least=0, at_most=n_layers - 1)
    third, layers = (n_layers - first) // 3, np.arange(n_layers) - first
    middle = (layers >= third) & (layers < n_layers - first - third)
    return {"early-only": (layers >= 0) & (layers < max(third, 1)), "middle-only": middle}


def _given(weights: np.ndarray | None, gains: Gains | np.ndarray) -> np.ndarray | None:
    """The weights, or those that gains of a model hold; InputError if these hold none."""
    if weights is not None or not isinstance(gains, Gains):
        return weights
    if gains.weights is None:
        raise InputError(
            "gains hold no weights, since their states are not known. Pass weights=relative_weights(states), or "
            "gains=gains.mean for the absolute energy."
        )
    return gains.weights


def _weights(weights: np.ndarray | None, argument: str, values: np.ndarray) -> np.ndarray:
    """Diagonal of W, a weight for each of the values of an argument; ones where there are none."""
    if weights is None:
        return np.ones(len(values))
    return array(f"weights, one for each of the {argument},", weights, values.shape, positive=True)
