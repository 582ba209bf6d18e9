"""Order and realization of a gain matrix: how many numbers carry past pushes to later outputs, and a system of so many.

Everything here is arithmetic on matrices ``G[l, k]``, the output at state k per unit of input before layer l < k.
The Hankel block at state k maps inputs before it to outputs from it on, ``H_k = G[:k, k:]^T``; its rank is the smallest
number of dimensions that the state can have there (Dewilde and van der Veen 1998).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Balanced:
    """A gain matrix's balanced realization of full order, padded; its leading blocks are those of smaller orders.

    Attributes
    ----------
    A : (..., n_layers, d, d) array
        State before a layer to state after it; zero before layer 0, whose state is at rest.
    B : (..., n_layers, d) array
    C : (..., n_layers + 1, d) array
        Output at every state, zero at state 0.
    singular_values : (..., n_layers + 1, d) array
        Of the Hankel block at every state, falling.
    """

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    singular_values: np.ndarray

    def matrix(self, order: int) -> np.ndarray:
        """Gain matrix of the realization cut to an order, ``(..., n_layers, n_layers + 1)``."""
        return gains_between(self.A[..., :order, :order], self.B[..., :order], self.C[..., :order])


def most_orders(n_layers: int) -> int:
    """Largest rank that a Hankel block of so many layers can have."""
    return (n_layers + 1) // 2


def hankel_svd(matrix: np.ndarray, state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and V^T of the Hankel block ``H_k = G[:k, k:]^T`` at a state."""
    u, sizes, vt = np.linalg.svd(np.swapaxes(matrix[..., :state, state:], -1, -2), full_matrices=False)
    return u, sizes, vt


def balance(matrix: np.ndarray, *, tolerance: float = 0.0) -> Balanced:
    """Time-varying Ho-Kalman realization in balanced coordinates, of matrices ``(..., n_layers, n_layers + 1)``.

    With ``H_k = U S V^T`` at each state, outputs see the state through ``O_k = U S^(1/2)`` and inputs reach it through
    ``R_k = S^(1/2) V^T``.  Then ``C_k`` is the first row of O_k, ``B_k`` the last column of R_{k+1}, and ``A_k`` maps
    R_k to the rest of R_{k+1}: ``A_k = S_{k+1}^(-1/2) U_{k+1}^T H_k[1:] V_k S_k^(-1/2)``.  Both Gramians of the result
    are S_k, and cutting it to an order errs by at most twice the sum of all singular values that are cut, in the norm
    of the map from inputs to outputs (Sandberg and Rantzer 2004; Lall and Beck 2003).  Singular values that are no more
    than ``tolerance`` of their state's largest count as zero.
    """
    n_layers = matrix.shape[-2]
    batch, most = matrix.shape[:-2], most_orders(n_layers)
    A = np.zeros((*batch, n_layers, most, most))
    B, C = np.zeros((*batch, n_layers, most)), np.zeros((*batch, n_layers + 1, most))
    values = np.zeros((*batch, n_layers + 1, most))
    before: tuple[np.ndarray, ...] | None = None
    for state in range(1, n_layers + 1):
        block = np.swapaxes(matrix[..., :state, state:], -1, -2)
        left, sizes, right = hankel_svd(matrix, state)
        rank = sizes.shape[-1]
        rounding = max(np.finfo(float).eps * max(block.shape), tolerance) * sizes[..., :1]
        roots = np.sqrt(np.where(sizes > rounding, sizes, 0))
        inverse = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 0)
        values[..., state, :rank] = sizes
        C[..., state, :rank] = left[..., 0, :] * roots
        B[..., state - 1, :rank] = roots * right[..., -1]
        if before is not None:
            block_before, right_before, inverse_before = before
            moved = np.swapaxes(left, -1, -2) @ block_before[..., 1:, :] @ np.swapaxes(right_before, -1, -2)
            A[..., state - 1, :rank, : moved.shape[-1]] = inverse[..., None] * moved * inverse_before[..., None, :]
        before = block, right, inverse
    return Balanced(A, B, C, values)


def gains_between(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
    """Gain matrix ``(..., n_layers, n_layers + 1)`` of a system, ``C_k A_{k-1} ... A_{l+1} B_l`` where l < k.

    Parameters
    ----------
    A, B, C
        ``(..., n_layers, d, d)``, ``(..., n_layers, d)``, ``(..., n_layers + 1, d)``.
    """
    n_layers = A.shape[-3]
    batch = np.broadcast_shapes(A.shape[:-3], B.shape[:-2], C.shape[:-2])
    matrix = np.zeros((*batch, n_layers, n_layers + 1))
    reached = np.zeros((*batch, A.shape[-1], 0))
    for layer in range(n_layers):
        new = np.broadcast_to(B[..., layer, :, None], (*batch, A.shape[-1], 1))
        reached = np.concatenate([A[..., layer, :, :] @ reached, new], axis=-1)
        matrix[..., : layer + 1, layer + 1] = (C[..., layer + 1, None, :] @ reached)[..., 0, :]
    return matrix


def misses(matrix: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of matrices that others miss, ``|G - G'| / |G|`` in Frobenius' norm, over the last two axes."""
    scale = np.maximum(np.abs(matrix).max(axis=(-2, -1), keepdims=True), np.finfo(float).tiny)  # lest squares overflow
    size = np.maximum(np.linalg.norm(matrix / scale, axis=(-2, -1)), np.finfo(float).tiny)
    return np.asarray(np.linalg.norm((matrix - other) / scale, axis=(-2, -1)) / size)


def smallest_orders(matrix: np.ndarray, tolerance: float) -> np.ndarray:
    """Smallest order whose balanced realization misses at most a share of each matrix, ``(...)`` int."""
    balanced = balance(matrix)
    orders = np.full(matrix.shape[:-2], most_orders(matrix.shape[-2]))
    for order in reversed(range(1, orders.max(initial=1))):
        orders = np.where(misses(matrix, balanced.matrix(order)) <= tolerance, order, orders)
    return orders
