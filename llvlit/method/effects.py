"""What inputs do on the full model: the output's shift, and the divergence of the next token's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from llvlit.checks import integer
from llvlit.engine.depth import DepthSystem, depth_system
from llvlit.engine.exclusive import lock_of
from llvlit.engine.head import Head, head_of
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import TokenizedPrompts, end_tokens
from llvlit.engine.tokenwise import token_finals
from llvlit.errors import InputError, NumericalError
from llvlit.method.gains import in_parts
from llvlit.method.outputs import Output, Reading, reading
from llvlit.progress import progress

CANDIDATES_AT_ONCE = 64
"""Sets of inputs of each prompt that pass through depth together."""


def sources(
    model: LanguageModel, texts: TokenizedPrompts, vectors: torch.Tensor, output: Output | None
) -> tuple[Head, Reading]:
    """The model's head and the output's reading, checked on the shortest text."""
    source = reading(model, texts, vectors[-1], output)
    return source.head or head_of(model, texts), source


def push_effects(
    head: Head,
    texts: TokenizedPrompts,
    vectors: torch.Tensor,
    inputs: np.ndarray,
    source: Reading,
    *,
    everywhere: bool = False,
    horizon: int = 1,
    system: DepthSystem | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Shift of the output and divergence of the next token's distribution in the full model, each ``(n_texts, k)``.

    Both are means over the tokens that are read; the divergence is ``KL(unpushed || pushed)`` in nats.

    Parameters
    ----------
    vectors : (n_layers + 1, hidden_size) tensor
    inputs : (n_texts, k, n_layers) array
    everywhere, horizon
        See :func:`llvlit.engine.tokenwise.token_tangents`.
    system
        Of all the texts, where they are so few that it has been made.

    Raises
    ------
    NumericalError
        If a pushed state or logit is not finite.
    """
    shifts, costs = np.empty((2, len(texts), inputs.shape[1]))
    for rows, columns, rest, pushed in _finals(head.model, texts, vectors, inputs, everywhere, horizon, system):
        moved = source.shifts(rest.unsqueeze(1), pushed)
        shifts[np.ix_(rows, columns)] = moved.mean(dim=-1).cpu().numpy()
        costs[np.ix_(rows, columns)] = _divergences(head, rest, pushed).cpu().numpy()
    if not (np.isfinite(shifts).all() and np.isfinite(costs).all()):
        raise NumericalError(
            f"Inputs of up to {np.abs(inputs).max():.3g} make logits of {head.model.name} that are not finite. Lower "
            "the budget, or the inputs."
        )
    return shifts, costs


def _finals(
    model: LanguageModel,
    texts: TokenizedPrompts,
    vectors: torch.Tensor,
    inputs: np.ndarray,
    everywhere: bool,
    horizon: int,
    recorded: DepthSystem | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]]:
    """Rows, columns, final states ``(n, horizon, hidden_size)``, and pushed ones ``(n, k, horizon, hidden_size)``."""
    given, columns = torch.tensor(inputs), np.arange(inputs.shape[1])
    if everywhere or horizon > 1:
        every = token_finals(model, texts, vectors[:-1], given, horizon=horizon, everywhere=everywhere)
        for members, rest, pushed in every:
            yield members.cpu().numpy(), columns, rest, pushed
        return
    for rows, part in in_parts(texts):
        system = recorded or depth_system(model, part, max_tokens=texts.max_tokens)
        for some in np.array_split(columns, -(-len(columns) // CANDIDATES_AT_ONCE)):
            pushes = given[rows][:, some].to(system.states).unsqueeze(-1) * vectors[:-1]
            start = system.states[:, :1].expand(-1, len(some), -1)
            pushed = system.propagate(start, inputs=pushes)
            yield rows, some, system.states[:, -1:], pushed.unsqueeze(2)


def _divergences(head: Head, rest: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are read of ``KL(rest || pushed)``, ``(n, k)``."""
    n, k, horizon, hidden_size = pushed.shape
    flat = pushed.transpose(1, 2).reshape(n * horizon, k, hidden_size)
    points, found = rest.reshape(n * horizon, hidden_size), rest.new_empty(n * horizon, k, dtype=torch.float64)
    with torch.no_grad():
        for part in head.parts(n * horizon, k + 1):
            before = head.logits(points[part]).to(torch.float64).log_softmax(dim=-1).unsqueeze(1)
            after = head.logits(flat[part]).to(torch.float64).log_softmax(dim=-1)
            found[part] = (before.exp() * (before - after)).sum(dim=-1)
    return found.view(n, horizon, k).mean(dim=1).clamp_min(0)


def with_continuations(model: LanguageModel, tokens: TokenizedPrompts, horizon: int) -> TokenizedPrompts:
    """Each prompt with the model's own, most likely continuation, so that its last ``horizon`` tokens predict the next.

    The prompts' last token predicts the first new one, so a text grows by ``horizon - 1`` tokens.  Tokens that end a
    text are passed over.  Nothing of the model's generation settings counts: no penalty, no limit.

    Raises
    ------
    InputError
        If the model's context has no room for them.
    """
    horizon = integer("horizon", horizon, at_least=1)
    if horizon == 1:
        return tokens
    longest = max(map(len, tokens.ids)) + horizon - 1
    if longest > model.max_positions:
        raise InputError(
            f"horizon={horizon} makes texts of {longest} tokens; {model.name} holds {model.max_positions}. Lower it."
        )
    ids, module, ends = [], cast(Any, model.module), end_tokens(model)
    with lock_of(model), torch.no_grad():
        for each in progress(tokens.ids, "continuations"):
            text = torch.tensor([each], device=model.device)
            for _ in range(horizon - 1):
                logits = module(input_ids=text, use_cache=False).logits[:, -1]
                logits[:, [end for end in ends if end < logits.shape[-1]]] = -torch.inf
                text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)
            ids.append(tuple(text[0].tolist()))
    return replace(tokens, ids=tuple(ids), max_tokens=max(tokens.max_tokens, longest))
