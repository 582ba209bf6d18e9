"""Steering: inputs that act on a model's last token while it runs or generates, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from llvlit.engine.exclusive import lock_of
from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError
from llvlit.method.concepts import Directions, direction_vectors


@contextmanager
def steer(
    model: LanguageModel, directions: Directions | torch.Tensor | np.ndarray, inputs: np.ndarray
) -> Iterator[LanguageModel]:
    """Context manager: inputs act on the last token of every forward pass inside, ``generate`` included.

    Before layer l, u_l v_l is added to the residual stream at the last position (prompts of a batch must be
    padded on the left, as ``generate`` asks for).  On leaving, by an exception too, the model is as it was.

    Parameters
    ----------
    inputs : (n_layers,) array
        u, such as :func:`minimum_energy` gives.

    Raises
    ------
    InputError
        If the inputs or directions do not fit the model.

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
    vectors = direction_vectors(directions, model)
    inputs = np.asarray(inputs, dtype=np.float64)
    if inputs.shape != (model.n_layers,) or not np.isfinite(inputs).all():
        raise InputError(f"inputs have shape {inputs.shape}; expected ({model.n_layers},), all finite.")
    pushes = torch.as_tensor(inputs).to(vectors).unsqueeze(-1) * vectors[:-1]

    def hook(layer: int) -> Any:
        def push(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            hidden[:, -1] += pushes[layer]
            return (hidden, *args[1:])

        return push

    handles = []
    try:
        with lock_of(model):  # not in the middle of another thread's run
            for layer, module in enumerate(model.layers):
                if inputs[layer]:
                    handles.append(module.register_forward_pre_hook(hook(layer)))
        yield model
    finally:
        for handle in handles:
            handle.remove()
