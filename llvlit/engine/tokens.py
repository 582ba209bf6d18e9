"""Prompts as tokens: one start token where it belongs, cut on the left, batched with padding on the right."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llvlit import checks
from llvlit.engine.models import LanguageModel, torch_device
from llvlit.errors import InputError, ModelError
from llvlit.hub import failure
from llvlit.prompts import ENTRIES, Prompts

MAX_TOKENS = 128

SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Stands before a chat template that tells today's date, which would give other numbers tomorrow."""

TOO_SHORT = "fewer than two tokens"
STARTED = "a start token of its own, as if it were in the chat template already"
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
    start_token : str
        What stands once before every prompt, by the tokenizer or the chat template; empty if nothing does.
    chat : bool
        Whether each prompt is the user's turn in the model's chat template.
    token_index : int
        Which token of each prompt is read; ``ids`` end there.

    Examples
    --------
    >>> tokens = llvlit.tokenize(model, splits.evaluation, max_tokens=128)
    >>> len(tokens), tokens.n_cut, tokens.select([0, 3]).prompts == splits.evaluation.select([0, 3])
    (8, 0, True)
    >>> print(tokens)
    8 prompts; suffix ' Rating:'
    """

    prompts: Prompts
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    is_cut: tuple[bool, ...] = field(repr=False)
    max_tokens: int
    model_identity: str = field(repr=False)
    start_token: str = ""
    chat: bool = False
    token_index: int = -1

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        done = [f"start token {self.start_token!r}"] if self.start_token else []
        done += ["in the chat template"] if self.chat else []
        done += [f"suffix {self.prompts.suffix!r}"] if self.prompts.suffix else []
        done += [f"read at token {self.token_index}"] if self.token_index != -1 else []
        done += [f"{self.n_cut} cut on the left to {self.max_tokens} tokens"] if self.n_cut else []
        return "; ".join([f"{len(self)} prompt{'s' * (len(self) != 1)}", *done])

    @property
    def n_cut(self) -> int:
        """Number of prompts that were cut."""
        return sum(self.is_cut)

    @property
    def metadata(self) -> dict[str, Any]:
        """What was done to the texts; every result carries it."""
        return {
            "start_token": self.start_token,
            "chat": self.chat,
            "suffix": self.prompts.suffix,
            "n_cut": self.n_cut,
            **({"token_index": self.token_index} if self.token_index != -1 else {}),
        }

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


def tokenize(
    model: LanguageModel,
    prompts: Prompts,
    *,
    max_tokens: int = MAX_TOKENS,
    chat: bool = False,
    token_index: int = -1,
) -> TokenizedPrompts:
    """Token ids of the prompts, each cut on the left to ``max_tokens``.

    One start token stands before each prompt where the tokenizer wants one, also where the text or the chat template
    brings its own, and stays when a prompt is cut.

    Parameters
    ----------
    chat
        Put each prompt, with its suffix, into the model's chat template as the user's only turn, no system turn before
        it: the last token is then the one before the answer.  What is cut is the prompt, never the template.  The
        template is run by transformers, in Jinja's immutable sandbox; for it, it is always the same day.
    token_index
        The token that is read and pushed in place of the last, counted as Python counts: from 0, the start token or
        the template's first included, or from -1 at the end.  What follows it is cut off before ``max_tokens`` is
        looked at: in a causal decoder later tokens change nothing of an earlier one.

    Raises
    ------
    InputError
        If ``max_tokens`` is not between 2 and the model's context, or leaves no room in the template; if a prompt has
        no token ``token_index``, or fewer than two tokens up to it (one of context, and the one that is read), or in a
        chat a start token of its own; or if prompts of different texts have the same tokens, since what is found on
        one would be tested on the other.
        :func:`~llvlit.engine.tokens.usable_prompts` leaves such prompts out.
    ModelError
        If a token has no embedding, or there is no chat template, or it fails, loses the text, or writes a second start
        token.

    Examples
    --------
    >>> tokens = llvlit.tokenize(model, splits.evaluation)
    >>> [llvlit.measured_gains(model, tokens, directions).mean.shape, llvlit.depth_system(model, tokens).n_layers]
    [(12,), 12]
    >>> answer = llvlit.Prompts(["Is it good? A", "Is it bad? B"], [1, 0])
    >>> print(llvlit.tokenize(model, answer, token_index=-2))
    2 prompts; read at token -2
    """
    tokens = _encode(model, prompts, max_tokens, chat, token_index)
    for reason, rows in _unusable(tokens).items():
        row = rows[0]
        problem = f"prompts.texts[{row}]={prompts.texts[row]!r} has {reason}"
        if reason == TOO_SHORT:
            raise InputError(f"{problem}; a prompt needs one of context and the last. Lengthen it or leave it out.")
        if reason == _no_token(tokens):
            raise InputError(f"{problem}. Choose a token_index that every prompt has, or leave it out.")
        if reason == STARTED:
            raise InputError(f"{problem}. Pass the bare text, or leave chat out.")
        other = next(i for i, ids in enumerate(tokens.ids) if i != row and ids == tokens.ids[row])
        read = "" if tokens.token_index == -1 else f"read up to token_index={token_index} and "
        raise InputError(
            f"{problem} (texts[{other}]={prompts.texts[other]!r}) when {read}cut on the left to "
            f"max_tokens={max_tokens}. Leave it out, {'read a later token, ' if read else ''}or raise max_tokens."
        )
    return tokens


def usable_prompts(
    model: LanguageModel,
    prompts: Prompts,
    *,
    max_tokens: int = MAX_TOKENS,
    chat: bool = False,
    token_index: int = -1,
) -> tuple[TokenizedPrompts, dict[str, tuple[int, ...]]]:
    """The prompts that :func:`llvlit.tokenize` takes, and the positions of those left out, by reason.

    Of prompts of one label that have the same tokens, the first stays; of both labels, none does.  A prompt stays
    when its twin is left out: its number in ``pairs`` is then its own.

    Raises
    ------
    InputError, ModelError
        If no prompt can be used; and for what is wrong with no single prompt, see :func:`llvlit.tokenize`.

    Examples
    --------
    >>> from llvlit.engine.tokens import usable_prompts
    >>> tokens, left_out = usable_prompts(model, llvlit.Prompts(["a joy", "a"], [1, 0]))
    >>> tokens.prompts.texts, left_out
    (('a joy',), {'fewer than two tokens': (1,)})
    """
    tokens = _encode(model, prompts, max_tokens, chat, token_index)
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


def end_tokens(model: LanguageModel) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the model names for generation."""
    named = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(int(each) for each in (model.tokenizer.eos_token_id, *several) if each is not None))


def origin(model: LanguageModel, tokens: TokenizedPrompts, *, final_norm: bool = False) -> dict[str, Any]:
    """What numbers are about: the model, with its final norm or without, the prompts, and what was done to them."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "precision": model.precision,
        "final_norm": final_norm,
        "prompts_fingerprint": tokens.prompts.fingerprint,
        "n_prompts": len(tokens),
        **tokens.metadata,
        "device": str(model.device),
    }


def _encode(model: LanguageModel, prompts: Prompts, max_tokens: int, chat: bool, token_index: int) -> TokenizedPrompts:
    checks.instance("model", model, LanguageModel, "a model, as load_model gives it")
    checks.instance("prompts", prompts, Prompts, "llvlit.Prompts or what tokenize() gives")
    max_tokens = checks.integer("max_tokens", max_tokens)
    start = _chat_start(model) if checks.flag("chat", chat) else _start(model)
    fewest = 1 + max(1, len(start))
    if not fewest <= max_tokens <= model.max_positions:
        raise InputError(
            f"max_tokens={max_tokens} is not between {fewest} and the context of {model.name}, "
            f"{model.max_positions} tokens."
        )
    index = checks.integer("token_index", token_index, at_most=max_tokens - 1)
    encoded = _chat_ids if chat else _ids
    ids, is_cut = zip(*(encoded(model, text, start, max_tokens, index) for text in prompts.texts), strict=True)
    for row, tokens in enumerate(ids):
        if (token := max(tokens, default=0)) >= model.n_embedded:
            raise ModelError(
                f"prompts.texts[{row}] holds token {token} ({_spelled(model, (token,))!r}), and the embedding of "
                f"{model.name} has {model.n_embedded}. Load the tokenizer that belongs to the model; if the token was "
                "added to it, resize the embedding (module.resize_token_embeddings) and train it, or leave it out."
            )
    return TokenizedPrompts(prompts, ids, is_cut, max_tokens, model.identity, _spelled(model, start), bool(chat), index)


def _spelled(model: LanguageModel, ids: tuple[int, ...]) -> str:
    return "".join(map(str, model.tokenizer.convert_ids_to_tokens(list(ids))))


def _start(model: LanguageModel) -> tuple[int, ...]:
    """What the tokenizer puts before every text: a start token, nothing, or several tokens."""
    framed, bare = (model.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if not bare:  # a letter that it does not know
        return tuple(framed[:1]) if framed[:1] == [model.tokenizer.bos_token_id] else ()
    places = range(len(framed) - len(bare) + 1)
    before = framed[: next((place for place in places if framed[place : place + len(bare)] == bare), 0)]
    return tuple(dict.fromkeys(before))


def _leading(start: tuple[int, ...], ids: Sequence[int]) -> int:
    """How many times tokens begin with what stands before a text."""
    n = 0
    while start and tuple(ids[n * len(start) : (n + 1) * len(start)]) == start:
        n += 1
    return n


def _up_to(ids: tuple[int, ...], token_index: int) -> tuple[int, ...]:
    """Tokens up to the one that is read; none where there is no such token."""
    return ids[: token_index + 1 or None] if -len(ids) <= token_index < len(ids) else ()


def _ids(
    model: LanguageModel, text: str, start: tuple[int, ...], max_tokens: int, token_index: int
) -> tuple[tuple[int, ...], bool]:
    """Tokens of a text, and whether it was cut."""
    ids = model.tokenizer(text, verbose=False)["input_ids"]
    ids = _up_to((*start, *ids[_leading(start, ids) * len(start) :]), token_index)
    n = len(ids) - max_tokens
    return (ids[: len(start)] + ids[len(start) + n :], True) if n > 0 else (ids, False)


def _chat_start(model: LanguageModel) -> tuple[int, ...]:
    """What stands before every text in a chat, where the template has been tried on one.

    Raises
    ------
    ModelError
        See :func:`tokenize`.
    """
    if not getattr(model.tokenizer, "chat_template", None):
        raise ModelError(
            f"chat=True, and the tokenizer of {model.name} has no chat template. Leave chat out, or take the model "
            "that was trained to chat and its tokenizer."
        )
    text = "A text"
    rendered = _rendered(model, text)
    if text not in rendered:
        raise ModelError(
            f"The chat template of {model.name} does not hold the user's text as it is. Correct "
            "model.tokenizer.chat_template, or leave chat out."
        )
    ids = model.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    wanted, usual = _start(model), model.tokenizer.bos_token_id
    start = wanted or ((usual,) if ids[:1] == [usual] else ())
    n_starts = n_leading = _leading(start, ids)
    if wanted and wanted[-1] != model.tokenizer.eos_token_id:  # which ends a turn
        n_starts = ids.count(wanted[-1]) + (n_leading == 0)
    if n_starts > 1:
        raise ModelError(
            f"The chat template of {model.name} leads to {n_starts} start tokens {_spelled(model, start)!r}, where one "
            "belongs, at the beginning. Correct model.tokenizer.chat_template, or leave chat out."
        )
    return start


def _rendered(model: LanguageModel, text: str) -> str:
    """A text as the user's turn, and what comes before the answer."""
    try:
        template = model.tokenizer.get_chat_template()
        return str(
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=(SAME_DAY if "strftime_now" in template else "") + template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )
    except Exception as error:  # whatever a template raises
        raise ModelError(
            f"The chat template of {model.name} takes no prompt as the user's only turn ({failure(error)}). Set a "
            "model.tokenizer.chat_template that needs no system turn and no tools, or leave chat out."
        ) from error


def _chat_ids(
    model: LanguageModel, text: str, start: tuple[int, ...], max_tokens: int, token_index: int
) -> tuple[tuple[int, ...], bool]:
    """Tokens of a text in the chat template, and whether it was cut: to its longest end that fits."""

    def ids_from(first: int) -> tuple[int, ...]:
        ids = model.tokenizer(_rendered(model, text[first:]), add_special_tokens=False, verbose=False)["input_ids"]
        return _up_to((*start, *ids[_leading(start, ids) * len(start) :]), token_index)

    ids = ids_from(0)
    if len(ids) <= max_tokens:
        return ids, False
    first = bisect_left(range(len(text)), True, key=lambda place: len(ids_from(place)) <= max_tokens)
    if first == len(text):
        raise InputError(
            f"max_tokens={max_tokens} leaves no room for a text in the chat template of {model.name}, which takes "
            f"{len(ids_from(first))} tokens by itself. Raise max_tokens."
        )
    return ids_from(first), True


def _no_token(tokens: TokenizedPrompts) -> str:
    return f"no token {tokens.token_index}"


def _unusable(tokens: TokenizedPrompts) -> dict[str, tuple[int, ...]]:
    """Positions of the prompts that cannot be used, by reason."""
    texts, labels = tokens.prompts.texts, tokens.prompts.labels
    same: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found: dict[str, list[int]] = defaultdict(list)
    for row, ids in enumerate(tokens.ids):
        if tokens.chat and tokens.start_token and texts[row].lstrip().startswith(tokens.start_token):
            found[STARTED].append(row)
        elif not ids and tokens.token_index != -1:
            found[_no_token(tokens)].append(row)
        elif len(ids) < 2:
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
