"""Balanced reduction of the mean chain: what pushes reach and what outputs see, weighed against each other."""

from __future__ import annotations

import numpy as np

from llvlit.method.hankel import Balanced, balance, hankel_svd


class Balancing:
    """Both factors of a chain's Gramians, gathered in one pass forward through depth and one back.

    With J_l the mean Jacobians, ``R_{l+1} = J_l [R_l, v_l]`` holds what unit pushes before layers 0 .. l have become,
    and ``O_k = [v_k^T; O_{k+1} J_k]``, ``O_L = c^T`` what outputs from state k on see of it.  Neither Gramian,
    ``R_k R_k^T`` nor ``O_k^T O_k``, is formed: the Hankel block ``O_k R_k = U S V^T`` has the sizes of layers.  Then
    ``P_k = R_k V S^(-1/2)`` and ``Q_k = O_k^T U S^(-1/2)``, ``Q_k^T P_k = I``, and the reduced chain
    ``Q_{l+1}^T J_l P_l`` is the balanced realization of the chain's gain matrix (square-root balancing, over a finite
    horizon: Sandberg and Rantzer 2004; Lall and Beck 2003).

    The way back carries fewer rows than O_k has.  With A and C of the realization, ``N_k = S_k Q_k^T`` obeys
    ``N_k = C_k v_k^T + A_k^T N_{k+1} J_k``, a row for each singular value.

    Attributes
    ----------
    reached : list of (hidden_size, k) arrays
        R_0, R_1, ... as far as :meth:`reach` went.
    observed : list of (hidden_size, rank) arrays
        ``N_L^T, N_{L-1}^T, ...`` as far as :meth:`observe` went.
    """

    def __init__(self, inputs: np.ndarray, outputs: np.ndarray, tolerance: float) -> None:
        """Start before layer 0, given v_0 .. v_{L-1}, and v_0 .. v_{L-1}, c along which states are read."""
        self.inputs, self.outputs, self.tolerance = inputs, outputs, tolerance
        self.reached = [np.zeros((inputs.shape[1], 0))]
        self.observed: list[np.ndarray] = []
        self.matrix = np.zeros((len(inputs), len(outputs)))
        self.balanced: Balanced | None = None

    @property
    def pushed(self) -> np.ndarray:
        """``[R_l, v_l]``, whose image under J_l is R_{l+1}."""
        return np.column_stack([self.reached[-1], self.inputs[len(self.reached) - 1]])

    def reach(self, images: np.ndarray) -> None:
        """One layer on: R_{l+1}, and the gains at that state; after the last layer, the realization."""
        state = len(self.reached)
        self.reached.append(images)
        self.matrix[:state, state] = images.T @ self.outputs[state]
        if state == len(self.inputs):
            self.balanced = balance(self.matrix, tolerance=self.tolerance)
            self.observed.append(np.outer(self.outputs[-1], self.balanced.C[-1, : self.ranks[-1]]))

    def observe(self, images: np.ndarray) -> None:
        """One layer back: N_l of the images ``J_l^T N_{l+1}^T``."""
        assert self.balanced is not None
        state = len(self.inputs) - len(self.observed)
        rank, later = self.ranks[state : state + 2]
        seen = np.outer(self.outputs[state], self.balanced.C[state, :rank])
        self.observed.append(seen + images @ self.balanced.A[state, :later, :rank])

    @property
    def ranks(self) -> np.ndarray:
        """Number of singular values at every state that are not zero ``(n_layers + 1,)`` int."""
        assert self.balanced is not None
        values = self.balanced.singular_values
        return np.asarray((values > self.tolerance * values[:, :1]).sum(axis=-1))

    def sizes(self, state: int) -> np.ndarray:
        """Singular values S_k that are not zero ``(rank,)``."""
        assert self.balanced is not None
        return self.balanced.singular_values[state, : self.ranks[state]]

    def right(self, state: int) -> np.ndarray:
        """P_k ``(hidden_size, rank)``."""
        _, _, vt = hankel_svd(self.matrix, state)
        sizes = self.sizes(state)
        return np.asarray(self.reached[state] @ vt[: len(sizes)].T / np.sqrt(sizes))

    def left(self, state: int) -> np.ndarray:
        """Q_k ``(hidden_size, rank)``."""
        return self.observed[len(self.inputs) - state] / self.sizes(state)
