"""What identification and measured gains cost on an accelerator: ``python benchmarks/accelerator.py --peak 66.9``.

The paper's sizes: a surrogate of order 32 from 400 operating prompts, and the measured gains of 400 held-out ones;
prompts of 64 tokens, random models of the three GPT-2 shapes, and the models named on the command line, whose first
runs warm the device up.  Operations are counted as in ``benchmarks/identification.py``: matrix products alone, in
float32.  They are set beside the rate of a large float32 product in the same process, and beside ``--peak``, the
float32 rate in TFLOP/s that the maker states.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from engine import N_TOKENS, interleaved, random_model, random_prompts, seconds

from llvlit.engine.models import LanguageModel, load_model, wrap_model
from llvlit.engine.tokens import tokenize
from llvlit.method.concepts import random_directions
from llvlit.method.gains import measured_gains
from llvlit.method.identification import identify
from llvlit.prompts import Prompts
from llvlit.provenance import environment
from llvlit.study.estimate import model_shape

BASES = ("krylov", "reachability")
ORDER = 32
N_PROMPTS = 400
PAPER_SHAPES = ((12, 768), (24, 1024), (36, 1280))
LARGE = 8192


def product_rate(device: torch.device, repeats: int) -> float:
    """Operations a second of a large float32 matrix product."""
    left, right = (torch.randn(LARGE, LARGE, device=device) for _ in range(2))
    return 2 * LARGE**3 / interleaved({"product": lambda: left @ right}, repeats)["product"]


def count(model: LanguageModel, prompts: Prompts) -> dict[str, float]:
    """Operations of both measurements: two a parameter of the layers and row, four with a tangent."""
    shape = model_shape(model)
    n_tokens = sum(len(ids) for ids in tokenize(model, prompts, max_tokens=128).ids)
    rows = dict.fromkeys(BASES, shape.n_layers * (n_tokens + 2 * min(shape.hidden_size, ORDER) * len(prompts)))
    rows["measured gains"] = shape.n_layers * (n_tokens + (shape.n_layers + 1) * len(prompts))
    return {name: 2.0 * shape.layer_parameters * number for name, number in rows.items()}


def measure(model: LanguageModel, prompts: Prompts, rate: float, peak: float | None) -> None:
    """Print a row for each measurement."""
    vectors = random_directions(model.n_layers + 1, model.hidden_size)
    runs = {basis: partial(identify, model, prompts, vectors, order=ORDER, basis=basis) for basis in BASES}
    runs["measured gains"] = partial(measured_gains, model, prompts, vectors)
    for run in runs.values():
        run.func(model, prompts.select(range(8)), vectors, **run.keywords)  # first calls load kernels
    for name, operations in count(model, prompts).items():
        torch.cuda.reset_peak_memory_stats()
        took = seconds(runs[name])
        memory = torch.cuda.max_memory_allocated() / 1e9
        share = f"{operations / took / (1e12 * peak):.0%}" if peak else ""
        print(
            f"| {model.name} | {name} | {operations / 1e12:.2f} | {took:.2f} | {operations / took / 1e12:.1f} "
            f"| {operations / took / rate:.0%} | {share} | {memory:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="besides the three shapes of the paper")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="what the maker states for float32")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    rate = product_rate(device, options.repeats)
    print(", ".join(f"{key} {value}" for key, value in environment(device).items()))
    print(f"float32 product of {LARGE} x {LARGE} matrices: {rate / 1e12:.1f} TFLOP/s; {N_PROMPTS} prompts.\n")
    print("| Model | What | TFLOP | Seconds | TFLOP/s | Of the product's rate | Of the peak | Memory, GB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    prompts = random_prompts(N_PROMPTS, seed=1)
    assert all(len(text.split()) == N_TOKENS for text in prompts.texts)
    for name in options.models:
        measure(load_model(name, device=str(device)), prompts, rate, options.peak)
    for n_layers, hidden_size in PAPER_SHAPES:
        model = random_model(n_layers, hidden_size)
        model = wrap_model(model.module.to(device), model.tokenizer, name=model.name)
        measure(model, prompts, rate, options.peak)


if __name__ == "__main__":
    main()
