"""Tasks: embedded grammars without shortcuts, splits without leaks, errors that explain themselves."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

from llvlit.errors import FileError, InputError
from llvlit.hub import failure
from llvlit.prompts import Prompts, length_auc
from llvlit.tasks.grammars import EMBEDDED_TASKS, generate, load_grammar
from llvlit.tasks.sources import HUB_TASKS, HubTask, clean_text, examples_from_rows, shuffled
from llvlit.tasks.splits import Splits, normalized
from llvlit.tasks.task import Task, load_task, task_names

LENGTH_AUC = 0.53  # chance is 0.5 with a standard error of 0.012 at 1,200 per class
FUNCTION_WORD_ACCURACY = 0.60
SINGLE_WORD_ACCURACY = 0.62
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a an the this that these those it its i me my mine you your yours yourself he him his she her hers
        we us our they them their who whom whose which what of in on at by for with from to into out over
        under about after before during through between without around near off up down away back than as if
        when while because since until though although and or but nor so yet not never no none nobody
        nothing anyone anybody everybody everyone someone anything everything something hardly barely rarely
        often always far is was are were be been being am do does did done has have had having will would
        can could shall should may might must very too really at all any some many much more most every each
        both other another only just even ever again once here there how then now one two
        """,
    )
)

embedded = pytest.mark.parametrize("name", EMBEDDED_TASKS)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@cache
def word_counts(name: str) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Counts (n_prompts, n_words), the words, labels, and groups of an embedded task."""
    task = load_task(name)
    counters = [Counter(words_of(text)) for text in task.texts]
    vocabulary = sorted(set().union(*counters))
    counts = np.array([[counter[word] for word in vocabulary] for counter in counters])
    return counts, vocabulary, np.array(task.labels), np.array(task.groups)


def grouped_accuracy(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    model = LogisticRegression(max_iter=1000)
    return float(cross_val_score(model, features, labels, groups=groups, cv=GroupKFold(4)).mean())


def toy_task(n_groups: int = 30) -> Task:
    """Twins ``plus i`` and ``minus i``."""
    texts = [f"{word} {i}" for i in range(n_groups) for word in ("minus", "plus")]
    groups = tuple(i for i in range(n_groups) for _ in (0, 1))
    return Task("toy", "", ("minus", "plus"), tuple(texts), (0, 1) * n_groups, groups=groups)


def parts_of(splits: Splits) -> tuple[Prompts, Prompts, Prompts]:
    return splits.concept, splits.operating, splits.evaluation


# Prompts


def test_prompts_accept_any_sequences() -> None:
    prompts = Prompts(["good", "", "bad"], np.array([1, 1, 0]))
    assert prompts.texts == ("good", "", "bad")
    assert prompts.labels == (1, 1, 0)
    assert all(type(label) is int for label in prompts.labels)
    assert len(prompts) == 3
    assert prompts.positive.tolist() == [True, True, False]
    assert prompts.negative.tolist() == [False, False, True]
    assert Prompts(iter(["x"]), [True]) == Prompts(("x",), (1,))


def test_prompts_select() -> None:
    prompts = Prompts(list("abcd"), [0, 1, 0, 1])
    assert prompts.select([3, 0]) == Prompts(["d", "a"], [1, 0], [3, 0])
    assert prompts.select(prompts.positive) == Prompts(["b", "d"], [1, 1], [1, 3])
    for indices in ([], [4], [0.5], [True]):
        with pytest.raises(InputError, match="indices"):
            prompts.select(indices)


def test_fingerprint_sees_texts_and_labels() -> None:
    prompts = Prompts(["ab", "c"], [0, 1])
    assert re.fullmatch(r"[0-9a-f]{16}", prompts.fingerprint)
    assert prompts.fingerprint == Prompts(("ab", "c"), (0, 1)).fingerprint
    others = [Prompts(["a", "bc"], [0, 1]), Prompts(["ab", "c"], [1, 1]), Prompts(["c", "ab"], [0, 1])]
    assert len({prompts.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "b"], [0], "2 texts came with 1 labels"),
        ([], [], "texts is empty"),
        (["a", "b"], [0, 2], r"labels\[1\]=2"),
        (["a", "b"], [0, -1], r"labels\[1\]=-1"),
        (["a"], ["1"], r"labels\[0\]='1'"),
        (["a"], [float("nan")], r"labels\[0\]=nan"),
        (["a"], [None], r"labels\[0\]=None"),
        (["a", 3], [0, 1], r"texts\[1\]=3"),
        ("ab", [0, 1], "texts='ab' is of type str; expected a sequence"),
        (["a"], 1, "labels=1 is of type int; expected a sequence"),
    ],
)
def test_prompts_name_what_is_wrong(texts: object, labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Prompts(texts, labels)


def test_length_auc() -> None:
    assert length_auc(Prompts(["a", "bb", "ccc", "dddd"], [0, 0, 1, 1])) == 1
    assert length_auc(Prompts(["a", "bb", "ccc", "dddd"], [1, 1, 0, 0])) == 1
    assert length_auc(Prompts(["aa", "bb", "cc", "dd"], [0, 1, 0, 1])) == 0.5
    assert length_auc(Prompts(["a", "bb", "bb", "ccc"], [0, 1, 0, 1])) == pytest.approx(3.5 / 4)
    with pytest.raises(InputError, match="0 of label 1"):
        length_auc(Prompts(["a"], [0]))


# Embedded grammars


@embedded
def test_embedded_task_is_large_balanced_and_distinct(name: str) -> None:
    task = load_task(name)
    assert Counter(task.labels) == {0: 1200, 1: 1200}
    assert len({normalized(text) for text in task.texts}) == len(task.texts)
    assert all(label in {0, 1} for label in task.labels)
    assert Counter(Counter(task.groups).values()) == {2: 1200}
    assert task.suffix == (" Rating:" if "sentiment" in name else "")
    assert task.prompts().texts[0] == task.texts[0] + task.suffix


@embedded
def test_embedded_texts_are_whole_sentences(name: str) -> None:
    for text in load_task(name).texts:
        assert not set(text) & set("[]{}|"), text
        assert re.fullmatch(r"[A-Z][A-Za-z',. -]*\.", text), text
        assert 1 <= text.count(".") <= 3, text
        assert not re.search(r"  | \.|\. [a-z]|\b[Aa] [aeio]|\b[Aa]n [^aeiouh]", text), text


@embedded
def test_twins_share_everything_but_the_class_phrases(name: str) -> None:
    """Twins use the same function words, so no grammar word can give the class away."""
    for first, second in generate(name):
        assert first != second
        shared = [Counter(word for word in words_of(text) if word in FUNCTION_WORDS) for text in (first, second)]
        assert shared[0] == shared[1], (first, second)
        assert len(set(words_of(first)) & set(words_of(second))) >= 3, (first, second)


@embedded
def test_generation_depends_on_the_seed_alone(name: str) -> None:
    first = generate(name)[:50]
    generate.cache_clear()
    assert generate(name, n_pairs=50) == first != generate(name, n_pairs=50, seed=1)


@embedded
def test_length_is_no_shortcut(name: str) -> None:
    prompts = load_task(name).prompts()
    lengths = np.array([len(text) for text in prompts.texts])
    assert length_auc(prompts) < LENGTH_AUC
    assert abs(lengths[prompts.positive].mean() - lengths[prompts.negative].mean()) < 0.02 * lengths.mean()


@embedded
def test_function_words_and_length_are_no_shortcut(name: str) -> None:
    counts, vocabulary, labels, groups = word_counts(name)
    lengths = np.array([[len(text), text.count(" ")] for text in load_task(name).texts], dtype=float)
    columns = [column for column, word in enumerate(vocabulary) if word in FUNCTION_WORDS]
    assert len(columns) > 20
    features = np.hstack([counts[:, columns], (lengths - lengths.mean(0)) / lengths.std(0)])
    assert grouped_accuracy(features, labels, groups) <= FUNCTION_WORD_ACCURACY


@embedded
def test_no_single_word_decides(name: str) -> None:
    counts, _, labels, _ = word_counts(name)
    present = counts > 0
    difference = np.abs(present[labels == 1].mean(axis=0) - present[labels == 0].mean(axis=0))
    assert (0.5 + difference / 2).max() <= SINGLE_WORD_ACCURACY


@embedded
def test_words_together_decide(name: str) -> None:
    """The class is there to be found, in pairs never seen."""
    counts, _, labels, groups = word_counts(name)
    seen = groups < 400
    model = LogisticRegression(max_iter=1000).fit(counts[seen], labels[seen])
    assert model.score(counts[~seen], labels[~seen]) > 0.95


def test_film_negation_is_a_minority_and_mixes_words() -> None:
    task = load_task("film-sentiment")
    negated = [bool({"not", "hardly", "nobody", "anything"} & set(words_of(text))) for text in task.texts]
    assert 0.08 < np.mean(negated) < 0.20
    words: dict[int, set[str]] = defaultdict(set)
    for text, label in zip(task.texts, task.labels, strict=True):
        words[label] |= set(words_of(text))
    assert {"bad", "good", "bored", "impressed", "waste", "art"} <= words[0] & words[1]


def test_tense_has_verbs_of_both_tenses_in_both_classes() -> None:
    texts = load_task("tense").texts
    for label in (0, 1):
        words = set().union(*(words_of(text) for text in texts[label::2]))
        assert {"wrote", "writes", "sang", "sings", "lives", "drove"} <= words
    auxiliaries = {"was", "is", "were", "are", "has", "had", "will", "did", "do", "does", "have", "would"}
    assert not auxiliaries & set().union(*(words_of(text) for text in texts))


@embedded
def test_grammar_rules_are_used_and_defined(name: str) -> None:
    rules = load_grammar(name).rules
    named = {slot for options in rules.values() for option in options for slot in re.findall(r"\{(\w+)\}", option)}
    assert named | {"text"} == set(rules)
    assert all(len(set(options)) == len(options) for options in rules.values())


# Splits


@embedded
def test_embedded_splits_keep_twins_together(name: str) -> None:
    task = load_task(name)
    group_of = {text + task.suffix: group for text, group in zip(task.texts, task.groups, strict=True)}
    parts = parts_of(task.split())
    assert [Counter(part.labels) for part in parts] == [{0: n, 1: n} for n in (400, 200, 200)]
    groups = [{group_of[text] for text in part.texts} for part in parts]
    assert [len(members) for members in groups] == [400, 200, 200]
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert all(text.endswith(task.suffix) for part in parts for text in part.texts)


@embedded
def test_twins_share_a_unit_that_no_other_split_has(name: str) -> None:
    parts = parts_of(load_task(name).split(40, 20, 10))
    for part in parts:
        assert part.pairs[::2] == part.pairs[1::2] and len(set(part.pairs)) == len(part) / 2
        assert set(part.select([0, 3]).pairs) == {part.pairs[0], part.pairs[2]}
    units = [set(part.pairs) for part in parts]
    assert not units[0] & units[1] | units[0] & units[2] | units[1] & units[2]
    assert load_task(name).prompts().pairs[:4] == (0, 0, 1, 1)


def test_texts_without_groups_are_units_of_their_own() -> None:
    task = Task("toy", "", ("no", "yes"), tuple(f"text {i}" for i in range(12)), (0, 1) * 6)
    pairs = [pair for part in parts_of(task.split(2, 2, 2)) for pair in part.pairs]
    assert len(set(pairs)) == len(pairs) == 12


def test_split_is_seeded() -> None:
    task = toy_task()
    sizes = {"concept": 10, "operating": 5, "evaluation": 5}
    assert task.split(**sizes, seed=3) == task.split(**sizes, seed=3)
    assert len({task.split(**sizes, seed=seed) for seed in range(-2, 3)}) == 5


def test_split_takes_its_counts_by_position() -> None:
    by_name = toy_task().split(concept=10, operating=5, evaluation=4, seed=3)
    assert toy_task().split(10, 5, 4, 3) == by_name
    assert [len(part) for part in parts_of(by_name)] == [20, 10, 8]


def test_heads_of_a_split_are_balanced() -> None:
    concept = toy_task().split(concept=10, operating=5, evaluation=5).concept
    assert concept.labels == (0, 1) * 10
    assert all(a.split()[1] == b.split()[1] for a, b in zip(concept.texts[::2], concept.texts[1::2], strict=True))


@given(
    texts=st.lists(st.text(alphabet="abAB .!?é", max_size=4), min_size=12, max_size=60),
    data=st.data(),
    seed=st.integers(-5, 5),
)
@settings(max_examples=80, deadline=None)
def test_split_never_leaks(texts: list[str], data: st.DataObject, seed: int) -> None:
    """Random texts, labels and groups: a split is balanced and leak-free, or refused."""
    size = len(texts)
    labels = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    groups = data.draw(st.none() | st.lists(st.integers(0, 40), min_size=size, max_size=size))
    counts = {part: data.draw(st.integers(1, 3)) for part in ("concept", "operating", "evaluation")}
    task = Task("random", "", ("no", "yes"), tuple(texts), tuple(labels), groups=groups and tuple(groups))
    labels_of = defaultdict(set)
    groups_of = defaultdict(set)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        labels_of[normalized(text)].add(label)
        groups_of[normalized(text)].add(groups[row] if groups else -row)
    usable = Counter(next(iter(found)) for found in labels_of.values() if len(found) == 1)
    try:
        splits = task.split(**counts, seed=seed)
    except InputError:
        assert groups or min(usable[0], usable[1]) < sum(counts.values())
        return
    seen: list[set[str]] = []
    for part, count in zip(parts_of(splits), counts.values(), strict=True):
        assert Counter(part.labels) == {0: count, 1: count}
        for text, label in zip(part.texts, part.labels, strict=True):
            assert labels_of[normalized(text)] == {label}
        seen.append({normalized(text) for text in part.texts})
        assert len(seen[-1]) == 2 * count
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not seen[i] & seen[j]
        grouped = [set().union(*(groups_of[text] for text in seen[k])) for k in (i, j)]
        assert not grouped[0] & grouped[1]


def test_duplicates_are_dropped_and_contradictions_too() -> None:
    texts = ("Good film!", "good  film", "bad film", "So so.", "so, so", "great", "poor")
    task = Task("toy", "", ("no", "yes"), texts, (1, 1, 0, 0, 1, 1, 0))
    with pytest.raises(InputError, match=r"has 2 distinct texts of label 0 \('no'\) and 2 .* need 3 .*sum of 2 at"):
        task.split(concept=1, operating=1, evaluation=1)
    more = Task("toy", "", ("no", "yes"), (*texts, "dull", "fine"), (1, 1, 0, 0, 1, 1, 0, 0, 1))
    drawn = [text for part in parts_of(more.split(concept=1, operating=1, evaluation=1)) for text in part.texts]
    assert sorted(drawn) == ["Good film!", "bad film", "dull", "fine", "great", "poor"]


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_share_a_text_are_one(seed: int) -> None:
    """``a i`` and ``A i!`` are one text, so their groups' other texts, ``b i`` and ``c i``, stay together."""
    texts = [text for i in range(20) for text in (f"a {i}", f"b {i}", f"A {i}!", f"c {i}")]
    groups = tuple(row // 2 for row in range(80))
    task = Task("toy", "", ("no", "yes"), tuple(texts), (0, 1) * 40, groups=groups)
    parts = parts_of(task.split(concept=5, operating=5, evaluation=5, seed=seed))
    numbers = [{text.split()[1].strip("!") for text in part.texts} for part in parts]
    assert not numbers[0] & numbers[1] | numbers[0] & numbers[2] | numbers[1] & numbers[2]
    for part, members in zip(parts, numbers, strict=True):
        assert len(set(part.pairs)) == len(members)  # what shares a text is one unit


def test_groups_too_coarse_are_refused() -> None:
    task = Task("toy", "", ("no", "yes"), tuple("abcdef"), (0, 1) * 3, groups=(1,) * 6)
    with pytest.raises(InputError, match="tearing a group apart"):
        task.split(concept=1, operating=1, evaluation=1)


@pytest.mark.parametrize("part", ["concept", "operating", "evaluation"])
@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
def test_counts_must_be_positive(part: str, count: object) -> None:
    sizes = {"concept": 1, "operating": 1, "evaluation": 1, part: count}
    with pytest.raises(InputError, match=f"{part}="):
        toy_task().split(**sizes)


def test_seed_must_be_whole() -> None:
    with pytest.raises(InputError, match=r"seed=0\.5"):
        toy_task().split(concept=1, operating=1, evaluation=1, seed=0.5)


def test_groups_must_fit_the_texts() -> None:
    with pytest.raises(InputError, match=r"groups has shape \(1,\); expected \(2,\)"):
        Task("toy", "", ("no", "yes"), ("a", "b"), (0, 1), groups=(0,))


def test_normalized_keeps_what_differs() -> None:
    assert normalized("Ah—well,\tYES!\n") == normalized("ah well yes") == normalized("``Ah'' <well> ~ Yes\u200b")
    assert normalized("?!  ?") == normalized("?!?\n")
    for a, b in (("!", "?"), ("की", "का"), ("4", "5"), ("😀", "😡"), ("日本", "本日"), ("", "."), ("a😀", "a😡")):
        assert normalized(a) != normalized(b)


def test_texts_without_letters_stay_apart() -> None:
    texts = ("😀", "😡", "👍 👍", "!!!", "???", "...", "❤️", "🔥", "💔", "—", "* * *", "$$$")
    for task in (
        Task("signs", "", ("no", "yes"), texts, (0, 1) * 6),
        Task("signs", "", ("no", "yes"), (*texts, "! ! !", " ??? ", "👍👍", "***"), ((0, 1) * 6) + (1, 0, 0, 0)),
    ):
        drawn = [text for part in parts_of(task.split(2, 1, 1)) for text in part.texts]
        assert len(set(map(normalized, drawn))) == len(drawn) == 8


@given(
    words=st.lists(st.text("abcé日🙂1", min_size=1, max_size=4), min_size=12, max_size=24, unique_by=normalized),
    data=st.data(),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_variants_of_a_text_never_straddle_splits(words: list[str], data: st.DataObject, seed: int) -> None:
    """Each text comes several times, with other case, punctuation and white space: one of them is drawn."""
    variants = (str.upper, str.title, lambda w: f" {w}!", lambda w: f"“{w}” …\n", lambda w: ", ".join(w))
    texts, labels = [], []
    for row, word in enumerate(words):
        for change in data.draw(st.lists(st.sampled_from(variants), max_size=3)):
            texts.append(change(word))
            labels.append(row % 2)
        texts.append(word)
        labels.append(row % 2)
    order = data.draw(st.permutations(range(len(texts))))
    task = Task("variants", "", ("no", "yes"), tuple(texts[i] for i in order), tuple(labels[i] for i in order))
    drawn = [text for part in parts_of(task.split(3, 2, 1, seed=seed)) for text in part.texts]
    assert len({normalized(text) for text in drawn}) == len(drawn) == 12


def test_text_is_cleaned() -> None:
    assert clean_text(" R&amp;D:<br /><BR>a\n\tb &lt;3 &#39;n&#x27; &nope; &c ") == "R&D: a b <3 'n' &nope; &c"


# Loading


def test_suffix_can_be_replaced() -> None:
    assert load_task("film-sentiment", suffix="").prompts().texts == load_task("film-sentiment").texts
    assert load_task("tense", suffix=" So").prompts().texts[0].endswith(". So")
    assert load_task("tense").with_suffix("?").suffix == "?"


def test_unknown_name_has_neighbors() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'film-sentiment'.*\.parquet"):
        load_task("film_sentiment")


def write(path: Path, **columns: list[object]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_round_trip(tmp_path: Path) -> None:
    texts, labels = ["One<br /><br/>two ", " three\n\nfour", "five"], [1, 0, 1]
    path = write(tmp_path / "mine.parquet", extra=[1, 2, 3], label=labels, text=texts)
    for task in (load_task(path), load_task(str(path))):
        assert task.texts == ("One two", "three four", "five")
        assert task.labels == (1, 0, 1)
        assert (task.name, task.suffix, task.groups) == ("mine", "", None)
    assert load_task(path, suffix=" Rating:").prompts().texts[2] == "five Rating:"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "mark": [1]}, "lacks label; its columns: text, mark"),
        ({"body": ["a"]}, "lacks label and text; its columns: body"),
        ({"text": ["a", "b", "c"], "label": [0, 1, 5]}, r"row 2 \(from 0\): label=5"),
        (
            {"text": ["a", "b"], "label": [1.0, 0.5]},
            r"mine.parquet, row 1 \(from 0\): label=0.5 .* Fix or drop the row",
        ),
        ({"text": ["a", "b"], "label": [0, None]}, "row 1 .*label=None"),
        ({"text": ["a"], "label": [float("nan")]}, "row 0 .*label=nan"),
        ({"text": ["a"], "label": ["1"]}, "row 0 .*label='1' is neither 0 nor 1"),
        ({"text": ["a"], "label": [[1]]}, r"row 0 .*label=\[1\] is neither 0 nor 1"),
        ({"text": [b"a"], "label": [1]}, "row 0 .*text=b'a' is no text with content"),
        ({"text": [7], "label": [0]}, "row 0 .*text=7 is no text with content"),
        ({"text": [{"text": "a"}], "label": [0]}, "row 0 .*text={'text': 'a'} is no text with content"),
        ({"text": [None], "label": [0]}, "row 0 .*text=None is no text with content"),
        ({"text": ["a", None], "label": [0, 1]}, r"row 1 \(from 0\): text=None"),
        ({"text": ["a", " <br /> "], "label": [0, 1]}, r"row 1 \(from 0\): text="),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "has no rows"),
    ],
)
def test_parquet_errors_say_where(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    path = write(tmp_path / "mine.parquet", **columns)
    with pytest.raises(FileError, match=message):
        load_task(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.csv", 'label,text\n1,"a ""dry"" film,\nbut good"\n0,NA\n0,2024-01-01\n', None),
        (
            "mine.jsonl",
            '{"text": "a \\"dry\\" film,\\nbut good", "label": 1}\n\n{"label": 0, "text": "NA"}\n'
            '{"label": 0, "text": "2024-01-01"}\n',
            None,
        ),
        ("mine.csv", "sentence,label\na,1\n", "lacks text; its columns: sentence, label"),
        ("mine.csv", "text,label\na,1\nb,yes\n", r"row 1 \(from 0\): label='yes'"),
        ("mine.csv", "text,label\na,1\n,0\n", r"row 1 \(from 0\): text=''"),
        ("mine.csv", "text,label\n", "has no rows"),
        ("mine.csv", "", "cannot be read as a CSV file"),
        ("mine.csv", b"text,label\n\xff\xfe,1\n", "cannot be read as a CSV file"),
        ("mine.jsonl", '{"text": "a"}\n', "lacks label; its columns: text"),
        ("mine.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"row 1 \(from 0\): label=None"),
        ("mine.jsonl", '{"text": 7, "label": 1}\n', "row 0 .*text=7 is no text"),
        ("mine.jsonl", "[1, 2]\n", "cannot be read as a file of JSON lines"),
        ("mine.jsonl", '{"text": "a", "lab', "cannot be read as a file of JSON lines"),
        ("mine.jsonl", "", "has no rows"),
    ],
)
def test_tables_of_text_are_read_as_parquet_is(
    tmp_path: Path, name: str, content: str | bytes, message: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if message:
        with pytest.raises(FileError, match=message):
            load_task(path)
        return
    for task in (load_task(path), load_task("mine", data_dir=tmp_path)):
        assert (task.name, task.texts) == ("mine", ('a "dry" film, but good', "NA", "2024-01-01"))
        assert task.labels == (1, 0, 0)


def test_parquet_of_categories_is_read(tmp_path: Path) -> None:
    categories = {name: pa.array(cells).dictionary_encode() for name, cells in (("text", "ab"), ("label", [0, 1]))}
    assert load_task(write(tmp_path / "mine.parquet", **categories)).labels == (0, 1)


def test_parquet_must_be_there_and_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_task(tmp_path / "absent.parquet")
    path = write(tmp_path / "torn.parquet", text=[f"text {i}" for i in range(500)], label=[0, 1] * 250)
    whole = path.read_bytes()
    for content in (b"", b"PAR1 not really", b"text,label\na,1\n", whole[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"torn.parquet cannot be read as a parquet file .*Write or copy it again"):
            load_task(path)
    path.write_bytes(whole[:20] + b"?" * 200 + whole[220:])
    with pytest.raises(FileError, match="torn"):
        load_task(path)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "endless.parquet").symlink_to("/dev/urandom")
    for name in ("folder", "pipe", "endless"):
        with pytest.raises(InputError, match=f"name=.*{name}.parquet': this is a folder or a device, no file"):
            load_task(tmp_path / f"{name}.parquet")
    assert list(task_names(tmp_path)) == list(task_names())


def test_parquet_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """The bytes of a string column are nobody's promise."""
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    path = write(tmp_path / "latin.parquet", text=broken, label=[1])
    with pytest.raises(FileError, match=r"latin.parquet cannot be read as a parquet file .*UnicodeDecodeError"):
        load_task(path)


def test_huge_files_are_refused_at_once(tmp_path: Path) -> None:
    n_rows = 5_000_000
    parts = pa.DictionaryArray.from_arrays(np.zeros(n_rows, np.int8), ["a" * 10_000])
    path = write(tmp_path / "rows.parquet", text=parts, label=np.zeros(n_rows, np.int8))
    began = time.perf_counter()
    with pytest.raises(FileError, match=r"has 5000000 rows. Keep 1000000 at most"):
        load_task(path)
    write(path, text=parts[:100_000], label=np.zeros(100_000, np.int8))
    with pytest.raises(FileError, match=r"first \d+ texts have over \d+ letters"):
        load_task(path)
    assert time.perf_counter() - began < 10


# Folder of task files


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A hub task's file, a file of another name, an embedded task's name, and a file that is no task."""
    for name in ("civil_comments", "mine", "tense"):
        write(tmp_path / f"{name}.parquet", text=[f"{name} {i}" for i in range(8)], label=[True, False] * 4)
    (tmp_path / "SOURCES.md").write_text("Where they come from.\n")
    return tmp_path


def test_folder_serves_tasks_by_name(data_dir: Path) -> None:
    task = load_task("civil_comments", data_dir=data_dir, suffix=" So")
    record = HUB_TASKS["civil_comments"]
    assert (task.name, task.class_names) == ("civil_comments", record.class_names)
    assert task.description == "local file, named like the hub task civil_comments; label 1 = toxic"  # 0.5: who knows
    assert (task.texts[1], task.labels[:2], task.suffix) == ("civil_comments 1", (1, 0), " So")
    assert task.source == "file: civil_comments.parquet"
    assert load_task("mine", data_dir=str(data_dir)).class_names == ("label 0", "label 1")
    assert load_task("tense", data_dir=data_dir).texts[0] == "tense 0"
    assert load_task("hostility", data_dir=data_dir) == load_task("hostility")
    assert load_task(data_dir / "mine.parquet", data_dir=data_dir).texts[0] == "mine 0"
    names = task_names(data_dir)
    assert set(names) == {*task_names(), "mine"}
    assert names["mine"].endswith("mine.parquet)") and task.description in names["civil_comments"]


def test_folder_lacks_a_task(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = "civil_comments.parquet, mine.parquet, tense.parquet"
    for name in ("imdb", "unheard-of", "../mine", "SOURCES"):
        with pytest.raises(InputError, match=rf"{re.escape(str(data_dir))}.* has no {name}\.parquet; it has {files}"):
            load_task(name, data_dir=data_dir)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=r"it has no \.parquet, \.csv or \.jsonl file"):
        load_task("imdb", data_dir=empty)
    assert load_task("tense", data_dir=empty) == load_task("tense")


def test_names_may_be_written_in_any_script(tmp_path: Path) -> None:
    for stem in ("données", "情感", "deux mots", 'l\'"été"', "a$b$c|`d`"):
        path = write(tmp_path / f"{stem}.parquet", text=[f"text {i}" for i in range(6)], label=[0, 1] * 3)
        for task in (load_task(stem, data_dir=tmp_path), load_task(path), load_task(str(path))):
            assert task.name == stem and len(task.split(1, 1, 1).concept) == 2
    decomposed = unicodedata.normalize("NFD", "données")  # as some file systems and some keyboards have it
    assert load_task(decomposed, data_dir=tmp_path).name == "données"
    (tmp_path / os.fsdecode(b"\xff.parquet")).write_bytes(path.read_bytes())
    assert all(name.encode() for name in task_names(tmp_path))


@pytest.mark.parametrize("value", [None, 3, 1.5, b"tense", ["tense"], {}, float("nan"), np.zeros(2), object()])
def test_odd_arguments_are_named(value: object) -> None:
    """Whatever comes, the error names the argument that it came for."""
    toy = toy_task()
    for argument, call in {
        "name": lambda: load_task(value),
        "suffix": lambda: toy.with_suffix(value),
        "class_names": lambda: Task("toy", "", value, ("a",), (1,)),
        "description": lambda: Task("toy", value, ("no", "yes"), ("a",), (1,)),
    }.items():
        with pytest.raises(InputError, match=argument):
            call()
    if value is None:
        return
    for argument, call in {
        "data_dir": lambda: load_task("tense", data_dir=value),
        "suffix": lambda: load_task("tense", suffix=value),
        "revision": lambda: load_task("sst2", revision=value),
        "groups": lambda: Task("toy", "", ("no", "yes"), ("a",), (1,), groups=value),
    }.items():
        with pytest.raises(InputError, match=argument):
            call()


@pytest.mark.parametrize("name", ["", "\0", "\0.parquet", "x" * 5000 + ".parquet", "~nobody/x.parquet", "\ud800", "/"])
def test_odd_names_are_named(name: str, tmp_path: Path) -> None:
    for call in (lambda: load_task(name), lambda: load_task(name, data_dir=tmp_path), lambda: load_task(Path(name))):
        with pytest.raises(InputError, match=r"name=|data_dir="):
            call()
    if name != "/":
        with pytest.raises(InputError, match="data_dir="):
            load_task("tense", data_dir=name)


def test_folder_must_be_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_dir.parent)
    for path, message in (
        (data_dir / "absent", "is no folder"),
        (data_dir / "mine.parquet", "is no folder"),
    ):
        for refused in (lambda path=path: load_task("tense", data_dir=path), lambda path=path: task_names(path)):
            with pytest.raises(InputError, match=f"data_dir=.*{message}"):
                refused()


def test_too_few_rows_say_how_many(data_dir: Path) -> None:
    path = data_dir / "mine.parquet"
    write(path, text=["a", "A!", "b", "c", "d", "e"], label=[0, 0, 0, 1, 1, 1])
    with pytest.raises(
        InputError,
        match=r"'mine' has 2 distinct texts of label 0 \('label 0'\) and 3 of label 1 .* "
        r"concept=4 \+ operating=2 \+ evaluation=1 need 7 of each\. Lower them to a sum of 2 at most, or add texts",
    ):
        load_task("mine", data_dir=data_dir).split(4, 2, 1)


# Hub


def test_hub_table() -> None:
    assert set(HUB_TASKS) == {
        *("amazon_polarity", "yelp_polarity", "sst2", "imdb", "civil_comments", "cola", "rotten_tomatoes"),
        *("tweeteval_irony", "tweeteval_hate", "tweeteval_offensive", "boolq", "mnli"),
    }
    for record in HUB_TASKS.values():
        assert re.fullmatch(r"[\w-]+/\w+", record.hub_id)
        assert len(record.class_names) == 2
        assert record.per_class >= 1000  # the paper takes 800; contradictions are dropped later
        assert re.fullmatch(r"[0-9a-f]{40}", record.revision)
    assert {HUB_TASKS[f"tweeteval_{kind}"].config for kind in ("irony", "hate", "offensive")} == {
        "irony",
        "hate",
        "offensive",
    }
    assert list(task_names()) == [*EMBEDDED_TASKS, *HUB_TASKS] == list(task_names(data_dir=None))
    assert all(task_names().values())


@pytest.mark.parametrize("name", list(HUB_TASKS))
def test_hub_rows(name: str) -> None:
    record = HUB_TASKS[name]
    columns = {
        "amazon_polarity": ("title", "content"),
        "sst2": ("sentence",),
        "cola": ("sentence",),
        "boolq": ("passage", "question"),
        "mnli": ("premise", "hypothesis"),
    }.get(name, ("text",))
    scores = {"civil_comments": (0.49, 0.5), "boolq": (False, True), "mnli": (2, 0)}.get(name, (0, 1))
    label = {"civil_comments": "toxicity", "boolq": "answer"}.get(name, "label")
    rows = [{**{column: f" {column}<br />{i}" for column in columns}, label: scores[i], "idx": i} for i in (0, 1)]
    texts, labels, groups = examples_from_rows(rows, record)
    joint = " " if name in ("boolq", "mnli") else ": "
    assert texts == [joint.join(f"{column} {i}" for column in columns) for i in (0, 1)]
    assert labels == [0, 1] and (groups is None) == (record.group is None)


def test_mnli_without_neutral_pairs_keeps_a_premise_in_one_split() -> None:
    said = HUB_TASKS["mnli"]
    assert "label 0: entailment, 2: contradiction, 1: dropped; rows of one premise stay in one split" in said.reading
    rows = [
        {"premise": premise, "hypothesis": f"{premise} {label}.", "label": label}
        for premise in ("It rained", "it rained.", "He left", "She slept", "They sang")  # the second is the first
        for label in (0, 1, 2)
    ]
    texts, labels, groups = examples_from_rows(rows, said)
    assert groups is not None and groups == [0, 0, 1, 1, 2, 2, 3, 3]  # two hypotheses a premise, the third repeats
    assert labels == [1, 0] * 4 and texts[:2] == ["It rained It rained 0.", "It rained It rained 2."]
    splits = Task("mnli", "", said.class_names, tuple(texts), tuple(labels), groups=tuple(groups)).split(2, 1, 1)
    seen = [{text.split(" ")[0] for text in part.texts} for part in vars(splits).values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 4
    with pytest.raises(InputError, match="label=3; 2 or 0 was expected"):
        examples_from_rows([{**rows[0], "label": 3}], said)


def test_hub_rows_are_filtered_and_capped() -> None:
    record = HubTask("some/set", None, "train", ("text",), ("no", "yes"), "", per_class=2)
    cells = "a0 A.0 b- _1 _1 c0 d0 e1 e1 f? a1 h1"  # text and label; A. repeats a, _ has no text
    rows = [
        {"text": text.replace("_", "") or None, "label": {"-": -1, "?": None}.get(label, int(label in "1"))}
        for *letters, label in cells.split()
        for text in ["".join(letters)]
    ]
    stream = iter(rows)
    assert examples_from_rows(stream, record) == (["a", "c", "e", "a"], [0, 0, 1, 1], None)
    assert next(stream)["text"] == "h"  # reading stopped when both classes were full
    for row, message in (
        ({"text": "a", "label": 4}, "label=4"),
        ({"text": "a", "label": 0.5}, "label=0.5"),
        ({"text": "a", "label": "1"}, "label='1'"),
        ({"text": 7, "label": 1}, "text=7; a string"),
        ({"text": "a"}, "lacks label; it has text"),
    ):
        with pytest.raises(InputError, match=message):
            examples_from_rows([row], record)


def test_hub_scores_and_escapes() -> None:
    record = HubTask("some/set", None, "train", ("text",), ("no", "yes"), "", label="score", threshold=0.5)
    scores = (0.5, 0.4999, None, float("nan"), 1.0)
    rows = [{"text": f"text {i}", "score": score} for i, score in enumerate(scores)]
    assert examples_from_rows(rows, record) == (["text 0", "text 1", "text 4"], [1, 0, 1], None)
    for escaped, text in ((True, 'Tom & "Jo"s \\ end'), (False, 'Tom &\\n \\"Jo\\"s \\ end')):
        record = HubTask("some/set", None, "train", ("text",), ("no", "yes"), "", escaped=escaped)
        row = {"text": 'Tom &amp;\\n \\"Jo\\"s \\ end', "label": 1}
        assert examples_from_rows([row], record) == ([text], [1], None)


@pytest.mark.parametrize("name", list(HUB_TASKS))
def test_hub_offline_names_the_alternatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"cannot be reached.*film-sentiment.*\.parquet"):
        load_task(name)


def test_hub_is_streamed_at_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that reach the clients, and the task that comes back; failures are explained."""
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(8)]
    asked: list[object] = []

    def dataset_info(_: object, repo: str, *, revision: str, timeout: float) -> object:
        asked.append((repo, revision))
        return SimpleNamespace(sha="c" * 40)

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr("llvlit.tasks.sources.hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    task = load_task("tweeteval_irony")
    assert asked == [
        ("cardiffnlp/tweet_eval", HUB_TASKS["tweeteval_irony"].revision),
        (("cardiffnlp/tweet_eval", "irony"), {"split": "train", "revision": "c" * 40, "streaming": True}),
    ]
    assert sorted(task.texts) == [row["text"] for row in rows]
    assert all(int(text[-1]) % 2 == label for text, label in zip(task.texts, task.labels, strict=True))
    assert task.class_names == ("literal", "ironic")
    assert task.source == f"hub: cardiffnlp/tweet_eval, irony, train, commit {'c' * 40}"
    load_task("tweeteval_irony", revision="other")
    assert asked[2] == ("cardiffnlp/tweet_eval", "other")
    for name in ("tense", "some.parquet"):
        with pytest.raises(InputError, match="revision='other' is of use on the hub alone"):
            load_task(name, revision="other")

    def fail(*arguments: object, **options: object) -> object:
        raise ConnectionError("timed out")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    before = vars(datasets.config).copy()
    with pytest.raises(InputError, match=r"could not be read \(timed out\).*film-sentiment"):
        load_task("imdb")
    assert vars(datasets.config) == before, "the settings of datasets are put back"


def test_failure_is_found_in_the_chain() -> None:
    asked = httpx.Request("GET", "http://hub/a/b.safetensors")
    with pytest.raises(OSError) as wrapped:
        try:
            raise RemoteEntryNotFoundError("404.\n\nMore.", response=httpx.Response(404, request=asked))
        except RemoteEntryNotFoundError as error:
            raise OSError("Something is wrong") from error
    assert failure(wrapped.value) == "Entry Not Found for url: http://hub/a/b.safetensors"
    assert failure(ValueError("first\nsecond")) == "first second"
    assert failure(ValueError()) == "ValueError"
    assert len(failure(ValueError("word " * 1000))) <= 300


def test_rows_are_shuffled_within_a_buffer() -> None:
    rows = list(shuffled(range(1000), buffer_size=100))
    assert sorted(rows) == list(range(1000)) and rows != sorted(rows)
    assert rows == list(shuffled(range(1000), buffer_size=100))
    assert rows != list(shuffled(range(1000), buffer_size=100, seed=1))
    assert max(row - place for place, row in enumerate(rows)) <= 100
