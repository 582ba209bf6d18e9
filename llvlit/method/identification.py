"""Identification of surrogates: one sweep through depth serves every basis, every direction, and the full order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llvlit.checks import array, choice, integer
from llvlit.checks import seed as checked_seed
from llvlit.engine.depth import sweep
from llvlit.engine.layer import DenseLayer, FrozenLayer, LinearizedLayer
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.balancing import Balancing
from llvlit.method.bases import BASES, arnoldi, principal_basis, random_basis, reachability_basis
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.gains import Gains, make_gains, weights_of
from llvlit.method.surrogate import LLV, OPERATORS
from llvlit.prompts import Prompts

JACOBIANS = ("jvp", "central")
Linearization = LinearizedLayer | DenseLayer
Images = torch.Tensor | None
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Deflation tolerance: well above the rounding of products in the model's type."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one surrogate of many shall be: see the arguments of :func:`identify`."""

    directions: DirectionsLike
    basis: str = "reachability"
    order: int = 32
    output: torch.Tensor | np.ndarray | None = None
    seed: int = 0
    operators: str = "mean"

    def __post_init__(self) -> None:
        choice("basis", self.basis, BASES)
        choice("operators", self.operators, OPERATORS)
        object.__setattr__(self, "directions", as_directions(self.directions))
        object.__setattr__(self, "order", integer("order", self.order, at_least=1))
        object.__setattr__(self, "seed", checked_seed("seed", self.seed))


@dataclass(frozen=True)
class Identification:
    """What one sweep over the operating prompts yields.

    Attributes
    ----------
    surrogates : dict of LLV
        One for each plan.
    linear : dict of Gains
        The full-order linear gains of every prompt, for each plan: the numbers of :func:`adjoint_gains`, from
        products forward. Empty unless asked for.
    states : (n_prompts, n_layers + 1, hidden_size) tensor
        Operating points.
    """

    surrogates: dict[Any, LLV]
    linear: dict[Any, Gains]
    states: torch.Tensor = field(repr=False)


def identify(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    order: int = 32,
    basis: str = "reachability",
    operators: str = "mean",
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
        With J_l the layer's mean Jacobian and K(J, v) the span of ``v, J v, J^2 v, ...``: ``krylov`` is
        ``P_l = K(J_l, v_l)``; ``krylov-shifted`` ``P_{l+1} = [v_{l+1}, K(J_{l+1}, J_l v_l)]``, P_0 as before;
        ``reachability`` ``P_{l+1} = [v_{l+1}, J_l P_l]``, so v and what earlier inputs have become, newest first;
        ``pca`` v and the states' principal components; ``random`` v and random directions.  The first three are
        readings of one sentence of arXiv 2603.12541; at the last state, which no layer follows, all three are the
        third.  ``balanced`` weighs what inputs reach against what outputs at every state see of it, and projects
        obliquely (``llvlit.method.balancing``); its order is at most half the number of layers, further
        columns are zero.
    operators
        ``mean``: gains of the operators averaged over the prompts. ``per prompt``: the average over the prompts of
        the gains of each one's own operators (the bases are the same).
    jacobian
        ``jvp`` (exact) or ``central`` (central differences).
    output : (hidden_size,), optional
        c, the readout of the last state; v_L unless given.
    seed
        Of the random basis.

    Raises
    ------
    InputError
        If order, basis, operators, jacobian, directions or output do not fit.
    NumericalError
        If a state or an operator is not finite.

    Notes
    -----
    Costs ``order`` Jacobian-vector products per prompt and layer, of ``reachability`` no more than there are inputs
    so far.  No Jacobian is formed; one layer's context is held at a time.  ``balanced`` costs three quarters of
    ``n_layers`` products per prompt and layer at any order, and holds the contexts of all layers, as
    :func:`depth_system` does, for its way back.

    Examples
    --------
    >>> surrogate = llvlit.identify(model, splits.operating, directions, order=16)
    >>> surrogate.A.shape
    (12, 16, 16)
    """
    plan = Plan(directions, basis, order, output, seed, operators)
    identification = identify_all(
        model, prompts, {"": plan}, jacobian=jacobian, max_tokens=max_tokens, final_norm=final_norm, linear=False
    )
    return identification.surrogates[""]


def identify_all(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    plans: Mapping[Any, Plan],
    *,
    jacobian: str = "jvp",
    max_tokens: int = MAX_TOKENS,
    final_norm: bool = False,
    linear: bool = True,
) -> Identification:
    """Surrogates of several plans, and with ``linear`` the full-order linear gains, from one sweep.

    Parameters
    ----------
    plans
        By name, or any other key; at least one.

    Raises
    ------
    InputError, NumericalError
        See :func:`identify`.

    Notes
    -----
    Where the plans ask for more products than the hidden size, every layer's Jacobians are formed once and
    serve all of them (n_prompts H^2 numbers, one layer at a time); else the products go through the layer.
    """
    if not plans:
        raise InputError("plans is empty; plan at least one surrogate.")
    choice("jacobian", jacobian, JACOBIANS)
    reductions = {
        name: (_BalancedReduction if plan.basis == "balanced" else _Reduction)(plan, model)
        for name, plan in plans.items()
    }
    tokens = tokens_of(model, prompts, max_tokens)
    first = {  # of those whose linear gains are the same
        name: next(other for other in reductions.values() if other.has_linear_gains_of(reduction))
        for name, reduction in (reductions.items() if linear else ())
    }
    carried = list(dict.fromkeys(first.values()))
    balanced = [reduction for reduction in reductions.values() if isinstance(reduction, _BalancedReduction)]
    others = [plan.order for plan in plans.values() if plan.basis != "balanced"]
    products = sum(others) + (len(carried) + len(balanced)) * model.n_layers // 2
    states: list[torch.Tensor] = []
    held: list[FrozenLayer] = []  # for the way back
    for frozen in sweep(model, tokens, max_tokens=max_tokens, final_norm=final_norm, description="identify"):
        forms = products > model.hidden_size
        largest = max(others, default=frozen.index + 1)
        layer: Linearization = frozen.dense(method=jacobian) if forms else frozen.linearize(largest)
        states.append(frozen.states)
        held += [frozen] if balanced else []
        krylov = [reduction for reduction in reductions.values() if reduction.plan.basis.startswith("krylov")]
        columns = _krylov_columns(krylov, frozen.index, layer, jacobian)
        for reduction in reductions.values():
            reduction.take(layer, jacobian, columns.get(reduction))
        for reduction in carried:
            reduction.carry(frozen.index, layer, jacobian)
        del layer  # its graphs hold the layer's weights
    states.append(frozen.next_states)
    while held:
        frozen = held.pop()
        for reduction in balanced:
            reduction.look_back(frozen, jacobian)
    metadata = {**origin(model, tokens, final_norm=final_norm), "jacobian": jacobian}
    weights = weights_of([state.norm(dim=-1) for state in states[:-1]]) if first else None
    return Identification(
        {name: reduction.finish(states[-1], metadata) for name, reduction in reductions.items()},
        {
            name: make_gains(
                model, tokens, one.linear_gains(), reductions[name].directions, weights=weights, final_norm=final_norm
            )
            for name, one in first.items()
        },
        torch.stack(states, dim=1),
    )


class _Reduction:
    """A surrogate in the making: bases and operators so far, and what became of the last basis."""

    def __init__(self, plan: Plan, model: LanguageModel) -> None:
        self.directions = as_directions(plan.directions)
        self.vectors = self.directions.on(model)
        self.plan, self.name = plan, model.name
        integer("order", plan.order, at_most=model.hidden_size)
        self.readout = self.vectors[-1]
        if plan.output is not None:
            self.readout = torch.from_numpy(array("output", plan.output, (model.hidden_size,)))
            if not self.readout.any():
                raise InputError("output is zero; nothing would be read out.")
        self.tolerance = TOLERANCE.get(model.dtype, 1e-2)  # of 16 bits
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.bases: list[torch.Tensor] = []
        self.orders: list[int] = []
        self.operators: list[torch.Tensor] = []
        self.transposed: list[torch.Tensor] = []  # every prompt's operators
        self.images = torch.empty(0)  # of the last basis, prompt by prompt (n_prompts, order, hidden_size)
        self.mean_images = torch.empty(model.hidden_size, 0)
        self.reached: torch.Tensor | None = None

    def take(self, layer: Linearization, jacobian: str, krylov: tuple[torch.Tensor, int, Images] | None) -> None:
        """Basis before a layer, operator of the layer before, and products with this one's Jacobians."""
        basis, rank, images = krylov or (*self._basis(layer.states), None)
        self._add(basis, rank)
        images = _images(layer, basis[:, :rank], jacobian) if images is None else images
        self.images = torch.nn.functional.pad(images, (0, 0, 0, self.plan.order - rank))
        self.mean_images = layer.mean @ basis if isinstance(layer, DenseLayer) else _mean(self.images).T

    def _basis(self, states: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Basis, other than Krylov's, at the next state."""
        direction, order = self.vectors[len(self.bases)].to("cpu", torch.float64), self.plan.order
        if self.plan.basis == "random":
            return random_basis(direction, order=order, generator=self.generator)
        if self.plan.basis == "pca":
            return principal_basis(states, direction, order=order, tolerance=self.tolerance)
        return reachability_basis(self.mean_images, direction, order=order, tolerance=self.tolerance)

    def _add(self, basis: torch.Tensor, rank: int) -> None:
        """One basis more, and with it the operators of the layer before."""
        if self.bases:
            self.transposed.append((self.images @ basis.to(self.images)).to("cpu", torch.float32))
            self.operators.append(basis.T @ self.mean_images)
        self.bases.append(basis)
        self.orders.append(rank)

    def finish(self, last_states: torch.Tensor, metadata: dict[str, Any]) -> LLV:
        """Basis and operator at the last state, and all of it as a surrogate."""
        self._add(*self._basis(last_states))
        return LLV(
            A=self._finite(torch.stack(self.operators)).numpy(),
            C=(self.bases[-1].T @ self.readout.to("cpu", torch.float64)).numpy(),
            bases=torch.stack(self.bases).numpy(),
            orders=np.array(self.orders),
            per_prompt=torch.stack(self.transposed).permute(1, 0, 3, 2).numpy(),
            **self._facts(metadata),
        )

    def _finite(self, means: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(means).all():  # nor is a mean, where one prompt's product is not
            raise NumericalError(
                f"The surrogate of {self.name} is not finite. Check the model's weights and directions."
            )
        return means

    def _facts(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {
            "metadata": {"basis": self.plan.basis, "order": self.plan.order, "seed": self.plan.seed, **metadata},
            "borrowed": borrowed_of(self.directions),
            "operators": self.plan.operators,
        }

    def has_linear_gains_of(self, other: _Reduction) -> bool:
        """Whether both have the same directions and the same readout."""
        return torch.equal(self.vectors, other.vectors) and torch.equal(self.readout, other.readout)

    def carry(self, index: int, layer: Linearization, jacobian: str) -> None:
        """Take what inputs at earlier layers have become at full order, prompt by prompt, and a new one a layer on."""
        new = self.vectors[index].expand(len(layer.states), 1, -1)
        together = new if self.reached is None else torch.cat([self.reached, new], dim=1)
        self.reached = layer.jvp(together, method=jacobian)

    def linear_gains(self) -> np.ndarray:
        """Readout of what arrived, ``(n_prompts, n_layers)``."""
        assert self.reached is not None
        gains = self.reached.to(torch.float64) @ self.readout.to(self.reached.device, torch.float64)
        return np.asarray(gains.cpu().numpy())


class _BalancedReduction(_Reduction):
    """One that goes through depth twice: forward with what pushes reach, and back with what outputs see."""

    def __init__(self, plan: Plan, model: LanguageModel) -> None:
        super().__init__(plan, model)
        inputs = self.vectors[:-1].to("cpu", torch.float64).numpy()
        outputs = np.vstack([inputs, self.readout.to("cpu", torch.float64).numpy()])
        self.factors = Balancing(inputs, outputs, self.tolerance)

    def take(self, layer: Linearization, jacobian: str, krylov: object) -> None:
        """Products with the Jacobians of a layer, of all that arrives there."""
        pushed = torch.from_numpy(self.factors.pushed)
        images = layer.mean @ pushed if isinstance(layer, DenseLayer) else _mean(_images(layer, pushed, jacobian)).T
        self.factors.reach(self._finite(images).numpy())

    def look_back(self, frozen: FrozenLayer, jacobian: str) -> None:
        """Products with the transposed Jacobians of a layer, after the last; and with them each prompt's operators."""
        layer = frozen if jacobian == "jvp" else frozen.dense(method=jacobian)
        index, order = frozen.index, self.plan.order
        seen = torch.from_numpy(self.factors.observed[-1].T).to(layer.states)
        images = layer.vjp(seen.expand(len(layer.states), -1, -1))  # (n_prompts, rank, hidden_size)
        right = np.column_stack([_padded(self.factors.right(index), (None, order)), self.factors.inputs[index]])
        sizes = torch.from_numpy(self.factors.sizes(index + 1)[:order]).to(images)
        own = images[:, :order] @ torch.from_numpy(right).to(images) / sizes.unsqueeze(-1)
        self.transposed.append(own.to("cpu", torch.float32))
        self.factors.observe(self._finite(_mean(images)).T.numpy())

    def finish(self, last_states: torch.Tensor, metadata: dict[str, Any]) -> LLV:
        """The realization in these coordinates."""
        order, balanced = self.plan.order, self.factors.balanced
        assert balanced is not None
        own = np.stack([_padded(each.numpy(), (None, order, None)) for each in reversed(self.transposed)], axis=1)
        outputs = _padded(balanced.C, (None, order))
        states = range(len(self.vectors))
        return LLV(
            A=_padded(balanced.A, (None, order, order)),
            B=_padded(balanced.B, (None, order)),
            C=outputs[-1],
            outputs=outputs,
            bases=np.stack([_padded(self.factors.right(state), (None, order)) for state in states]),
            left_bases=np.stack([_padded(self.factors.left(state), (None, order)) for state in states]),
            orders=np.minimum(self.factors.ranks, order),
            per_prompt=own[..., :order],
            per_prompt_inputs=own[..., order],
            **self._facts(metadata),
        )


def _padded(values: np.ndarray, sizes: tuple[int | None, ...]) -> np.ndarray:
    """An array cut, or filled with zeros, to some sizes of its axes."""
    shape = tuple(have if want is None else want for have, want in zip(values.shape, sizes, strict=True))
    values = values[tuple(slice(size) for size in shape)]
    return np.pad(values, [(0, want - have) for want, have in zip(shape, values.shape, strict=True)])


def _krylov_columns(
    reductions: list[_Reduction], index: int, layer: Linearization, jacobian: str
) -> dict[_Reduction, tuple[torch.Tensor, int, Images]]:
    """Krylov basis of each plan, its rank, and every prompt's products with its columns, where they were needed.

    A plan asks for one product at a time; those of all plans and all prompts go out together.
    """
    iterations = {
        each: arnoldi(
            each.vectors[index].to("cpu", torch.float64).numpy(),
            each.plan.order,
            each.tolerance,
            each.mean_images[:, 0].numpy() if index and each.plan.basis == "krylov-shifted" else None,
        )
        for each in reductions
    }
    asked: dict[_Reduction, np.ndarray] = {}
    kept: dict[_Reduction, list[torch.Tensor]] = {each: [] for each in reductions}
    finished: dict[_Reduction, tuple[torch.Tensor, int, Images]] = {}

    def go_on(each: _Reduction, mean: Any = None) -> None:
        try:
            asked[each] = iterations[each].send(mean)
        except StopIteration as end:
            basis, rank, _ = end.value
            finished[each] = basis, rank, torch.cat(kept[each], dim=1) if kept[each] else None
            asked.pop(each, None)

    for each in reductions:
        go_on(each)
    while asked:
        columns = torch.from_numpy(np.stack([*asked.values()], axis=1))
        if isinstance(layer, DenseLayer):
            means = (layer.mean @ columns).T
        else:
            images = _images(layer, columns, jacobian)
            means = _mean(images)
            for place, each in enumerate(asked):
                kept[each].append(images[:, place : place + 1])
        for each, mean in zip(list(asked), means.numpy(), strict=True):
            go_on(each, mean)
    return finished


def _mean(images: torch.Tensor) -> torch.Tensor:
    """Mean over the prompts ``(order, hidden_size)``, in float64 on the CPU."""
    return images.mean(dim=0, dtype=torch.float64).to("cpu")


def _images(layer: Linearization, columns: torch.Tensor, jacobian: str) -> torch.Tensor:
    """Products of each prompt's Jacobian with the columns of a basis, ``(n_prompts, order, hidden_size)``."""
    tangents = columns.T.to(layer.states).expand(len(layer.states), -1, -1)
    return layer.jvp(tangents, method=jacobian)
