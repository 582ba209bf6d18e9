"""The linear layer-variant surrogate (LLV): d numbers in place of the residual stream, one matrix per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llvlit.bases import BASES, krylov_basis, random_basis, reachability_basis
from llvlit.concepts import Directions, direction_vectors
from llvlit.depth import MAX_TOKENS, FrozenLayer, sweep
from llvlit.errors import InputError, NumericalError, unknown_name
from llvlit.files import load_tensors, save_tensors
from llvlit.models import LanguageModel
from llvlit.prompting import tokenize
from llvlit.provenance import environment
from llvlit.tasks import Prompts

JACOBIANS = ("jvp", "central")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Deflation tolerance: well above the rounding of products in the model's type."""


@dataclass(frozen=True)
class Trajectory:
    """Response of a surrogate to inputs, as deviations from the operating point.

    Attributes
    ----------
    states : (..., n_layers + 1, order) float64 array
        Reduced states r_0 = 0, r_1, ..., r_L; the first coordinate is the one along the concept direction.
    output : (...) float64 array
        y = C^T r_L.
    """

    states: np.ndarray
    output: np.ndarray


@dataclass(frozen=True)
class LLV:
    """Linear layer-variant surrogate r_{l+1} = A_l r_l + B_l u_l, y = C^T r_L (arXiv 2603.12541).

    Attributes
    ----------
    A : (n_layers, order, order) float64 array
        A_l = P_{l+1}^T J_l P_l, with J_l the Jacobian averaged over the prompts.
    C : (order,) float64 array
        P_L^T c.
    bases : (n_layers + 1, hidden_size, order) float64 array
        P_l: orthonormal columns, the first v_l; columns beyond ``orders[l]`` are zero.
    orders : (n_layers + 1,) int array
        Order after deflation.
    per_prompt : (n_prompts, n_layers, order, order) float32 array
        The same operators, one surrogate per prompt, in the shared bases.
    metadata : dict
        Model, prompts, settings, versions.
    """

    A: np.ndarray
    C: np.ndarray
    bases: np.ndarray = field(repr=False)
    orders: np.ndarray
    per_prompt: np.ndarray = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)

    @property
    def B(self) -> np.ndarray:
        """Input vectors B_l = P_{l+1}^T J_l v_l ``(n_layers, order)``: first columns of A, as P_l starts at v_l."""
        return self.A[:, :, 0]

    @property
    def n_layers(self) -> int:
        """Horizon L."""
        return len(self.A)

    @property
    def order(self) -> int:
        """Order d that was asked for."""
        return self.A.shape[-1]

    def gains(self) -> np.ndarray:
        """Predicted gains h_l = C^T A_{L-1} ... A_{l+1} B_l: the Markov parameters, ``(n_layers,)`` float64."""
        return markov_parameters(self.A, self.C)

    def per_prompt_gains(self) -> np.ndarray:
        """Gains of each prompt's own surrogate, ``(n_prompts, n_layers)`` float64."""
        return markov_parameters(self.per_prompt.astype(np.float64), self.C)

    def simulate(self, inputs: np.ndarray) -> Trajectory:
        """Response to inputs u ``(..., n_layers)``, from the operating point.

        Raises
        ------
        InputError
            If the last axis is not ``n_layers``, or an input is not finite.
        """
        inputs = np.asarray(inputs, dtype=np.float64)
        if inputs.shape[-1:] != (self.n_layers,) or not np.isfinite(inputs).all():
            raise InputError(f"inputs have shape {inputs.shape}; expected (..., {self.n_layers}), all finite.")
        states = [np.zeros((*inputs.shape[:-1], self.order))]
        for layer in range(self.n_layers):
            pushed = states[-1].copy()
            pushed[..., 0] += inputs[..., layer]
            states.append(pushed @ self.A[layer].T)
        return Trajectory(np.stack(states, axis=-2), states[-1] @ self.C)

    def save(self, path: str | Path) -> None:
        """Write the surrogate as safetensors, whole or not at all; FileError if it cannot be written."""
        arrays = {name: getattr(self, name) for name in ("A", "C", "bases", "orders", "per_prompt")}
        save_tensors(path, arrays, {"kind": "llv", **self.metadata})

    @classmethod
    def load(cls, path: str | Path) -> LLV:
        """Read what :meth:`save` wrote; FileError if it is cut short, of another kind or version."""
        tensors, metadata = load_tensors(path, kind="llv")
        arrays = {name: value.numpy() for name, value in tensors.items()}
        return cls(**arrays, metadata={k: v for k, v in metadata.items() if k not in ("kind", "format")})


def markov_parameters(operators: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Gains ``(..., n_layers)`` of operators ``(..., n_layers, order, order)`` and output vector ``(order,)``.

    The adjoint recursion w_L = C, w_l = A_l^T w_{l+1} costs one product per layer; h_l is the first
    coordinate of w_l, since B_l is A_l's first column.

    Examples
    --------
    >>> markov_parameters(np.array([[[2.0, 0], [1, 0]], [[1, 3], [0, 1]]]), np.array([1.0, 0]))
    array([5., 1.])
    """
    adjoint = np.broadcast_to(output, (*operators.shape[:-3], operators.shape[-1]))
    gains = []
    for layer in reversed(range(operators.shape[-3])):
        adjoint = np.einsum("...ij,...i->...j", operators[..., layer, :, :], adjoint)
        gains.append(adjoint[..., 0])
    return np.stack(gains[::-1], axis=-1)


def identify(
    model: LanguageModel,
    prompts: Prompts,
    directions: Directions | torch.Tensor | np.ndarray,
    *,
    order: int = 32,
    basis: str = "krylov",
    jacobian: str = "jvp",
    output: torch.Tensor | np.ndarray | None = None,
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
    seed: int = 0,
) -> LLV:
    """LLV surrogate of a model around the operating points of the prompts (the operating split).

    Parameters
    ----------
    directions
        Concept directions, or vectors ``(n_layers + 1, hidden_size)``.
    order
        d, from 1 to the hidden size.
    basis
        ``krylov`` (v, J v, J^2 v, ... with each layer's own mean Jacobian), ``reachability`` (v and what
        earlier inputs have become, newest first), or ``random``.
    jacobian
        ``jvp`` (exact) or ``central`` (central differences).
    output : (hidden_size,), optional
        c, the readout of the last state; v_L unless given.
    seed
        Of the random basis.

    Raises
    ------
    InputError
        If order, basis, jacobian, directions or output do not fit.
    NumericalError
        If a state or an operator is not finite.

    Notes
    -----
    Costs ``order`` Jacobian-vector products per prompt and layer.  No Jacobian is formed; one layer's context
    is held at a time.
    """
    _check_settings(model, order, basis, jacobian)
    vectors = direction_vectors(directions, model)
    readout = vectors[-1] if output is None else torch.as_tensor(output)
    if tuple(readout.shape) != (model.hidden_size,) or not torch.isfinite(readout).all() or not readout.any():
        raise InputError(f"output has shape {tuple(readout.shape)}; expected ({model.hidden_size},), finite, not zero.")
    tokenized = tokenize(model, prompts, max_tokens=max_tokens)
    tolerance = TOLERANCE[model.dtype]
    generator = torch.Generator().manual_seed(seed)
    bases: list[torch.Tensor] = []
    orders: list[int] = []
    operators: list[torch.Tensor] = []
    images = torch.zeros(len(prompts), 0, model.hidden_size, device=model.device, dtype=model.dtype)
    layers = sweep(model, tokenized, final_norm=final_norm, description=f"identify ({basis})")
    for index, layer in enumerate(chain(layers, [None])):
        direction = vectors[index].to("cpu", torch.float64)
        mean_images = images.to(torch.float64).mean(dim=0).to("cpu").T
        next_images = None
        if basis == "krylov" and layer is not None:
            columns: list[torch.Tensor] = []
            image = partial(_mean_image, layer, jacobian, columns)
            P, rank, _ = krylov_basis(image, direction, order=order, tolerance=tolerance)
            next_images = torch.cat([*columns, columns[0].new_zeros(len(prompts), order - rank, P.shape[0])], dim=1)
        elif basis == "random":
            P, rank = random_basis(direction, order=order, generator=generator)
        else:
            P, rank = reachability_basis(mean_images, direction, order=order, tolerance=tolerance)
        bases.append(P)
        orders.append(rank)
        if index:
            operators.append(torch.einsum("hi,njh->nij", P.to(images), images).cpu())
        if layer is not None:
            images = _images(layer, P, jacobian) if next_images is None else next_images
    per_prompt = torch.stack(operators, dim=1)
    if not torch.isfinite(per_prompt).all():
        raise NumericalError(f"The surrogate of {model.name} is not finite. Check the model's weights and directions.")
    settings = {"basis": basis, "order": order, "jacobian": jacobian, "final_norm": final_norm, "seed": seed}
    return LLV(
        A=per_prompt.to(torch.float64).mean(dim=0).numpy(),
        C=(bases[-1].T @ readout.to("cpu", torch.float64)).numpy(),
        bases=torch.stack(bases).numpy(),
        orders=np.array(orders),
        per_prompt=per_prompt.to(torch.float32).numpy(),
        metadata={
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "prompts_fingerprint": prompts.fingerprint,
            "n_prompts": len(prompts),
            "n_cut": tokenized.n_cut,
            **settings,
            **environment(model.device),
        },
    )


def _check_settings(model: LanguageModel, order: int, basis: str, jacobian: str) -> None:
    if not 1 <= order <= model.hidden_size:
        raise InputError(f"order={order} is not between 1 and the hidden size of {model.name}, {model.hidden_size}.")
    if basis not in BASES:
        raise InputError(unknown_name("basis", basis, BASES))
    if jacobian not in JACOBIANS:
        raise InputError(unknown_name("jacobian", jacobian, JACOBIANS))


def _images(layer: FrozenLayer, columns: torch.Tensor, jacobian: str) -> torch.Tensor:
    """Products of each prompt's Jacobian with the columns of a basis, ``(n_prompts, order, hidden_size)``."""
    tangents = columns.T.to(layer.states).expand(len(layer.states), -1, -1)
    return layer.jvp(tangents, method=jacobian)


def _mean_image(layer: FrozenLayer, jacobian: str, kept: list[torch.Tensor], column: torch.Tensor) -> torch.Tensor:
    """Mean over the prompts of J q ``(hidden_size,)``; each prompt's own product is appended to ``kept``."""
    kept.append(_images(layer, column.unsqueeze(1), jacobian))
    return kept[-1].to(torch.float64).mean(dim=(0, 1))
