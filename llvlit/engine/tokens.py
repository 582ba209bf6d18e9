"""Prompts as tokens: cut on the left, sorted by length, batched with padding on the right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llvlit import checks
from llvlit.engine.models import LanguageModel, torch_device
from llvlit.errors import InputError, ModelError
from llvlit.prompts import ENTRIES, Prompts

MAX_TOKENS = 128

TOO_SHORT = "fewer than two tokens"
REPEATED = "the same tokens as an earlier prompt of another text"
CONTRADICTED = "the same tokens as a prompt of another text and the other label"


@dataclass(frozen=True)
class TokenizedPrompts:
    """Token ids of each prompt, for one model; takes the place of the prompts in every function.

    Padding stands on the right, behind the last token, where a causal decoder cannot see it: a prompt's
    numbers do not depend on its batch.

    Attributes
    ----------
    prompts : Prompts
        What was tokenized: texts, labels, pairs.
    ids : tuple of tuples of int
    is_cut : tuple of bool
        Whether a prompt was cut on the left.
    max_tokens : int
        Longest prompt that was not cut.
    model_identity : str
        Of the model whose tokenizer was asked.

    Examples
    --------
    >>> from llvlit.engine.tokens import tokenize
    >>> tokens = tokenize(model, splits.evaluation, max_tokens=128)
    >>> len(tokens), tokens.n_cut, tokens.select([0, 3]).prompts == splits.evaluation.select([0, 3])
    (8, 0, True)
    """

    prompts: Prompts
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    is_cut: tuple[bool, ...] = field(repr=False)
    max_tokens: int
    model_identity: str = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_cut(self) -> int:
        """Number of prompts that were cut."""
        return sum(self.is_cut)

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedPrompts:
        """Those at the given positions, or where a mask is true; see :meth:`llvlit.Prompts.select`."""
        indices = checks.sequence("indices", indices, ENTRIES)
        prompts = self.prompts.select(indices)
        rows = np.arange(len(self))[np.asarray(indices)].tolist()
        ids, is_cut = tuple(self.ids[row] for row in rows), tuple(self.is_cut[row] for row in rows)
        return replace(self, prompts=prompts, ids=ids, is_cut=is_cut)

    def batches(
        self, tokens_per_batch: int, device: torch.device, *, equal_lengths: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Batches of prompts of similar, or equal, length: their indices, token ids, and last tokens' positions."""
        checks.integer("tokens_per_batch", tokens_per_batch, at_least=1)
        checks.instance("device", device, (str, torch.device), "a device")
        checks.flag("equal_lengths", equal_lengths)
        device = torch_device(device)
        order = sorted(range(len(self.ids)), key=lambda index: len(self.ids[index]))
        while order:
            lengths = [len(self.ids[index]) for index in order]
            if equal_lengths:
                lengths = lengths[: lengths.count(lengths[0])]
            fitting = [count for count, length in enumerate(lengths, start=1) if count * length <= tokens_per_batch]
            n_prompts = max(fitting, default=1)
            members, order = order[:n_prompts], order[n_prompts:]
            padded = pad_sequence([torch.tensor(self.ids[index]) for index in members], batch_first=True)
            last = torch.tensor(lengths[:n_prompts], device=device) - 1
            yield torch.tensor(members, device=device), padded.to(device), last


def tokenize(model: LanguageModel, prompts: Prompts, *, max_tokens: int = MAX_TOKENS) -> TokenizedPrompts:
    """Token ids of the prompts, each cut on the left to ``max_tokens``.

    Raises
    ------
    InputError
        If ``max_tokens`` is not between 2 and the model's context; if a prompt has fewer than two tokens (one of
        context, and the last); or if prompts of different texts have the same tokens, since what is found on one
        would be tested on the other.  :func:`usable_prompts` leaves such prompts out.

    Examples
    --------
    >>> from llvlit.engine.tokens import tokenize
    >>> tokens = tokenize(model, splits.evaluation)
    >>> [llvlit.measured_gains(model, tokens, directions).mean.shape, llvlit.depth_system(model, tokens).n_layers]
    [(12,), 12]
    """
    tokens = _encode(model, prompts, max_tokens)
    for reason, rows in _unusable(tokens).items():
        row = rows[0]
        problem = f"prompts.texts[{row}]={prompts.texts[row]!r} has {reason}"
        if reason == TOO_SHORT:
            raise InputError(f"{problem}; a prompt needs one of context and the last. Lengthen it or leave it out.")
        other = next(i for i, ids in enumerate(tokens.ids) if i != row and ids == tokens.ids[row])
        raise InputError(
            f"{problem} (texts[{other}]={prompts.texts[other]!r}) when cut on the left to max_tokens={max_tokens}. "
            "Leave it out or raise max_tokens."
        )
    return tokens


def usable_prompts(
    model: LanguageModel, prompts: Prompts, *, max_tokens: int = MAX_TOKENS
) -> tuple[TokenizedPrompts, dict[str, tuple[int, ...]]]:
    """The prompts that :func:`~llvlit.engine.tokens.tokenize` takes, and the positions of those left out, by reason.

    Of prompts of one label that have the same tokens, the first stays; of both labels, none does.  A prompt stays
    when its twin is left out: its number in ``pairs`` is then its own.

    Raises
    ------
    InputError
        If no prompt can be used.

    Examples
    --------
    >>> from llvlit.engine.tokens import usable_prompts
    >>> tokens, left_out = usable_prompts(model, llvlit.Prompts(["a joy", "a"], [1, 0]))
    >>> tokens.prompts.texts, left_out
    (('a joy',), {'fewer than two tokens': (1,)})
    """
    tokens = _encode(model, prompts, max_tokens)
    left_out = _unusable(tokens)
    without = {row for rows in left_out.values() for row in rows}
    if len(without) == len(prompts):
        counts = ", ".join(f"{len(rows)} have {reason}" for reason, rows in left_out.items())
        raise InputError(f"None of the {len(prompts)} prompts can be used with {model.name}: {counts}.")
    return tokens.select([row for row in range(len(tokens)) if row not in without]), left_out


def tokens_of(model: LanguageModel, prompts: Prompts | TokenizedPrompts, max_tokens: int) -> TokenizedPrompts:
    """Tokens of the prompts, tokenized unless they are already.

    Raises
    ------
    InputError
        See :func:`tokenize`; and if the tokens are those of another model, or were cut to another length.
    """
    if not isinstance(prompts, TokenizedPrompts):
        return tokenize(model, prompts, max_tokens=max_tokens)
    checks.instance("model", model, LanguageModel, "a model, as load_model gives it")
    if prompts.model_identity != model.identity:
        raise InputError(f"prompts were tokenized for another model than {model.name}. Tokenize them for this one.")
    if prompts.max_tokens != checks.integer("max_tokens", max_tokens):
        raise InputError(
            f"prompts were tokenized with max_tokens={prompts.max_tokens}, and max_tokens={max_tokens} is asked for. "
            f"Pass max_tokens={prompts.max_tokens}, or tokenize them again."
        )
    return prompts


def _encode(model: LanguageModel, prompts: Prompts, max_tokens: int) -> TokenizedPrompts:
    checks.instance("model", model, LanguageModel, "a model, as load_model gives it")
    checks.instance("prompts", prompts, Prompts, "llvlit.Prompts or what tokenize() gives")
    max_tokens = checks.integer("max_tokens", max_tokens)
    if not 2 <= max_tokens <= model.max_positions:
        raise InputError(
            f"max_tokens={max_tokens} is not between 2 and the context of {model.name}, {model.max_positions} tokens."
        )
    ids = [tuple(model.tokenizer(text, verbose=False)["input_ids"]) for text in prompts.texts]
    unknown = max((token for tokens in ids for token in tokens), default=0)
    if unknown >= model.n_embedded:
        raise ModelError(
            f"The tokenizer of {model.name} gives token {unknown}, and its embedding has {model.n_embedded}. "
            "Load the tokenizer that belongs to the model."
        )
    is_cut = tuple(len(tokens) > max_tokens for tokens in ids)
    return TokenizedPrompts(prompts, tuple(tokens[-max_tokens:] for tokens in ids), is_cut, max_tokens, model.identity)


def _unusable(tokens: TokenizedPrompts) -> dict[str, tuple[int, ...]]:
    """Positions of the prompts that cannot be used, by reason."""
    texts, labels = tokens.prompts.texts, tokens.prompts.labels
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found: dict[str, list[int]] = defaultdict(list)
    for row, ids in enumerate(tokens.ids):
        if len(ids) < 2:
            found[TOO_SHORT].append(row)
        else:
            same[ids].append(row)
    for rows in same.values():
        if len({texts[row] for row in rows}) == 1:  # alike from the start: as they were passed
            continue
        if len({labels[row] for row in rows}) == 2:
            found[CONTRADICTED] += rows
        else:
            found[REPEATED] += [row for row in rows if texts[row] != texts[rows[0]]]
    return {reason: tuple(sorted(rows)) for reason, rows in found.items()}
