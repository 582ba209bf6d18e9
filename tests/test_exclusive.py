"""A model to oneself: nothing that changes its numbers goes unnoticed, and nothing that happens changes the model."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import llvlit
from conftest import PROMPTS, tiny_model
from llvlit.engine.depth import last_token_states, sweep
from llvlit.engine.exclusive import exclusive
from llvlit.engine.models import LanguageModel
from llvlit.errors import ModelError
from llvlit.method.concepts import random_directions
from llvlit.prompts import Prompts

ENTRIES: dict[str, Callable[[LanguageModel], Any]] = {
    "depth_system": lambda model: llvlit.depth_system(model, PROMPTS),
    "last_token_states": lambda model: last_token_states(model, PROMPTS),
    "measured_gains": lambda model: llvlit.measured_gains(model, PROMPTS, directions_of(model)),
    "adjoint_gains": lambda model: llvlit.adjoint_gains(model, PROMPTS, directions_of(model)),
}


def directions_of(model: LanguageModel) -> torch.Tensor:
    return random_directions(model.n_layers + 1, model.hidden_size)


@pytest.mark.parametrize("entry", ENTRIES)
def test_gains_of_a_steered_model_are_an_error_that_names_the_hook(entry: str) -> None:
    model = tiny_model("gpt2", seed=4)
    run = ENTRIES[entry]
    run(model)
    push = np.eye(model.n_layers)[2]
    with (
        llvlit.steer(model, directions_of(model), push),
        pytest.raises(ModelError, match=r"tiny-gpt2 has a hook on the model itself \(llvlit\.method\.steering\.steer"),
    ):
        run(model)
    run(model)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_that_come_after_a_check_are_noticed(kind: str) -> None:
    model = tiny_model("gpt2", seed=4)
    system = llvlit.depth_system(model, PROMPTS)
    handle = getattr(model.layers[1].mlp, f"register_{kind}")(lambda *_: None)
    for run in (lambda: llvlit.depth_system(model, PROMPTS), lambda: system.step(1, system.states[:, 1:2])):
        with pytest.raises(ModelError, match=r"hook on transformer\.h\.1\.mlp"):
            run()
    handle.remove()
    assert torch.equal(llvlit.depth_system(model, PROMPTS).states, system.states)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_hooks_on_every_module_are_refused(entry: str, kind: str) -> None:
    model = tiny_model("gpt2", seed=4)
    ENTRIES[entry](model)
    handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        with pytest.raises(ModelError, match=r"hook is on every module .*tiny-gpt2.* Remove it"):
            ENTRIES[entry](model)
    finally:
        handle.remove()
    ENTRIES[entry](model)


def test_a_hook_that_comes_in_the_middle_of_a_sweep_is_noticed(gpt2: LanguageModel) -> None:
    layers = sweep(gpt2, PROMPTS)
    next(layers)
    with llvlit.steer(gpt2, directions_of(gpt2), np.ones(4)), pytest.raises(ModelError, match="hook"):
        next(layers)


def test_hooks_that_transformers_leaves_behind_are_no_hindrance(gpt2: LanguageModel) -> None:
    model = tiny_model("llama")
    expected = last_token_states(model, PROMPTS)
    model.module(torch.tensor([[5, 6, 7]]), output_hidden_states=True, output_attentions=True)
    assert torch.equal(last_token_states(model, PROMPTS), expected)


@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_inference_mode_and_training_are_refused(entry: str) -> None:
    model = tiny_model("gpt2", seed=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ModelError, match="autocast is on"):
        ENTRIES[entry](model)
    with torch.inference_mode(), pytest.raises(ModelError, match="inference mode is on"):
        ENTRIES[entry](model)
    model.module.train()
    with pytest.raises(ModelError, match=r"is in training mode .*model\.module\.eval\(\)"):
        ENTRIES[entry](model)


def test_two_threads_on_one_model_have_the_numbers_of_one() -> None:
    model = tiny_model("llama")
    directions = directions_of(model)
    halves = [PROMPTS.select([0, 1, 2]), PROMPTS.select([3, 4, 5])]

    def run(number: int) -> np.ndarray:
        gains = llvlit.adjoint_gains if number % 4 < 2 else llvlit.measured_gains
        return gains(model, halves[number % 2], directions).per_prompt

    expected = [run(number) for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        for number, found in enumerate(pool.map(run, range(40))):
            assert np.array_equal(found, expected[number % 4])


def test_a_thread_waits_while_another_holds_the_model(gpt2: LanguageModel) -> None:
    started, order = Event(), []

    def enter() -> None:
        started.set()
        with exclusive(gpt2):
            order.append("the other")

    with ThreadPoolExecutor(1) as pool:
        with exclusive(gpt2):
            other = pool.submit(enter)
            assert started.wait(timeout=60)
            for _ in range(5):  # in this thread it goes on, a thousand times as long as entering takes
                last_token_states(gpt2, PROMPTS)
            order.append("the holder")
        other.result(timeout=60)
    assert order == ["the holder", "the other"]


def interrupted(function: Callable[[], Any], number: int) -> bool:
    """Run a function with a keyboard interrupt before the given bytecode of the engine; whether it came so far."""
    left = number

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if f"llvlit{'/'}engine" not in frame.f_code.co_filename and "contextlib" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_keyboard_interrupt_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    prompts = Prompts(["a film", "one"], [0, 1])
    cotangents = torch.ones(2, 3, 24, dtype=torch.float64)

    def run() -> torch.Tensor:
        return llvlit.depth_system(model, prompts).vjp(1, cotangents)

    def state() -> list[Any]:
        parts = [dict(vars(part)) for part in model.module.modules()]
        return [*parts, *(dict(vars(part["config"])) for part in parts if "config" in part)]

    expected, before = run(), state()
    n_bytecodes = 1
    while interrupted(run, n_bytecodes):
        n_bytecodes *= 2
    draw = random.Random(7)
    for number in draw.sample(range(1, n_bytecodes // 2), 300):
        assert interrupted(run, number)
        assert all(new.keys() == old.keys() for new, old in zip(state(), before, strict=True))
        assert all(new[key] is old[key] for new, old in zip(state(), before, strict=True) for key in old)
    assert torch.equal(run(), expected)


def test_an_interrupt_from_the_keyboard_leaves_the_model_to_other_threads() -> None:
    """Real signals, which Python handles between calls: they find the lock taken and released, or not at all."""
    model = tiny_model("llama", num_hidden_layers=2)
    prompts = Prompts(["a film", "one"], [0, 1])

    def press(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    def took(seconds: float) -> bool:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            llvlit.depth_system(model, prompts)
            signal.setitimer(signal.ITIMER_REAL, 0)
            return True
        except KeyboardInterrupt:
            return False

    handler = signal.signal(signal.SIGALRM, press)
    try:
        assert took(60)
        start = time.perf_counter()
        assert took(60)
        longest = time.perf_counter() - start
        draw = random.Random(7)
        n_interrupted = sum(not took(draw.uniform(1e-4, longest)) for _ in range(100))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert n_interrupted > 20
    other = threading.Thread(target=llvlit.depth_system, args=(model, prompts), daemon=True)
    other.start()
    other.join(timeout=60)
    assert not other.is_alive()
