"""Steering: inputs that act on a model's last token while it runs or generates, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from llvlit.checks import array
from llvlit.engine.models import LanguageModel
from llvlit.method.concepts import DirectionsLike, as_directions


@contextmanager
def steer(model: LanguageModel, directions: DirectionsLike, inputs: np.ndarray) -> Iterator[LanguageModel]:
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
    vectors = as_directions(directions).on(model)
    inputs = array("inputs", inputs, (model.n_layers,))
    pushes = torch.as_tensor(inputs).to(vectors).unsqueeze(-1) * vectors[:-1]

    def hook(layer: int) -> Any:
        def push(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            hidden[:, -1] += pushes[layer]
            return (hidden, *args[1:])

        return push

    handles = [
        module.register_forward_pre_hook(hook(layer)) for layer, module in enumerate(model.layers) if inputs[layer]
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
