"""The linear layer-variant surrogate (LLV): d numbers in place of the residual stream, one matrix per layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llvlit.checks import array, choice, instance, integer
from llvlit.checks import path as checked_path
from llvlit.errors import InputError, NumericalError
from llvlit.files import load_tensors, save_tensors
from llvlit.method.hankel import gains_between
from llvlit.method.results import borrowing, numbers_of, own_content
from llvlit.provenance import environment

ARRAYS = ("A", "B", "C", "outputs", "bases", "orders", "per_prompt", "per_prompt_inputs")
OPERATORS = ("mean", "per prompt")
"""What a surrogate's gains and responses are of: mean operators, or each prompt's own, the results then averaged."""


@dataclass(frozen=True)
class Trajectory:
    """Response of a surrogate to inputs, as deviations from the operating point.

    Attributes
    ----------
    states : (..., n_layers + 1, order) float64 array
        Reduced states r_0 = 0, r_1, ..., r_L; in bases that begin with v_l the first coordinate is the one along the
        concept direction.
    output : (...) float64 array
        ``y = C^T r_L``.

    Examples
    --------
    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=16)
    >>> surrogate.simulate(np.eye(12)).states.shape  # 12 experiments, one push each
    (12, 13, 16)
    """

    states: np.ndarray
    output: np.ndarray


def _is_left_out(values: object) -> bool:
    return isinstance(values, np.ndarray) and not values.size


@dataclass(frozen=True)
class LLV:
    """Linear layer-variant surrogate ``r_{l+1} = A_l r_l + B_l u_l``, ``y = C^T r_L`` (arXiv 2603.12541).

    Attributes
    ----------
    A : (n_layers, order, order) float64 array
        ``A_l = Q_{l+1}^T J_l P_l``, with J_l the Jacobian averaged over the prompts.
    C : (order,) float64 array
        ``P_L^T c``.
    bases : (n_layers + 1, hidden_size, order) float64 array
        P_l, whose columns span the states that the surrogate stands for, ``P_l r``; columns beyond ``orders[l]`` are
        zero.  Orthonormal, the first v_l, but for the balanced basis, whose columns are neither.  Of a hidden size of 0
        where the surrogate was found from experiments (:func:`llvlit.realize`), and there is none.
    orders : (n_layers + 1,) int array
        Order after deflation.
    per_prompt : (n_prompts, n_layers, order, order) float32 array
        The same operators, one surrogate per prompt, in the shared bases.
    metadata : dict
        Model, prompts, settings.
    borrowed : tuple of int
        States whose direction, the first column of their basis, is that of a later state.
    B : (n_layers, order) float64 array
        Input vectors ``Q_{l+1}^T J_l v_l``; A's first columns unless given, as P_l starts at v_l.
    outputs : (n_layers + 1, order) float64 array
        C_l, which reads the concept at every state, ``P_l^T v_l``: the first unit vector unless given; C at the end.
    per_prompt_inputs : (n_prompts, n_layers, order) float32 array
        Input vectors of the single prompts' operators; their first columns unless given.
    left_bases : (n_layers + 1, hidden_size, order) float64 array
        Q_l, which give a deviation of the state its coordinates, ``r = Q_l^T dx``; ``Q_l^T P_l = I``.  Unless given,
        they are P_l.
    operators : str
        ``mean``: :meth:`gains` and :meth:`simulate` are those of A.  ``per prompt``: means over the prompts of what
        each one's own operators give; a product of means is no mean of products.

    Raises
    ------
    InputError
        If a number is not finite, the shapes do not fit each other, or ``operators`` is unknown.

    Examples
    --------
    The response to any inputs is the sum of the gains, each times its input:

    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=16)
    >>> inputs = np.linspace(-1, 1, surrogate.n_layers)
    >>> bool(np.isclose(surrogate.simulate(inputs).output, surrogate.gains() @ inputs))
    True
    """

    A: np.ndarray
    C: np.ndarray
    bases: np.ndarray = field(repr=False)
    orders: np.ndarray
    per_prompt: np.ndarray = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    borrowed: tuple[int, ...] = ()
    operators: str = "mean"
    B: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))
    outputs: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))
    per_prompt_inputs: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))
    left_bases: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        choice("operators", self.operators, OPERATORS)
        n_layers, order, _ = array("A", self.A, ("n_layers", "order", "order")).shape
        array("A", self.A, (n_layers, order, order))
        array("C", self.C, (order,))
        hidden_size = 0 if array("bases", self.bases).shape[1:2] == (0,) else "hidden_size"
        if _is_left_out(self.B):
            object.__setattr__(self, "B", np.asarray(self.A)[:, :, 0])
        if _is_left_out(self.outputs):
            object.__setattr__(self, "outputs", np.concatenate([np.eye(order)[[0] * n_layers], [self.C]]))
        for name, shape in {
            "A": (n_layers, order, order),
            "B": (n_layers, order),
            "C": (order,),
            "outputs": (n_layers + 1, order),
            "bases": (n_layers + 1, hidden_size, order),
            "orders": (n_layers + 1,),
        }.items():
            object.__setattr__(self, name, array(name, getattr(self, name), shape))
        left = self.bases if _is_left_out(self.left_bases) else self.left_bases
        object.__setattr__(self, "left_bases", array("left_bases", left, self.bases.shape))
        if (self.orders % 1).any() or self.orders.min() < 0 or self.orders.max() > order:
            raise InputError(f"orders={self.orders.tolist()} must be whole numbers from 0 to {order}.")
        object.__setattr__(self, "orders", self.orders.astype(int))
        per_prompt = instance("per_prompt", self.per_prompt, np.ndarray, "an array")
        if per_prompt.dtype != np.float32:
            per_prompt = array("per_prompt", per_prompt).astype(np.float32)
        object.__setattr__(self, "per_prompt", per_prompt)
        if per_prompt.shape[1:] != self.A.shape or not len(per_prompt) or not np.isfinite(per_prompt).all():
            raise InputError(f"per_prompt has shape {per_prompt.shape}; expected one finite A for each prompt.")
        inputs = per_prompt[..., 0] if _is_left_out(self.per_prompt_inputs) else self.per_prompt_inputs
        inputs = array("per_prompt_inputs", inputs, per_prompt.shape[:-1]).astype(np.float32)
        object.__setattr__(self, "per_prompt_inputs", inputs)
        instance("metadata", self.metadata, dict, "a dict")
        object.__setattr__(self, "borrowed", numbers_of("borrowed", self.borrowed, last=n_layers))

    def __str__(self) -> str:
        return f"surrogate of order {self.order}, {self.n_layers} layers{borrowing(self.borrowed)}"

    @property
    def n_layers(self) -> int:
        """Horizon L."""
        return len(self.A)

    @property
    def order(self) -> int:
        """Order d that was asked for."""
        return self.A.shape[-1]

    def gains(self) -> np.ndarray:
        """Predicted gains ``h_l = C^T A_{L-1} ... A_{l+1} B_l``, the Markov parameters, ``(n_layers,)`` float64."""
        if self.operators == "mean":
            return markov_parameters(self.A, self.C, inputs=self.B)
        return self.per_prompt_gains().mean(axis=0)

    def per_prompt_gains(self) -> np.ndarray:
        """Gains of each prompt's own surrogate, ``(n_prompts, n_layers)`` float64."""
        return markov_parameters(self.per_prompt, self.C, inputs=self.per_prompt_inputs)

    def matrix(self) -> np.ndarray:
        """Predicted gain matrix ``(n_layers, n_layers + 1)`` float64, outputs at every state, the last the gains."""
        if self.operators == "mean":
            return gains_between(self.A, self.B, self.outputs)
        return gains_between(self.per_prompt, self.per_prompt_inputs, self.outputs).mean(axis=0)

    def truncate(self, order: int) -> LLV:
        """The surrogate of a smaller order, for nothing.

        Every basis here is nested: its first d columns are the basis of order d, and the leading blocks of A
        are the operators in it (a random basis becomes another random basis).

        Raises
        ------
        InputError
            If the order is not between 1 and the present one.
        """
        order = integer("order", order, at_least=1, at_most=self.order)
        return replace(
            self,
            A=self.A[:, :order, :order],
            B=self.B[:, :order],
            C=self.C[:order],
            outputs=self.outputs[:, :order],
            bases=self.bases[:, :, :order],
            left_bases=self.left_bases[:, :, :order],
            orders=np.minimum(self.orders, order),
            per_prompt=self.per_prompt[:, :, :order, :order],
            per_prompt_inputs=self.per_prompt_inputs[:, :, :order],
            metadata={**self.metadata, "order": order},
        )

    def simulate(self, inputs: np.ndarray) -> Trajectory:
        """Response to inputs u ``(..., n_layers)``, from the operating point.

        Raises
        ------
        InputError
            If the last axis is not ``n_layers``, or an input is not finite.
        """
        inputs = array("inputs", inputs)
        if inputs.shape[-1:] != (self.n_layers,):
            raise InputError(f"inputs has shape {inputs.shape}; expected (..., {self.n_layers}).")
        is_mean = self.operators == "mean"
        operators, vectors = (self.A[None], self.B[None]) if is_mean else (self.per_prompt, self.per_prompt_inputs)
        state, states = np.zeros((len(operators), *inputs.shape[:-1], self.order)), []
        for layer in range(self.n_layers):
            states.append(state.mean(axis=0))
            state = np.einsum("p...j,pij->p...i", state, operators[:, layer])
            state += np.einsum("...,pi->p...i", inputs[..., layer], vectors[:, layer])
        states.append(state.mean(axis=0))
        return Trajectory(np.stack(states, axis=-2), states[-1] @ self.C)

    def save(self, path: str | Path) -> None:
        """Write the surrogate as safetensors, and what computed it; FileError if it cannot be written."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        if not np.array_equal(self.left_bases, self.bases):
            arrays["left_bases"] = self.left_bases
        header: dict[str, Any] = {"kind": "llv", "borrowed": self.borrowed, "operators": self.operators}
        header["metadata"] = {**environment(), **self.metadata}
        save_tensors(checked_path("path", path), arrays, header)

    @classmethod
    def load(cls, path: str | Path) -> LLV:
        """Read what :meth:`save` wrote; FileError if it is cut short, changed, of another kind or version."""
        tensors, header = load_tensors(checked_path("path", path), kind="llv")
        with own_content(path):
            names = (*ARRAYS, *({"left_bases"} & {*tensors}))
            parts: dict[str, Any] = {name: tensors[name].numpy() for name in names}
            parts |= {"borrowed": header["borrowed"], "operators": header.get("operators", "mean")}
            return cls(**parts, metadata=header["metadata"])


def markov_parameters(operators: np.ndarray, output: np.ndarray, *, inputs: np.ndarray | None = None) -> np.ndarray:
    """Gains ``(..., n_layers)`` of operators ``(..., n_layers, order, order)`` and output vector ``(order,)``.

    The adjoint recursion ``λ_L = C``, ``λ_l = A_l^T λ_{l+1}`` costs one product per layer; ``h_l = λ_{l+1}^T B_l``.

    Parameters
    ----------
    inputs : (..., n_layers, order) array, optional
        B; the operators' first columns unless given.

    Raises
    ------
    NumericalError
        If a product overflows.

    Examples
    --------
    >>> from llvlit.method.surrogate import markov_parameters
    >>> markov_parameters(np.array([[[2.0, 0], [1, 0]], [[1, 3], [0, 1]]]), np.array([1.0, 0]))
    array([5., 1.])
    """
    operators, output = array("operators", operators), array("output", output, ("order",))
    if operators.ndim < 3 or operators.shape[-2:] != (len(output),) * 2 or not operators.shape[-3]:
        raise InputError(
            f"operators has shape {operators.shape}; expected (..., n_layers, {len(output)}, {len(output)}), as output "
            f"has shape {output.shape}."
        )
    inputs = operators[..., 0] if inputs is None else array("inputs", inputs, operators.shape[:-1])
    adjoint = np.broadcast_to(output, (*operators.shape[:-3], operators.shape[-1]))
    gains = []
    with np.errstate(over="ignore", invalid="ignore"):
        for layer in reversed(range(operators.shape[-3])):
            gains.append((adjoint * inputs[..., layer, :]).sum(axis=-1))
            adjoint = np.einsum("...ij,...i->...j", operators[..., layer, :, :], adjoint)
    if not np.isfinite(gains).all():
        raise NumericalError("operators and output are so large that their products overflow; pass smaller ones.")
    return np.stack(gains[::-1], axis=-1)
