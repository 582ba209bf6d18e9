"""Steering: inputs that act on a model's last token while it runs or generates, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from llvlit.checks import array
from llvlit.engine.exclusive import lock_of
from llvlit.engine.models import LanguageModel
from llvlit.errors import ModelError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions


@contextmanager
def steer(model: LanguageModel, directions: DirectionsLike, inputs: np.ndarray) -> Iterator[LanguageModel]:
    """Context manager: inputs act on the last token of every forward pass inside, ``generate`` included.

    Before layer l, u_l v_l is added to the residual stream at the last position (prompts of a batch must be
    padded on the left, as ``generate`` asks for).  On leaving, by an exception or interrupt too, the model is as it
    was.  Inside, the package's other functions refuse the model: their numbers would be those of another.

    Parameters
    ----------
    inputs : (n_layers,) array
        u, such as :func:`minimum_energy` gives.

    Raises
    ------
    InputError
        If the inputs or directions do not fit the model.
    ModelError
        If the model is being steered already.
    NumericalError
        Inside, when the pushed states overflow.

    Examples
    --------
    >>> gains = llvlit.adjoint_gains(model, splits.operating, directions)
    >>> prompt = model.tokenizer("The plot was thin, and", return_tensors="pt")
    >>> with llvlit.steer(model, directions, llvlit.minimum_energy(gains, target=50.0)):
    ...     steered = model.module.generate(**prompt, max_new_tokens=8, do_sample=False)
    >>> plain = model.module.generate(**prompt, max_new_tokens=8, do_sample=False)
    >>> model.tokenizer.decode(steered[0]) == model.tokenizer.decode(plain[0])
    False
    """
    vectors = as_directions(directions).on(model)
    inputs = array("inputs", inputs, (model.n_layers,))
    pushes = torch.as_tensor(inputs).to(vectors).unsqueeze(-1) * vectors[:-1]

    def hook(layer: int) -> Any:
        def push(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            hidden[:, -1] += pushes[layer]
            return (hidden, *args[1:])

        return push

    def check_finite(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if not torch.isfinite((output[0] if isinstance(output, tuple) else output)[:, -1]).all():
            raise NumericalError(f"Inputs of up to {np.abs(inputs).max():.3g} overflow {model.name}; lower them.")

    entered = False
    try:
        try:
            with lock_of(model):
                if any(_hooks(model)):
                    raise ModelError(
                        f"{model.name} is being steered already. Add the inputs, or leave that block first."
                    )
                entered = True
                for layer in np.flatnonzero(inputs).tolist():
                    model.layers[layer].register_forward_pre_hook(hook(layer))
                model.layers[-1].register_forward_hook(check_finite)
            yield model
        finally:
            if entered:
                _remove_hooks(model)
    finally:  # again, for an interrupt that came in the midst of it
        if entered:
            _remove_hooks(model)


def _hooks(model: LanguageModel) -> Iterator[tuple[dict[int, Any], int]]:
    """Where hooks of this module are, and under which key."""
    for layer in model.layers:
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            yield from ((hooks, key) for key, hook in hooks.items() if getattr(hook, "__module__", "") == __name__)


def _remove_hooks(model: LanguageModel) -> None:
    for hooks, key in list(_hooks(model)):
        hooks.pop(key, None)
