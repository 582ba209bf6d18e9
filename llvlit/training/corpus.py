"""Training text: film reviews, some with a rating, as one array of tokens and a stream of windows.

Half of the windows are plain text.  The other half are packed with excerpts of rated reviews, each
closed by `` Rating: 9/10``, so that the token before the verdict has to carry it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from llvlit import checks
from llvlit.errors import FileError, InputError
from llvlit.files import foreign, read_bytes, read_text

END_OF_TEXT = "<|endoftext|>"
SUFFIX = " Rating:"
RATINGS = (1, 2, 3, 4, 7, 8, 9, 10)
SHORTEST_EXCERPT = 8
HELD_OUT_FRACTION = 0.01
MOST_REVIEWS, MOST_LETTERS, LONGEST_LINE = 1_000_000, 2**29, 2**20
"""Of a corpus, and of a review on a line; what has more is none, or has no end."""


def read_reviews(folder: str | Path) -> Iterator[tuple[str, int]]:
    """Reviews of a corpus folder as ``(text, rating)``; rating 0 where there is none.

    Two layouts are read: the data set's own ``aclImdb/`` (``train/pos/123_9.txt``: the rating is in the
    file's name), or gzipped lines (``*.txt.gz`` plain, ``*.tsv.gz`` rating, tab, text).

    Raises
    ------
    InputError
        If the folder holds neither layout.
    FileError
        If a file is not what its name says, or there is no end to the reviews.
    """
    folder = checks.path("corpus", folder)
    read = _read_files if os.path.isdir(folder / "train") else _read_lines
    n_letters = 0
    for number, (text, rating) in enumerate(read(folder)):
        n_letters += len(text)
        if number >= MOST_REVIEWS or n_letters > MOST_LETTERS:
            raise FileError(
                f"corpus={str(folder)!r} has over {MOST_REVIEWS} reviews or {MOST_LETTERS} letters. Take a part of it."
            )
        yield text, rating


def _read_files(folder: Path) -> Iterator[tuple[str, int]]:
    for part in ("pos", "neg", "unsup"):
        for path in sorted((folder / "train" / part).glob("*.txt")):
            rating = 0 if part == "unsup" else _rating(path.stem.rpartition("_")[2], path)
            text = read_text(path, "a review")
            yield re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text)).strip(), rating


def _read_lines(folder: Path) -> Iterator[tuple[str, int]]:
    paths = sorted([*folder.glob("*.txt.gz"), *folder.glob("*.tsv.gz")]) if os.path.isdir(folder) else []
    if not paths:
        raise InputError(
            f"corpus={str(folder)!r} has neither a train/ folder (aclImdb) nor *.txt.gz or *.tsv.gz files. "
            "Name the folder of the Large Movie Review Dataset, or of gzipped lines."
        )
    for path in paths:
        packed = io.BytesIO(read_bytes(path, "gzipped lines"))
        with foreign(path, "gzipped lines in UTF-8"), gzip.open(packed, "rt", encoding="utf-8") as lines:
            while line := lines.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise FileError(f"{path} has a line of over {LONGEST_LINE - 1} letters, which is no review.")
                if path.name.endswith(".tsv.gz"):
                    mark, _, text = line.rstrip("\n").partition("\t")
                    yield text, _rating(mark, path)
                else:
                    yield line.rstrip("\n"), 0


def _rating(mark: str, path: Path) -> int:
    if mark not in map(str, RATINGS):
        raise FileError(f"{path} has the rating {checks.shown(mark)}; expected one of {', '.join(map(str, RATINGS))}.")
    return int(mark)


def fingerprint_of(reviews: Iterable[tuple[str, int]]) -> str:
    """SHA-256 of texts and ratings, first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for review in reviews:
        digest.update(json.dumps(review).encode())
    return digest.hexdigest()[:16]


def train_tokenizer(texts: Sequence[str], *, vocabulary: int = 4096) -> Tokenizer:
    """Byte-level BPE tokenizer with ``vocabulary`` entries, ``<|endoftext|>`` the first of them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    ratings = [f"{SUFFIX} {rating}/10" for rating in RATINGS for _ in range(2000)]
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *ratings], trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokenized reviews.

    Attributes
    ----------
    tokens : (n_tokens,) uint16
        All reviews, one after the other.
    starts : (n_reviews + 1,) int64
        Review i is ``tokens[starts[i]:starts[i + 1]]``.
    ratings : (n_reviews,) int64
        1 to 10, or 0 for none.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ratings: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and ratings, first 16 digits."""
        digest = hashlib.sha256(self.tokens.tobytes() + self.starts.tobytes() + self.ratings.tobytes())
        return digest.hexdigest()[:16]

    def review(self, index: int) -> np.ndarray:
        """Tokens of one review."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def tokenize_corpus(reviews: Sequence[tuple[str, int]], tokenizer: Tokenizer) -> Corpus:
    """Corpus of the given reviews, in their order."""
    encoded = tokenizer.encode_batch_fast([text for text, _ in reviews], add_special_tokens=False)
    lengths = np.array([len(review.ids) for review in encoded], dtype=np.int64)
    tokens = np.concatenate([np.asarray(review.ids, dtype=np.uint16) for review in encoded])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(tokens, starts, np.array([rating for _, rating in reviews], dtype=np.int64))


@dataclass(frozen=True)
class WindowStream:
    """Endless, random-access stream of training windows: batch i depends on the seed and i alone.

    Attributes
    ----------
    length : int
        Tokens per window.
    verdict_weight : float
        Weight of a verdict token in the loss (1 for every other token).
    """

    corpus: Corpus
    suffix: np.ndarray
    verdicts: dict[int, np.ndarray]
    end_of_text: int
    length: int
    verdict_weight: float
    seed: int
    plain: np.ndarray
    rated: np.ndarray

    def batch(self, index: int, n_windows: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows ``(n_windows, length)`` int64 and loss weights of the same shape, float32."""
        generator = np.random.default_rng([self.seed, index])
        windows = [
            self._rated_window(generator) if row % 2 else self._plain_window(generator) for row in range(n_windows)
        ]
        tokens, weights = zip(*windows, strict=True)
        return np.stack(tokens).astype(np.int64), np.stack(weights)

    def _plain_window(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[np.ndarray] = []
        n_tokens = 0
        while n_tokens < self.length:
            review = self.corpus.review(int(generator.choice(self.plain)))
            start = int(generator.integers(max(1, len(review) - self.length))) if not pieces else 0
            pieces += [review[start:], np.array([self.end_of_text], dtype=np.uint16)]
            n_tokens += len(review) - start + 1
        return np.concatenate(pieces)[: self.length], np.ones(self.length, dtype=np.float32)

    def _rated_window(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        n_tokens = 0
        while n_tokens < self.length:
            index = int(generator.choice(self.rated))
            excerpt = self._excerpt(self.corpus.review(index), generator)
            verdict = self.verdicts[int(self.corpus.ratings[index])]
            piece = np.concatenate([excerpt, self.suffix, verdict, [self.end_of_text]])
            weight = np.ones(len(piece), dtype=np.float32)
            weight[len(excerpt) + len(self.suffix)] = self.verdict_weight
            pieces.insert(0, piece)
            weights.insert(0, weight)
            n_tokens += len(piece)
        return np.concatenate(pieces)[-self.length :], np.concatenate(weights)[-self.length :]

    def _excerpt(self, review: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The review's end, or a piece from its middle; short pieces as likely as long ones."""
        longest = max(SHORTEST_EXCERPT + 1, min(len(review), self.length))
        n_tokens = int(np.exp(generator.uniform(np.log(SHORTEST_EXCERPT), np.log(longest))))
        latest = max(0, len(review) - n_tokens)
        start = latest if generator.random() < 0.5 else int(generator.integers(latest + 1))
        return review[start : start + n_tokens]


def window_streams(
    corpus: Corpus, tokenizer: Tokenizer, *, length: int, verdict_weight: float, seed: int
) -> tuple[WindowStream, WindowStream]:
    """Training and held-out streams; no review is in both."""
    order = np.random.default_rng(seed).permutation(len(corpus.ratings))
    n_held_out = max(2, int(HELD_OUT_FRACTION * len(order)))

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    def stream(members: np.ndarray, stream_seed: int) -> WindowStream:
        is_rated = corpus.ratings[members] > 0
        if not is_rated.any():
            raise InputError(
                f"The corpus holds {(corpus.ratings > 0).sum()} rated reviews of {len(order)}, and no rated review is "
                "left for one of training and held-out windows. Add some (see read_reviews)."
            )
        return WindowStream(
            corpus=corpus,
            suffix=encode(SUFFIX),
            verdicts={rating: encode(f" {rating}/10") for rating in RATINGS},
            end_of_text=int(encode(END_OF_TEXT)[0]),
            length=length,
            verdict_weight=verdict_weight,
            seed=stream_seed,
            plain=members,
            rated=members[is_rated],
        )

    return stream(order[n_held_out:], seed), stream(order[:n_held_out], seed + 1)
