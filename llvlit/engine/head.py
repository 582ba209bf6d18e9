"""From the last state to the logits of the next token: final norm, unembedding, and whatever scales or caps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from llvlit.engine.check import HINT, check_replay
from llvlit.engine.depth import last_token_states
from llvlit.engine.exclusive import exclusive
from llvlit.engine.layer import all_finite
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import stand_in
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.errors import ModelError, NumericalError

LOGITS_AT_ONCE = 30_000_000
"""Numbers that are held together: candidates times words of the vocabulary."""

TOLERANCE = 1e-3
"""Of the check against the model's own logits, relative to their spread."""


@dataclass(frozen=True)
class Head:
    """What a model makes of the last token's final state ``x_L``.

    The model itself runs, with layers that hand on the states they are given in the places of its own: nothing is
    known here of norms, scales, caps or biases.
    """

    model: LanguageModel = field(repr=False)
    n_outputs: int

    @property
    def n_words(self) -> int:
        """Length of a row of logits."""
        return int(self.logits(torch.zeros(1, self.model.hidden_size)).shape[-1])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits ``(..., n_words)`` of final states ``(..., hidden_size)``; can be differentiated."""
        rows = states.to(self.model.device, self.model.dtype).reshape(-1, 1, states.shape[-1])
        last = self.model.layers[-1]

        def change(part: nn.Module) -> dict[str, Any]:
            if any(part is layer for layer in self.model.layers):
                return {"forward": self._given(rows) if part is last else self._idle(), "_forward_pre_hooks": {}}
            return {}

        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        with exclusive(self.model):
            logits = stand_in(self.model.module, change)(input_ids=ids, use_cache=False).logits
        return logits[:, -1].reshape(*states.shape[:-1], -1)

    def jvp(self, states: torch.Tensor, tangents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``(n, n_words)`` at final states ``(n, hidden_size)``, and their derivatives along k tangents each.

        Parameters
        ----------
        tangents : (n, k, hidden_size) tensor

        Returns
        -------
        (n, n_words) and (n, k, n_words) tensors
        """
        points = states.unsqueeze(1).expand_as(tangents).reshape(-1, states.shape[-1])
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(points.to(tangents).contiguous(), tangents.reshape(points.shape).contiguous())
            logits, derivative = forward_ad.unpack_dual(self.logits(dual))
        shape = (*tangents.shape[:2], -1)
        return logits.reshape(shape)[:, 0], derivative.reshape(shape)

    def parts(self, n_states: int, n_candidates: int) -> Iterator[slice]:
        """Slices of states whose candidates' logits are held together."""
        size = max(1, LOGITS_AT_ONCE // (self.n_words * n_candidates))
        yield from (slice(start, start + size) for start in range(0, n_states, size))

    def _given(self, rows: torch.Tensor) -> Callable[..., Any]:
        return lambda *_, **__: (rows, *[None] * (self.n_outputs - 1)) if self.n_outputs else rows

    def _idle(self) -> Callable[..., Any]:
        return lambda hidden, *_, **__: (hidden, *[None] * (self.n_outputs - 1)) if self.n_outputs else hidden


def head_of(model: LanguageModel, tokens: TokenizedPrompts) -> Head:
    """The head of a model, checked on the shortest prompt: of its final state it makes the logits of the whole model.

    Raises
    ------
    ModelError
        If the logits are others.
    NumericalError
        If a logit is not finite.
    """
    shortest = tokens.select([min(range(len(tokens)), key=lambda row: len(tokens.ids[row]))])
    state = last_token_states(model, shortest, max_tokens=tokens.max_tokens)[0, -1]
    with exclusive(model), torch.no_grad():
        head = Head(model, check_replay(model, tokens).n_outputs)
        ids = torch.tensor(shortest.ids, device=model.device)
        expected = model.module(input_ids=ids, use_cache=False).logits[0, -1].to(torch.float64)
        found = head.logits(state).to(torch.float64)
    if not all_finite(expected):
        raise NumericalError(f"{model.name} gives logits that are not finite. Check the model's weights.")
    spread = expected.std().clamp_min(torch.finfo(torch.float64).tiny)
    deviation = float((expected - found).abs().max() / spread) if expected.shape == found.shape else float("inf")
    if not deviation <= max(TOLERANCE, 50 * torch.finfo(model.dtype).eps):
        raise ModelError(
            f"{model.name} is refused for outputs that read its logits, since those of the last state alone are off by "
            f"{deviation:.1e} of their spread. Read the concept at the last state instead. {HINT}"
        )
    return head
