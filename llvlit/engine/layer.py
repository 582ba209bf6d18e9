"""One layer as a map of last tokens: steps, derivatives forward and backward, its context frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llvlit import checks
from llvlit.engine.exclusive import exclusive
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import ContextCache, LayerCall, Recording, run_candidates
from llvlit.errors import InputError, NumericalError

ROWS_PER_CALL = 4096
"""Rows that run together on a processor: enough for its matrix units, and few enough for its caches.

The temporary memory of a call is about twenty times as many numbers as the rows have, or thirty where a layer is
differentiated row by row.
"""

ROWS_PER_JVP = 1024
"""The same for a Jacobian-vector product, whose graph costs a pass back of as many rows, and is kept."""

NUMBERS_PER_CALL = 48_000_000
"""Rows times hidden size that run together on an accelerator: some 4 GB for a call, and 400 prompts in one."""

METHODS = ("jvp", "central")

CENTRAL_STEP = 2e-3
"""Step of central differences, relative to the state's norm."""


@dataclass(frozen=True)
class FrozenBatch:
    """One layer of one batch of prompts: everything a replay needs."""

    members: torch.Tensor
    call: LayerCall
    recording: Recording
    context: ContextCache

    @property
    def n_rows(self) -> int:
        """Rows that run for one vector of each prompt."""
        return len(self.members) * (1 if self.context.tokens is None else self.context.tokens.shape[1])


@dataclass(frozen=True)
class FrozenLayer:
    """Last-token map f_l of one layer, for every prompt, its context frozen.

    Attributes
    ----------
    index : int
        Layer l.
    states : (n_prompts, hidden_size) tensor
        Operating point: the state before the layer.
    next_states : (n_prompts, hidden_size) tensor
        The state after it.

    Examples
    --------
    Products from both sides agree, ``w^T (A t) = (A^T w)^T t``:

    >>> layer = llvlit.depth_system(model, splits.evaluation).layer(5)
    >>> t, w = torch.ones(8, 1, 64), torch.ones(8, 1, 64)
    >>> torch.allclose((w * layer.jvp(t)).sum(-1), (layer.vjp(w) * t).sum(-1), rtol=1e-3)
    True
    """

    index: int
    model: LanguageModel = field(repr=False)
    states: torch.Tensor = field(repr=False)
    next_states: torch.Tensor = field(repr=False)
    batches: tuple[FrozenBatch, ...] = field(repr=False)
    after: tuple[nn.Module, ...] = field(repr=False, default=())

    @property
    def module(self) -> nn.Module:
        """The model's layer."""
        return self.model.layers[self.index]

    def step(self, candidates: torch.Tensor) -> torch.Tensor:
        """Next states ``(n_prompts, k, hidden_size)`` of k candidate states of each prompt, same shape.

        Raises
        ------
        InputError
            If the shape is not ``(n_prompts, k, hidden_size)``.
        NumericalError
            If the candidates are so large that the model's numbers overflow.
        """
        return self._finite("candidates", candidates, self.advance(candidates))

    def advance(self, candidates: torch.Tensor) -> torch.Tensor:
        """The same, not finite where the model's numbers overflow or the candidates are not."""
        return self._by_pieces(self._fitting("candidates", candidates), self._replay)

    def jvp(self, tangents: torch.Tensor, *, method: str = "jvp") -> torch.Tensor:
        """Jacobian-vector products A_l t ``(n_prompts, k, hidden_size)`` at the operating point.

        Parameters
        ----------
        tangents : (n_prompts, k, hidden_size) tensor
        method
            ``jvp``: exact derivative.  ``central``: central differences of relative step
            ``2e-3``, an independent check.

        Raises
        ------
        InputError
            If the shape or the method does not fit.
        NumericalError
            If a product is beyond the model's numbers.
        """
        fitting = self._fitting("tangents", tangents)
        if checks.choice("method", method, METHODS) == "central":
            if 4 * torch.finfo(self.states.dtype).eps > CENTRAL_STEP:
                raise InputError(
                    f"method='central' takes steps that drown in {self.states.dtype}'s rounding. Take 'jvp', or load "
                    f"{self.model.name} in float32."
                )
            products = self._by_pieces(fitting, self._central_difference)
        else:
            products = LinearizedLayer(self, fitting.shape[1], keeps_graphs=False).jvp(fitting)
        return self._finite("tangents", tangents, products)

    def _central_difference(self, batch: FrozenBatch, tangent: torch.Tensor) -> torch.Tensor:
        point = self.states[batch.members].unsqueeze(1)
        size = tangent.norm(dim=-1, keepdim=True)
        scale = CENTRAL_STEP * point.norm(dim=-1, keepdim=True) / torch.where(size > 0, size, 1.0)
        both = torch.cat([point + scale * tangent, point - scale * tangent], dim=1)
        plus, minus = self._replay(batch, both).chunk(2, dim=1)
        return (plus - minus) / (2 * scale)

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Vector-Jacobian products A_l^T w ``(n_prompts, k, hidden_size)``; ``cotangents`` has the same shape."""
        fitting = self._fitting("cotangents", cotangents)
        products = LinearizedLayer(self, fitting.shape[1], keeps_graphs=False).vjp(fitting)
        return self._finite("cotangents", cotangents, products)

    def linearize(self, n_products: int) -> LinearizedLayer:
        """The derivative at every prompt, for many products that come at several times.

        Parameters
        ----------
        n_products
            As many as will most often be asked for at once.
        """
        return LinearizedLayer(self, checks.integer("n_products", n_products, at_least=1))

    def _replay(
        self, batch: FrozenBatch, candidates: torch.Tensor, *, shared: bool = False, often: bool = False
    ) -> torch.Tensor:
        frozen = (batch.call, batch.recording, batch.context)
        with exclusive(self.model, self.module):
            out = run_candidates(self.module, candidates, *frozen, shared=shared, often=often)
            return apply_modules(self.after, out)

    def _by_pieces(
        self, vectors: torch.Tensor, function: Callable[[FrozenBatch, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """A function of some prompts and their vectors, of few enough vectors at a time."""
        out = torch.empty_like(vectors)
        with torch.no_grad():
            for batch in self.batches:
                n_rows = max(1, rows_per_call(self.states.device, self.states.shape[1]) // batch.n_rows)
                for start in range(0, vectors.shape[1], n_rows):
                    rows = slice(start, start + n_rows)
                    out[batch.members, rows] = function(batch, vectors[batch.members, rows])
        return out

    def dense(self, *, method: str = "jvp") -> DenseLayer:
        """The same linearization with every prompt's Jacobian formed: worth it for more than H products.

        Costs H products and H^2 numbers a prompt; exact Jacobians come row by row, which is cheaper than
        column by column, since reverse mode has fused kernels.
        """
        checks.choice("method", method, METHODS)
        n_prompts, hidden_size = self.states.shape
        identity = torch.eye(hidden_size, dtype=self.states.dtype, device=self.states.device)
        units = identity.expand(n_prompts, -1, -1)
        jacobians = self.vjp(units) if method == "jvp" else self.jvp(units, method=method).transpose(1, 2)
        return DenseLayer(self.states, self.next_states, jacobians)

    def _fitting(self, argument: str, value: torch.Tensor) -> torch.Tensor:
        """The same vectors in the model's type and on its device, finite or not."""
        value = real_tensor(argument, value, finite=False)
        expected = (len(self.states), "k", self.states.shape[1])
        if value.ndim != 3 or value.shape[0] != expected[0] or value.shape[2] != expected[2] or not value.shape[1]:
            raise InputError(f"{argument} has shape {tuple(value.shape)}; expected {expected}, k at least 1.")
        return value.to(self.states)

    def _finite(self, argument: str, value: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The result of vectors, if finite; the one look that a call takes, since an accelerator waits for each."""
        if all_finite(out):
            return out
        if not all_finite(value):
            raise InputError(f"{argument} holds a number that is not finite; pass finite numbers.")
        raise NumericalError(f"{argument} overflow the model's numbers from layer {self.index} on; pass smaller ones.")


@dataclass(frozen=True)
class LinearizedLayer:
    """Derivative of a layer at every prompt, its graph kept, so that each product costs one pass and no more.

    A vector-Jacobian product is a pass back.  It is linear in its cotangent w, so a Jacobian-vector product is
    a pass back through it, with respect to w: d/dw <A^T w, t> = A t.  Both use the fused kernels of reverse
    mode, and neither computes the layer's value again.

    Graphs are made when first asked for, of one row a prompt for single products and of several for many, and
    live as long as this object if it ``keeps_graphs``, else as long as they are needed.
    """

    frozen: FrozenLayer = field(repr=False)
    n_products: int
    keeps_graphs: bool = True
    _graphs: dict[tuple[int, int], _Graph] = field(repr=False, default_factory=dict)

    @property
    def states(self) -> torch.Tensor:
        """Operating points before the layer, ``(n_prompts, hidden_size)``."""
        return self.frozen.states

    @property
    def next_states(self) -> torch.Tensor:
        """Operating points after the layer."""
        return self.frozen.next_states

    def jvp(self, tangents: torch.Tensor, *, method: str = "jvp") -> torch.Tensor:
        """Products A_l t ``(n_prompts, k, hidden_size)``; see :meth:`FrozenLayer.jvp`, which is the door."""
        if method != "jvp":
            return self.frozen.jvp(tangents, method=method)
        return self._in_pieces(tangents.to(self.states), _Graph.forward, jvp=True)

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Products A_l^T w ``(n_prompts, k, hidden_size)``."""
        return self._in_pieces(cotangents.to(self.states), _Graph.backward, jvp=False)

    def _in_pieces(
        self, vectors: torch.Tensor, product: Callable[[_Graph, torch.Tensor], torch.Tensor], *, jvp: bool
    ) -> torch.Tensor:
        _, n_vectors, hidden_size = vectors.shape
        out = vectors.new_empty(vectors.shape)
        for number, batch in enumerate(self.frozen.batches):
            n_most = max(1, rows_per_call(vectors.device, hidden_size, jvp=jvp) // batch.n_rows)
            n_rows = -(-self.n_products // -(-self.n_products // n_most))  # even pieces
            if n_vectors == 1 or 4 * n_vectors <= n_rows:  # a graph of their own is cheaper than rows of zeros
                n_rows = n_vectors
            graph = self._graph(number, n_rows)
            is_shared = vectors.stride(0) == 0  # by all prompts, and a view of it still is
            mine = vectors[: len(batch.members)] if is_shared else vectors[batch.members]
            if n_vectors < n_rows:
                mine = nn.functional.pad(mine, (0, 0, 0, n_rows - n_vectors))
            for start in range(0, n_vectors, n_rows):
                first = max(0, min(start, n_vectors - n_rows))  # the last piece begins among those of the one before
                piece = product(graph, mine[:, first : first + n_rows])
                out[batch.members, first : first + n_rows] = piece[:, :n_vectors]
        return out

    def _graph(self, number: int, n_rows: int) -> _Graph:
        graph = self._graphs.get((number, n_rows)) or _Graph(self.frozen, number, n_rows, often=self.keeps_graphs)
        if self.keeps_graphs:
            self._graphs[number, n_rows] = graph
        return graph


class _Graph:
    """A layer's graph for one batch, each prompt's operating point in some rows."""

    def __init__(self, frozen: FrozenLayer, number: int, n_rows: int, *, often: bool) -> None:
        batch = frozen.batches[number]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            point = frozen.states[batch.members].unsqueeze(1).expand(-1, n_rows, -1)
            self.point = point.contiguous().requires_grad_()
            self.value = frozen._replay(batch, self.point, shared=True, often=often)
        self.linear: tuple[torch.Tensor, torch.Tensor] | None = None

    def backward(self, cotangents: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(self.value, self.point, cotangents, retain_graph=True)[0]

    def forward(self, tangents: torch.Tensor) -> torch.Tensor:
        if self.linear is None:
            cotangents = torch.zeros_like(self.value, requires_grad=True)
            with torch.enable_grad():
                gradient = torch.autograd.grad(self.value, self.point, cotangents, create_graph=True)[0]
            self.linear = gradient, cotangents
        return torch.autograd.grad(*self.linear, tangents, retain_graph=True)[0]


@dataclass(frozen=True)
class DenseLayer:
    """A layer's linearization at every prompt, as matrices; takes the place of a :class:`FrozenLayer`.

    Attributes
    ----------
    states, next_states : (n_prompts, hidden_size) tensor
        Operating points before and after the layer.
    jacobians : (n_prompts, hidden_size, hidden_size) tensor
    """

    states: torch.Tensor = field(repr=False)
    next_states: torch.Tensor = field(repr=False)
    jacobians: torch.Tensor = field(repr=False)

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean Jacobian over the prompts ``(hidden_size, hidden_size)``, in float64 on the CPU."""
        return self.jacobians.sum(dim=0).to("cpu", torch.float64) / len(self.jacobians)  # torch sums pairwise

    def jvp(self, tangents: torch.Tensor, *, method: str = "jvp") -> torch.Tensor:
        """Products A_l t ``(n_prompts, k, hidden_size)``; ``method`` was chosen when the matrices were formed."""
        if tangents.stride(0) == 0:  # all prompts share them: one product instead of one a prompt
            images = self.jacobians.flatten(0, 1) @ tangents[0].T
            return images.unflatten(0, self.jacobians.shape[:2]).transpose(1, 2)
        return tangents @ self.jacobians.transpose(1, 2)

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Products A_l^T w ``(n_prompts, k, hidden_size)``."""
        return cotangents @ self.jacobians


def rows_per_call(device: torch.device, hidden_size: int, *, jvp: bool = False) -> int:
    """Rows that run together on a device: tokens, candidates, or products with a Jacobian."""
    if device.type == "cpu":
        return ROWS_PER_JVP if jvp else ROWS_PER_CALL
    return max(1, NUMBERS_PER_CALL // hidden_size)


def apply_modules(modules: tuple[nn.Module, ...], hidden: torch.Tensor) -> torch.Tensor:
    """Residual stream after some modules, one after the other."""
    for module in modules:
        hidden = module(hidden)
    return hidden


def all_finite(values: torch.Tensor) -> bool:
    """Whether all numbers are finite; their sum, which one that is not would spoil, is the cheaper look."""
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def real_tensor(argument: str, value: object, *, finite: bool = True) -> torch.Tensor:
    """A dense tensor of real numbers, as it came; of finite ones unless the caller looks at what comes of them."""
    tensor = checks.instance(argument, value, torch.Tensor, "a tensor")
    if not tensor.is_floating_point():
        raise InputError(f"{argument} holds {tensor.dtype}; expected real numbers, such as torch.float32.")
    if tensor.layout != torch.strided or tensor.is_meta or (finite and not all_finite(tensor)):
        raise InputError(f"{argument} holds a number that is not finite, or none; pass finite numbers.")
    return tensor
