"""Verification on the full model: what a schedule really costs until the output has moved by the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, instance, number
from llvlit.engine.depth import DepthSystem, depth_system
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.control import energy
from llvlit.method.gains import check_resolution, in_parts
from llvlit.method.outputs import Output, Reading, reading
from llvlit.method.results import Result
from llvlit.progress import progress
from llvlit.prompts import Prompts

LARGEST_PUSH = 1e4
"""Largest norm of the inputs that is tried, relative to what the first-order gain asks for."""
FACTORS = np.split(
    np.concatenate([np.geomspace(1 / 16, 1, 7), np.geomspace(1.5, 64, 9), np.geomspace(128, LARGEST_PUSH, 6)]),
    [7, 8, 10, 13, 16],
)
"""Scales that are tried, relative to what the first-order gain asks for: portion by portion, until one crosses."""

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
class RequiredEnergy(Result):
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
    metadata : dict
        Model and prompts, by name, fingerprint and number.

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

    def _about(self) -> str:
        return (
            f"median energy {self.median:.3g} for a shift of {self.target:.3g}, {len(self.scale)} prompts, "
            f"{self.n_out_of_reach} out of reach"
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


def required_energy(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    shape: np.ndarray | Mapping[Any, np.ndarray],
    target: float,
    *,
    weights: np.ndarray | None = None,
    relative_tolerance: float = 1e-3,
    output: Output | None = None,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Any:
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
        Of the energy reported; by default a push counts in units of the prompt's own state (relative energy).
    relative_tolerance
        Relative width of the final bracket, below 1.
    output
        What is to move in place of the concept along its last direction; see :func:`llvlit.measured_gains`.

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
    arrays = {name: array(str(name), one, (model.n_layers,)) for name, one in shapes.items()}
    lengths = np.array([np.linalg.norm(one) for one in arrays.values()])
    for name, length in zip(arrays, lengths, strict=True):
        if not 0 < length < np.inf:
            raise InputError(f"{name} has length {length:g}; no scale of it can be taken. Pass inputs of some length.")
    units = np.stack([*arrays.values()]) / lengths[:, None]
    spent = None if weights is None else np.array([[energy(unit, weights=weights)] for unit in units])
    target = number("target", target, nonzero=True)
    tolerance = number("relative_tolerance", relative_tolerance, above=0, at_most=0.5)
    check_resolution("relative_tolerance", tolerance, 1.0, model.dtype)
    tokens = tokens_of(model, prompts, max_tokens)
    source = reading(model, tokens, vectors[-1], output, final_norm=final_norm)
    parts, squares = [], []
    for _, part in progress(list(in_parts(tokens)), "energies"):
        system = depth_system(model, part, max_tokens=max_tokens, final_norm=final_norm)
        squares.append(system.states[:, :-1].to(torch.float64).square().sum(dim=-1).cpu().numpy())
        states = system.states[:, -1]
        size = (states.norm(dim=-1) if output is None else 1 + source.values(states).abs()).mean().item()
        check_resolution("target", target, size, model.dtype)
        parts.append(_first_crossings(_Search(system, vectors, units, target, source), tolerance))
    norms, reached = (np.concatenate(column).T for column in zip(*parts, strict=True))
    if spent is None:  # (n_shapes, n_prompts)
        pushed = np.where(units[:, None] == 0, np.inf, np.concatenate(squares))  # a layer without a push costs nothing
        with np.errstate(divide="ignore"):
            spent = (units[:, None] ** 2 / pushed).sum(axis=-1)
    results, metadata = {}, {**origin(model, tokens, final_norm=final_norm), **source.metadata}
    for place, name in enumerate(arrays):
        norm, missed = norms[place], np.isnan(norms[place])
        cost = np.where(missed, np.inf, norm**2 * spent[place])
        status = OUT_OF_REACH if missed.any() else REACHED
        found = norm / lengths[place], cost, reached[place], target, status
        results[name] = RequiredEnergy(*found, borrowed=borrowed_of(directions, units[place] != 0), metadata=metadata)
    return results if shapes is shape else results["shape"]


def output_shifts(
    system: DepthSystem, directions: DirectionsLike, inputs: np.ndarray, *, source: Reading | None = None
) -> np.ndarray:
    """Shift of the output on the full model, ``(n_prompts, k)``, under inputs ``(n_prompts, k, n_layers)``.

    Parameters
    ----------
    source
        What is read; by default ``y = v_L^T x_L``.

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
    vectors = as_directions(directions).on(system)
    inputs = array("inputs", inputs, (len(states), "k", system.n_layers))
    source = Reading(vectors[-1]) if source is None else instance("source", source, Reading, "how an output is read")
    shifts = _shifts(system, vectors, inputs, source)
    if not np.isfinite(shifts).all():
        raise NumericalError(f"Inputs of up to {np.abs(inputs).max():.3g} overflow the model's numbers; lower them.")
    return shifts


def _shifts(
    system: DepthSystem, vectors: torch.Tensor, inputs: np.ndarray, source: Reading, *, careful: bool = False
) -> np.ndarray:
    """The same of arguments that fit, not finite where the model's numbers overflow.

    Candidates join where their first push is.  Where one overflows, all run again ``careful``: with the operating
    point in its place, so that a kernel that mixes rows does not carry it to the others.
    """
    n_prompts, k, n_layers = inputs.shape
    is_pushed = (inputs != 0).any(axis=0)  # (k, n_layers)
    starts = np.where(is_pushed.any(axis=1), is_pushed.argmax(axis=1), n_layers)
    columns = np.argsort(starts, kind="stable")
    n_joined = np.searchsorted(starts[columns], np.arange(n_layers + 1), side="right")
    states, vectors = system.states, vectors.to(system.states)
    pushes = torch.as_tensor(inputs[:, columns]).to(states)
    candidates = states[:, :0]
    lost = torch.zeros(n_prompts, k, dtype=torch.bool, device=states.device)
    for layer, n_active in enumerate(n_joined):
        joining = states[:, layer, None].expand(-1, n_active - candidates.shape[1], -1)
        candidates = torch.cat([candidates, joining], dim=1)
        if layer == n_layers or not n_active:
            continue
        candidates = candidates + pushes[:, :n_active, layer, None] * vectors[layer]
        if careful:
            lost[:, :n_active] |= ~candidates.isfinite().all(dim=-1)
            candidates = torch.where(lost[:, :n_active, None], states[:, layer, None], candidates)
        candidates = system.layers[layer].advance(candidates)
    moved = source.shifts(states[:, -1:], candidates)
    shifts = np.empty((n_prompts, k))
    shifts[:, columns] = torch.where(lost, torch.nan, moved).cpu().numpy().reshape(n_prompts, k)
    return shifts if careful or np.isfinite(shifts).all() else _shifts(system, vectors, inputs, source, careful=True)


@dataclass(frozen=True)
class _Search:
    """The shift that scales of some shapes make, in the target's direction.

    Attributes
    ----------
    units : (n_shapes, n_layers) float64 array
    """

    system: DepthSystem
    vectors: torch.Tensor
    units: np.ndarray
    target: float
    source: Reading

    def shifts(self, scales: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Shifts ``(n_prompts, n_shapes, k)`` of scales, as many, where they are wanted ``(n_prompts, n_shapes)``.

        Zero elsewhere.  The shapes that a prompt wants stand side by side: a pass has as many as the prompt of most.
        """
        k = scales.shape[-1]
        chosen = np.argsort(~wanted, axis=1, kind="stable")[:, : wanted.sum(axis=1).max(initial=0)]
        asked = np.where(wanted[..., None], scales, 0.0)
        asked = np.take_along_axis(asked, chosen[..., None], axis=1)  # (n_prompts, most wanted, k)
        inputs = (asked[..., None] * self.units[chosen][:, :, None]).reshape(len(scales), -1, self.units.shape[1])
        values = (
            _shifts(self.system, self.vectors, inputs, self.source).reshape(*chosen.shape, k) if chosen.size else asked
        )
        shifts = np.zeros(scales.shape)
        np.put_along_axis(shifts, chosen[..., None], np.where(np.isfinite(values), values, 0.0), axis=1)
        return np.where(wanted[..., None], shifts, 0.0) * np.sign(self.target)

    def brackets(self) -> tuple[np.ndarray, ...]:
        """Scales between which the output first crosses the target, and the shifts there, ``(n_prompts, n_shapes)``.

        From a geometric grid of both signs, by size, as far as the first crossing.  Without one the upper scale is
        NaN, and the shift the nearest seen.
        """
        aim = abs(self.target)
        shape = (len(self.system.states), len(self.units))
        everywhere = np.ones(shape, dtype=bool)
        reference = self.system.states[:, :1].to("cpu", torch.float64).norm(dim=-1).numpy() * 1e-3
        slope = np.abs(self.shifts(np.broadcast_to(reference[..., None], (*shape, 1)), everywhere)[..., 0]) / reference
        guess = aim / np.maximum(slope, aim / (LARGEST_PUSH * reference))
        below = above = np.zeros((*shape, 2))  # scales and shifts of the two signs so far
        lower, at_lower, upper, at_upper = (
            np.zeros(shape),
            np.zeros(shape),
            np.full(shape, np.nan),
            np.full(shape, -np.inf),
        )
        for factors in FACTORS:
            wanted = np.isnan(upper)
            grid = guess[..., None] * np.stack([factors, -factors], axis=1).ravel()
            seen = self.shifts(grid, wanted)
            crosses = seen >= aim
            first = crosses.argmax(axis=-1)[..., None]
            new = wanted & crosses.any(axis=-1)
            grid, seen_before = np.concatenate([below, grid], axis=-1), np.concatenate([above, seen], axis=-1)

            def at(values: np.ndarray, place: np.ndarray) -> np.ndarray:
                return np.take_along_axis(values, place, axis=-1)[..., 0]

            lower, at_lower = np.where(new, at(grid, first), lower), np.where(new, at(seen_before, first), at_lower)
            upper = np.where(new, at(grid, first + 2), upper)
            best = np.where(wanted, np.maximum(at_upper, seen.max(axis=-1)), at_upper)
            at_upper = np.where(new, at(seen_before, first + 2), best)
            below, above = grid[..., -2:], seen_before[..., -2:]
        return lower, at_lower, upper, at_upper


def _first_crossings(search: _Search, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest scale at which the output crosses the target, and the shift there, ``(n_prompts, n_shapes)``.

    Each bracket is narrowed where the chord between its ends crosses, a little beyond towards the farther end, so that
    both ends come near; and halved every third time, whatever the chord says.
    """
    aim = abs(search.target)
    lower, at_lower, upper, at_upper = search.brackets()
    crosses = ~np.isnan(upper)
    for number_of_trial in range(3 * MOST_HALVINGS):
        wanted = crosses & (np.abs(upper - lower) > tolerance * np.abs(upper))
        if not wanted.any():
            break
        with np.errstate(invalid="ignore", divide="ignore"):
            part = (aim - at_lower) / (at_upper - at_lower)
            beyond = 0.3 * tolerance * np.abs(upper / (upper - lower))
        part = np.where(part < 0.5, part + beyond, part - beyond)
        halves = number_of_trial % 3 == 2 or not np.isfinite(part[wanted]).all()
        middle = lower + (0.5 if halves else part) * (upper - lower)
        value = search.shifts(middle[..., None], wanted)[..., 0]
        enough, short = wanted & (value >= aim), wanted & (value < aim)
        upper, at_upper = np.where(enough, middle, upper), np.where(enough, value, at_upper)
        lower, at_lower = np.where(short, middle, lower), np.where(short, value, at_lower)
    return upper, np.sign(search.target) * at_upper
