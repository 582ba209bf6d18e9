"""A model to oneself: one thread at a time, and nothing around that would change its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llvlit import checks
from llvlit.engine.models import LanguageModel
from llvlit.errors import ModelError

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

HARMLESS = ("transformers.utils.output_capturing", "llvlit.engine.stream")
"""Where hooks come from that change no number: they read, and only while it asks for states; or bring the weights."""


def lock_of(model: LanguageModel) -> Any:
    """The lock of a model's module, re-entrant in a thread: whoever runs or changes the module holds it."""
    return _LOCKS.setdefault(model.module, RLock())  # one step for threads and interrupts, unlike a lock around it


@contextmanager
def exclusive(model: LanguageModel, part: nn.Module | None = None) -> Iterator[None]:
    """Inside, no other thread runs the model through this package; the module is as its weights and code say.

    Parameters
    ----------
    part
        A part that runs alone, where that is all that needs a look.

    Raises
    ------
    ModelError
        If a hook is on the module or on every module, it is in training mode, or autocast or inference mode is on.

    Examples
    --------
    >>> from llvlit.engine.exclusive import exclusive
    >>> with llvlit.steer(model, directions, np.eye(12)[0]), exclusive(model):
    ...     pass
    Traceback (most recent call last):
    llvlit.errors.ModelError: embedded/small has a hook on the model itself (llvlit.method.steering.steer): ...
    """
    checks.instance("model", model, LanguageModel, "a model, as load_model gives it")
    if part is not None:
        checks.instance("part", part, nn.Module, "a module of the model")
    with lock_of(model):
        _check_surroundings(model)
        for module in parts_of(part or model.module):
            hooked = module._forward_pre_hooks or module._forward_hooks
            if hooked or module._backward_hooks or module._backward_pre_hooks or module.training:
                _check_module(model, module)
        yield


def parts_of(module: nn.Module) -> list[nn.Module]:
    """A module and all that it holds; ``modules()`` is ten times slower, and this runs for every layer."""
    parts = [module]
    for part in parts:  # which grows
        parts.extend(filter(None, part._modules.values()))
    return parts


def _check_surroundings(model: LanguageModel) -> None:
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu"))):
        raise ModelError(
            f"autocast is on: {model.name} would compute in half precision, and small differences drown in it. "
            "Leave the autocast block."
        )
    if torch.is_inference_mode_enabled():
        raise ModelError(f"inference mode is on, where {model.name} cannot be differentiated. Use torch.no_grad().")
    if torch.nn.modules.module._has_any_global_hook():
        raise ModelError(
            f"A hook is on every module (torch.nn.modules.module.register_module_...): the numbers of {model.name} "
            "would be those of another model. Remove it."
        )


def _check_module(model: LanguageModel, module: nn.Module) -> None:
    name = next(name for name, part in model.module.named_modules() if part is module) or "the model itself"
    if module.training:
        raise ModelError(f"{model.name} is in training mode ({name}). Call model.module.eval() first.")
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        for hook in hooks.values():
            home = getattr(hook, "__module__", "?")
            if home not in HARMLESS:
                origin = f"{home}.{getattr(hook, '__qualname__', type(hook).__name__)}".partition(".<locals>")[0]
                raise ModelError(
                    f"{model.name} has a hook on {name} ({origin}): its numbers would be those of another model. "
                    "Leave the block that set it, such as llvlit.steer, or remove it."
                )
