"""The Fisher metric: what pushes cost in the next token's distribution, as a quadratic form of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llvlit.checks import array
from llvlit.engine.depth import DepthSystem, sweep
from llvlit.engine.head import Head, head_of
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import MAX_TOKENS, TokenizedPrompts, origin, tokens_of
from llvlit.engine.tokenwise import token_tangents
from llvlit.errors import InputError, NumericalError
from llvlit.method.concepts import Directions, DirectionsLike, as_directions, borrowed_of
from llvlit.method.gains import checked_positions, in_parts
from llvlit.method.intervals import mean_interval
from llvlit.method.results import Result, load_result, save_result, settle, units_of
from llvlit.method.routing import has_routes
from llvlit.prompts import Prompts


@dataclass(frozen=True)
class FisherMetric(Result):
    """Covariance of the logits' response to unit inputs under the next token's own distribution, prompt by prompt.

    To second order, inputs u change the distribution by ``KL(p || p pushed) = u^T F u / 2`` nats; in a mixture of
    experts, as long as no token is sent to other experts.

    Attributes
    ----------
    per_prompt : (n_prompts, n_layers, n_layers) float64 array
        ``F = Cov_{t ~ p}(d logit_t / du)``, in nats per squared unit of input.
    pairs : tuple of int, length n_prompts
        The independent unit of each prompt, which intervals resample.
    borrowed : tuple of int
        Layers whose push went along a borrowed direction.
    metadata : dict
        Model and prompts, by name, fingerprint and number; which tokens were pushed and read; and of a mixture of
        experts, that each prompt's are those without a push.

    Raises
    ------
    InputError
        If a number is not finite, a matrix is not symmetric, or the parts do not fit each other.

    Examples
    --------
    >>> metric = llvlit.fisher_metric(model, splits.evaluation, directions)
    >>> metric.mean.shape, bool(metric.kl(np.eye(12)[5]).min() > 0)
    ((12, 12), True)
    """

    per_prompt: np.ndarray
    pairs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        per_prompt = array("per_prompt", self.per_prompt, ("n_prompts", "n_layers", "n_layers"))
        n_prompts, n_layers, n_columns = per_prompt.shape
        if n_columns != n_layers or not np.allclose(per_prompt, per_prompt.swapaxes(1, 2)):
            raise InputError(f"per_prompt of shape {per_prompt.shape} is not one symmetric matrix for each prompt.")
        settle(self, {"per_prompt": per_prompt, "pairs": units_of(self.pairs, n_prompts)}, last=n_layers - 1)

    def _about(self) -> str:
        n_prompts, n_layers, _ = self.per_prompt.shape
        routes = ", each by its own experts" if self.metadata.get("experts") == "as without a push" else ""
        return f"Fisher metric of {n_layers} layers, {n_prompts} prompts{routes}"

    @property
    def mean(self) -> np.ndarray:
        """Mean over the prompts ``(n_layers, n_layers)``."""
        return self.per_prompt.mean(axis=0)

    def kl(self, inputs: np.ndarray) -> np.ndarray:
        """Divergence of the pushed distribution that inputs ``(n_layers,)`` make at each prompt, in nats, to second
        order; NumericalError if one is too large to be told.
        """
        inputs = array("inputs", inputs, self.per_prompt.shape[1:2])
        with np.errstate(over="ignore", invalid="ignore"):
            divergences = np.einsum("l,nlk,k->n", inputs, self.per_prompt, inputs) / 2
        if not np.isfinite(divergences).all():
            raise NumericalError("inputs are so large that a divergence overflows. Scale them down.")
        return np.asarray(divergences)

    def interval(self, *, level: float = 0.95, seed: int = 0) -> np.ndarray:
        """Bootstrap interval of the mean over independent units, ``(2, n_layers, n_layers)``."""
        flat = self.per_prompt.reshape(len(self.pairs), -1)
        return mean_interval(flat, self.pairs, level=level, seed=seed).reshape(2, *self.per_prompt.shape[1:])

    def save(self, path: str | Path) -> None:
        """Write the metric as safetensors, and what it was computed with; FileError if it cannot be written."""
        save_result(self, path, "fisher metric")

    @classmethod
    def load(cls, path: str | Path) -> FisherMetric:
        """Read what :meth:`save` wrote; FileError if it is cut short, changed, of another kind or version."""
        return load_result(cls, path, "fisher metric")


def fisher_metric(
    model: LanguageModel,
    prompts: Prompts | TokenizedPrompts,
    directions: DirectionsLike,
    *,
    positions: str = "last",
    max_tokens: int = MAX_TOKENS,
) -> FisherMetric:
    """What inputs cost in the next token's distribution: the Fisher information pulled back to them.

    Products with the Jacobians carry every push to the last state, and one more through final norm and unembedding to
    the logits; of these ``(n_layers, n_words)`` responses the covariance is taken, so that nothing of the vocabulary's
    square is formed.

    Parameters
    ----------
    positions
        ``last``: pushes at the last token.  ``all``: the same push at every token of the prompt, through keys and
        values as well.

    Raises
    ------
    InputError
        If the directions do not fit.
    ModelError
        If the logits are not a function of the last state.
    NumericalError
        If a response is not finite.

    Examples
    --------
    >>> metric = llvlit.fisher_metric(model, splits.evaluation, directions)
    >>> bool(np.linalg.eigvalsh(metric.mean).min() > -1e-9)
    True
    """
    along = as_directions(directions)
    vectors, tokens = along.on(model), tokens_of(model, prompts, max_tokens)
    everywhere = checked_positions(positions)
    fisher = np.empty((len(tokens), model.n_layers, model.n_layers))
    head = head_of(model, tokens)
    for rows, states, tangents in responses(model, tokens, vectors, everywhere=everywhere):
        fisher[rows] = pulled_back(head, states, tangents)
    return make_metric(model, tokens, fisher, along, positions)


def make_metric(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    fisher: np.ndarray,
    along: Directions,
    positions: str,
    *,
    horizon: int = 1,
) -> FisherMetric:
    """A metric with the facts that it carries."""
    if not np.isfinite(fisher).all():
        raise NumericalError(f"The responses of {model.name}'s logits are not finite. Check the model's weights.")
    borrowed = borrowed_of(along, True)
    metadata = {**origin(model, tokens), "positions": positions, "horizon": horizon}
    metadata |= {"experts": "as without a push"} if has_routes(model) else {}
    return FisherMetric(fisher, tokens.prompts.pairs, borrowed=borrowed, metadata=metadata)


def responses(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    vectors: torch.Tensor,
    *,
    everywhere: bool = False,
    horizon: int = 1,
    system: DepthSystem | None = None,
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Final states of the tokens that are read, and their derivatives with respect to the inputs, part by part.

    Parameters
    ----------
    vectors : (n_layers + 1, hidden_size) tensor
    everywhere, horizon
        See :func:`llvlit.engine.tokenwise.token_tangents`.
    system
        Of all the texts, where they are so few that it has been made.

    Yields
    ------
    Rows ``(n,)``, states ``(n, horizon, hidden_size)``, derivatives ``(n, horizon, n_layers, hidden_size)``
    """
    if everywhere or horizon > 1:
        every = token_tangents(model, tokens, vectors[:-1], horizon=horizon, everywhere=everywhere)
        for members, states, tangents in every:
            yield members.cpu().numpy(), states, tangents
        return
    for rows, part in in_parts(tokens):
        reached = vectors.new_zeros(len(part), 0, vectors.shape[-1])
        swept = sweep(model, part, max_tokens=tokens.max_tokens, description="responses")
        for layer in system.layers if system else swept:
            new = vectors[layer.index].expand(len(part), 1, -1)
            reached = layer.jvp(torch.cat([reached, new], dim=1))
            states = layer.next_states
        yield rows, states.unsqueeze(1), reached.unsqueeze(1)


def pulled_back(head: Head, states: torch.Tensor, tangents: torch.Tensor) -> np.ndarray:
    """Fisher metric ``(n, n_layers, n_layers)``, the mean over the tokens that are read; see :func:`responses`."""
    n_texts, horizon, n_layers, hidden_size = tangents.shape
    flat_states, flat = states.reshape(-1, hidden_size), tangents.reshape(-1, n_layers, hidden_size)
    found = np.empty((len(flat), n_layers, n_layers))
    for part in head.parts(len(flat), n_layers):
        logits, moved = head.jvp(flat_states[part], flat[part])
        chances = logits.to(torch.float64).softmax(dim=-1).unsqueeze(1)
        moved = moved.to(torch.float64)
        moved -= (moved * chances).sum(dim=-1, keepdim=True)
        found[part] = ((moved * chances) @ moved.transpose(1, 2)).cpu().numpy()
    return found.reshape(n_texts, horizon, n_layers, n_layers).mean(axis=1)
