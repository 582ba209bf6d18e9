"""Training: the corpus in both layouts, windows that can be asked for twice, runs that survive a kill."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from llvlit import load_model
from llvlit.errors import InputError, NumericalError
from llvlit.training import run as training_run
from llvlit.training import train
from llvlit.training.corpus import (
    END_OF_TEXT,
    RATINGS,
    SUFFIX,
    Corpus,
    WindowStream,
    load_corpus,
    read_reviews,
    save_corpus,
    tokenize_corpus,
    train_tokenizer,
    window_streams,
)
from llvlit.training.run import train_family
from llvlit.training.train import Recipe, Size, TrainingState, build_model, train_model

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
    """One size of the family that trains in no time."""
    monkeypatch.setitem(train.SIZES, "tiny", Size(n_layers=2, hidden_size=16, n_heads=2))


# Reading


def write_acl_imdb(folder: Path) -> None:
    files = {
        "train/pos/0_9.txt": "Loved it.<br /><br />Twice!",
        "train/pos/10_10.txt": "Superb",
        "train/neg/123_1.txt": " Awful \n film<br/>really ",
        "train/unsup/5_0.txt": "Né en été.",
        "test/pos/7_8.txt": "not for training",
    }
    for name, text in files.items():
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


def test_corpus_round_trip(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_corpus(corpus, tmp_path / "corpus.safetensors")
    loaded = load_corpus(tmp_path / "corpus.safetensors")
    assert loaded.fingerprint == corpus.fingerprint
    for row, (text, rating) in enumerate(reviews()):
        assert tokenizer.decode(loaded.review(row).tolist()) == text
        assert loaded.ratings[row] == rating
    others = [*reviews()[:-1], (reviews()[-1][0], reviews()[-1][1] % 10 + 1)]
    assert tokenize_corpus(others, tokenizer).fingerprint != corpus.fingerprint


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
    progress: Callable[[int, int, str], None] | None = None,
    corpus_fingerprint: str = "tiny",
) -> tuple[dict[str, torch.Tensor], TrainingState]:
    model, state = train_model(
        "tiny",
        recipe,
        streams,
        checkpoint,
        vocabulary=VOCABULARY,
        corpus_fingerprint=corpus_fingerprint,
        checkpoint_every=3,
        progress=progress,
    )
    return {name: value.detach().clone() for name, value in model.named_parameters()}, state


class Killed(BaseException):
    """A kill, as far as a test can send one."""


def kill_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, _total: int, _message: str) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.fixture
def halfway(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> Path:
    """Checkpoint of a run that was killed after its third step."""
    with pytest.raises(Killed):
        fit(streams, tmp_path / "checkpoint.safetensors", progress=kill_at(4))
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
            fit(streams, tmp_path / "killed.safetensors", progress=kill_at(step))
    found, resumed = fit(
        streams, tmp_path / "killed.safetensors", progress=lambda step, _total, _message: steps.append(step)
    )
    assert steps == list(range(3 * ((killed_at[-1] - 1) // 3) + 1, RECIPE.steps + 1))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert resumed.curve == state.curve
    assert [point["step"] for point in state.curve] == [3, 6, 9, 10]
    assert resumed.step == RECIPE.steps and resumed.seconds > 0


def test_verdicts_weigh_more_from_late_from_on(
    streams: tuple[WindowStream, WindowStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = train._losses
    seen: list[set[float]] = []

    def spy(model: torch.nn.Module, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            seen.append(set(weights.unique().tolist()))
        return losses(model, tokens, weights)

    monkeypatch.setattr(train, "_losses", spy)
    fit(streams, tmp_path / "checkpoint.safetensors")
    assert seen == [{1.0, 4.0}] * 5 + [{1.0, 40.0}] * 5


def test_finished_run_is_loaded(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> None:
    expected, state = fit(streams, tmp_path / "checkpoint.safetensors")
    found, again = fit(streams, tmp_path / "checkpoint.safetensors", progress=kill_at(1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again == state


def test_training_learns(streams: tuple[WindowStream, WindowStream], tmp_path: Path) -> None:
    _, state = fit(streams, tmp_path / "checkpoint.safetensors", replace(RECIPE, steps=60))
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
    with pytest.raises(InputError, match=rf"trained with other settings \({next(iter(change))}\)"):
        fit(streams, halfway, replace(RECIPE, **change))
    assert halfway.read_bytes() == before


def test_another_corpus_is_refused(streams: tuple[WindowStream, WindowStream], halfway: Path) -> None:
    with pytest.raises(InputError, match=r"other settings \(corpus\)"):
        fit(streams, halfway, corpus_fingerprint="another")


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


def test_diverged_run_keeps_the_last_good_checkpoint(
    streams: tuple[WindowStream, WindowStream], halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = halfway.read_bytes()
    losses = train._losses

    def diverging(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, per_token = losses(*arguments)
        return loss, per_token * float("nan")

    monkeypatch.setattr(train, "_losses", diverging)
    with pytest.raises(NumericalError, match=r"not finite at step 6.*last good checkpoint"):
        fit(streams, halfway)
    assert halfway.read_bytes() == before


def test_loss_weighs_the_verdict() -> None:
    """Against the sum written out."""
    model = build_model("tiny", vocabulary=VOCABULARY, length=24, seed=0)
    tokens = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 7)
    weights[1, 4] = 4.0
    loss, per_token = train._losses(model, tokens, weights)
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


def test_family_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "VOCABULARY", VOCABULARY)
    write_gzipped(tmp_path / "corpus", reviews())
    out = tmp_path / "run"
    finals = train_family(tmp_path / "corpus", out, sizes=["tiny"], steps=2, seed=7, device="cpu")
    model = load_model(out / "models" / "tiny", device="cpu")
    assert (model.n_layers, model.hidden_size, model.max_positions) == (2, 16, 160)
    training = json.loads((out / "models" / "tiny" / "training.json").read_text())
    assert training["held_out"] == finals["tiny"]
    assert training["curve"][-1]["step"] == 2
    assert (training["recipe"]["steps"], training["recipe"]["seed"]) == (2, 7)
    assert training["command"].endswith("--sizes tiny --steps 2 --seed 7")
    assert training["corpus"]["reviews"] == 60
    trained = train_family(tmp_path / "corpus", out, sizes=["tiny"], steps=2, seed=7, device="cpu")
    assert trained == finals  # from its checkpoint
    assert model.tokenizer.decode(model.tokenizer("dull Rating:")["input_ids"]) == "dull Rating:"
    assert model.tokenizer.eos_token == END_OF_TEXT

    tensors, _ = train.load_tensors(out / "tiny" / "checkpoint.safetensors", kind="training")
    for name, value in model.module.named_parameters():
        assert torch.equal(value, tensors[f"model.{name}"].to(torch.float16).float())


def test_family_refuses_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'small'"):
        train_family(tmp_path, tmp_path / "run", sizes=["smal"])
    with pytest.raises(InputError, match="steps=0"):
        train_family(tmp_path, tmp_path / "run", steps=0)
    assert list(tmp_path.iterdir()) == []
