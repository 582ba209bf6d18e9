"""Products at a shared point are those of the layer's own modules, and where they are not, they are not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from conftest import ARCHITECTURES, EXACT, PROMPTS, SOFTMAX32, tiny_model
from llvlit.engine import layer as frozen
from llvlit.engine.depth import depth_system
from llvlit.engine.fast import fast_layer
from llvlit.engine.layer import FrozenLayer
from llvlit.method.concepts import random_directions
from llvlit.method.identification import identify
from llvlit.prompts import Prompts

MODULES = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "Conv1D": lambda: Conv1D(4, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "RMS norm": lambda: nn.RMSNorm(6, eps=1e-5),
    "Llama's RMS norm": lambda: LlamaRMSNorm(6),
    "Gemma's RMS norm": lambda: Gemma3RMSNorm(6),
    "layer norm without weight": lambda: nn.LayerNorm(6, elementwise_affine=False),
} | {name: (lambda name=name: ACT2FN[name]) for name in ACT2CLS}


def products(module: nn.Module, point: torch.Tensor, cotangents: torch.Tensor, tangents: torch.Tensor) -> list:
    """Value, transposed products with its derivative, and products, as a layer's graph takes them."""
    point = point.clone().requires_grad_()
    value = module(point)
    weights = torch.zeros_like(value, requires_grad=True)
    back = torch.autograd.grad(value, point, weights, create_graph=True)[0]
    forth = torch.autograd.grad(back, weights, tangents)[0]
    return [value.detach(), torch.autograd.grad(value, point, cotangents)[0], forth]


@pytest.mark.parametrize("cotangents_are_shared", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_at_a_shared_point_has_the_derivative_of_its_own(name, cotangents_are_shared, generator):
    torch.manual_seed(1)
    module = MODULES[name]().to(torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    point = torch.randn(5, 1, 6, generator=generator, dtype=torch.float64).expand(-1, 3, -1)
    n_outputs = module(point.contiguous()).shape[-1]
    cotangents = torch.randn(5, 3, n_outputs, generator=generator, dtype=torch.float64)
    if cotangents_are_shared:
        cotangents = cotangents[:1].expand(5, -1, -1)
    tangents = torch.randn(5, 3, 6, generator=generator, dtype=torch.float64)
    expected = products(module, point, cotangents, tangents)
    found = products(fast_layer(module, frozen_context=False, rows=(5, 3)), point, cotangents, tangents)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=SOFTMAX32 if "'s" in name else EXACT)
    assert "forward" not in vars(module)


def without_sharing(layer: FrozenLayer) -> FrozenLayer:
    def plain(batch: frozen.FrozenBatch) -> frozen.FrozenBatch:
        style = replace(batch.recording.style, shares_point=False)
        return replace(batch, recording=replace(batch.recording, style=style))

    return replace(layer, batches=tuple(plain(batch) for batch in layer.batches))


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "gemma2"])
def test_a_layer_at_a_shared_point_has_the_derivative_of_its_own_modules(model_type, generator):
    """Grouped keys, capped scores, windows and padded prompts included; cotangents shared by the prompts, too."""
    layers = depth_system(tiny_model(model_type), PROMPTS).layers
    vectors = torch.randn(len(PROMPTS), 5, 24, generator=generator, dtype=torch.float64)
    shared = vectors[:1].expand_as(vectors)
    tolerance = EXACT if model_type == "gpt2" else SOFTMAX32
    for layer in layers:
        assert all(batch.recording.style.shares_point for batch in layer.batches)
        own = without_sharing(layer)
        for expected, found in (
            (own.vjp(vectors), layer.vjp(vectors)),
            (own.vjp(shared), layer.vjp(shared)),
            (own.jvp(vectors), layer.jvp(vectors)),
        ):
            assert (found - expected).abs().max() < tolerance * expected.abs().max()


class ChannelsFirst(nn.Module):
    """An activation that is handed the transpose: where there are as many products as numbers, of the same shape."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.activation(rows.transpose(1, 2)).transpose(1, 2)


class SequenceFirst(nn.Module):
    """Modules that are handed the rows of a prompt in the prompts' place."""

    def __init__(self, modules: nn.Module) -> None:
        super().__init__()
        self.wrapped = modules

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.wrapped(rows.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.parametrize("wrapper", [ChannelsFirst, SequenceFirst])
def test_rows_that_are_not_equal_are_not_shared(wrapper, generator):
    """As many products as prompts, or as numbers: the shape alone does not tell."""
    model = tiny_model("gpt2")
    for layer in model.layers:
        if wrapper is ChannelsFirst:
            layer.mlp.act = ChannelsFirst(layer.mlp.act)
        else:
            layer.mlp = SequenceFirst(layer.mlp)
    model.module.eval()
    layer = depth_system(model, PROMPTS).layers[1]
    n_products = 4 * 24 if wrapper is ChannelsFirst else len(PROMPTS)
    vectors = torch.randn(len(PROMPTS), n_products, 24, generator=generator, dtype=torch.float64)
    expected = without_sharing(layer).vjp(vectors)
    assert (layer.vjp(vectors) - expected).abs().max() < EXACT * expected.abs().max()


@pytest.mark.parametrize("rows", [30, 4096], ids=["in pieces", "at once"])
def test_formed_jacobians_are_products_with_the_identity(rows, gpt2, monkeypatch):
    monkeypatch.setattr(frozen, "ROWS_PER_CALL", rows)
    layer = depth_system(gpt2, PROMPTS).layers[1]
    identity = torch.eye(24, dtype=torch.float64).repeat(len(PROMPTS), 1, 1)
    expected = without_sharing(layer).vjp(identity)
    assert (layer.dense().jacobians - expected).abs().max() < EXACT * expected.abs().max()
    tangents = torch.randn(1, 3, 24, dtype=torch.float64).expand(len(PROMPTS), -1, -1)
    products = without_sharing(layer).jvp(tangents)
    assert (layer.dense().jvp(tangents) - products).abs().max() < EXACT * products.abs().max()
    fewer = layer.linearize(24).vjp(identity[:, :23])  # no multiple of a piece: the last overlaps the one before
    assert (fewer - expected[:, :23]).abs().max() < EXACT * expected.abs().max()


class Faulty(torch.autograd.Function):
    """The identity, whose derivative goes wrong."""

    @staticmethod
    def forward(ctx: object, rows: torch.Tensor, factor: float | Exception) -> torch.Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: object, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        if isinstance(ctx.factor, Exception):
            raise ctx.factor
        return ctx.factor * cotangents[0], None


@pytest.fixture
def single_rows_fail(monkeypatch):
    """Makes the derivative of llama's activation wrong for one row a prompt, which nothing asks for but sharing."""
    activation = type(tiny_model("llama").layers[0].mlp.act_fn)
    right = activation.forward

    def fail(factor: float | Exception) -> None:
        def forward(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
            value = right(module, rows)
            return Faulty.apply(value, factor) if rows.shape[1] == 1 else value

        monkeypatch.setattr(activation, "forward", forward)

    return fail


@pytest.mark.parametrize(
    "factor", [1.01, torch.nan, RuntimeError("not for this layer")], ids=["other numbers", "no numbers", "an error"]
)
def test_a_layer_that_cannot_share_its_point_is_differentiated_row_by_row(factor, single_rows_fail, generator):
    vectors = torch.randn(len(PROMPTS), 3, 24, generator=generator, dtype=torch.float64)
    expected = depth_system(tiny_model("llama"), PROMPTS).vjp(2, vectors)
    single_rows_fail(factor)
    system = depth_system(tiny_model("llama"), PROMPTS)
    assert not any(batch.recording.style.shares_point for layer in system.layers for batch in layer.batches)
    assert (system.vjp(2, vectors) - expected).abs().max() < SOFTMAX32 * expected.abs().max()


def test_too_little_memory_does_not_refuse_an_architecture(single_rows_fail):
    single_rows_fail(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        depth_system(tiny_model("llama"), PROMPTS)


def operator_calls(run: Callable[[], object]) -> int:
    """Operators that are called, not counting those inside of others."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events = [event for event in profiled.events() if event.name.startswith("aten::")]
    return sum(not (event.cpu_parent and event.cpu_parent.name.startswith("aten::")) for event in events)


@pytest.mark.parametrize("n_prompts", [3, 24])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_krylov_column_takes_few_operators_whatever_the_number_of_prompts(model_type, n_prompts):
    """An accelerator waits for the launch of each: all prompts' products with a column go out as one batch."""
    model = tiny_model(model_type)
    prompts = Prompts([f"film number {10 + i}" for i in range(n_prompts)], [i % 2 for i in range(n_prompts)])
    vectors = random_directions(5, 24)

    def calls(order: int) -> int:
        return operator_calls(lambda: identify(model, prompts, vectors, order=order, basis="krylov"))

    identify(model, prompts, vectors, order=2, basis="krylov")  # which checks the replay
    assert (calls(9) - calls(3)) / (6 * model.n_layers) <= 80
