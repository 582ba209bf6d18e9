"""Prompts as tokens: cut on the left, sorted by length, batched with padding on the right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError
from llvlit.prompts import Prompts
from llvlit.provenance import environment


@dataclass(frozen=True)
class TokenizedPrompts:
    """Token ids of each prompt, and how many prompts were cut.

    Padding stands on the right, behind the last token, where a causal decoder cannot see it: a prompt's
    numbers do not depend on its batch.
    """

    ids: tuple[tuple[int, ...], ...]
    n_cut: int

    def batches(
        self, tokens_per_batch: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Batches of prompts of similar length: their indices, token ids, and last tokens' positions."""
        order = sorted(range(len(self.ids)), key=lambda index: len(self.ids[index]))
        while order:
            n_prompts = _largest_batch([len(self.ids[index]) for index in order], tokens_per_batch)
            members, order = order[:n_prompts], order[n_prompts:]
            length = len(self.ids[members[-1]])
            padded = [[*self.ids[index], *[0] * (length - len(self.ids[index]))] for index in members]
            last = [len(self.ids[index]) - 1 for index in members]
            yield (
                torch.tensor(members, device=device),
                torch.tensor(padded, device=device),
                torch.tensor(last, device=device),
            )


def _largest_batch(lengths: list[int], tokens_per_batch: int) -> int:
    """How many of the prompts, sorted by length, fit in a batch padded to its longest."""
    fitting = [count for count, length in enumerate(lengths, start=1) if count * length <= tokens_per_batch]
    return max(fitting, default=1)


def tokenize(model: LanguageModel, prompts: Prompts, *, max_tokens: int) -> TokenizedPrompts:
    """Token ids of the prompts, each cut on the left to ``max_tokens``.

    Raises
    ------
    InputError
        If ``max_tokens`` is not between 2 and the model's context, or a prompt has fewer than two tokens
        (one of context, and the last).
    """
    if not 2 <= max_tokens <= model.max_positions:
        raise InputError(
            f"max_tokens={max_tokens} is not between 2 and the context of {model.name}, {model.max_positions} tokens."
        )
    ids = [tuple(model.tokenizer(text, verbose=False)["input_ids"]) for text in prompts.texts]
    for number, (text, tokens) in enumerate(zip(prompts.texts, ids, strict=True)):
        if len(tokens) < 2:
            raise InputError(
                f"prompts.texts[{number}]={text!r} has {len(tokens)} token(s); a prompt needs at least two, "
                "one of context and the last. Lengthen it or leave it out."
            )
    n_cut = sum(len(tokens) > max_tokens for tokens in ids)
    return TokenizedPrompts(tuple(tokens[-max_tokens:] for tokens in ids), n_cut)


def origin(model: LanguageModel, prompts: Prompts, tokenized: TokenizedPrompts) -> dict[str, Any]:
    """Where numbers come from: the model, the prompts, the machine."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "prompts_fingerprint": prompts.fingerprint,
        "n_prompts": len(prompts),
        "n_cut": tokenized.n_cut,
        **environment(model.device),
    }
