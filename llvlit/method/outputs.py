"""Outputs: what is read of the last state, the concept along its direction or the odds of some next tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llvlit.checks import flag, instance, integer, number, sequence, text
from llvlit.engine.head import Head, head_of
from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.errors import InputError

Score = Callable[[torch.Tensor], torch.Tensor]
"""From logits ``(..., n_words)`` to values ``(...)`` in float64."""
SHOWN = 3
"""Words that stand in a printed output."""
CONTEXT = "It was"
"""Stands before a word when its tokens are sought, as the middle of a sentence does."""


@dataclass(frozen=True, init=False)
class TokenContrast:
    """Log-odds of two sets of next tokens, ``log P(positive) - log P(negative)``, in nats.

    Parameters
    ----------
    positive, negative : sequence of str
        Words, each one token of the model as it stands in the middle of a sentence.
    space
        Whether a space comes before the words, as in a sentence; False where they begin an answer.
    first_tokens
        Take the first token of a word that is several.

    Raises
    ------
    InputError
        If a set is empty or a word stands in both; when it is used with a model, also if a word is several tokens
        and ``first_tokens`` is not set, the first of them is a bare space, or words of both sets share a token.

    Examples
    --------
    >>> odds = llvlit.TokenContrast(["good", "great"], ["bad", "terrible"], first_tokens=True)
    >>> gains = llvlit.adjoint_gains(model, splits.evaluation, directions, output=odds)
    >>> gains.metadata["output"]
    'log-odds of good, great against bad, terrible (first tokens)'
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    space: bool = True
    first_tokens: bool = False

    def __init__(
        self, positive: Iterable[str], negative: Iterable[str], *, space: bool = True, first_tokens: bool = False
    ) -> None:
        for name, words in (("positive", positive), ("negative", negative)):
            entries = sequence(name, words, "a sequence of words")
            if not entries:
                raise InputError(f"{name} is empty; pass at least one word.")
            checked = tuple(text(f"{name}[{place}]", word, may_be_empty=False) for place, word in enumerate(entries))
            object.__setattr__(self, name, tuple(dict.fromkeys(word.strip() or word for word in checked)))
        if both := set(self.positive) & set(self.negative):
            raise InputError(f"{', '.join(sorted(both))} stands among the positive and the negative words.")
        object.__setattr__(self, "space", flag("space", space))
        object.__setattr__(self, "first_tokens", flag("first_tokens", first_tokens))

    def __str__(self) -> str:
        first = " (first tokens)" if self.first_tokens else ""
        return f"log-odds of {_some(self.positive)} against {_some(self.negative)}{first}"

    def tokens(self, model: LanguageModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of both sets; see :class:`TokenContrast` for what is raised."""
        instance("model", model, LanguageModel, "a model, as load_model gives it")
        sets = []
        for words in (self.positive, self.negative):
            found = {word: _tokens_of(model, word, space=self.space) for word in words}
            for word, ids in found.items():
                if word.strip() and not str(model.tokenizer.decode([ids[0]])).strip():
                    raise InputError(
                        f"{word!r} begins with a bare space in the tokens of {model.name}, as other words do: its "
                        "first token tells nothing. Take other words, or set space=False."
                    )
            long = {word: ids for word, ids in found.items() if len(ids) > 1}
            if long and not self.first_tokens:
                word, ids = next(iter(long.items()))
                pieces = ", ".join(repr(model.tokenizer.decode([token])) for token in ids)
                raise InputError(
                    f"{word!r} is {len(ids)} tokens of {model.name} ({pieces}), and {len(long)} of {len(words)} words "
                    "are several. Take words of one token, or set first_tokens=True (--first-tokens) to read the first."
                )
            sets.append(tuple(dict.fromkeys(ids[0] for ids in found.values())))
        if shared := set(sets[0]) & set(sets[1]):
            pieces = ", ".join(repr(model.tokenizer.decode([token])) for token in sorted(shared))
            raise InputError(f"Words of both sets begin with the same token of {model.name}: {pieces}. Leave one out.")
        return sets[0], sets[1]

    def _score(self, model: LanguageModel) -> Score:
        """Log-odds ``(...)`` of logits ``(..., n_words)``, in float64; the words are looked up once."""
        sets = self.tokens(model)

        def odds(logits: torch.Tensor) -> torch.Tensor:
            positive, negative = (_logits_of(logits, each, model).logsumexp(dim=-1) for each in sets)
            return positive - negative

        return odds


@dataclass(frozen=True, init=False)
class LogitReadout:
    """A weighted sum of the logits of some next tokens.

    Parameters
    ----------
    weights : dict of int to float
        By token id.

    Examples
    --------
    >>> readout = llvlit.LogitReadout({17: 1.0, 23: -1.0})
    >>> llvlit.adjoint_gains(model, splits.evaluation, directions, output=readout).mean.shape
    (12,)
    """

    weights: tuple[tuple[int, float], ...]

    def __init__(self, weights: Mapping[int, float]) -> None:
        instance("weights", weights, Mapping, "a dict of token ids and their weights")
        checked = tuple(
            (integer("weights' token id", token, at_least=0), number(f"weights[{token}]", weight))
            for token, weight in weights.items()
        )
        if not any(weight for _, weight in checked):
            raise InputError("weights are all zero, or there are none; the readout would always be zero.")
        object.__setattr__(self, "weights", checked)

    def __str__(self) -> str:
        return "logits " + " ".join(f"{weight:+g} [{token}]" for token, weight in self.weights)

    def _score(self, model: LanguageModel) -> Score:
        """Sums ``(...)`` of logits ``(..., n_words)``, in float64."""
        tokens, weights = zip(*self.weights, strict=True)
        return lambda logits: _logits_of(logits, tokens, model) @ torch.tensor(weights).to(logits.device, torch.float64)


Output = TokenContrast | LogitReadout


@dataclass(frozen=True)
class Reading:
    """An output of one model: values of final states and, at the prompts' own, gradients.

    Attributes
    ----------
    readout : (hidden_size,) tensor
        c of ``y = c^T x_L``, where no other output is asked for.
    """

    readout: torch.Tensor
    output: Output | None = None
    head: Head | None = field(default=None, repr=False)
    score: Score | None = field(default=None, repr=False)

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """Y ``(...)`` of final states ``(..., hidden_size)``, in float64."""
        if self.score is None or self.head is None:
            return states.to(torch.float64) @ self.readout.to(states.device, torch.float64)
        rows, values = states.reshape(-1, states.shape[-1]), []
        with torch.no_grad():
            for part in self.head.parts(len(rows), 1):
                values.append(self.score(self.head.logits(rows[part])))
        return torch.cat(values).reshape(states.shape[:-1]) if values else rows.new_zeros(states.shape[:-1])

    def shifts(self, rest: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
        """How far y is from its value at rest, of states that may be broadcast, in float64."""
        if self.output is None:  # the difference of states first: y itself may be large
            moved = pushed.to(torch.float64) - rest.to(torch.float64)
            return moved @ self.readout.to(moved)
        return self.values(pushed) - self.values(rest)

    def gradients(self, states: torch.Tensor) -> torch.Tensor:
        """``dy / dx_L`` at final states ``(n, hidden_size)``."""
        if self.score is None or self.head is None:
            return self.readout.to(states).expand(len(states), -1)
        gradients = torch.empty_like(states)
        for part in self.head.parts(len(states), 1):
            with torch.enable_grad():
                point = states[part].detach().requires_grad_()
                gradients[part] = torch.autograd.grad(self.score(self.head.logits(point)).sum(), point)[0]
        return gradients

    @property
    def metadata(self) -> dict[str, Any]:
        """What a result says of its output, if it is not the concept along its direction."""
        return {} if self.output is None else {"output": str(self.output)}


def reading(
    model: LanguageModel,
    tokens: TokenizedPrompts,
    readout: torch.Tensor,
    output: Output | None,
    *,
    final_norm: bool = False,
) -> Reading:
    """How the output of a model is read; of one that reads logits, the head is checked on the shortest prompt.

    Raises
    ------
    InputError
        If the output does not fit the model, or the final norm is to be taken twice.
    """
    if output is None:
        return Reading(readout)
    instance("output", output, (TokenContrast, LogitReadout), "a TokenContrast or LogitReadout")
    if final_norm:
        raise InputError("output reads the logits, which have the final norm in them. Leave final_norm out.")
    score = output._score(model)
    found = Reading(readout, output, head_of(model, tokens), score)
    found.values(readout[None])  # before anything is computed: words that the model has no logits of
    return found


def _logits_of(logits: torch.Tensor, tokens: tuple[int, ...], model: LanguageModel) -> torch.Tensor:
    """Logits ``(..., k)`` of some tokens, in float64."""
    if max(tokens) >= logits.shape[-1]:
        raise InputError(
            f"weights or words name token {max(tokens)}; the logits of {model.name} are {logits.shape[-1]}."
        )
    return logits[..., list(tokens)].to(torch.float64)


def _some(words: tuple[str, ...]) -> str:
    """The first words, and how many more there are."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def _tokens_of(model: LanguageModel, word: str, *, space: bool) -> tuple[int, ...]:
    """Tokens of a word behind some context, or by itself as it begins an answer."""
    ids = [
        model.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        for part in ((CONTEXT, f"{CONTEXT} {word}") if space else ("", word))
    ]
    before, whole = ids
    if not len(whole) > len(before) or whole[: len(before)] != before:
        raise InputError(f"{word!r} has no tokens of its own in {model.name}. Take another word.")
    return tuple(whole[len(before) :])
