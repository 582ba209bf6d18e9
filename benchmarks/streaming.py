"""What it costs to hold one layer at a time: ``python benchmarks/streaming.py``.

A random Llama of a given size is written in shards, and three things are computed with it, in a process of its own
each time: once with all weights in memory, once with ``load_model(folder, stream=True)``.  Printed are peak resident
memory, seconds, passes over the weights (parts read, by the number of layers), and the largest difference of the
numbers, relative to the largest of them.  Files leave the page cache before each process starts.

Then, on paper, what Llama 3 takes: bytes and operations are counted from the sizes in its configurations; the rates
are assumptions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from llvlit.engine.layer import NUMBERS_PER_CALL
from llvlit.engine.models import load_model
from llvlit.method.concepts import random_directions
from llvlit.method.gains import PROMPTS_AT_ONCE, adjoint_gains, measured_gains
from llvlit.method.identification import identify
from llvlit.prompts import Prompts

VOCABULARY = 8000
ORDER = 8
LLAMA_3 = {  # numbers of the models' configurations
    "Llama-3-8B": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "key_heads": 8, "vocabulary": 128256},
    "Llama-3-70B": {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "key_heads": 8, "vocabulary": 128256},
}
DEVICES = {"24 GB": (24, 20, 20), "80 GB": (80, 24, 40)}
"""Memory, and what is assumed: TFLOP/s that products in float32 reach, GB/s from the machine's memory."""


def write_model(folder: Path, gigabytes: float) -> None:
    """A random model in float32, a layer a shard, so that writing holds one layer as well."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    layer_size = 2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    n_layers = max(1, round((gigabytes * 1e9 / 4 - 2 * VOCABULARY * 2048) / layer_size))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=n_layers,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
        **sizes,
    )
    config.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0} | {str(i): i for i in range(1, VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[str]] = {}
    for name in shell.state_dict():
        shards.setdefault(name.partition("layers.")[2].partition(".")[0] or "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    index = {}
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            shape = shell.get_parameter(name).shape
            scale = shape[-1] ** -0.5
            tensors[name] = torch.ones(shape) if len(shape) == 1 else scale * torch.randn(shape, generator=generator)
        save_file(tensors, folder / f"model-{shard}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(names, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def evict(folder: Path) -> None:
    """Take the weights out of the page cache, where the system can."""
    for path in folder.glob("*.safetensors") if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak() -> float:
    """Peak resident memory of this process in GB, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(folder: Path, way: str, n_prompts: int, out: Path) -> None:
    """In a process of its own: numbers into a file, and what they took as JSON."""
    start = peak()
    generator = torch.Generator().manual_seed(1)
    lengths = [24 + 8 * (i % 2) for i in range(n_prompts)]
    texts = [" ".join(map(str, torch.randint(1, VOCABULARY, (n,), generator=generator).tolist())) for n in lengths]
    prompts = Prompts(texts, [i % 2 for i in range(n_prompts)])
    began = time.perf_counter()
    model = load_model(folder, device="cpu", stream=way == "streamed")
    _ = model.fingerprint
    rows = [("load and fingerprint", time.perf_counter() - began, peak(), reads(model))]
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    numbers = {}
    for name, compute in (
        ("measured gains, replay checked first", lambda: measured_gains(model, prompts, directions).per_prompt),
        ("measured gains", lambda: measured_gains(model, prompts, directions).per_prompt),
        ("adjoint gains", lambda: adjoint_gains(model, prompts, directions).per_prompt),
        (f"identification, order {ORDER}", lambda: identify(model, prompts, directions, order=ORDER, basis="krylov").A),
    ):
        began, before = time.perf_counter(), reads(model)
        numbers[name] = compute()
        rows.append((name, time.perf_counter() - began, peak(), reads(model) - before))
    np.savez(out, **numbers)
    layers = model.n_layers
    print(json.dumps({"start": start, "rows": [(*row[:3], row[3] / layers) for row in rows], "layers": layers}))


def reads(model: object) -> int:
    stream = getattr(model, "stream", None)
    return stream.reads if stream else 0


def compare(folder: Path, options: argparse.Namespace) -> None:
    run([options, "--write", folder])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    found = {}
    for way in ("streamed", "whole"):
        evict(folder)
        found[way] = json.loads(run([options, "--measure", way, folder, folder / f"{way}.npz"]))
    whole, streamed = (np.load(folder / f"{way}.npz") for way in ("whole", "streamed"))
    print(
        f"{size:.2f} GB of weights in {found['whole']['layers']} layers; {options.prompts} prompts of 24 and 32 tokens"
    )
    print(f"before loading: {found['whole']['start']:.2f} GB resident\n")
    print("| What | Peak so far whole, GB | Streamed, GB | Seconds whole | Streamed | Passes | Largest difference |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for (name, whole_s, whole_gb, _), (_, part_s, part_gb, passes) in zip(
        found["whole"]["rows"], found["streamed"]["rows"], strict=True
    ):
        difference = ""
        if name in whole:
            difference = f"{np.abs(whole[name] - streamed[name]).max() / np.abs(whole[name]).max():.1g}"
        print(
            f"| {name} | {whole_gb:.2f} | {part_gb:.2f} | {whole_s:.1f} | {part_s:.1f} | {passes:.1f} | {difference} |"
        )


def run(parts: list[object]) -> str:
    """This script in a process of its own."""
    options, *arguments = parts
    assert isinstance(options, argparse.Namespace)
    common = ["--threads", options.threads, "--prompts", options.prompts, "--gigabytes", options.gigabytes]
    command = [sys.executable, __file__, *map(str, [*common, *arguments])]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def on_paper(options: argparse.Namespace) -> Iterator[str]:
    """Rows of a table: bytes, operations and seconds for shapes of Llama 3, from their sizes."""
    n, tokens = options.paper_prompts, options.paper_tokens
    for name, size in LLAMA_3.items():
        layer, ends, key_size = counts(size)
        layers, hidden = size["layers"], size["hidden"]
        everything = layers * layer + 2 * ends
        per_row = 2 * layer + 4 * hidden * tokens  # multiply and add; scores and mixture of attention
        some = min(n, PROMPTS_AT_ONCE)
        rows = {  # rows that pass each layer; passes over the weights; numbers in states, keys and values
            "check of the replay, once": (16 * tokens, 4, 2 * tokens * hidden),
            "measured gains": (n * (tokens + layers + 1), 1, n * hidden * (tokens + 2 * layers)),
            "adjoint gains": (n * (tokens + 2), 2 * -(-n // some), some * tokens * (hidden + 2 * key_size * layers)),
            "identification, order 32": (n * (tokens + 1 + 2 * 32), 1, n * tokens * (hidden + 2 * key_size)),
        }
        for device, (memory, tflops, bus) in DEVICES.items():
            whole = 4 * everything < 0.9e9 * memory
            for what, (n_rows, passes, numbers) in rows.items():
                held = 4 * (everything if whole else max(layer, ends)) + 4 * numbers + 20 * 4 * NUMBERS_PER_CALL
                passes = 0 if whole else passes
                operations = n_rows * layers * per_row
                moved, read = passes * 4 * layers * layer, passes * 2 * layers * layer
                seconds = (operations / tflops / 1e12, moved / bus / 1e9, read / options.disk / 1e9)
                yield (
                    f"| {name} | {device}{', whole' if whole else ''} | {what} | {held / 1e9:.1f} | {passes} | "
                    f"{read / 1e9:.0f} | {moved / 1e9:.0f} | {operations / 1e12:.0f} | "
                    f"{' | '.join(f'{each:.0f}' for each in seconds)} |"
                )


def counts(size: dict[str, int]) -> tuple[int, int, int]:
    """Weights of a layer, of the embedding or the head, and numbers in a token's keys."""
    hidden, key_size = size["hidden"], size["key_heads"] * size["hidden"] // size["heads"]
    layer = 2 * hidden**2 + 2 * hidden * key_size + 3 * hidden * size["inner"] + 2 * hidden
    return layer, size["vocabulary"] * hidden, key_size


def paper(options: argparse.Namespace) -> None:
    rates = "; ".join(f"{name}: {tflops} TFLOP/s, {bus} GB/s to it" for name, (_, tflops, bus) in DEVICES.items())
    print(
        f"\nOn paper: {options.paper_prompts} prompts of {options.paper_tokens} tokens, weights stored in 16 bits, "
        f"moved and computed in float32. Assumed: {rates}; {options.disk:g} GB/s from disk. Nothing overlaps: the "
        "seconds add up.\n"
    )
    print("| Model | A layer, GB | Embedding or head, GB | All layers, GB | All in float32, GB | On disk, GB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, size in LLAMA_3.items():
        layer, ends, _ = counts(size)
        layers, everything = size["layers"] * layer, size["layers"] * layer + 2 * ends
        sizes = f"{4 * layer / 1e9:.2f} | {4 * ends / 1e9:.2f} | {4 * layers / 1e9:.0f} | {4 * everything / 1e9:.0f}"
        print(f"| {name} | {sizes} | {2 * everything / 1e9:.0f} |")
    print(
        "\n| Model | Device | What | Held, GB | Passes | Read, GB | Moved, GB | TFLOP | Computing, s | Moving, s |",
        end="",
    )
    print(" Reading, s |\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(on_paper(options)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="weights of the random model (default: 4)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the model is written for the while (default: temporary)")
    parser.add_argument("--paper-only", action="store_true", help="print the second part alone")
    parser.add_argument("--paper-prompts", type=int, default=100)
    parser.add_argument("--paper-tokens", type=int, default=64)
    parser.add_argument("--disk", type=float, default=3.0, help="GB/s from disk")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.write:
        write_model(options.write, options.gigabytes)
    elif options.measure:
        way, folder, out = options.measure
        measure(Path(folder), way, options.prompts, Path(out))
    else:
        if not options.paper_only:
            print(f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads")
            folder = Path(tempfile.mkdtemp(dir=options.folder))
            try:
                compare(folder, options)
            finally:
                shutil.rmtree(folder)
        paper(options)


if __name__ == "__main__":
    main()
