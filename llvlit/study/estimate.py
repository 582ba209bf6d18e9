"""What a cell will cost, before it runs: floating-point operations counted, memory, and minutes on this device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from llvlit.engine.layer import rows_per_call
from llvlit.engine.models import LanguageModel
from llvlit.study.grid import Cell
from llvlit.tasks.sources import HUB_TASKS
from llvlit.tasks.task import load_task

EFFICIENCY = 0.22
"""Share of the matrix-product rate at which the counted operations of a cell are done.

Fitted with ``CELL_SECONDS`` by ``benchmarks/estimate.py`` to the 58 cells of ``results/seconds.csv`` (two workers of
one thread each; mean error 8 %, largest 22 %) for 110 GFLOP/s a thread.  The rate of that machine
is no constant (78 to 190 were measured on one day), and so the minutes are good to a factor of two.
"""

CELL_SECONDS = 12.9
"""What a cell takes besides: many small steps, whatever the model's size."""

CHARACTERS_PER_TOKEN = 4.0
CANDIDATES_PER_ENERGY = 20
"""Candidate states that the search for one required energy sends through the model."""

KEPT_BY_GRAPHS = 300
"""Numbers that the graphs of products keep for each prompt and hidden number.

Some rows in a dozen tensors each, and the derivative of attention, twice the head size.
"""


@dataclass(frozen=True)
class ModelShape:
    """What decides the cost of a model.

    Attributes
    ----------
    layer_parameters : int
        Numbers in the matrices of one layer: each takes part in one multiplication and one addition a token.
    """

    n_layers: int
    hidden_size: int
    layer_parameters: int
    parameters: int


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of one cell: operations, peak bytes beside the interpreter, and minutes.

    That is for a concept that shows; where it does not, the cell ends early.
    """

    operations: float
    memory: float
    minutes: float


PAPER_SHAPES = {
    name: ModelShape(n_layers, hidden, 12 * hidden**2, 12 * hidden**2 * n_layers + (50257 + 1024) * hidden)
    for name, n_layers, hidden in (("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280))
}
"""Public shapes of the paper's models, so that their cost can be told without the hub."""


def model_shape(model: LanguageModel) -> ModelShape:
    """Shape of a loaded model."""
    layer = sum(p.numel() for p in model.layers[0].parameters() if p.ndim > 1)
    return ModelShape(model.n_layers, model.hidden_size, layer, model.n_parameters)


def tokens_of(cell: Cell) -> float:
    """Expected tokens of a prompt; of a task that is still on the hub, the most there can be."""
    settings = cell.settings
    if cell.task in HUB_TASKS and cell.data_dir is None:
        return float(settings.max_tokens)
    texts = load_task(cell.task, suffix=cell.suffix, data_dir=cell.data_dir).prompts().texts
    return sum(min(settings.max_tokens, len(text) / CHARACTERS_PER_TOKEN) for text in texts) / len(texts)


def count_operations(cell: Cell, shape: ModelShape, n_tokens: float) -> float:
    """Floating-point operations of a cell, counted in rows that pass a layer.

    Forward, a row costs two operations a parameter and four a hidden number and token of context; a
    Jacobian-vector product or a reverse product twice that.  Jacobians are formed where that takes fewer
    products (see :func:`llvlit.method.identification.identify_all`).
    """
    settings, n_layers = cell.settings, shape.n_layers
    row = 2.0 * shape.layer_parameters + 4.0 * shape.hidden_size * n_tokens
    order = min(settings.orders[-1], shape.hidden_size)
    directions = len(settings.directions)
    asked = directions * (len(settings.bases) * order + n_layers // 2)
    products = min(asked, shape.hidden_size)
    identified = 2 * settings.operating + sum(settings.operating_counts)
    pushes = len(settings.amplitudes) + 2 * directions - 1
    rows = n_layers * 2 * settings.concept * n_tokens
    rows += n_layers * identified * (n_tokens + 2 * products)
    rows += n_layers * 2 * settings.evaluation * (n_tokens + pushes * (n_layers + 1))
    schedules = n_layers + 4 * (len(settings.bases) + 4)  # besides: adjoint, uniform, early and middle
    rows += n_layers * 2 * settings.energy_prompts * (n_tokens + schedules * CANDIDATES_PER_ENERGY)
    return rows * row


def count_memory(cell: Cell, shape: ModelShape, n_tokens: float, *, device: torch.device) -> float:
    """Bytes: weights, one layer's context of all operating prompts, states, operators, and temporaries."""
    settings, hidden = cell.settings, shape.hidden_size
    order = min(settings.orders[-1], hidden)
    n_plans = len(settings.directions) * len(settings.bases)
    numbers = float(shape.parameters)
    numbers += 2 * settings.operating * n_tokens * hidden * 4
    numbers += 2 * (settings.concept + settings.operating) * (shape.n_layers + 1) * hidden * 2
    numbers += 2 * settings.operating * shape.n_layers * order**2 * n_plans * 2
    if n_plans * order > hidden:
        numbers += 2 * settings.operating * hidden**2 * 2
    else:
        numbers += 2 * settings.operating * hidden * KEPT_BY_GRAPHS
    numbers += 2 * 2 * settings.energy_prompts * n_tokens * hidden * shape.n_layers
    return 4 * (numbers + 20 * rows_per_call(device, hidden) * hidden)


def product_rate(device: torch.device, *, size: int = 768, repeats: int = 5) -> float:
    """Operations a second of float32 matrix products on a device, the best of some runs."""
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def estimate(cell: Cell, shape: ModelShape, rate: float, *, device: torch.device) -> Estimate:
    """Cost of a cell on a device of the given matrix-product rate."""
    n_tokens = tokens_of(cell)
    operations = count_operations(cell, shape, n_tokens)
    minutes = (CELL_SECONDS + operations / (EFFICIENCY * rate)) / 60
    return Estimate(operations, count_memory(cell, shape, n_tokens, device=device), minutes)
