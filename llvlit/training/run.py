"""A whole training run: tokenizer, tokens, one model after the other, and a folder for each that can be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from llvlit.errors import InputError
from llvlit.files import write_atomically, write_json
from llvlit.provenance import environment
from llvlit.training.corpus import (
    END_OF_TEXT,
    Corpus,
    load_corpus,
    read_reviews,
    save_corpus,
    tokenize_corpus,
    train_tokenizer,
    window_streams,
)
from llvlit.training.train import SIZES, Recipe, held_out_loss, shape_of, train_model

VOCABULARY = 4096
TOKENIZER_SAMPLE = 4
"""Every fourth review trains the tokenizer."""

FINAL_BATCHES = 40
"""Batches of held-out windows that the finished model is judged on; the curve takes two."""


def train_family(
    corpus: str | Path,
    out: str | Path,
    *,
    sizes: Sequence[str] = tuple(SIZES),
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    compiled: bool = False,
    keep: Sequence[int] = (),
) -> dict[str, Any]:
    """Train models of the family, from scratch or from where an earlier run in ``out`` was killed.

    ``out`` gets ``tokenizer.json``, ``corpus.safetensors`` (the tokens), a checkpoint and, at the end,
    ``models/SIZE`` for every size, named as in :data:`SIZES` or as ``24x64``.  The model after each of the steps
    in ``keep`` (0: untrained) is exported too, as ``models/SIZE-STEP``.  Returns each size's held-out losses.

    Raises
    ------
    InputError
        If a size is unknown, the corpus holds no reviews, or ``out`` holds a run with other settings.
    """
    shapes = {size: shape_of(size) for size in sizes}
    if steps is not None and steps < 1:
        raise InputError(f"steps={steps} must be at least 1.")
    out = Path(out)
    recipe = Recipe(seed=seed) if steps is None else replace(Recipe(seed=seed), steps=steps)
    tokenizer, tokens = _prepare(Path(corpus), out)
    streams = window_streams(
        tokens, tokenizer, length=recipe.length, verdict_weight=recipe.verdict_weight, seed=recipe.seed
    )
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    finals: dict[str, Any] = {}
    for size in sizes:
        with tqdm(total=recipe.steps, desc=size, unit="step") as bar:

            def report(step: int, _total: int, message: str, bar: tqdm = bar) -> None:
                bar.update(step - bar.n)
                bar.set_postfix_str(message)

            def export(step: int, model: GPT2LMHeadModel, size: str = size) -> None:
                if step in keep:
                    where = out / "models" / f"{size}-{step}"
                    export_model(model, tokenizer, where, training={"size": asdict(shapes[size]), "steps_done": step})

            model, state = train_model(
                size,
                recipe,
                streams,
                out / size / "checkpoint.safetensors",
                vocabulary=VOCABULARY,
                corpus_fingerprint=tokens.fingerprint,
                device=chosen,
                compiled=compiled,
                progress=report,
                visit=export,
            )
        held_out = held_out_loss(model, streams[1], n_batches=FINAL_BATCHES, n_windows=recipe.n_windows)
        training = {
            "size": asdict(shapes[size]),
            "recipe": asdict(recipe),
            "corpus": {"fingerprint": tokens.fingerprint, "reviews": len(tokens.ratings)},
            "tokens_seen": recipe.steps * recipe.n_windows * recipe.length,
            "seconds": round(state.seconds),
            "curve": state.curve,
            "held_out": held_out,
            "held_out_tokens": FINAL_BATCHES * recipe.n_windows * recipe.length,
            "environment": environment(torch.device(chosen)),
            "command": f"llvlit train --corpus CORPUS --out OUT --sizes {size} --steps {recipe.steps} --seed {seed}"
            + (" --compile" if compiled else ""),
        }
        export_model(model, tokenizer, out / "models" / size, training=training)
        finals[size] = held_out
    return finals


def export_model(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path, *, training: dict[str, Any]) -> None:
    """Model folder in the hub's own format (float16 safetensors, tokenizer), with ``training.json`` beside."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float16",
        "tie_word_embeddings": True,
    }
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.named_parameters()}
    write_atomically(
        folder / "model.safetensors",
        lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}),
    )
    write_json(folder / "config.json", config)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model.config.n_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    write_json(folder / "training.json", training)


def _prepare(corpus: Path, out: Path) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and tokens, made once for a run."""
    tokenizer_path, tokens_path = out / "tokenizer.json", out / "corpus.safetensors"
    if not tokens_path.is_file() or not tokenizer_path.is_file():
        reviews = list(tqdm(read_reviews(corpus), desc="read", unit="review"))
        tokenizer = train_tokenizer([text for text, _ in reviews[::TOKENIZER_SAMPLE]], vocabulary=VOCABULARY)
        write_atomically(tokenizer_path, lambda temporary: tokenizer.save(str(temporary)))
        save_corpus(tokenize_corpus(reviews, tokenizer), tokens_path)
        shutil.rmtree(out / "models", ignore_errors=True)
    return Tokenizer.from_file(str(tokenizer_path)), load_corpus(tokens_path)
