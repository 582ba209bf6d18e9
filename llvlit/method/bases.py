"""Bases of 32 directions for a stream of hundreds: Krylov in two readings, reachability, random, principal components.

A basis P_l has orthonormal columns, the first of them the concept direction v_l, each next one what its
method adds, in order.  A method that finds nothing new *deflates*: the remaining columns are zero, which
leaves every formula as it stands, and the order reported is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
import torch

from llvlit.checks import array, instance, integer, number, sequence
from llvlit.errors import InputError, LlvlitError

DEFLATION_TOLERANCE = 1e-8
"""Relative size under which the part of a vector outside the basis counts as rounding."""

BASES = ("krylov", "krylov-shifted", "reachability", "random", "pca", "balanced")


def orthonormal_basis(
    vectors: Iterable[torch.Tensor], *, order: int, tolerance: float = DEFLATION_TOLERANCE
) -> tuple[torch.Tensor, int]:
    """Orthonormal basis of the span of vectors, in their order.

    Gram and Schmidt, each vector orthogonalized twice (twice is enough: Giraud et al. 2005), in float64.

    Parameters
    ----------
    vectors : iterable of (hidden_size,) tensors
        Taken one by one until the basis has ``order`` columns; those inside the span so far are skipped.

    Returns
    -------
    basis : (hidden_size, order) float64 tensor
        Column j is what the j-th vector adds; columns beyond the rank are zero.
    rank : int

    Examples
    --------
    >>> from llvlit.method.bases import orthonormal_basis
    >>> vectors = torch.tensor([[2.0, 0, 0], [4.0, 0, 0], [1.0, 3.0, 0]])
    >>> basis, rank = orthonormal_basis(vectors, order=3)
    >>> rank
    2
    >>> basis[:, :2].T.tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    entries = sequence("vectors", vectors, "vectors, one after the other")
    arrays = [array(f"vectors[{place}]", entry, ("hidden_size",)) for place, entry in enumerate(entries)]
    if len({len(one) for one in arrays}) != 1:
        raise InputError("vectors must be one or more, all of one length.")
    _checked("vectors", arrays[0], order, tolerance)
    return _orthonormal(arrays, order, tolerance)


def _orthonormal(vectors: Sequence[np.ndarray], order: int, tolerance: float) -> tuple[torch.Tensor, int]:
    columns: list[np.ndarray] = []
    for vector in vectors:
        if len(columns) == order:
            break
        add_vector(columns, vector, tolerance=tolerance)
    return _padded(columns, len(vectors[0]), order), len(columns)


def _checked(argument: str, vector: object, order: object, tolerance: object) -> np.ndarray:
    """A vector ``(hidden_size,)`` in float64, where the other arguments of a basis fit it."""
    checked = array(argument, vector, ("hidden_size",))
    if integer("order", order, at_least=1) > len(checked):
        raise InputError(f"order={order} must be at most {len(checked)}, the size of {argument}.")
    number("tolerance", tolerance, at_least=0)
    return checked


def add_vector(columns: list[np.ndarray], vector: np.ndarray, *, tolerance: float) -> bool:
    """Append the unit vector that ``vector`` adds to the span of orthonormal ``columns``, if it adds any."""
    rest, size = vector, np.linalg.norm(vector)
    if columns:
        span = np.stack(columns)
        for _ in range(2):
            rest = rest - (span @ rest) @ span
    left = np.linalg.norm(rest)
    if size == 0 or not left > float(tolerance) * size:
        return False
    columns.append(rest / left)
    return True


def _padded(columns: list[np.ndarray], hidden_size: int, order: int) -> torch.Tensor:
    basis = np.zeros((order, hidden_size))
    basis[: len(columns)] = columns or 0.0
    return torch.from_numpy(basis.T.copy())


def arnoldi(
    direction: np.ndarray, order: int, tolerance: float, start: np.ndarray | None = None
) -> Generator[np.ndarray, np.ndarray, tuple[torch.Tensor, int, torch.Tensor]]:
    """Arnoldi's iteration by turns: it gives a column q, and is sent A q; what it returns is :func:`krylov_basis`'s."""
    columns: list[np.ndarray] = []
    images: list[np.ndarray] = []
    offsets: list[float] = []  # columns[j + 1] + offsets[j] v lies in K(A, start)
    grows = add_vector(columns, direction, tolerance=tolerance)
    while grows:
        images.append((yield columns[-1]))
        vector = images[-1]
        if start is not None:
            vector = vector + offsets[-1] * images[0] if offsets else start
        grows = len(columns) < order and add_vector(columns, vector, tolerance=tolerance)
        tries = len(columns) if start is not None and len(columns) < order and not grows else 0
        while tries and not grows:  # A^j w lies in the span through its part along v; A of it need not
            vector, tries = (np.stack(columns) @ vector) @ np.stack(images), tries - 1
            grows = add_vector(columns, vector, tolerance=tolerance)
        if grows and start is not None:
            parts = np.stack(columns) @ vector
            offsets.append(float((parts[0] - parts[1:-1] @ np.array(offsets)) / parts[-1]))
    hidden_size = len(direction)
    return _padded(columns, hidden_size, order), len(columns), _padded(images, hidden_size, order)


def krylov_basis(
    apply: Callable[[torch.Tensor], torch.Tensor],
    direction: torch.Tensor,
    *,
    order: int,
    start: torch.Tensor | None = None,
    tolerance: float = DEFLATION_TOLERANCE,
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Basis of the Krylov space ``span{v, A v, A^2 v, ...}``, by Arnoldi's iteration.

    Parameters
    ----------
    apply
        Maps a column q ``(hidden_size,)`` to A q.  Called once per column.
    direction : (hidden_size,) tensor
        v, the first column after normalization.
    start : (hidden_size,) tensor, optional
        w of the *shifted* space ``span{v, w, A w, A^2 w, ...}``.

    Returns
    -------
    basis : (hidden_size, order) float64 tensor
    rank : int
        Smaller than ``order`` if the space is invariant before it is full.
    images : (hidden_size, order) float64 tensor
        A times the basis.

    Examples
    --------
    >>> from llvlit.method.bases import krylov_basis
    >>> shift = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    >>> basis, rank, images = krylov_basis(shift.mv, torch.tensor([1.0, 0, 0]), order=2)
    >>> basis.T.tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if not callable(apply):
        raise InputError("apply cannot be called; pass a function that maps q to A q.")
    first = _checked("direction", direction, order, tolerance)
    iteration = arnoldi(first, order, tolerance, None if start is None else array("start", start, first.shape))
    image = None
    try:
        while True:
            column = iteration.send(image)  # type: ignore[arg-type]  # None starts it
            try:
                found = apply(torch.from_numpy(column))
            except (LlvlitError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of a foreign function, anything
                raise InputError(f"apply(q) fails on a column q ({type(error).__name__}: {error}).") from error
            image = array("apply(q)", found, (len(column),))
    except StopIteration as end:
        return end.value


def reachability_basis(
    previous_images: torch.Tensor,
    direction: torch.Tensor,
    *,
    order: int,
    tolerance: float = DEFLATION_TOLERANCE,
) -> tuple[torch.Tensor, int]:
    """Basis of v_l and of what earlier inputs have become by layer l, newest first.

    ``R_{l+1} = A_l [v_l, R_l]``: with P_l a basis of ``[v_l, R_l]`` in that order, ``A_l P_l`` spans R_{l+1} in
    the same order.  Exact for the mean chain as long as the order exceeds l (time-varying reachable space:
    Kailath 1980, chapter 9).

    Parameters
    ----------
    previous_images : (hidden_size, order) tensor
        A_{l-1} P_{l-1}; empty (hidden_size, 0) before layer 0.

    Examples
    --------
    >>> from llvlit.method.bases import reachability_basis
    >>> earlier = torch.tensor([[3.0], [4.0], [0.0]])  # one earlier push has become this
    >>> reachability_basis(earlier, torch.tensor([1.0, 0, 0]), order=2)[0].T.tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    first = _checked("direction", direction, order, tolerance)
    images = array("previous_images", previous_images)
    if images.ndim != 2 or len(images) != len(first):
        raise InputError(f"previous_images has shape {images.shape}; expected ({len(first)}, order).")
    return _orthonormal([first, *images.T], order, tolerance)


def principal_basis(
    states: torch.Tensor, direction: torch.Tensor, *, order: int, tolerance: float = DEFLATION_TOLERANCE
) -> tuple[torch.Tensor, int]:
    """Basis of v_l and the leading principal components of the states, by falling variance.

    Knows where the states lie, and nothing of what the layers do (Jolliffe 2002).

    Parameters
    ----------
    states : (n_prompts, hidden_size) tensor
        Operating points before the layer.

    Examples
    --------
    >>> from llvlit.method.bases import principal_basis
    >>> states = torch.tensor([[0.0, 0, -2], [0, 0, 2], [0, 0, 0]])
    >>> basis, rank = principal_basis(states, torch.tensor([1.0, 0, 0]), order=3)
    >>> rank, basis[:, 1].abs().tolist()
    (2, [0.0, 0.0, 1.0])
    """
    first = _checked("direction", direction, order, tolerance)
    states = torch.from_numpy(array("states", states, ("n_prompts", len(first))))
    centred = states - states.mean(dim=0)
    _, sizes, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[sizes > float(tolerance) * states.norm(dim=-1).max().item()]
    return _orthonormal([first, *components.numpy()], order, tolerance)


def random_basis(direction: torch.Tensor, *, order: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """v_l and random directions orthogonal to it: what any other basis has to beat.

    Examples
    --------
    >>> from llvlit.method.bases import random_basis
    >>> drawn = torch.Generator().manual_seed(0)
    >>> basis, rank = random_basis(torch.eye(64)[0], order=8, generator=drawn)
    >>> torch.allclose(basis.T @ basis, torch.eye(8).double())
    True
    """
    first = _checked("direction", direction, order, DEFLATION_TOLERANCE)
    instance("generator", generator, torch.Generator, "a torch.Generator")
    others = torch.randn(2 * order, len(first), generator=generator, dtype=torch.float64)
    return _orthonormal([first, *others.numpy()], order, DEFLATION_TOLERANCE)
