"""Verification on the full model: what a schedule really costs until the output has moved by the target."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from llvlit.checks import array, flag, instance, number
from llvlit.engine.depth import DepthSystem, depth_system
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowing
from llvlit.method.control import energy
from llvlit.method.gains import check_resolution
from llvlit.progress import progress
from llvlit.prompts import Prompts

PROMPTS_PER_SYSTEM = 32
LARGEST_PUSH = 1e4
"""Largest norm of the inputs that is tried, relative to what the first-order gain asks for."""
MOST_HALVINGS = 60
"""Of a bracket: more than the digits of a number in float64."""

REACHED = "reached"
OUT_OF_REACH = "out of reach"
HELP = {
    REACHED: "The output reached the target.",
    OUT_OF_REACH: "No scale of this shape that was tried moves the output to the target. Lower the target, or "
    "use a shape that acts on layers of larger gain.",
}


@dataclass(frozen=True)
class RequiredEnergy:
    """What a shape of inputs costs on the full model.

    Attributes
    ----------
    scale : (n_prompts,) float64 array
        Smallest scale (in size) found at which ``scale * shape`` moves the output by the target; NaN if out of reach.
        Negative where the shape has to be turned round.
    energy : (n_prompts,) float64 array
        Energy ``u^T W u`` of the scaled inputs; infinite if out of reach.
    reached : (n_prompts,) float64 array
        The shift of the output at that scale; the nearest one seen if out of reach.
    target : float
    status : str
        ``reached`` if every prompt got there, else ``out of reach``.
    borrowed : tuple of int
        Layers pushed along a borrowed direction.

    Examples
    --------
    >>> shape = llvlit.adjoint_gains(model, splits.operating, directions).mean
    >>> cost = llvlit.required_energy(model, splits.evaluation.select([0, 1]), directions, shape, 2.0)
    >>> cost.n_out_of_reach, cost.help
    (0, 'The output reached the target.')
    """

    scale: np.ndarray
    energy: np.ndarray
    reached: np.ndarray
    target: float
    status: str
    borrowed: tuple[int, ...] = ()

    def __str__(self) -> str:
        return (
            f"median energy {self.median:.3g} for a shift of {self.target:.3g}, {len(self.scale)} prompts, "
            f"{self.n_out_of_reach} out of reach{borrowing(self.borrowed)}"
        )

    @property
    def median(self) -> float:
        """Median energy over the prompts."""
        return float(np.median(self.energy))

    @property
    def n_out_of_reach(self) -> int:
        """Number of prompts whose output no scale moved to the target."""
        return int(np.isnan(self.scale).sum())

    @property
    def help(self) -> str:
        """A sentence on the status."""
        return HELP[self.status]


@overload
def required_energy(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    shape: np.ndarray,
    target: float,
    *,
    weights: np.ndarray | None = ...,
    relative_tolerance: float = ...,
    max_tokens: int = ...,
    final_norm: bool = ...,
) -> RequiredEnergy: ...


@overload
def required_energy(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    shape: Mapping[Any, np.ndarray],
    target: float,
    *,
    weights: np.ndarray | None = ...,
    relative_tolerance: float = ...,
    max_tokens: int = ...,
    final_norm: bool = ...,
) -> dict[Any, RequiredEnergy]: ...


def required_energy(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    shape: np.ndarray | Mapping[Any, np.ndarray],
    target: float,
    *,
    weights: np.ndarray | None = None,
    relative_tolerance: float = 1e-3,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> RequiredEnergy | dict[Any, RequiredEnergy]:
    """Smallest scale of a shape of inputs that moves the full model's output by the target, prompt by prompt.

    A geometric grid of scales of both signs brackets the first crossing; bisection narrows it.  All scales of
    all prompts run through the frozen context side by side.

    Parameters
    ----------
    shape : (n_layers,) array, or a dict of several
        Inputs u up to scale, such as one or all of :func:`schedules`; several share the prompts' frozen contexts.
    target : float
        Wanted shift of ``y = v_L^T x_L``, not zero.
    weights : (n_layers,) array, optional
        Of the energy reported.
    relative_tolerance
        Relative width of the final bracket, below 1.

    Returns
    -------
    RequiredEnergy, or of several shapes a dict of them

    Raises
    ------
    InputError
        If a shape is zero or does not fit, or the target or the tolerance drowns in the rounding of the states.

    Notes
    -----
    A target out of reach is a status, not an error: see ``status`` and ``help``.

    Examples
    --------
    >>> every = llvlit.schedules(llvlit.adjoint_gains(model, splits.operating, directions))
    >>> two = splits.evaluation.select([0, 1])
    >>> optimal = llvlit.required_energy(model, two, directions, every["optimal"], 2.0)
    >>> optimal.status, optimal.energy.shape
    ('reached', (2,))
    >>> shapes = {name: every[name] for name in ("optimal", "uniform")}
    >>> costs = llvlit.required_energy(model, two, directions, shapes, 2.0)
    >>> costs["optimal"].median < costs["uniform"].median
    True
    """
    directions = as_directions(directions)
    vectors = directions.on(model)
    shapes = shape if isinstance(shape, Mapping) else {"shape": shape}
    if not shapes:
        raise InputError("shape is empty; pass at least one shape.")
    units = {name: _unit(name, one, model.n_layers) for name, one in shapes.items()}
    target = number("target", target, nonzero=True)
    flag("final_norm", final_norm)
    tolerance = number("relative_tolerance", relative_tolerance, above=0, at_most=0.5)
    check_resolution("relative_tolerance", tolerance, 1.0, model.dtype)
    tokens = tokens_of(model, prompts, max_tokens)
    parts = []
    for members in np.array_split(np.arange(len(tokens)), -(-len(tokens) // PROMPTS_PER_SYSTEM)):
        system = depth_system(model, tokens.select(members), max_tokens=max_tokens, final_norm=final_norm)
        size = system.states[:, -1].norm(dim=-1).mean().item()
        check_resolution("target", target, size, model.dtype)
        parts.append(_first_crossings(system, vectors, np.stack([*units.values()]), target, tolerance))
    norms, reached = (np.concatenate(column).T for column in zip(*parts, strict=True))
    results = {}
    for (name, unit), norm, shifts in zip(units.items(), norms, reached, strict=True):
        missed = np.isnan(norm)
        cost = np.where(missed, np.inf, norm**2 * energy(unit, weights=weights))
        status = OUT_OF_REACH if missed.any() else REACHED
        scale = norm / np.linalg.norm(np.asarray(shapes[name], dtype=np.float64))
        borrowed = tuple(np.flatnonzero(directions.borrowed[:-1] & (unit != 0)).tolist())
        results[name] = RequiredEnergy(scale, cost, shifts, target, status, borrowed)
    return results if shapes is shape else results["shape"]


def _unit(name: Hashable, shape: np.ndarray, n_layers: int) -> np.ndarray:
    """The shape scaled to norm 1."""
    shape = array(str(name), shape, (n_layers,))
    size = np.linalg.norm(shape)
    if size == 0:
        raise InputError(f"{name} is zero; no scale of it moves the output.")
    return shape / size


def output_shifts(system: DepthSystem, directions: DirectionsLike, inputs: np.ndarray) -> np.ndarray:
    """Shift of y = v_L^T x_L on the full model, ``(n_prompts, k)``, under inputs ``(n_prompts, k, n_layers)``.

    Raises
    ------
    InputError
        If the inputs or directions do not fit.
    NumericalError
        If the inputs are so large that the model's numbers overflow.

    Examples
    --------
    >>> from llvlit.method.verification import output_shifts
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> shifts = output_shifts(system, directions, np.zeros((8, 1, 12)))
    >>> shifts.shape, bool(np.abs(shifts).max() < 1e-3)
    ((8, 1), True)
    """
    states = instance("system", system, DepthSystem, "a system, as depth_system gives it").states
    n_prompts, n_states, hidden_size = states.shape
    vectors = as_directions(directions).vectors
    array("directions", vectors, (n_states, hidden_size))
    shifts = _shifts(system, vectors, array("inputs", inputs, (n_prompts, "k", system.n_layers)))
    if not np.isfinite(shifts).all():
        raise NumericalError(f"Inputs of up to {np.abs(inputs).max():.3g} overflow the model's numbers; lower them.")
    return shifts


def _shifts(system: DepthSystem, vectors: torch.Tensor, inputs: np.ndarray) -> np.ndarray:
    """The same of arguments that fit, not finite where the model's numbers overflow."""
    n_prompts, k, _ = inputs.shape
    vectors = vectors.to(system.states)
    pushes = torch.as_tensor(inputs).to(vectors)
    candidates = system.states[:, :1].expand(-1, k, -1)
    lost = torch.zeros(n_prompts, k, dtype=torch.bool, device=candidates.device)
    for layer in range(system.n_layers):
        pushed = candidates + pushes[:, :, layer, None] * vectors[layer]
        lost |= ~pushed.isfinite().all(dim=-1)
        candidates = system.layers[layer].advance(torch.where(lost[..., None], system.states[:, layer, None], pushed))
    candidates = torch.where(lost[..., None], torch.nan, candidates)
    rest = system.states[:, -1:].to(torch.float64)
    shifts = (candidates.to(torch.float64) - rest) @ vectors[-1].to(torch.float64)
    return np.asarray(shifts.cpu().numpy().reshape(n_prompts, k))


@dataclass(frozen=True)
class _Bracket:
    """Scales of one shape between which the output first crosses the target, prompt by prompt ``(n_prompts,)``.

    Where ``crosses`` is false no scale tried crosses it; ``reached`` is the shift at ``upper``, or the nearest seen.
    """

    lower: np.ndarray
    upper: np.ndarray
    reached: np.ndarray
    crosses: np.ndarray


def _shifts_towards(
    system: DepthSystem, vectors: torch.Tensor, scales: np.ndarray, units: np.ndarray, target: float
) -> np.ndarray:
    """Shift in the target's direction ``(n_prompts, k)`` of scales, as many, times units ``(k or 1, n_layers)``."""
    values = _shifts(system, vectors, scales[:, :, None] * units)
    return np.where(np.isfinite(values), values, 0.0) * np.sign(target)


def _bracket(system: DepthSystem, vectors: torch.Tensor, unit: np.ndarray, target: float) -> _Bracket:
    """The first crossing on a geometric grid of scales of both signs."""
    wanted = abs(target)
    reference = system.states[:, 0].to("cpu", torch.float64).norm(dim=-1).numpy() * 1e-3
    slope = np.abs(_shifts_towards(system, vectors, reference[:, None], unit[None], target)[:, 0]) / reference
    guess = wanted / np.maximum(slope, wanted / (LARGEST_PUSH * reference))
    factors = np.concatenate([np.geomspace(1 / 16, 1, 7), np.geomspace(1.5, 64, 9), np.geomspace(128, LARGEST_PUSH, 6)])
    grid = guess[:, None] * np.concatenate([factors, -factors])
    seen = _shifts_towards(system, vectors, grid, unit[None], target)
    order = np.argsort(np.abs(grid), axis=1, kind="stable")
    grid, seen = np.take_along_axis(grid, order, 1), np.take_along_axis(seen, order, 1)
    crossed = seen >= wanted
    crosses = np.asarray(crossed.any(axis=1))
    rows, first = np.arange(len(grid)), crossed.argmax(axis=1)
    upper = grid[rows, first]
    sign = np.sign(upper)
    smaller = np.where((np.sign(grid) == sign[:, None]) & (np.abs(grid) < np.abs(upper)[:, None]), np.abs(grid), 0.0)
    reached = np.where(crosses, seen[rows, first], seen.max(axis=1))
    return _Bracket(sign * smaller.max(axis=1), upper, reached, crosses)


def _first_crossings(
    system: DepthSystem, vectors: torch.Tensor, units: np.ndarray, target: float, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest scale at which the output crosses the target, and the shift there, ``(n_prompts, n_shapes)``.

    Each shape has a grid of its own; then the brackets of all shapes are halved together.
    """
    brackets = [_bracket(system, vectors, unit, target) for unit in progress(units, "energies")]
    lower, upper, reached, crosses = (
        np.stack([getattr(bracket, name) for bracket in brackets], axis=1)
        for name in ("lower", "upper", "reached", "crosses")
    )
    for _ in range(MOST_HALVINGS):
        if np.max(np.abs(upper - lower)[crosses] / np.abs(upper)[crosses], initial=0.0) <= tolerance:
            break
        middle = (lower + upper) / 2
        value = _shifts_towards(system, vectors, middle, units, target)
        enough = crosses & (value >= abs(target))
        upper, lower = np.where(enough, middle, upper), np.where(enough, lower, middle)
        reached = np.where(enough, value, reached)
    return np.where(crosses, upper, np.nan), np.sign(target) * reached
