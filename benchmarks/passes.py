"""What a cell of a grid asks of the model's layers, counted: ``python benchmarks/passes.py --layers 12 --hidden 320``.

A row is one token, candidate or product with a Jacobian that passes one layer, by its products with the layer's
matrices: rows times their size, over the size of all.  A call is one product with the first matrix of a layer: what a
device launches at a time.  Settings are those of the grid ``paper`` with as many prompts as ``--prompts`` says; counts
grow in proportion to prompts, and energies to their own number.  The concept is the prompts' last word.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from engine import N_TOKENS, random_model, random_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from llvlit.engine.models import LanguageModel
from llvlit.prompts import Prompts
from llvlit.study import experiment
from llvlit.study.grid import Settings, load_grid
from llvlit.tasks.splits import Splits

PHASES = ("last_token_states", "identify_all", "measured_gains", "adjoint_gains", "required_energy")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Count(TorchDispatchMode):
    """Rows through layers, calls of layers, and operators, by phase."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.sizes = {p.data_ptr(): p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2}
        self.first = {next(p for p in layer.parameters() if p.ndim == 2).data_ptr() for layer in model.layers}
        self.layer_size = sum(self.sizes.values()) / model.n_layers
        self.phase = "other"
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.operators[self.phase] += 1
        if function._opname in PRODUCTS:
            matrices = [a for a in args if isinstance(a, torch.Tensor) and a.ndim >= 2]
            for matrix in matrices:
                if (size := self.sizes.get(matrix.data_ptr())) is not None:
                    self.rows[self.phase] += out.numel() // out.shape[-1] * size / self.layer_size
                    self.calls[self.phase] += matrix.data_ptr() in self.first
        return out

    @contextmanager
    def by_phase(self) -> Iterator[None]:
        def named(name: str) -> Any:
            function = getattr(experiment, name)

            def run(*args: Any, **kwargs: Any) -> Any:
                self.phase = name
                try:
                    return function(*args, **kwargs)
                finally:
                    self.phase = "other"

            return run

        with ExitStack() as stack:
            for name in PHASES:
                stack.enter_context(patch.object(experiment, name, named(name)))
            yield


def splits(n_prompts: int) -> Splits:
    """Random words, the last of which is one of the class's ten; half the prompts are of either."""
    parts = []
    for seed, n in enumerate((2 * n_prompts, n_prompts, n_prompts)):
        prompts = random_prompts(n, seed=seed)
        pairs = enumerate(zip(prompts.texts, prompts.labels, strict=True))
        texts = [f"{text.rpartition(' ')[0]} {1 + 10 * label + i // 2 % 10}" for i, (text, label) in pairs]
        parts.append(Prompts(texts, prompts.labels))
    return Splits(*parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--prompts", type=int, default=50, help="for operating points, and held out; 400 in the paper")
    options = parser.parse_args()
    model = random_model(options.layers, options.hidden)
    n = options.prompts
    settings: Settings = replace(load_grid("paper").settings, concept=n, operating=n // 2, evaluation=n // 2)
    settings = replace(settings, energy_prompts=max(1, round(settings.energy_prompts * n / 400)))
    tokens = experiment.tokenize_splits(model, splits(n), settings)
    with patch.object(experiment, "SAME_PROMPTS", n // 4), Count(model) as count, count.by_phase():
        experiment.run_experiment(model, tokens, settings)
    print(f"{model.name}, {n} prompts of {N_TOKENS} tokens held out, {2 * settings.energy_prompts} for energies\n")
    print("| Phase | Rows of a layer, a held-out prompt | Calls of a layer, a layer | Operators, thousands |")
    print("|---|---:|---:|---:|")
    for phase in (*PHASES, "all"):
        chosen = PHASES if phase == "all" else (phase,)
        rows, calls, operators = (sum(c[p] for p in chosen) for c in (count.rows, count.calls, count.operators))
        print(f"| {phase} | {rows / options.layers / n:.1f} | {calls / options.layers:.1f} | {operators / 1000:.1f} |")


if __name__ == "__main__":
    main()
