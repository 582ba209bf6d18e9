"""Rivals that take no Jacobian: layers that change nothing, and one linear map for all layers."""

from __future__ import annotations

import numpy as np
import torch

from llvlit.checks import array, integer
from llvlit.errors import InputError
from llvlit.method.bases import DEFLATION_TOLERANCE
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.surrogate import LLV


def identity_matrix(directions: DirectionsLike) -> np.ndarray:
    """Gain matrix of layers that change nothing, ``x_{l+1} = x_l``: ``G[l, k] = v_k^T v_l`` for l < k.

    What the directions alone predict, whatever the model does: ``(n_layers, n_layers + 1)`` float64.

    Examples
    --------
    >>> from llvlit.method.rivals import identity_matrix
    >>> identity_matrix(torch.eye(3)[[0, 0, 1]].double())
    array([[0., 1., 0.],
           [0., 0., 0.]])
    """
    vectors = as_directions(directions).vectors.detach().to("cpu", torch.float64).numpy()
    return np.triu(vectors @ vectors.T, 1)[:-1]


def dynamic_modes(states: torch.Tensor, directions: DirectionsLike, *, order: int = 32) -> LLV:
    """One linear map for all layers: dynamic mode decomposition of operating states along depth.

    With X the states before all layers and Y those after them, of all prompts, each less its layer's mean over the
    prompts, and ``X = U S V^T`` cut to an order, the map is ``A = U^T Y V S^(-1)`` in the coordinates ``r = U^T dx``
    (Schmid 2010).  Nested: A's leading blocks are the maps of smaller orders; cut to one, it keeps inputs
    that went through the map of its own order.

    Parameters
    ----------
    states : (n_prompts, n_layers + 1, hidden_size) tensor
        Of :func:`~llvlit.engine.depth.last_token_states`, of two prompts or more.
    order
        At most the hidden size; columns beyond the rank of X are zero.

    Raises
    ------
    InputError
        If the shapes do not fit, the order is above the hidden size, or all prompts have the same states.

    Examples
    --------
    >>> from llvlit.engine.depth import last_token_states
    >>> from llvlit.method.rivals import dynamic_modes
    >>> states = last_token_states(model, splits.operating)
    >>> dynamic_modes(states, directions, order=8).matrix().shape
    (12, 13)
    """
    vectors = as_directions(directions).vectors.detach().to("cpu", torch.float64).numpy()
    (n_states, hidden_size), n_layers = vectors.shape, len(vectors) - 1
    order = integer("order", order, at_least=1, at_most=hidden_size)
    moved = array("states", states, ("n_prompts", n_states, hidden_size))
    moved = moved - moved.mean(axis=0)
    before, after = (part.reshape(-1, hidden_size) for part in (moved[:, :-1], moved[:, 1:]))
    left, sizes, right = np.linalg.svd(before.T, full_matrices=False)
    rank = min(order, int((sizes > DEFLATION_TOLERANCE * np.linalg.norm(array("states", states))).sum()))
    if not rank:
        raise InputError("states are the same for all prompts; pass prompts that differ.")
    basis, operator = np.zeros((hidden_size, order)), np.zeros((order, order))
    basis[:, :rank] = left[:, :rank]
    operator[:rank, :rank] = left[:, :rank].T @ after.T @ right[:rank].T / sizes[:rank]
    A, outputs = np.tile(operator, (n_layers, 1, 1)), vectors @ basis
    B = outputs[:-1] @ operator.T
    return LLV(
        A=A,
        B=B,
        C=outputs[-1],
        outputs=outputs,
        bases=np.tile(basis, (n_states, 1, 1)),
        orders=np.full(n_states, rank),
        per_prompt=A[None].astype(np.float32),
        per_prompt_inputs=B[None].astype(np.float32),
        metadata={"basis": "dynamic modes", "order": order},
        borrowed=borrowed_of(as_directions(directions)),
    )
