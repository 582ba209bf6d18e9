"""Verification on the full model: what a schedule really costs until the output has moved by the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from llvlit.engine.depth import MAX_TOKENS, DepthSystem, depth_system
from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError
from llvlit.method.concepts import Directions, direction_vectors
from llvlit.method.control import energy
from llvlit.progress import progress
from llvlit.prompts import Prompts

PROMPTS_PER_SYSTEM = 32
LARGEST_PUSH = 1e4
"""Largest norm of the inputs that is tried, relative to what the first-order gain asks for."""

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

    Examples
    --------
    >>> shape = llvlit.adjoint_gains(model, splits.operating, directions).mean
    >>> found = llvlit.required_energy(model, splits.evaluation.select([0, 1]), directions, shape, 2.0)
    >>> found.n_out_of_reach, found.help
    (0, 'The output reached the target.')
    """

    scale: np.ndarray
    energy: np.ndarray
    reached: np.ndarray
    target: float
    status: str

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


def required_energy(
    model: LanguageModel,
    prompts: Prompts,
    directions: Directions | torch.Tensor | np.ndarray,
    shape: np.ndarray,
    target: float,
    *,
    weights: np.ndarray | None = None,
    relative_tolerance: float = 1e-3,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> RequiredEnergy:
    """Smallest scale of a shape of inputs that moves the full model's output by the target, prompt by prompt.

    A geometric grid of scales of both signs brackets the first crossing; bisection narrows it.  All scales of
    all prompts run through the frozen context side by side.

    Parameters
    ----------
    shape : (n_layers,) array
        Inputs u up to scale, such as one of :func:`schedules`.
    target : float
        Wanted shift of ``y = v_L^T x_L``, not zero.
    weights : (n_layers,) array, optional
        Of the energy reported.
    relative_tolerance
        Relative width of the final bracket.

    Raises
    ------
    InputError
        If the shape is zero or does not fit, or the target is zero or not finite.

    Notes
    -----
    A target out of reach is a status, not an error: see ``status`` and ``help``.

    Examples
    --------
    >>> shape = llvlit.adjoint_gains(model, splits.operating, directions).mean
    >>> found = llvlit.required_energy(model, splits.evaluation.select([0, 1]), directions, shape, 2.0)
    >>> found.status, found.energy.shape
    ('reached', (2,))
    """
    return required_energies(
        model,
        prompts,
        directions,
        {"shape": shape},
        target,
        weights=weights,
        relative_tolerance=relative_tolerance,
        max_tokens=max_tokens,
        final_norm=final_norm,
    )["shape"]


def required_energies(
    model: LanguageModel,
    prompts: Prompts,
    directions: Directions | torch.Tensor | np.ndarray,
    shapes: Mapping[str, np.ndarray],
    target: float,
    *,
    weights: np.ndarray | None = None,
    relative_tolerance: float = 1e-3,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> dict[str, RequiredEnergy]:
    """The same for several shapes, which share the prompts' frozen contexts; see :func:`llvlit.required_energy`.

    Examples
    --------
    >>> from llvlit.method.verification import required_energies
    >>> every = llvlit.schedules(llvlit.adjoint_gains(model, splits.operating, directions))
    >>> shapes = {name: every[name] for name in ("optimal", "uniform")}
    >>> found = required_energies(model, splits.evaluation.select([0, 1]), directions, shapes, 2.0)
    >>> found["optimal"].median < found["uniform"].median
    True
    """
    vectors = direction_vectors(directions, model)
    units = {name: _unit(name, shape, model.n_layers) for name, shape in shapes.items()}
    if not (np.isfinite(target) and target):
        raise InputError(f"target={target} must be finite and not zero.")
    parts = []
    for members in np.array_split(np.arange(len(prompts)), -(-len(prompts) // PROMPTS_PER_SYSTEM)):
        system = depth_system(model, prompts.select(members), max_tokens=max_tokens, final_norm=final_norm)
        parts.append(_first_crossings(system, vectors, np.stack([*units.values()]), target, relative_tolerance))
    norms, reached = (np.concatenate(column).T for column in zip(*parts, strict=True))
    results = {}
    for name, norm, shifts in zip(shapes, norms, reached, strict=True):
        missed = np.isnan(norm)
        cost = np.where(missed, np.inf, norm**2 * energy(units[name], weights=weights))
        status = OUT_OF_REACH if missed.any() else REACHED
        scale = norm / np.linalg.norm(np.asarray(shapes[name], dtype=np.float64))
        results[name] = RequiredEnergy(scale, cost, shifts, float(target), status)
    return results


def _unit(name: str, shape: np.ndarray, n_layers: int) -> np.ndarray:
    """The shape scaled to norm 1."""
    shape = np.asarray(shape, dtype=np.float64)
    if shape.shape != (n_layers,) or not np.isfinite(shape).all() or not shape.any():
        raise InputError(f"{name} has shape {shape.shape}; expected ({n_layers},), finite and not zero.")
    return shape / np.linalg.norm(shape)


def output_shifts(system: DepthSystem, vectors: torch.Tensor, inputs: np.ndarray) -> np.ndarray:
    """Shift of y = v_L^T x_L on the full model, ``(n_prompts, k)``, under inputs ``(n_prompts, k, n_layers)``.

    Examples
    --------
    >>> from llvlit.method.verification import output_shifts
    >>> system = llvlit.depth_system(model, splits.evaluation)
    >>> shifts = output_shifts(system, directions.vectors, np.zeros((8, 1, 12)))
    >>> shifts.shape, bool(np.abs(shifts).max() < 1e-3)
    ((8, 1), True)
    """
    n_prompts, k, _ = inputs.shape
    vectors = vectors.to(system.states)
    pushes = torch.as_tensor(inputs).to(vectors)
    candidates = system.states[:, :1].expand(-1, k, -1)
    for layer in range(system.n_layers):
        candidates = system.step(layer, candidates + pushes[:, :, layer, None] * vectors[layer])
    rest = system.states[:, -1:].to(torch.float64)
    shifts = (candidates.to(torch.float64) - rest) @ vectors[-1].to(torch.float64)
    return shifts.cpu().numpy().reshape(n_prompts, k)


@dataclass(frozen=True)
class _Bracket:
    """Scales of one shape between which the output first crosses the target, prompt by prompt ``(n_prompts,)``.

    Where ``found`` is false no scale tried crosses it; ``reached`` is the shift at ``upper``, or the nearest seen.
    """

    lower: np.ndarray
    upper: np.ndarray
    reached: np.ndarray
    found: np.ndarray


def _shifts_towards(
    system: DepthSystem, vectors: torch.Tensor, scales: np.ndarray, units: np.ndarray, target: float
) -> np.ndarray:
    """Shift in the target's direction ``(n_prompts, k)`` of scales, as many, times units ``(k or 1, n_layers)``."""
    values = output_shifts(system, vectors, scales[:, :, None] * units)
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
    found = np.asarray(crossed.any(axis=1))
    rows, first = np.arange(len(grid)), crossed.argmax(axis=1)
    upper = grid[rows, first]
    sign = np.sign(upper)
    smaller = np.where((np.sign(grid) == sign[:, None]) & (np.abs(grid) < np.abs(upper)[:, None]), np.abs(grid), 0.0)
    reached = np.where(found, seen[rows, first], seen.max(axis=1))
    return _Bracket(sign * smaller.max(axis=1), upper, reached, found)


def _first_crossings(
    system: DepthSystem, vectors: torch.Tensor, units: np.ndarray, target: float, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest scale at which the output crosses the target, and the shift there, ``(n_prompts, n_shapes)``.

    Each shape has a grid of its own; then the brackets of all shapes are halved together.
    """
    brackets = [_bracket(system, vectors, unit, target) for unit in progress(units, "energies")]
    lower, upper, reached, found = (
        np.stack([getattr(one, name) for one in brackets], axis=1) for name in ("lower", "upper", "reached", "found")
    )
    while np.max(np.abs(upper - lower)[found] / np.abs(upper)[found], initial=0.0) > tolerance:
        middle = (lower + upper) / 2
        value = _shifts_towards(system, vectors, middle, units, target)
        enough = found & (value >= abs(target))
        upper, lower = np.where(enough, middle, upper), np.where(enough, lower, middle)
        reached = np.where(enough, value, reached)
    return np.where(found, upper, np.nan), np.sign(target) * reached
