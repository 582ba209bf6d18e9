"""The true optimum: the cheapest inputs that move the mean output of the full model, linear or not, by a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize

from llvlit.checks import array, instance, integer, number
from llvlit.engine.depth import DepthSystem
from llvlit.errors import NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.control import energy, minimum_energy, relative_weights, schedules
from llvlit.method.gains import check_resolution
from llvlit.method.results import Result

MET = 1e-3
"""Relative distance from the target that counts as there."""


@dataclass(frozen=True)
class Optimum(Result):
    """Inputs that reach a target on the full model, and no cheaper ones near them.

    Attributes
    ----------
    inputs : (n_layers,) float64 array
    energy : float
        ``u^T W u``.
    shift : float
        Mean shift of the output over the prompts.
    local : tuple of float
        Energies that the single starts led to, infinite where one led nowhere.  Where they differ, there are several
        valleys, and a lower one may have been missed.
    borrowed, metadata
        As of :class:`llvlit.RequiredEnergy`.

    Examples
    --------
    >>> from llvlit.method.optimum import true_optimum
    >>> best = true_optimum(llvlit.depth_system(model, splits.evaluation), directions, 5.0)
    >>> best.inputs.shape, bool(best.energy <= min(best.local) * 1.001)
    ((12,), True)
    """

    inputs: np.ndarray
    energy: float
    shift: float
    local: tuple[float, ...]

    def _about(self) -> str:
        return f"energy {self.energy:.3g} for a mean shift of {self.shift:.3g}, the best of {len(self.local)} starts"


def mean_shift(system: DepthSystem, directions: DirectionsLike, inputs: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean shift of y = v_L^T x_L over the prompts under inputs ``(n_layers,)``, and its gradient with respect to them.

    One pass through depth, and the adjoint back along the pushed states: the gains where the inputs have led.

    Raises
    ------
    InputError
        If the inputs or directions do not fit.
    NumericalError
        If the inputs are so large that the model's numbers overflow.

    Examples
    --------
    >>> from llvlit.method.optimum import mean_shift
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> shift, gains = mean_shift(system, directions, np.zeros(12))
    >>> linear = llvlit.adjoint_gains(model, splits.evaluation, directions)
    >>> bool(abs(shift) < 1e-4), bool(np.allclose(gains, linear.mean, rtol=1e-3, atol=1e-4))
    (True, True)
    """
    rest = instance("system", system, DepthSystem, "a system, as depth_system gives it").states
    vectors = as_directions(directions).on(system)
    pushes = torch.as_tensor(array("inputs", inputs, (system.n_layers,))).to(rest).unsqueeze(-1) * vectors[:-1]
    states, before = rest[:, 0], []
    for layer, push in zip(system.layers, pushes, strict=True):
        before.append(states + push)
        states = layer.step(before[-1].unsqueeze(1))[:, 0]
    shift = float(((states - rest[:, -1]).to(torch.float64) @ vectors[-1].to(torch.float64)).mean())
    adjoints, gradient = vectors[-1].expand(len(rest), 1, -1), np.empty(system.n_layers)
    for layer, point in zip(reversed(system.layers), reversed(before), strict=True):
        adjoints = replace(layer, states=point).vjp(adjoints)
        along = adjoints[:, 0].to(torch.float64) @ vectors[layer.index].to(torch.float64)
        gradient[layer.index] = float(along.mean())
    return shift, gradient


def true_optimum(
    system: DepthSystem,
    directions: DirectionsLike,
    target: float,
    *,
    weights: np.ndarray | None = None,
    starts: np.ndarray | None = None,
    most_steps: int = 50,
) -> Optimum:
    """Inputs of least energy ``u^T W u`` whose mean shift on the full model is the target.

    Sequential quadratic programming (SciPy's SLSQP) with exact gradients, from several starts, of which the cheapest
    end is returned.  It is an oracle for :func:`llvlit.minimum_energy`, not its rival: it needs the model at every
    step, and knows the prompts that it is judged on.

    Parameters
    ----------
    target : float
        Wanted mean shift, not zero.
    weights : (n_layers,) array, optional
        Diagonal of W; by default of the relative energy.
    starts : (n_starts, n_layers) array, optional
        By default the linear optimum, half of it, and the uniform schedule of its energy.
    most_steps
        Of each start.

    Raises
    ------
    InputError
        If the arguments do not fit, or the target drowns in the rounding of the states.
    NumericalError
        If no start leads to the target.

    Examples
    --------
    >>> from llvlit.method.optimum import true_optimum
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> best = true_optimum(system, directions, 5.0)
    >>> bool(abs(best.shift / 5.0 - 1) < 1e-3)
    True
    """
    n_layers = instance("system", system, DepthSystem, "a system, as depth_system gives it").n_layers
    target, most_steps = number("target", target, nonzero=True), integer("most_steps", most_steps, at_least=1)
    weights = relative_weights(system.states) if weights is None else weights
    weights = array("weights", weights, (n_layers,), positive=True)
    check_resolution("target", target, system.states[:, -1].norm(dim=-1).mean().item(), system.states.dtype)
    _, gains = mean_shift(system, directions, np.zeros(n_layers))
    linear = minimum_energy(gains, target, weights=weights)
    scale = np.sqrt(energy(linear, weights=weights))
    if starts is None:
        uniform = schedules(gains, weights=weights)["uniform"]
        starts = np.stack([linear, linear / 2, uniform * scale * np.sign(gains @ uniform * target)])
    starts = array("starts", starts, ("n_starts", n_layers))
    units = scale / np.sqrt(weights)  # inputs u = units z have the energy |scale z|^2
    seen: dict[bytes, tuple[float, np.ndarray]] = {}

    def at(z: np.ndarray) -> tuple[float, np.ndarray]:
        if z.tobytes() not in seen:
            seen.clear()
            try:
                shift, gradient = mean_shift(system, directions, units * z)
            except NumericalError:  # too far out: nothing there is close to the target
                shift, gradient = -1e3 * target, np.zeros(len(z))
            seen[z.tobytes()] = shift / target - 1, units * gradient / target
        return seen[z.tobytes()]

    tolerance = torch.finfo(system.states.dtype).eps ** 0.5  # finer ones drown in rounding
    ends = []
    for start in starts:
        found = minimize(
            lambda z: z @ z,
            np.clip(start, -1e6 * units, 1e6 * units) / units,
            jac=lambda z: 2 * z,
            constraints={"type": "eq", "fun": lambda z: at(z)[0], "jac": lambda z: at(z)[1]},
            method="SLSQP",
            options={"maxiter": most_steps, "ftol": tolerance},
        )
        missed = at(found.x)[0]
        ends.append((float(scale**2 * found.x @ found.x) if abs(missed) <= MET else np.inf, found.x, missed))
    best = min(ends, key=lambda end: end[0])
    if best[0] == np.inf:
        raise NumericalError(
            f"target={target:g}: no start led to inputs that reach it; the nearest missed it by "
            f"{min(abs(end[2]) for end in ends):.0%}. Lower the target, or pass other starts."
        )
    inputs, reached = units * best[1], float((1 + best[2]) * target)
    borrowed = borrowed_of(as_directions(directions), inputs != 0)
    local = tuple(end[0] for end in ends)
    return Optimum(inputs, best[0], reached, local, borrowed=borrowed, metadata=system.metadata)
