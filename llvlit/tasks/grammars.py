"""Contrastive prompt grammars.

Every prompt has a twin that differs in its class-bearing phrases alone.  A grammar is a JSON file of rules.
``{rule}`` is replaced by one option of that rule; ``[a|b]`` reads ``a`` in the prompt of class 0 and ``b`` in
its twin of class 1.  All choices are shared by the twins, so whatever is not in brackets (topic, template,
fillers) says nothing about the class.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgspec

from llvlit.tasks.splits import normalized

EMBEDDED_TASKS = ("film-sentiment", "food-sentiment", "hostility", "tense")
N_PAIRS = 1200

_SLOT = re.compile(r"\{(\w+)\}")
_CONTRAST = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")
_LONG_WORD = re.compile(r"[a-z]{5,}")


@dataclass(frozen=True)
class Grammar:
    """Rules that write labelled twins.

    Attributes
    ----------
    name, description : str
    class_names : tuple of two str
        What label 0 and label 1 mean.
    suffix : str
        Default ending of every prompt.
    rules : mapping of str to tuple of str
        Options of each rule; ``"text"`` is where every prompt starts.
    """

    name: str
    description: str
    class_names: tuple[str, str]
    suffix: str
    rules: Mapping[str, tuple[str, ...]]


@cache
def load_grammar(name: str) -> Grammar:
    """Grammar of that name, one of :data:`EMBEDDED_TASKS`."""
    source = files("llvlit") / "data" / "grammars" / f"{name}.json"
    return msgspec.convert({"name": name, **msgspec.json.decode(source.read_bytes())}, Grammar)


def twins(grammar: Grammar, generator: random.Random) -> tuple[str, str]:
    """One prompt of class 0 and its twin of class 1; no long word stands twice in either."""
    while True:
        shared = _shared_text(grammar, generator)
        pair = _side(shared, 1), _side(shared, 2)
        if not any(map(_repeats, pair)):
            return pair


def _shared_text(grammar: Grammar, generator: random.Random) -> str:
    """Text of both twins, contrasts in brackets; no option is used twice."""
    text, taken = "{text}", set[str]()
    while slot := _SLOT.search(text):
        option = generator.choice([option for option in grammar.rules[slot[1]] if option not in taken])
        taken.add(option)
        text = text[: slot.start()] + option + text[slot.end() :]
    return text


def _side(shared: str, side: int) -> str:
    """Prompt of one class, with its articles and capital letters put right."""
    text = _CONTRAST.sub(lambda contrast: contrast[side], shared)
    text = re.sub(r"\b([Aa]) (?=[aeio]|un|ho(?:nest|ur))(?!one\b)", r"\1n ", text)
    return re.sub(r"(?:^|(?<=[.!?] ))[a-z]", lambda letter: letter[0].upper(), text)


def _repeats(text: str) -> bool:
    words = _LONG_WORD.findall(text.lower())
    return len(set(words)) < len(words)


@cache
def generate(name: str, *, n_pairs: int = N_PAIRS, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """Distinct twins of an embedded grammar, ``(class 0, class 1)`` each, the same ones for the same seed.

    No text occurs twice (see :func:`normalized`), within a pair or across pairs.
    """
    grammar, generator = load_grammar(name), random.Random(f"{name}/{seed}")
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(pairs) < n_pairs:
        pair = twins(grammar, generator)
        identities = {normalized(text) for text in pair}
        if len(identities) == 2 and not identities & seen:
            pairs.append(pair)
            seen |= identities
    return tuple(pairs)
