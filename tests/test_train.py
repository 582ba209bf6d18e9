"""Training: the corpus in both layouts, windows that can be asked for twice, runs that survive a kill."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from string import ascii_letters
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from llvlit import files, load_model
from llvlit.errors import FileError, InputError, LlvlitError, NumericalError
from llvlit.training.corpus import (
    END_OF_TEXT,
    RATINGS,
    SUFFIX,
    Corpus,
    WindowStream,
    fingerprint_of,
    read_reviews,
    tokenize_corpus,
    train_tokenizer,
    window_streams,
)
from llvlit.training.family import train_family
from llvlit.training.loop import TrainingState, losses, train_model
from llvlit.training.recipe import SIZES, Recipe, Size, build_model

WORDS = (
    "the",
    "film",
    "plot",
    "actor",
    "scene",
    "was",
    "felt",
    "great",
    "fine",
    "dull",
    "bad",
    "slow",
    "clever",
    "warm",
)
VOCABULARY = 320
RECIPE = Recipe(steps=10, n_windows=4, length=24, decay=0.4, late_from=5)


def reviews(n_reviews: int = 60) -> list[tuple[str, int]]:
    """Random reviews, two of three of them rated."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(12, 60))) for _ in range(n_reviews)]
    ratings = [0 if row % 3 == 0 else int(generator.choice(RATINGS)) for row in range(n_reviews)]
    return list(zip(texts, ratings, strict=True))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for text, _ in reviews()], vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Corpus:
    return tokenize_corpus(reviews(), tokenizer)


@pytest.fixture(scope="module")
def streams(corpus: Corpus, tokenizer: Tokenizer) -> tuple[WindowStream, WindowStream]:
    return window_streams(corpus, tokenizer, length=RECIPE.length, verdict_weight=4.0, seed=0)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size of the family that trains in no time, and is judged in no time."""
    monkeypatch.setitem(SIZES, "tiny", Size(n_layers=2, hidden_size=16, n_heads=2))
    monkeypatch.setattr("llvlit.training.family.FINAL_BATCHES", 2)


# Reading


def write_acl_imdb(folder: Path) -> None:
    written = {
        "train/pos/0_9.txt": "Loved it.<br /><br />Twice!",
        "train/pos/10_10.txt": "Superb",
        "train/neg/123_1.txt": " Awful \n film<br/>really ",
        "train/unsup/5_0.txt": "Né en été.",
        "test/pos/7_8.txt": "not for training",
    }
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def write_gzipped(folder: Path, written: list[tuple[str, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "rated_00.tsv.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(f"{rating}\t{text}\n" for text, rating in written if rating)
    with gzip.open(folder / "unsup_00.txt.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(f"{text}\n" for text, rating in written if not rating)


def test_the_data_sets_own_folder_is_read(tmp_path: Path) -> None:
    write_acl_imdb(tmp_path)
    assert list(read_reviews(tmp_path)) == [
        ("Loved it. Twice!", 9),
        ("Superb", 10),
        ("Awful film really", 1),
        ("Né en été.", 0),
    ]


def test_gzipped_lines_are_read(tmp_path: Path) -> None:
    written = [("good\tas tabs go", 8), ("Né en été.", 0), ("bad", 1), ("9\tis no rating here", 0)]
    write_gzipped(tmp_path, written)
    assert sorted(read_reviews(str(tmp_path))) == sorted(written)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"neither a train/ folder \(aclImdb\) nor"):
            list(read_reviews(folder))


def odd_corpora(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders that are no corpora, and what is said of each."""
    whole = gzip.compress(b"9\ta fine film\n" * 50)
    lines = {
        "latin": (gzip.compress("7\tdéjà vu\n".encode("latin-1")), "cannot be read as gzipped lines in UTF-8"),
        "cut": (whole[:-20], "cannot be read as gzipped lines in UTF-8"),
        "plain": (b"9\ta fine film\n", "cannot be read as gzipped lines in UTF-8"),
        "rating": (gzip.compress(b"11\ta fine film\n"), "has the rating '11'; expected one of 1, 2, 3"),
        "unmarked": (gzip.compress(b"a fine film\n"), "has the rating 'a fine film'"),
        "endless": (gzip.compress(b"0" * 2_000_000), "has a line of over"),
        "empty": (gzip.compress(b""), "holds no review"),
        "mute": (gzip.compress(b"9\t\n" * 9), "holds no review"),
        "few": (gzip.compress(b"9\ta fine film\n"), "holds 1 rated reviews of 1, and no rated review is left"),
    }
    for name, (content, message) in lines.items():
        (folder / name).mkdir()
        (folder / name / "part.tsv.gz").write_bytes(content)
        yield folder / name, message
    reviews_in = {
        "latin": "in UTF-8",
        "folder": "no regular file",
        "pipe": "no regular file",
        "endless": "no regular file",
    }
    for name, message in {**reviews_in, "name": "has the rating 'review'"}.items():
        part = folder / f"files-{name}" / "train" / "pos"
        part.mkdir(parents=True)
        path = part / ("review.txt" if name == "name" else "1_9.txt")
        if name == "folder":
            path.mkdir()
        elif name == "pipe":
            os.mkfifo(path)
        elif name == "endless":
            path.symlink_to("/dev/urandom")
        else:
            path.write_bytes(b"d\xe9j\xe0 vu")
        yield folder / f"files-{name}", message
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "part.txt.gz")
    yield folder / "pipes", "no regular file"
    (folder / "no-reviews" / "train").mkdir(parents=True)
    yield folder / "no-reviews", "holds no review"
    (folder / "file").write_bytes(b"")
    yield folder / "file", "neither a train/ folder"
    yield Path("/dev/urandom"), "neither a train/ folder"


def test_odd_corpora_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    began = time.perf_counter()
    for folder, message in odd_corpora(tmp_path / "corpora"):
        with pytest.raises(LlvlitError, match=message) as told:
            train_family(folder, tmp_path / "run", sizes=["tiny"], steps=1, device="cpu")
        assert folder.name in str(told.value) or folder.name == "few"
    assert time.perf_counter() - began < 10
    assert sorted(files_of(tmp_path / "run")) == [".llvlit.json", "corpus.safetensors", "tokenizer.json"]  # of the few


# Tokens


def test_tokenizer_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    for text in ("The film, été 2004 — 😀!", " leading", "tab\tand  two spaces", SUFFIX):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_verdicts_differ_in_the_token_after_the_suffix(tokenizer: Tokenizer) -> None:
    """The last token of `` Rating:`` is what every verdict is predicted from."""
    suffix = tokenizer.encode(SUFFIX).ids
    firsts = set()
    for rating in RATINGS:
        whole = tokenizer.encode(f"dull{SUFFIX} {rating}/10").ids
        assert whole[-len(suffix) - 3 : -3] == suffix
        assert [tokenizer.decode([token]) for token in whole[-3:]] == [f" {rating}", "/", "10"]
        firsts.add(whole[-3])
    assert len(firsts) == len(RATINGS)


def test_corpus_holds_its_reviews(corpus: Corpus, tokenizer: Tokenizer) -> None:
    for row, (text, rating) in enumerate(reviews()):
        assert tokenizer.decode(corpus.review(row).tolist()) == text
        assert corpus.ratings[row] == rating
    others = [*reviews()[:-1], (reviews()[-1][0], reviews()[-1][1] % 10 + 1)]
    assert tokenize_corpus(others, tokenizer).fingerprint != corpus.fingerprint
    assert len({fingerprint_of(read) for read in (reviews(), others, reviews()[::-1])}) == 3


# Windows


def test_batch_depends_on_seed_and_index_alone(
    streams: tuple[WindowStream, WindowStream], corpus: Corpus, tokenizer: Tokenizer
) -> None:
    training, _ = streams
    again, _ = window_streams(corpus, tokenizer, length=RECIPE.length, verdict_weight=4.0, seed=0)
    batches = [training.batch(index, 6)[0] for index in (3, 1, 2)]
    for index, batch in zip((3, 1, 2), batches, strict=True):
        assert np.array_equal(again.batch(index, 6)[0], batch)
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(replace(training, seed=1).batch(3, 6)[0], batches[0])


def test_shapes_and_types(streams: tuple[WindowStream, WindowStream]) -> None:
    tokens, weights = streams[0].batch(0, 5)
    assert tokens.shape == weights.shape == (5, RECIPE.length)
    assert (tokens.dtype, weights.dtype) == (np.int64, np.float32)
    assert tokens.max() < VOCABULARY


def test_rated_windows_end_with_a_verdict(streams: tuple[WindowStream, WindowStream], tokenizer: Tokenizer) -> None:
    """Odd rows: `` Rating: 9/10<|endoftext|>`` at the end, weight on the token after the colon and on no other."""
    verdicts = {tokenizer.encode(f" {rating}").ids[0] for rating in RATINGS}
    colon = tokenizer.encode(SUFFIX).ids[-1]
    n_verdicts = 0
    for index in range(20):
        tokens, weights = streams[0].batch(index, 6)
        assert (weights[0::2] == 1).all()
        for window, weight in zip(tokens[1::2], weights[1::2], strict=True):
            end = tokenizer.decode(window[-12:].tolist(), skip_special_tokens=False)
            assert any(end.endswith(f"{SUFFIX} {rating}/10{END_OF_TEXT}") for rating in RATINGS), end
            heavy = np.flatnonzero(weight != 1)
            assert (weight[heavy] == 4).all()
            assert heavy[-1] == RECIPE.length - 4
            assert set(window[heavy]) <= verdicts
            assert all(window[place - 1] == colon for place in heavy if place)
            n_verdicts += len(heavy)
    assert n_verdicts > 60  # excerpts are short enough for several verdicts in some windows


def test_verdict_is_that_of_the_review(tokenizer: Tokenizer) -> None:
    """One review per rating, each of one letter: the letters in a window name the verdict after them."""
    letters = dict(zip(RATINGS, ascii_letters, strict=False))
    own = [(" ".join(letter * 30), rating) for rating, letter in letters.items()]
    stream, _ = window_streams(tokenize_corpus(own, tokenizer), tokenizer, length=40, verdict_weight=4.0, seed=0)
    seen = set()
    for index in range(20):
        for window in stream.batch(index, 4)[0][1::2]:
            for piece in tokenizer.decode(window.tolist(), skip_special_tokens=False).split(END_OF_TEXT)[1:-1]:
                text, _, verdict = piece.partition(SUFFIX)
                rating = int(verdict.split("/")[0])
                assert set(text) - {" "} == {letters[rating]}, piece
                seen.add(rating)
    assert seen == {int(stream.corpus.ratings[row]) for row in stream.rated}


def test_no_review_is_in_both_streams(streams: tuple[WindowStream, WindowStream], corpus: Corpus) -> None:
    training, held_out = streams
    assert not set(training.plain) & set(held_out.plain)
    assert set(training.plain) | set(held_out.plain) == set(range(len(corpus.ratings)))
    for stream in streams:
        assert set(stream.rated) == {row for row in stream.plain if corpus.ratings[row] > 0}


def test_windows_come_from_their_own_reviews(tokenizer: Tokenizer) -> None:
    """Each review is one letter, so that every token of a window says where it comes from."""
    own = [(" ".join(letter * 20), RATINGS[row % 8]) for row, letter in enumerate(ascii_letters)]
    for stream in window_streams(tokenize_corpus(own, tokenizer), tokenizer, length=30, verdict_weight=1.0, seed=3):
        tokens = np.concatenate([stream.batch(index, 8)[0][0::2] for index in range(200)])
        seen = set(tokenizer.decode(tokens.ravel().tolist())) - {" "}
        assert seen == {ascii_letters[row] for row in stream.plain}


def test_corpus_without_ratings_is_refused(tokenizer: Tokenizer) -> None:
    unrated = tokenize_corpus([(text, 0) for text, _ in reviews()], tokenizer)
    with pytest.raises(InputError, match="no rated review"):
        window_streams(unrated, tokenizer, length=24, verdict_weight=4.0, seed=0)


# Training


def fit(
    streams: tuple[WindowStream, WindowStream],
    checkpoint: Path,
    recipe: Recipe = RECIPE,
    *,
    visit: Callable[[int, torch.nn.Module, float | None], None] | None = None,
    corpus: str = "tiny",
) -> tuple[dict[str, torch.Tensor], TrainingState]:
    model, state = train_model(
        "tiny",
        recipe,
        streams,
        checkpoint,
        vocabulary=VOCABULARY,
        inputs={"corpus": corpus},
        checkpoint_every=3,
        visit=visit,
    )
    return {name: value.detach().clone() for name, value in model.named_parameters()}, state


class Killed(BaseException):
    """A kill, as far as a test can send one."""


def kill_at(step: int) -> Callable[[int, torch.nn.Module, float | None], None]:
    def visit(done: int, _model: torch.nn.Module, loss: float | None) -> None:
        if done == step and loss is not None:
            raise Killed

    return visit


@pytest.fixture
def halfway(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> Path:
    """Checkpoint of a run that was killed after its third step."""
    with pytest.raises(Killed):
        fit(streams, tmp_path / "checkpoint.safetensors", visit=kill_at(4))
    return tmp_path / "checkpoint.safetensors"


@pytest.mark.parametrize("killed_at", [[5], [3, 4, 8]], ids=str)
def test_killed_run_continues_bit_for_bit(
    streams: tuple[WindowStream, WindowStream], tmp_path: Path, killed_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    draw = WindowStream.batch

    def batch(stream: WindowStream, index: int, n_windows: int) -> tuple[np.ndarray, np.ndarray]:
        if stream is streams[0]:
            seen.append(index)
        return draw(stream, index, n_windows)

    monkeypatch.setattr(WindowStream, "batch", batch)
    expected, state = fit(streams, tmp_path / "whole.safetensors")
    assert seen == list(range(RECIPE.steps))
    steps: list[int] = []
    for step in killed_at:
        with pytest.raises(Killed):
            fit(streams, tmp_path / "killed.safetensors", visit=kill_at(step))
    found, resumed = fit(streams, tmp_path / "killed.safetensors", visit=lambda step, _model, _loss: steps.append(step))
    assert steps == list(range(3 * ((killed_at[-1] - 1) // 3), RECIPE.steps + 1))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert resumed.curve == state.curve
    assert [point["step"] for point in state.curve] == [3, 6, 9, 10]
    assert resumed.step == RECIPE.steps and resumed.seconds > 0


def test_verdicts_weigh_more_from_late_from_on(
    corpus: Corpus, tokenizer: Tokenizer, streams: tuple[WindowStream, WindowStream], tmp_path: Path
) -> None:
    """As if the stream had given them that weight, from that step on and not before."""
    heavy = window_streams(corpus, tokenizer, length=RECIPE.length, verdict_weight=40.0, seed=0)
    short = replace(RECIPE, steps=3)
    late, never = (fit(streams, tmp_path / f"{step}.safetensors", replace(short, late_from=step))[0] for step in (0, 3))
    expected = fit(heavy, tmp_path / "heavy.safetensors", replace(short, late_from=3))[0]
    assert all(torch.equal(late[name], expected[name]) for name in expected)
    assert not all(torch.equal(never[name], expected[name]) for name in expected)


def test_finished_run_is_loaded(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> None:
    expected, state = fit(streams, tmp_path / "checkpoint.safetensors")
    found, again = fit(streams, tmp_path / "checkpoint.safetensors", visit=kill_at(1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again == state


def test_training_learns(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> None:
    _, state = fit(streams, tmp_path / "checkpoint.safetensors", replace(RECIPE, steps=40))
    first, last = state.curve[0], state.curve[-1]
    assert set(last) == {"step", "training", "held_out_plain", "held_out_rated", "held_out_verdict"}
    assert first["held_out_plain"] > 5 and last["held_out_plain"] < first["held_out_plain"] - 1
    assert last["held_out_rated"] < first["held_out_rated"] - 1


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-3}, {"seed": 1}, {"n_windows": 5}, {"decay": 0.5}, {"late_from": 2}], ids=str
)
def test_another_recipe_is_refused(
    streams: tuple[WindowStream, WindowStream], halfway: Path, change: dict[str, float]
) -> None:
    before = halfway.read_bytes()
    with pytest.raises(InputError, match="trained with {} .*, not {}".format(*next(iter(change.items())))):
        fit(streams, halfway, replace(RECIPE, **change))
    assert halfway.read_bytes() == before


def test_another_corpus_is_refused(streams: tuple[WindowStream, WindowStream], halfway: Path) -> None:
    with pytest.raises(InputError, match="trained with corpus tiny, not another"):
        fit(streams, halfway, corpus="another")


def test_steps_may_change_until_the_rate_falls(streams: tuple[WindowStream, WindowStream], halfway: Path) -> None:
    with pytest.raises(InputError, match="step 3 of 10; steps=3 would need another learning rate in the past"):
        fit(streams, halfway, replace(RECIPE, steps=3))
    longer = replace(RECIPE, steps=12)  # both rates are at their peak up to step 3
    found, _ = fit(streams, halfway, longer)
    expected, _ = fit(streams, halfway.with_name("whole.safetensors"), longer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match="Keep the number of steps"):  # it has fallen by now
        fit(streams, halfway, replace(RECIPE, steps=20))


def test_steps_may_not_change_the_rise(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> None:
    slow = replace(RECIPE, warmup=0.5)
    path = tmp_path / "slow.safetensors"
    fit(streams, path, slow)
    with pytest.raises(InputError, match="another learning rate in the past"):
        fit(streams, path, replace(slow, steps=slow.steps + 4))


def test_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=0.1, decay=0.4)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:60] == [1.0] * 51
    assert all(later < earlier for earlier, later in pairwise(rates[60:]))
    assert rates[-1] == pytest.approx(1 / 40)


def test_diverged_run_keeps_the_last_good_checkpoint(streams: tuple[WindowStream, WindowStream], halfway: Path) -> None:
    before = halfway.read_bytes()
    broken = replace(streams[0], verdict_weight=float("nan"))
    with pytest.raises(NumericalError, match=r"not finite at step 6.*last good checkpoint"):
        fit((broken, streams[1]), halfway)
    assert halfway.read_bytes() == before


def test_loss_weighs_the_verdict() -> None:
    """Against the sum written out."""
    model = build_model("tiny", vocabulary=VOCABULARY, length=24, seed=0)
    tokens = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 7)
    weights[1, 4] = 4.0
    loss, per_token = losses(model, tokens, weights)
    scores = model(tokens).logits.log_softmax(-1)
    expected = [[-scores[row, place - 1, tokens[row, place]].item() for place in range(1, 7)] for row in (0, 1)]
    np.testing.assert_allclose(per_token.numpy(), expected, rtol=1e-5)
    assert loss.item() == pytest.approx((sum(map(sum, expected)) + 3 * expected[1][3]) / (12 + 3), rel=1e-5)


def test_weights_depend_on_the_seed_and_touch_no_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build_model("tiny", vocabulary=50, length=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    with pytest.raises(InputError, match="Did you mean 'tiny'"):
        build_model("tinny", vocabulary=50, length=8, seed=0)


# The family


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    write_gzipped(tmp_path / "corpus", reviews())
    return tmp_path / "corpus"


def family(corpus: Path, out: Path, **options: object) -> dict[str, Any]:
    """A family of one tiny model, trained for two steps."""
    chosen = {"sizes": ["tiny"], "steps": 2, "seed": 7, "device": "cpu", "vocabulary": VOCABULARY}
    return train_family(corpus, out, **{**chosen, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_family_can_be_loaded(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finals = family(corpus_folder, out, keep=[0, 2])
    model = load_model(out / "models" / "tiny", device="cpu")
    assert (model.n_layers, model.hidden_size, model.max_positions) == (2, 16, 160)
    training = json.loads((out / "models" / "tiny" / "training.json").read_text())
    assert training["held_out"] == finals["tiny"]
    assert training["curve"][-1]["step"] == 2
    assert (training["recipe"]["steps"], training["recipe"]["seed"]) == (2, 7)
    assert training["command"].endswith("--sizes tiny --steps 2 --seed 7")
    assert training["corpus"]["reviews"] == 60
    assert model.tokenizer.decode(model.tokenizer("dull Rating:")["input_ids"]) == "dull Rating:"
    assert model.tokenizer.eos_token == END_OF_TEXT

    tensors, _ = files.load_tensors(out / "tiny" / "checkpoint.safetensors", kind="training")
    for name, value in model.module.named_parameters():
        assert torch.equal(value, tensors[f"model.{name}"].to(torch.float16).float())
    weights = [(out / "models" / name / "model.safetensors").read_bytes() for name in ("tiny-0", "tiny-2", "tiny")]
    assert weights[0] != weights[1] == weights[2]

    remnants = [out / ".tokenizer.json.abcdefgh", out / "models" / "tiny" / ".model.safetensors.a_c_e_g1"]
    others = [out / ".notes.txt.abcdefgh", out / "models" / "tiny" / "notes.md"]
    for path in (*remnants, *others):
        path.write_text("")
    before = files_of(out)
    assert family(corpus_folder, out, keep=[0, 2]) == finals  # from its checkpoint
    assert not any(path.exists() for path in remnants) and all(path.exists() for path in others)
    kept = set(before) - {str(path.relative_to(out)) for path in remnants}
    after = files_of(out)
    assert set(after) == kept
    assert {name for name in kept if after[name] != before[name]} <= {"models/tiny/training.json"}  # the environment


def test_family_is_not_trained_on_another_corpus(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    family(corpus_folder, out)
    before = files_of(out)
    write_gzipped(tmp_path / "other", [(f"{text} indeed", rating) for text, rating in reviews()])
    both = [fingerprint_of(read_reviews(folder)) for folder in (corpus_folder, tmp_path / "other")]
    with pytest.raises(InputError, match="trained with corpus {}, not {}".format(*both)):
        family(tmp_path / "other", out)
    with pytest.raises(InputError, match="absent"):
        family(tmp_path / "absent", out)
    with pytest.raises(InputError, match="trained with vocabulary 320, not 330"):
        family(corpus_folder, out, vocabulary=330)
    with pytest.raises(InputError, match="trained with seed 7, not 8"):
        family(corpus_folder, out, seed=8)
    tokenizer = out / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'), encoding="utf-8")
    with pytest.raises(InputError, match=r"trained with tokenizer [0-9a-f]{16}, not"):
        family(corpus_folder, out)
    tokenizer.write_text(text, encoding="utf-8")
    assert files_of(out) == before


def test_a_step_that_was_passed_cannot_be_kept(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    family(corpus_folder, out, keep=[1])
    family(corpus_folder, out, keep=[1, 2])  # one lies there, the other is where the checkpoint stands
    for keep in ([0], [0, 1]):
        with pytest.raises(InputError, match=r"keep=0: tiny in .* stands at step 2 already.* was not kept"):
            family(corpus_folder, out, keep=keep)
    with pytest.raises(InputError, match="keep=3"):
        family(corpus_folder, out, keep=[3])
    (out / "tiny" / "checkpoint.safetensors").unlink()  # as if another run had been killed before its first
    family(corpus_folder, out, seed=8)
    with pytest.raises(InputError, match="keep=1: tiny"):
        family(corpus_folder, out, seed=8, keep=[1])


def test_what_llvlit_did_not_write_stays(corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with models of somebody else, and a corpus that is none."""
    (tmp_path / "models" / "precious").mkdir(parents=True)
    (tmp_path / "models" / "precious" / "model.safetensors").write_bytes(b"weights")
    before = files_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    for corpus in (corpus_folder, tmp_path):
        with pytest.raises(LlvlitError, match=r"which llvlit did not write|neither a train/ folder"):
            family(corpus, Path("."))
    assert files_of(tmp_path) == before


def test_a_model_folder_of_somebody_else_inside_a_run_stays(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    family(corpus_folder, out)
    assert files.finished(out, "training run") is not None
    mine = out / "models" / "tiny-1" / "config.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    with pytest.raises(FileError, match=r"tiny-1 .* llvlit did not write"):
        family(corpus_folder, out, keep=[1])
    assert mine.read_text() == "{}"


def test_a_run_has_its_folder_for_itself(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    files.own(out, "training run")
    before = files_of(out)
    script = (
        "import sys; from llvlit.files import locked\nwith locked(sys.argv[1]): print('has it', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", script, out], stdin=PIPE, stdout=PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(FileError, match=f"run is in use by process {other.pid}"):
            family(corpus_folder, out)
        other.communicate(b"\n")
    assert files_of(out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ["smal"]}, "Did you mean 'small'"),
        ({"sizes": "small"}, "sizes='small'"),
        ({"sizes": [3]}, "size=3"),
        ({"sizes": ["1x99999968"]}, "size='1x99999968' has over 1000000000 parameters"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, r"steps=1\.5"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "cpux"}, "device='cpux'"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"device": 1}, "device=1"),
        ({"keep": [-1]}, "keep=-1"),
        ({"keep": 3}, "keep=3"),
        ({"compiled": "yes"}, "compiled='yes'"),
        ({"vocabulary": 10}, "vocabulary=10"),
        ({"corpus": 3}, "corpus=3"),
        ({"out": None}, "out=None"),
    ],
    ids=str,
)
def test_family_refuses_before_it_reads(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = {"corpus": tmp_path / "absent", "out": tmp_path / "run", **options}
    with pytest.raises(InputError, match=message):
        train_family(**arguments)
    assert list(tmp_path.iterdir()) == []
