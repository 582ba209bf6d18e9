"""Gain profiles: how strongly a push before each layer moves the concept at the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, choice, flag, instance, integer, number
from llvlit.checks import path as checked_path
from llvlit.checks import seed as checked_seed
from llvlit.engine.depth import all_token_adjoints, propagate_beside, sweep
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, tokens_of
from llvlit.errors import FileError, InputError, NumericalError
from llvlit.files import load_tensors, save_tensors
from llvlit.method.concepts import Directions, DirectionsLike, as_directions, borrowing, numbers_of
from llvlit.method.intervals import interval, resampled_means
from llvlit.method.routing import RouteWatch, has_routes, tell_routes
from llvlit.prompts import Prompts
from llvlit.provenance import environment

PROMPTS_AT_ONCE = 32
"""Whose layers' contexts are held together."""
POSITIONS = ("last", "all")
"""Which of a prompt's tokens are pushed."""


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
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt, which intervals resample; by default every prompt its own.
    borrowed : tuple of int
        Layers whose push went along a borrowed direction: the sign of such a gain means nothing.
    metadata : dict
        Model and prompts, by name, fingerprint and number.

    Raises
    ------
    InputError
        If a gain is not finite, or the parts do not fit each other.

    Examples
    --------
    >>> gains = llvlit.adjoint_gains(model, splits.evaluation, directions)
    >>> gains.mean.shape, gains.interval().shape
    ((12,), (2, 12))
    >>> print(gains)
    adjoint gains of 12 layers, 8 prompts; borrowed directions: 0, 1, 2
    """

    per_prompt: np.ndarray
    kind: str
    amplitude: float
    pairs: tuple[int, ...] = ()
    borrowed: tuple[int, ...] = ()
    metadata: dict[str, Any] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        per_prompt = array("per_prompt", self.per_prompt, ("n_prompts", "n_layers"))
        n_prompts, n_layers = per_prompt.shape
        amplitude, pairs = number("amplitude", self.amplitude, at_least=0), numbers_of("pairs", self.pairs)
        if pairs and len(pairs) != n_prompts:
            raise InputError(f"pairs has {len(pairs)} entries; there are {n_prompts} prompts.")
        if (amplitude == 0) != (choice("kind", self.kind, ("measured", "adjoint")) == "adjoint"):
            raise InputError(
                f"amplitude={amplitude} of {self.kind} gains: it is 0 for adjoint gains and for no others."
            )
        object.__setattr__(self, "per_prompt", per_prompt)
        object.__setattr__(self, "amplitude", amplitude)
        object.__setattr__(self, "pairs", pairs or tuple(range(n_prompts)))
        object.__setattr__(self, "borrowed", numbers_of("borrowed", self.borrowed, last=n_layers - 1))
        instance("metadata", self.metadata, dict, "a dict")

    def __str__(self) -> str:
        n_prompts, n_layers = self.per_prompt.shape
        pushed = f", pushes of {self.amplitude:g}" if self.amplitude else ""
        return f"{self.kind} gains of {n_layers} layers, {n_prompts} prompts{pushed}{borrowing(self.borrowed)}"

    @property
    def mean(self) -> np.ndarray:
        """Gain profile, the mean over prompts ``(n_layers,)``."""
        return self.per_prompt.mean(axis=0)

    def interval(self, *, level: float = 0.95, seed: int = 0) -> np.ndarray:
        """Bootstrap interval of the mean over independent units: lower and upper bound, ``(2, n_layers)``."""
        level = number("level", level, at_least=1e-12, at_most=1 - 1e-12)
        return interval(resampled_means(self.per_prompt, self.pairs, seed=checked_seed("seed", seed)), level=level)

    def select(self, layers: slice) -> Gains:
        """The same gains at some layers only, such as ``slice(1, None)`` for all but layer 0, counted anew from 0."""
        kept = np.arange(self.per_prompt.shape[1])[instance("layers", layers, slice, "a slice")].tolist()
        borrowed = tuple(kept.index(layer) for layer in self.borrowed if layer in kept)
        return replace(self, per_prompt=self.per_prompt[:, layers], borrowed=borrowed)

    def head(self, n_prompts: int) -> Gains:
        """The same gains of the first prompts only."""
        n_prompts = integer("n_prompts", n_prompts, at_least=1, at_most=len(self.pairs))
        return replace(self, per_prompt=self.per_prompt[:n_prompts], pairs=self.pairs[:n_prompts])

    def save(self, path: str | Path) -> None:
        """Write the gains as safetensors, and what they were computed with; FileError if they cannot be written."""
        parts = {"gains": self.kind, "amplitude": self.amplitude, "pairs": self.pairs, "borrowed": self.borrowed}
        header = {"kind": "gains", **parts, "metadata": {**environment(), **self.metadata}}
        save_tensors(checked_path("path", path), {"per_prompt": self.per_prompt}, header)

    @classmethod
    def load(cls, path: str | Path) -> Gains:
        """Read what :meth:`save` wrote; FileError if it is cut short, changed, of another kind or version."""
        tensors, header = load_tensors(checked_path("path", path), kind="gains")
        names = ("gains", "amplitude", "pairs", "borrowed", "metadata")
        with own_content(path):
            return cls(tensors["per_prompt"].numpy(), *(header[name] for name in names))


def profile(argument: str, gains: Gains | np.ndarray) -> np.ndarray:
    """Gain profile ``(n_layers,)`` of gains, or as it was given."""
    return gains.mean if isinstance(gains, Gains) else array(argument, gains, ("n_layers",))


@contextmanager
def own_content(path: str | Path) -> Iterator[None]:
    """Inside, what a file of ours holds becomes a result; where it does not fit, the file is to blame."""
    try:
        yield
    except (InputError, KeyError, TypeError) as error:
        raise FileError(f"{path} does not hold a whole result ({error}). Compute it again.") from error


def measured_gains(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike | Sequence[DirectionsLike],
    *,
    amplitude: float | Sequence[float] = 0.1,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Any:
    """Gains of the full model: central differences of the output over an input before one layer at a time.

    Every prompt's 2 L pushed states travel through depth behind its tokens, joining at the layer where they
    are pushed, so that the whole profile costs about one forward pass of the prompts and a fifth.

    Parameters
    ----------
    directions
        One set, or a list of several, which are measured in one pass of the prompts.
    amplitude
        a > 0, the length of the push in the residual stream's units; with several sets also a list, one for each.
        Rounding adds an error in inverse proportion to it.  At the smallest amplitude that is accepted (the embedded
        models, 100 prompts) it is some 0.05 of a single prompt's gain of one, at worst 0.2, and at most 0.03 of a
        mean; 32 times as large a push has 0.01 and 0.001.  Small gains of single prompts drown first.

    Returns
    -------
    Gains, or where a list was given a list of them.  Of a mixture of experts, ``metadata["rerouted"]`` holds for each
    layer the share of prompts whose route the push changed; where it is not rare, a warning suggests an amplitude, and
    so does ``metadata["suggested_amplitude"]``.

    Raises
    ------
    InputError
        If the directions do not fit, or an amplitude is not positive and finite, or so small that the difference
        drowns in the rounding of the states, which shows after the first batch of prompts.

    Examples
    --------
    >>> measured = llvlit.measured_gains(model, splits.evaluation, directions)
    >>> measured.per_prompt.shape
    (8, 12)
    >>> small, large = llvlit.measured_gains(model, splits.evaluation, [directions] * 2, amplitude=[0.1, 10.0])
    >>> small.amplitude, large.amplitude
    (0.1, 10.0)
    """
    several = _several(directions)
    amplitudes = array("amplitude", amplitude, positive=True)
    if amplitudes.shape not in ((), (len(several),)):
        raise InputError(f"{len(several)} sets of directions came with {amplitudes.size} amplitudes; pass one each.")
    steps = np.broadcast_to(amplitudes, len(several)).tolist()
    flag("final_norm", final_norm)
    vectors = torch.stack([one.on(model) for one in several])  # (n_sets, n_layers + 1, hidden_size)
    distinct: list[tuple[float, torch.Tensor]] = []  # sets that differ in their readout alone share their pushes
    place_of = []
    for step, along in zip(steps, vectors[:, :-1], strict=True):
        same = (i for i, (size, other) in enumerate(distinct) if size == step and torch.equal(other, along))
        place_of.append(next(same, len(distinct)))
        if place_of[-1] == len(distinct):
            distinct.append((step, along))
    tokens = tokens_of(model, prompts, max_tokens)
    norms: list[list[torch.Tensor]] = [[] for _ in model.layers]  # of each layer's states, batch by batch
    routes = RouteWatch() if has_routes(model) else None

    def push(layer: int, states: torch.Tensor) -> torch.Tensor:
        norms[layer].append(states.norm(dim=-1))
        if layer == model.n_layers - 1:  # all sizes are known after the first batch: refuse no later
            size = torch.stack([torch.cat(norm).mean() for norm in norms]).max().item()
            check_resolution("amplitude", min(steps), size, model.dtype)
        pushes = [step * along[layer] for step, along in distinct]
        joining = [states + sign * one for one in pushes for sign in (1, -1)]
        if routes:
            routes.enter(layer, len(states), 1 + len(joining) * (layer + 1))
            joining = joining if layer else [states, *joining]
        return torch.stack(joining, dim=1)

    with routes or nullcontext():
        pushed = propagate_beside(model, tokens, push, final_norm=final_norm, description="measured gains")
    if routes:
        pushed, shares = pushed[:, 1:], routes.shares(len(distinct))
    finals = pushed.to(torch.float64).view(len(tokens), model.n_layers, len(distinct), 2, -1)
    results = []
    for place, (one, step) in enumerate(zip(several, steps, strict=True)):
        readouts = finals[:, :, place_of[place]] @ vectors[place, -1].to(torch.float64)
        per_prompt = ((readouts[..., 0] - readouts[..., 1]) / (2 * step)).cpu().numpy()
        gains = make_gains(model, tokens, per_prompt, one, amplitude=step, final_norm=final_norm)
        if routes:
            smallest = smallest_step(torch.stack([torch.cat(norm).mean() for norm in norms]).max().item(), model.dtype)
            gains.metadata.update(tell_routes(model.name, shares[place_of[place]], step, smallest))
        results.append(gains)
    return results if isinstance(directions, list | tuple) else results[0]


def _several(directions: Any) -> list[Directions]:
    """Sets of directions, of one or several, each in the one form."""
    several = [as_directions(one) for one in (directions if isinstance(directions, list | tuple) else [directions])]
    if not several:
        raise InputError("directions is empty; pass at least one set.")
    return several


def check_resolution(argument: str, value: float, size: float, dtype: torch.dtype) -> None:
    """Refuse a step, target or tolerance that drowns in the rounding of numbers of this size.

    Rounding moves the output by some 0.2 epsilon of the state's norm; :func:`measured_gains` says what that makes of
    gains at the smallest step.
    """
    smallest = smallest_step(size, dtype)
    if abs(value) < smallest:
        raise InputError(
            f"{argument}={value:g} drowns in rounding: in {str(dtype).removeprefix('torch.')}, with numbers of size "
            f"{size:.3g}, the smallest usable is {float(f'{smallest * 1.05:.1e}'):g}. Take a larger one, or float64."
        )


def smallest_step(size: float, dtype: torch.dtype) -> float:
    """Smallest step that does not drown in the rounding of numbers of some size."""
    return 4 * torch.finfo(dtype).eps * size


def make_gains(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    per_prompt: np.ndarray,
    directions: Directions,
    *,
    amplitude: float = 0.0,
    final_norm: bool = False,
) -> Gains:
    """Gains with the facts that they carry: kind, units, borrowed directions, origin."""
    kind = "measured" if amplitude else "adjoint"
    if not np.isfinite(per_prompt).all():
        raise NumericalError(f"The {kind} gains of {model.name} are not finite. Check the model's weights.")
    borrowed = tuple(np.flatnonzero(directions.borrowed[:-1]).tolist())
    return Gains(
        per_prompt, kind, amplitude, tokens.prompts.pairs, borrowed, origin(model, tokens, final_norm=final_norm)
    )


def in_parts(tokens: TokenizedPrompts) -> Iterator[tuple[np.ndarray, TokenizedPrompts]]:
    """Prompts, and their rows, in even parts whose layers' contexts fit into memory together."""
    for rows in np.array_split(np.arange(len(tokens)), -(-len(tokens) // PROMPTS_AT_ONCE)):
        yield rows, tokens.select(rows)


def origin(model: LanguageModel, tokens: TokenizedPrompts, *, final_norm: bool = False) -> dict[str, Any]:
    """What numbers are about: the model, with its final norm or without, the prompts, and what was done to them."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "precision": model.precision,
        "final_norm": final_norm,
        "prompts_fingerprint": tokens.prompts.fingerprint,
        "n_prompts": len(tokens),
        **tokens.metadata,
        "device": str(model.device),
    }


def adjoint_gains(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike | Sequence[DirectionsLike],
    *,
    positions: str = "last",
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
) -> Any:
    """First-order gains of the full model, all layers from one backward pass.

    The adjoint ``w_L = c``, ``w_l = A_l^T w_{l+1}`` gives ``g_l = w_l^T v_l``: the full-order linear
    reference that every surrogate is judged against.

    Parameters
    ----------
    directions
        One set, or a list of several, whose outputs share the backward pass.
    positions
        ``last``: pushes at the last token.  ``all``: the same push at every token of the prompt, as
        ``steer(..., positions="all")`` makes it; the gain is the sum over the tokens, start token and massive
        activations included, of ``(dy / dx_l)^T v_l``, from one backward pass through the whole prompt.

    Returns
    -------
    Gains, or where a list was given a list of them

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
    several = _several(directions)
    vectors = torch.stack([one.on(model) for one in several], dim=1)  # (n_layers + 1, n_sets, hidden_size)
    tokens = tokens_of(model, prompts, max_tokens)
    flag("final_norm", final_norm)
    if choice("positions", positions, POSITIONS) == "all":
        sums = all_token_adjoints(model, tokens, vectors[-1], final_norm=final_norm).to(torch.float64)
        at_all = torch.einsum("nlkh,lkh->knl", sums, vectors[:-1].to(sums)).cpu().numpy()
        results = [
            make_gains(model, tokens, each, one, final_norm=final_norm)
            for each, one in zip(at_all, several, strict=True)
        ]
        for result in results:
            result.metadata["positions"] = positions
        return results if isinstance(directions, list | tuple) else results[0]
    gains = np.empty((len(several), len(tokens), model.n_layers))
    for members, part in in_parts(tokens):
        layers = tuple(sweep(model, part, max_tokens=max_tokens, final_norm=final_norm, description="adjoint gains"))
        adjoints = vectors[-1].expand(len(members), -1, -1)
        for layer in reversed(layers):
            adjoints = layer.vjp(adjoints)
            products = torch.einsum("nkh,kh->kn", adjoints.to(torch.float64), vectors[layer.index].to(torch.float64))
            gains[:, members, layer.index] = products.cpu().numpy()
    results = [
        make_gains(model, tokens, each, one, final_norm=final_norm) for each, one in zip(gains, several, strict=True)
    ]
    return results if isinstance(directions, list | tuple) else results[0]
