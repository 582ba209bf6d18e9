"""Pushes at many tokens of a text, through keys and values as well, read at its last ones: values and derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llvlit.engine.check import check_replay
from llvlit.engine.depth import _batches
from llvlit.engine.exclusive import exclusive
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import Recording, record, run_all_tokens
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.progress import progress


@dataclass(frozen=True)
class TokenBatch:
    """Texts that run together, and which of their tokens are pushed and read.

    Attributes
    ----------
    members : (n,) int tensor
        Their rows among all texts.
    pushed : (n, n_tokens, 1) tensor
        One where a token is pushed, else zero.
    read : (n, horizon) int tensor
        Positions of the tokens that are read.
    """

    members: torch.Tensor
    recording: Recording
    pushed: torch.Tensor
    read: torch.Tensor

    def at_read(self, hidden: torch.Tensor) -> torch.Tensor:
        """States ``(n, horizon, hidden_size)`` of the tokens that are read."""
        return hidden[torch.arange(len(self.read), device=hidden.device).unsqueeze(1), self.read]


def token_batches(
    model: LanguageModel, texts: TokenizedPrompts, *, horizon: int, everywhere: bool, description: str
) -> Iterator[TokenBatch]:
    """The texts in batches; the last ``horizon`` tokens of each are read, and they or all of its tokens are pushed."""
    style = check_replay(model, texts)
    for members, ids, last in progress(list(_batches(model, texts, style)), description):
        recording = record(model, ids, last, style)
        places = torch.arange(ids.shape[1], device=ids.device)
        first = 0 * last if everywhere else last - (horizon - 1)
        is_pushed = (places <= last.unsqueeze(1)) & (places >= first.unsqueeze(1))
        read = last.unsqueeze(1) - torch.arange(horizon - 1, -1, -1, device=last.device)
        yield TokenBatch(members, recording, is_pushed.unsqueeze(-1).to(recording.hidden), read)


def token_tangents(
    model: LanguageModel,
    texts: TokenizedPrompts,
    vectors: torch.Tensor,
    *,
    horizon: int = 1,
    everywhere: bool = True,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What a push along ``vectors[l]`` before each layer makes of the final states, to first order.

    Products with the derivative of each layer at all tokens carry every push on: ``n_layers / 2`` a layer.

    Parameters
    ----------
    vectors : (n_layers, hidden_size) tensor
        The push of a unit input before each layer, the same at every token that is pushed.
    horizon, everywhere
        How many of a text's last tokens are read; and whether all of its tokens are pushed, or only those.

    Yields
    ------
    Batch by batch: rows of the texts ``(n,)``, final states ``(n, horizon, hidden_size)``, and their derivatives
    ``(n, horizon, n_layers, hidden_size)`` with respect to the inputs
    """
    with exclusive(model):
        for batch in token_batches(
            model, texts, horizon=horizon, everywhere=everywhere, description="responses at all tokens"
        ):
            hidden, tangents = batch.recording.hidden, []
            for index, module in enumerate(model.layers):
                tangents.append(batch.pushed * vectors[index].to(hidden))
                call, cache = batch.recording.calls[index], batch.recording.cache
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
                    before = hidden.detach().requires_grad_()
                    after = run_all_tokens(module, before, call, cache)[0]
                    cotangents = torch.zeros_like(after, requires_grad=True)
                    gradient = torch.autograd.grad(after, before, cotangents, create_graph=True)[0]
                tangents = [torch.autograd.grad(gradient, cotangents, t, retain_graph=True)[0] for t in tangents]
                hidden = after.detach()
            responses = torch.stack([batch.at_read(tangent) for tangent in tangents], dim=2)
            yield batch.members, batch.at_read(hidden), responses


def token_finals(
    model: LanguageModel,
    texts: TokenizedPrompts,
    vectors: torch.Tensor,
    inputs: torch.Tensor,
    *,
    horizon: int = 1,
    everywhere: bool = True,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Final states of the full model under inputs at many tokens.

    Parameters
    ----------
    vectors : (n_layers, hidden_size) tensor
        See :func:`token_tangents`.
    inputs : (n_texts, k, n_layers) tensor

    Yields
    ------
    Batch by batch: rows of the texts ``(n,)``, final states without a push ``(n, horizon, hidden_size)``, and with each
    of the k sets of inputs ``(n, k, horizon, hidden_size)``
    """
    with exclusive(model), torch.no_grad():
        for batch in token_batches(
            model, texts, horizon=horizon, everywhere=everywhere, description="pushes at many tokens"
        ):
            mine = inputs[batch.members.cpu()].to(batch.recording.hidden)
            finals = []
            for each in (0 * mine[:, 0], *mine.unbind(dim=1)):
                hidden = batch.recording.hidden
                for index, module in enumerate(model.layers):
                    push = each[:, index, None, None] * vectors[index].to(hidden)
                    call = batch.recording.calls[index]
                    hidden, _ = run_all_tokens(module, hidden + batch.pushed * push, call, batch.recording.cache)
                finals.append(batch.at_read(hidden))
            yield batch.members, finals[0], torch.stack(finals[1:], dim=1)
