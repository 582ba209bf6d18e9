"""What one cell's identification costs beside its floating-point floor: ``python benchmarks/identification.py``.

The floor counts matrix products alone: every token of every prompt once through every layer, and every product with a
Jacobian twice that (value and tangent, as forward mode has it), at the rate that this machine reaches in float32
products of the model's own shapes, measured in turn in the same process.  Attention and the reduced operators are not
counted.  Four bases of order 32 from 400 prompts, as in the grid ``real``; of GPT-2-small's shape from 64 prompts,
and there single bases of 64 and 8 prompts, too.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace

import torch
from engine import interleaved, random_model, random_prompts

from llvlit.engine.models import LanguageModel, load_model
from llvlit.engine.tokens import tokenize
from llvlit.method.concepts import random_directions
from llvlit.method.identification import Plan, identify_all
from llvlit.prompts import Prompts
from llvlit.study.estimate import model_shape
from llvlit.study.grid import load_grid
from llvlit.tasks.task import load_task

BASES = load_grid("real").settings.bases
ORDER = 32


def compare(model: LanguageModel, prompts: Prompts, bases: tuple[str, ...], *, repeats: int) -> None:
    shape = model_shape(model)
    hidden, n_layers = shape.hidden_size, shape.n_layers
    vectors = random_directions(n_layers + 1, hidden)
    plans = {basis: Plan(vectors, basis, ORDER) for basis in bases}
    n_tokens = sum(len(ids) for ids in tokenize(model, prompts, max_tokens=128).ids)
    products = min(hidden, len(bases) * ORDER + n_layers // 2)
    rows = n_tokens + 2 * products * len(prompts)
    operations = 2.0 * shape.layer_parameters * n_layers * rows
    left, right = torch.randn(2048, hidden), torch.randn(hidden, 4 * hidden)
    found = interleaved(
        {
            "identification": lambda: identify_all(model, prompts, plans),
            "products": lambda: [left @ right for _ in range(20)],
        },
        repeats,
    )
    rate = 20 * 2 * 2048 * hidden * 4 * hidden / found["products"]
    floor = operations / rate
    print(
        f"| {model.name} | {len(prompts)} | {n_tokens / len(prompts):.0f} | {len(bases)} | {operations / 1e9:.0f} "
        f"| {rate / 1e9:.0f} | {floor:.2f} | {found['identification']:.2f} | {found['identification'] / floor:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads\n")
    print("| Model | Prompts | Tokens | Bases | GFLOP | GFLOP/s of products | Floor, s | Identification, s | Ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    prompts = load_task("film-sentiment").split(concept=10, operating=200, evaluation=10).operating
    for size in ("small", "medium", "large"):
        compare(load_model(f"embedded/{size}", device="cpu"), prompts, BASES, repeats=options.repeats)
    model = random_model(12, 768)
    for bases, n_prompts in ((BASES, 64), (("random",), 64), (("krylov",), 64), (("random",), 8), (("krylov",), 8)):
        name = model.name if len(bases) > 1 else f"{model.name}, {bases[0]}"
        compare(replace(model, name=name), random_prompts(n_prompts, seed=1), bases, repeats=options.repeats)


if __name__ == "__main__":
    main()
