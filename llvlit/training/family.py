"""A training run of the family: tokenizer, tokens, one model after the other, and a folder for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from llvlit import checks, files
from llvlit.engine.models import torch_device
from llvlit.errors import InputError
from llvlit.provenance import environment
from llvlit.training.corpus import (
    END_OF_TEXT,
    Corpus,
    fingerprint_of,
    read_reviews,
    tokenize_corpus,
    train_tokenizer,
    window_streams,
)
from llvlit.training.loop import held_out_loss, train_model
from llvlit.training.recipe import SIZES, Recipe, check_same, shape_of

KIND, MODEL = "training run", "model folder"
CHECKPOINT = "checkpoint.safetensors"
WRITTEN = {CHECKPOINT, "corpus.safetensors", "model.safetensors", "config.json", "training.json"}
WRITTEN |= {"tokenizer.json", "tokenizer_config.json"}
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
    vocabulary: int = VOCABULARY,
) -> dict[str, Any]:
    """Train models of the family, from scratch or from where an earlier run in ``out`` was killed.

    ``out`` gets ``tokenizer.json``, ``corpus.safetensors`` (the tokens), a checkpoint and, at the end,
    ``models/SIZE`` for every size, named as in :data:`SIZES` or as ``24x64``.  The model after each of the steps
    in ``keep`` (0: untrained) is exported too, as ``models/SIZE-STEP``.  Returns each size's held-out losses.

    Raises
    ------
    InputError
        If an argument does not fit, the corpus holds no reviews, ``out`` holds a run on another corpus or with other
        settings, or a step to keep was passed without being kept.
    FileError
        If the corpus cannot be read, or ``out`` holds what llvlit did not write, is in use, or cannot be written.
    """
    corpus, out = checks.path("corpus", corpus), checks.path("out", out)
    shapes = {size: shape_of(size) for size in checks.sequence("sizes", sizes, "a list of sizes")}
    recipe = Recipe(seed=checks.seed("seed", seed))
    if steps is not None:
        recipe = replace(recipe, steps=checks.integer("steps", steps, at_least=1))
    keep = checks.sequence("keep", keep, "a list of steps")
    kept = {checks.integer("keep", step, at_least=0, at_most=recipe.steps) for step in keep}
    vocabulary = checks.integer("vocabulary", vocabulary, at_least=300, at_most=2**16)
    chosen = torch_device(checks.text("device", device))
    if checks.flag("compiled", compiled):
        _try_compiler(chosen)
    reviews = list(tqdm(read_reviews(corpus), desc="read", unit="review"))
    if not any(text for text, _ in reviews):
        raise InputError(f"corpus={str(corpus)!r} holds no review with a text. Name a folder that holds some.")
    files.check_ours(out, KIND)
    for size in shapes:
        for folder in (size, *(f"{size}-{step}" for step in kept)):
            files.check_ours(out / "models" / folder, MODEL)
    with files.locked(out):
        if not files.is_owned(out, KIND):
            files.own(out, KIND)
        tokenizer, tokens, inputs = _prepare(reviews, out, vocabulary)
        facts = {"recipe": asdict(recipe), "inputs": inputs}
        for size in shapes:
            _check_kept(out, size, kept, facts)
        streams = window_streams(
            tokens, tokenizer, length=recipe.length, verdict_weight=recipe.verdict_weight, seed=recipe.seed
        )

        def train_member(size: str) -> dict[str, float]:
            def visit(step: int, model: GPT2LMHeadModel, loss: float | None) -> None:
                bar.update(step - bar.n)
                bar.set_postfix_str("" if loss is None else f"loss {loss:.3f}")
                if step in kept:
                    training = {"size": asdict(shapes[size]), "steps_done": step, **facts}
                    export_model(model, tokenizer, out / "models" / f"{size}-{step}", training=training)

            checkpoint = out / size / CHECKPOINT
            made_by: dict[str, Any] = {"vocabulary": vocabulary, "inputs": inputs, "device": str(chosen)}
            with tqdm(total=recipe.steps, desc=size, unit="step") as bar:
                model, state = train_model(size, recipe, streams, checkpoint, visit=visit, compiled=compiled, **made_by)
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
                "environment": environment(chosen),
                "command": f"llvlit train --corpus CORPUS --out OUT --sizes {size} --steps {recipe.steps} "
                f"--seed {recipe.seed}" + (" --compile" if compiled else ""),
            }
            export_model(model, tokenizer, out / "models" / size, training=training)
            return held_out

        losses = {size: train_member(size) for size in shapes}
        files.finish(out, KIND)
        return losses


def export_model(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path, *, training: dict[str, Any]) -> None:
    """Model folder in the hub's own format (float16 safetensors, tokenizer), of ours alone; its mark comes last."""
    files.own(folder, MODEL)
    told = {"architectures": ["GPT2LMHeadModel"], "dtype": "float16", "tie_word_embeddings": True}
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.named_parameters()}
    files.write_atomically(
        folder / "model.safetensors", lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"})
    )
    files.write_json(folder / "config.json", model.config.to_dict() | told)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    settings = {"model_max_length": model.config.n_positions, "clean_up_tokenization_spaces": False}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings)
    files.write_text(folder / "tokenizer.json", fast.backend_tokenizer.to_str(pretty=True))
    files.write_json(folder / "tokenizer_config.json", {**fast.init_kwargs, "tokenizer_class": type(fast).__name__})
    files.write_json(folder / "training.json", training)
    files.finish(folder, MODEL)


def _try_compiler(device: torch.device) -> None:
    """InputError if ``torch.compile`` does not work here: told before minutes of work."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # no compiler, or none for this device or this Python
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"compiled=True: torch.compile does not work here ({reason}). Leave it out.") from error


def _prepare(
    reviews: Sequence[tuple[str, int]], out: Path, vocabulary: int
) -> tuple[Tokenizer, Corpus, dict[str, str]]:
    """Tokenizer and tokens, made once for a run, and the fingerprints of all that it is made from."""
    for path in out.rglob(".*.????????"):  # what a kill leaves of a file that was being written
        if path.name[1:-9] in WRITTEN:
            path.unlink()
    made_from = {"corpus": fingerprint_of(reviews), "vocabulary": vocabulary}
    tokenizer_path, tokens_path = out / "tokenizer.json", out / "corpus.safetensors"
    if not tokens_path.is_file() or not tokenizer_path.is_file():
        tokenizer = train_tokenizer([text for text, _ in reviews[::TOKENIZER_SAMPLE]], vocabulary=vocabulary)
        files.write_text(tokenizer_path, tokenizer.to_str(pretty=True))
        arrays = vars(tokenize_corpus(reviews, tokenizer))
        files.save_tensors(tokens_path, arrays, {"kind": "corpus", **made_from, "tokenizer": _digest(tokenizer)})
    with files.foreign(tokenizer_path, "a tokenizer"):
        tokenizer = Tokenizer.from_str(files.read_text(tokenizer_path, "a tokenizer"))
    tensors, stored = files.load_tensors(tokens_path, kind="corpus")
    check_same(out, stored, {**made_from, "tokenizer": _digest(tokenizer)})
    tokens = Corpus(**{name: tensor.numpy() for name, tensor in tensors.items()})
    return tokenizer, tokens, {"corpus": tokens.fingerprint, "tokenizer": _digest(tokenizer)}


def _digest(tokenizer: Tokenizer) -> str:
    return sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def _check_kept(out: Path, size: str, kept: Iterable[int], facts: Mapping[str, Any]) -> None:
    """InputError for a step that a run has passed without keeping the model of these facts."""
    checkpoint = out / size / CHECKPOINT
    done = files.load_tensors(checkpoint, kind="training")[1]["state"]["step"] if checkpoint.is_file() else 0
    for step in sorted(step for step in kept if step < done):
        note = out / "models" / f"{size}-{step}" / "training.json"
        stored = {"recipe": {}, **(files.read_json(note, "facts of a training") if note.is_file() else {})}
        recipe = stored["recipe"] | {"steps": facts["recipe"]["steps"]}  # how long it goes on is another matter
        if {"recipe": recipe, "inputs": stored.get("inputs")} != facts:
            raise InputError(
                f"keep={step}: {size} in {out} stands at step {done} already, and the model after step {step} was not "
                "kept. Choose another --out, or leave that step out."
            )
