"""An independent look at a model: the frozen-context system against hooks on the full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from llvlit import checks
from llvlit.engine.check import HINT
from llvlit.engine.depth import DepthSystem, depth_system, propagate_beside
from llvlit.engine.exclusive import lock_of
from llvlit.engine.models import LanguageModel
from llvlit.engine.replay import first_output
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.errors import ModelError
from llvlit.prompts import Prompts

EXACT = 1e-4
"""Largest relative deviation of what counts as exact, in four layers of float32; what is wrong deviates by far more."""

DEPTH = 4
"""Layers; through more of them rounding adds up, and as much more is allowed."""

LENGTHS = (2, 12, 19)
"""Tokens of the prompts, which share a batch where they may: the shorter ones are padded."""

FIRST_TOKEN = 8
"""Id of the token that all prompts begin with; those below are most often special ones."""

PUSH = 0.3
"""Length of the pushes, relative to the state: large enough for every nonlinearity to matter."""


@dataclass(frozen=True)
class ArchitectureCheck:
    """What :func:`~llvlit.check_architecture` finds.

    Attributes
    ----------
    architecture : str
        Class of the model.
    status : str
        ``exact``, ``refused``, or ``wrong``: deviates without a refusal, which is a fault of this package.
    reason : str
        Why it is refused; empty if it is not.
    value_deviation : float
        Largest deviation of a state, relative to the state, or of a pushed final state, relative to what the push
        moved; nan if refused.
    derivative_deviation : float
        Largest deviation of an adjoint, relative to the adjoint, or of what a tangent becomes; nan if refused.
    context : str
        What candidates of a layer are run with: ``frozen`` (keys and values, the fast way), ``own kernel`` (the same,
        through the layer's own attention), or ``whole prompts`` (all tokens again: slower by their number).

    Examples
    --------
    >>> print(llvlit.check_architecture(model).context)
    frozen
    """

    architecture: str
    status: str
    reason: str = ""
    value_deviation: float = float("nan")
    derivative_deviation: float = float("nan")
    context: str = ""

    def __str__(self) -> str:
        if self.status == "refused":
            return f"{self.architecture}: refused ({self.reason})"
        deviations = f"{self.value_deviation:.0e} in value, {self.derivative_deviation:.0e} in derivative"
        return f"{self.architecture}: {self.status} (largest relative deviation {deviations})"


def check_architecture(model: LanguageModel) -> ArchitectureCheck:
    """Whether the frozen-context system of a model is exact: its states and derivatives against the full model's.

    Random tokens run through the whole model, each prompt alone, with hooks that push the last token before a layer
    and note it after each; the same pushes, and the adjoint of one backward pass through all of it, are asked of the
    depth system.  Nothing of the replay is used on the side of the hooks.

    Raises
    ------
    NumericalError
        If a state is not finite.

    Notes
    -----
    Costs about ``5 n_layers`` forward passes of some ten tokens.

    Examples
    --------
    >>> found = llvlit.check_architecture(model)
    >>> found.status, found.value_deviation < 1e-5
    ('exact', True)
    """
    checks.instance("model", model, LanguageModel, "a model, as load_model gives it")
    name = type(model.module).__name__
    tokens = _random_tokens(model)
    try:
        system = depth_system(model, tokens)
        values, derivatives = _deviations(model, tokens, system)
    except ModelError as error:
        return ArchitectureCheck(name, "refused", reason_of(error))
    is_exact = max(values, derivatives) <= EXACT * max(1, model.n_layers / DEPTH)
    style = system.layers[0].batches[0].recording.style
    context = "whole prompts" if style.whole_prompts else "frozen" if style.frozen_context else "own kernel"
    return ArchitectureCheck(name, "exact" if is_exact else "wrong", "", values, derivatives, context)


def reason_of(error: Exception) -> str:
    """Why a model is refused, out of the whole sentence that says so and what to do."""
    return str(error).rpartition(" is refused, since ")[2].removesuffix(f" {HINT}")


def _random_tokens(model: LanguageModel) -> TokenizedPrompts:
    generator = torch.Generator().manual_seed(0)
    size = min(model.n_embedded, len(model.tokenizer) or model.n_embedded)
    first = min(FIRST_TOKEN, size // 2)
    lengths = [min(length, model.max_positions) for length in LENGTHS]
    ids = tuple((first, *torch.randint(first, size, (n - 1,), generator=generator).tolist()) for n in lengths)
    prompts = Prompts([f"random tokens {number}" for number in range(len(ids))], [i % 2 for i in range(len(ids))])
    return TokenizedPrompts(prompts, ids, (False,) * len(ids), 128, model.identity)


def _deviations(model: LanguageModel, tokens: TokenizedPrompts, system: DepthSystem) -> tuple[float, float]:
    n_prompts, n_layers, size = len(tokens), model.n_layers, model.hidden_size
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(n_layers + 2, size, generator=generator, dtype=torch.float64)
    directions = (draws / draws.norm(dim=-1, keepdim=True)).to(system.states)
    readout = directions[-1]
    pushes = PUSH * system.states[:, :-1].norm(dim=-1, keepdim=True) * directions[:n_layers]
    full = [_full_model(model, ids, pushes[row], readout) for row, ids in enumerate(tokens.ids)]
    states, pushed, adjoints = (torch.stack(each) for each in zip(*full, strict=True))

    def push(layer: int, before: torch.Tensor) -> torch.Tensor:
        return (before + PUSH * before.norm(dim=-1, keepdim=True) * directions[layer]).unsqueeze(1)

    beside = propagate_beside(model, tokens, push)
    alone = [system.propagate((system.states[:, i] + pushes[:, i]).unsqueeze(1), start=i) for i in range(n_layers)]
    moved = pushed - states[:, -1:]
    values = [_relative(states, system.states, states)]
    values += [_relative(pushed, each, moved) for each in (beside, torch.cat(alone, dim=1))]

    w, t = readout.expand(n_prompts, 1, -1), directions[:1].expand(n_prompts, 1, -1)
    derivatives = []
    for index in reversed(range(n_layers)):
        w = system.vjp(index, w)
        derivatives.append(_relative(adjoints[:, index], w[:, 0], adjoints[:, index]))
    for index in range(n_layers):
        both = torch.cat([t, directions[index].expand(n_prompts, 1, -1)], dim=1)
        t = system.jvp(index, both)[:, :1]
    expected = (adjoints[:, 0] * directions[0]).sum(dim=-1, keepdim=True)
    derivatives.append(_relative(expected, (t[:, 0] * readout).sum(dim=-1, keepdim=True), adjoints[:, 0]))
    return max(values), max(derivatives)


def _relative(expected: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> float:
    sizes = scale.norm(dim=-1).clamp_min(torch.finfo(scale.dtype).tiny)
    return float(((expected - value).norm(dim=-1) / sizes).max())


def _full_model(
    model: LanguageModel, ids: tuple[int, ...], pushes: torch.Tensor, readout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one prompt: states ``(n_layers + 1, hidden_size)``; final states, each pushed before one layer; adjoints."""
    inputs = torch.zeros_like(pushes, requires_grad=True)
    with torch.enable_grad():
        states = _run(model, ids, inputs)
        (adjoints,) = torch.autograd.grad(states[-1] @ readout, inputs)
    with torch.no_grad():
        only = torch.eye(len(pushes), dtype=pushes.dtype, device=pushes.device).unsqueeze(-1)
        finals = [_run(model, ids, row * pushes)[-1] for row in only]
    return states.detach(), torch.stack(finals), adjoints


def _run(model: LanguageModel, ids: tuple[int, ...], inputs: torch.Tensor) -> torch.Tensor:
    """States of the last token in the full model, an input added before each layer."""
    states: list[torch.Tensor] = []

    def push(index: int) -> Callable[..., Any]:
        def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            last = hidden[:, -1:] + inputs[index]
            if not index:
                states.append(last[0, 0] - inputs[index])
            hidden = torch.cat([hidden[:, :-1], last], dim=1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def note(_: object, __: object, output: Any) -> None:
        states.append(first_output(output)[0, -1])

    with lock_of(model), ExitStack() as hooks:
        for index, layer in enumerate(model.layers):
            hooks.callback(layer.register_forward_pre_hook(push(index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(note).remove)
        model.module(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return torch.stack(states)
