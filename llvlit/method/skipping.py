"""Layers to skip: how little a layer does, as the concept and the next token see it, and a few numbers in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llvlit.checks import array, instance, integer, sequence
from llvlit.engine.depth import sweep
from llvlit.engine.exclusive import exclusive, lock_of
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import first_output
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions, borrowed_of
from llvlit.method.gains import in_parts
from llvlit.method.results import Result
from llvlit.prompts import Prompts

NUMBERS_AT_ONCE = 50_000_000
"""Probabilities, one for every word of the vocabulary at each token, that are held together."""


@dataclass(frozen=True, eq=False)
class LowOrderLayer:
    """An affine map of the residual stream, ``x -> x + constant + U V^T (x - mean)``, in a layer's place.

    Attributes
    ----------
    U, V : (hidden_size, order) float64 array
    constant, mean : (hidden_size,) float64 array
        Mean update of the layer, and mean state before it.

    Examples
    --------
    >>> layer = llvlit.fit_layers(model, splits.concept, [5], order=8)[5]
    >>> layer.U.shape, tuple(layer(torch.zeros(2, 7, 64)).shape)
    ((64, 8), (2, 7, 64))
    """

    U: np.ndarray
    V: np.ndarray
    constant: np.ndarray
    mean: np.ndarray

    def __post_init__(self) -> None:
        shape = array("U", self.U, ("hidden_size", "order")).shape
        for name, expected in (("U", shape), ("V", shape), ("constant", shape[:1]), ("mean", shape[:1])):
            object.__setattr__(self, name, array(name, getattr(self, name), expected))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States after the map of states ``(..., hidden_size)`` before it, in their type and on their device."""
        U, V, constant, mean = (torch.from_numpy(each).to(states) for each in vars(self).values())
        return states + constant + (states - mean) @ V @ U.T


@dataclass(frozen=True, eq=False)
class LayerEffects(Result):
    """How much each layer does, as something sees it.

    Attributes
    ----------
    values : (n_layers,) or (n_prompts, n_layers) float64 array
    seen_by : str
        ``concept`` (:func:`llvlit.concept_effects`) or ``next token`` (:func:`llvlit.logit_effects`).
    borrowed : tuple of int
        States that were pushed or read along a borrowed direction.
    metadata : dict
        Model and prompts, by name, fingerprint and number.

    Examples
    --------
    >>> print(llvlit.logit_effects(model, splits.operating))
    12 layers as the next token sees them, 8 prompts
    """

    values: np.ndarray
    seen_by: str

    def _about(self) -> str:
        n_prompts = self.metadata.get("n_prompts", "some")
        return f"{self.values.shape[-1]} layers as the {self.seen_by} sees them, {n_prompts} prompts"

    @property
    def mean(self) -> np.ndarray:
        """Of each layer ``(n_layers,)``, over the prompts."""
        return self.values.reshape(-1, self.values.shape[-1]).mean(axis=0)


Replacements = Mapping[int, LowOrderLayer | None]


def concept_effects(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    max_tokens: int = MAX_TOKENS,
) -> LayerEffects:
    """How much of the gain matrix each layer's absence changes, ``(n_layers,)``: what the layer does to the concept.

    With A_l replaced by the identity, the other Jacobians held, the entries ``j <= l < k`` of the linear gain matrix
    lose ``O_k^T (A_l - I) R_j``, where ``R_j = A_{l-1} ... A_{j+1} A_j v_j`` is what a push before layer j has become
    before layer l, and ``O_k = A_{l+1}^T ... A_{k-1}^T v_k`` what the output at state k reads behind it.  The effect is
    that change of the mean matrix, relative to the matrix, in Frobenius' norm; it is 0 for a layer that adds nothing
    that depends on its state along what the concept uses.

    Notes
    -----
    Costs ``n_layers / 2`` products a layer and prompt in either direction.

    Examples
    --------
    No layer changes more than the first, where the last token begins to read its context:

    >>> effects = llvlit.concept_effects(model, splits.operating, directions)
    >>> effects.values.shape, int(effects.mean.argmax())
    ((12,), 0)
    """
    along = as_directions(directions)
    vectors, tokens = along.on(model), tokens_of(model, prompts, max_tokens)
    n_layers = model.n_layers
    matrix, changes = np.zeros((n_layers, n_layers + 1)), np.zeros((n_layers, n_layers, n_layers + 1))
    for members, part in in_parts(tokens):
        layers = tuple(sweep(model, part, max_tokens=max_tokens, description="concept effects"))
        one = vectors.unsqueeze(1).expand(-1, len(members), -1).unsqueeze(2)  # (n_states, n, 1, hidden_size)
        reached, updates = one[0, :, :0], []
        for layer in layers:
            before = torch.cat([reached, one[layer.index]], dim=1)
            reached = layer.jvp(before)
            updates.append(reached - before)
            after = layer.index + 1
            matrix[:after, after] += (reached @ vectors[after]).sum(dim=0).cpu().numpy()
        outputs = one[-1]
        for layer in reversed(layers):
            change = torch.einsum("nih,nkh->ik", updates.pop().double(), outputs.double())
            changes[layer.index, : layer.index + 1, layer.index + 1 :] += change.cpu().numpy()
            outputs = torch.cat([one[layer.index], layer.vjp(outputs)], dim=1)
    effects = np.linalg.norm(changes, axis=(1, 2)) / max(np.linalg.norm(matrix), np.finfo(float).tiny)
    if not np.isfinite(effects).all():
        raise NumericalError(f"The gain matrix of {model.name} is not finite. Check the model's weights.")
    return LayerEffects(effects, "concept", borrowed=borrowed_of(along), metadata=origin(model, tokens))


def logit_effects(
    model: LanguageModel, prompts: Prompts | TokenizedPrompts, *, max_tokens: int = MAX_TOKENS
) -> LayerEffects:
    """How much each layer matters to the next token, ``(n_prompts, n_layers)``, in nats per token.

    The mean over a prompt's positions of ``KL(p || p without the layer)``, the layer dropped at every position.

    Examples
    --------
    >>> effects = llvlit.logit_effects(model, splits.operating)
    >>> effects.values.shape, bool((effects.mean > 0).all())
    ((8, 12), True)
    """
    tokens = tokens_of(model, prompts, max_tokens)
    effects = np.empty((len(tokens), model.n_layers))
    for members, ids, real in _batches(model, tokens):
        with lock_of(model):
            with replace_layers(model, {}):
                whole = _log_probabilities(model, ids)
            for layer in range(model.n_layers):
                with replace_layers(model, {layer: None}):
                    without = _log_probabilities(model, ids)
                divergence = (whole.exp() * (whole - without)).sum(dim=-1)
                effects[members, layer] = _means(divergence, real)
    return LayerEffects(_finite(model, effects), "next token", metadata=origin(model, tokens))


def token_losses(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    replacements: Replacements | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
) -> np.ndarray:
    """Mean negative log-likelihood of each prompt's tokens, given those before, ``(n_prompts,)`` in nats per token.

    Parameters
    ----------
    replacements
        What stands in some layers' places; see :func:`llvlit.replace_layers`.

    Examples
    --------
    >>> from llvlit.method.skipping import token_losses
    >>> whole, without = (token_losses(model, splits.evaluation, {5: None} if drop else {}) for drop in (0, 1))
    >>> bool(whole.mean() < without.mean())
    True
    """
    tokens = tokens_of(model, prompts, max_tokens)
    losses = np.empty(len(tokens))
    with lock_of(model), replace_layers(model, {} if replacements is None else replacements):
        for members, ids, real in _batches(model, tokens):
            chosen = _log_probabilities(model, ids)[:, :-1].gather(-1, ids[:, 1:, None])
            losses[members] = _means(-chosen[..., 0], real[:, 1:])
    return _finite(model, losses)


def fit_layers(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    layers: Sequence[int],
    *,
    order: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> dict[int, LowOrderLayer]:
    """For each of some layers, the affine map of an order that comes nearest to it at every token of the prompts.

    Reduced-rank regression of the layer's update ``f(x) - x`` on the state x before it: with the states' covariance
    ``S = W^-T W^-1`` and that of states and updates, D, the singular value decomposition ``W^T D = P s Q^T`` gives
    ``V = W P s`` and ``U = Q``, cut to the order.  Each layer is fitted in the unchanged model.  A state counts by
    ``1 / |x|^2``, since what comes next normalizes it: a few tokens have states a hundred times as long as the others.

    Parameters
    ----------
    layers
        Numbers of the layers.
    order
        From 1 to the hidden size; a layer's update is linear of no more than that.

    Raises
    ------
    InputError
        If a layer or the order does not fit the model, or the prompts have no more tokens than the state has numbers.

    Examples
    --------
    >>> from llvlit.method.skipping import token_losses
    >>> fitted = llvlit.fit_layers(model, splits.concept, [5], order=8)
    >>> losses = [token_losses(model, splits.evaluation, {5: each}).mean() for each in (None, fitted[5])]
    >>> bool(losses[1] < losses[0])
    True
    """
    tokens = tokens_of(model, prompts, max_tokens)
    order = integer("order", order, at_least=1, at_most=model.hidden_size)
    chosen = [_layer(model, layer) for layer in sequence("layers", layers, "numbers of layers")]
    n_tokens = sum(map(len, tokens.ids))
    if n_tokens <= model.hidden_size:
        raise InputError(
            f"prompts have {n_tokens} tokens, too few to fit maps of {model.hidden_size} numbers. Pass more text."
        )
    moments = {layer: _Moments() for layer in chosen}
    for _, ids, real in _batches(model, tokens):
        watching = {layer: each.watching(real) for layer, each in moments.items()}
        with lock_of(model), torch.no_grad(), _hooked(model, watching):
            model.module.base_model(input_ids=ids, use_cache=False)
    return {layer: each.regression(order) for layer, each in moments.items()}


@contextmanager
def replace_layers(model: LanguageModel, replacements: Replacements) -> Iterator[LanguageModel]:
    """Context manager: other maps stand in some layers' places, at every token; ``None`` drops a layer.

    A replaced layer still runs, for its keys and values, and what it gives is put aside; so ``generate`` works, and
    nothing becomes faster.  On leaving, by an exception too, the model is as it was.  Inside, the package's other
    functions refuse the model.

    Raises
    ------
    InputError
        If a layer is not one of the model's, or its map is of another width.
    ModelError
        If a hook is on the model already.

    Examples
    --------
    >>> prompt = model.tokenizer("The plot was thin, and", return_tensors="pt")
    >>> with torch.no_grad(), llvlit.replace_layers(model, {5: None}):
    ...     without = model.module(**prompt).logits
    >>> torch.equal(without, model.module(**prompt).logits)
    False
    """
    instance("model", model, LanguageModel, "a model, as load_model gives it")
    given = instance("replacements", replacements, Mapping, "a mapping from layers to what stands in their places")
    changes = {}
    for layer, replacement in given.items():
        if replacement is not None:
            instance(f"replacements[{layer}]", replacement, LowOrderLayer, "a LowOrderLayer, or None")
            array(f"replacements[{layer}].mean", replacement.mean, (model.hidden_size,))
        changes[_layer(model, layer)] = _in_place(replacement)
    with _hooked(model, changes):
        yield model


def _layer(model: LanguageModel, layer: object) -> int:
    return integer("layer", layer, at_least=0, at_most=model.n_layers - 1)


def _in_place(replacement: LowOrderLayer | None) -> Callable[..., Any]:
    def change(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = args[0] if replacement is None else replacement(args[0])
        return type(output)((states, *output[1:])) if isinstance(output, tuple | list) else states

    return change


@contextmanager
def _hooked(model: LanguageModel, hooks: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on some layers of a model that has none, removed whatever happens."""
    entered = False
    try:
        try:
            with exclusive(model):
                entered = True
                for layer, hook in hooks.items():
                    model.layers[layer].register_forward_hook(hook)
            yield
        finally:
            if entered:
                _remove_hooks(model)
    finally:  # again, for an interrupt that came in the midst of it
        if entered:
            _remove_hooks(model)


def _remove_hooks(model: LanguageModel) -> None:
    for layer in model.layers:
        for key, hook in list(layer._forward_hooks.items()):
            if getattr(hook, "__module__", "") == __name__:
                layer._forward_hooks.pop(key, None)


class _Moments:
    """Weighted sums over states before a layer and its updates, in float64."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def watching(self, real: torch.Tensor) -> Callable[..., None]:
        """Hook that takes in the real tokens of a pass."""

        def watch(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states = args[0][real].double()
            updates = first_output(output)[real].double() - states
            rows = torch.cat([torch.ones_like(states[:, :1]), states, updates], dim=1)
            norms = states.norm(dim=1, keepdim=True)
            rows /= norms.where(norms > 0, torch.inf)
            products = rows[:, : states.shape[1] + 1].T @ rows
            self.sums = products if self.sums is None else self.sums + products

        return watch

    def regression(self, order: int) -> LowOrderLayer:
        assert self.sums is not None
        sums = (self.sums / self.sums[0, 0]).cpu().numpy()
        size = len(sums) - 1
        mean, constant = sums[0, 1 : size + 1], sums[0, size + 1 :]
        sizes, axes = np.linalg.eigh(sums[1:, 1 : size + 1] - np.outer(mean, mean))
        kept = sizes > size * np.finfo(float).eps * sizes[-1]
        whitening = axes[:, kept] / np.sqrt(sizes[kept])
        left, values, right = np.linalg.svd(
            whitening.T @ (sums[1:, size + 1 :] - np.outer(mean, constant)), full_matrices=False
        )
        return LowOrderLayer(right[:order].T, whitening @ (left[:, :order] * values[:order]), constant, mean)


def _batches(model: LanguageModel, tokens: TokenizedPrompts) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Rows of prompts, token ids ``(n, n_tokens)``, and where they are real: what pads them stands on the right."""
    n_tokens = max(1, NUMBERS_AT_ONCE // model.n_embedded)
    for members, ids, last in tokens.batches(n_tokens, model.device):
        places = torch.arange(ids.shape[1], device=ids.device)
        yield members.cpu().numpy(), ids, places <= last.unsqueeze(1)


def _log_probabilities(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Of every next token ``(n, n_tokens, n_words)``, with whatever hooks are on; no earlier token sees padding."""
    with torch.no_grad():
        logits = model.module(input_ids=ids, use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _means(values: torch.Tensor, real: torch.Tensor) -> np.ndarray:
    """Of every row's real entries."""
    sums = torch.where(real, values, 0).double().sum(dim=1)
    return np.asarray((sums / real.sum(dim=1)).cpu().numpy())


def _finite(model: LanguageModel, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise NumericalError(f"{model.name} gives probabilities that are not finite. Check what replaces its layers.")
    return values
