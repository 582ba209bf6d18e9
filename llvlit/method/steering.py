"""Steering: inputs that act on a model's tokens, the last or all, while it runs or generates, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from threading import local
from typing import Any

import numpy as np
import torch
from torch import nn

from llvlit.checks import array, choice
from llvlit.engine.exclusive import lock_of
from llvlit.engine.models import LanguageModel
from llvlit.errors import InputError, ModelError, NumericalError
from llvlit.method.concepts import DirectionsLike, as_directions

MODES = ("prompt", "last", "all")


@contextmanager
def steer(
    model: LanguageModel, directions: DirectionsLike, inputs: np.ndarray, *, positions: str = "last"
) -> Iterator[LanguageModel]:
    """Context manager: inputs act on the last token of every forward pass inside, ``generate`` included; of the first
    alone; or on all tokens.

    Before layer l, u_l v_l is added to the residual stream at each prompt's last token that the attention mask
    ``(n_prompts, n_tokens)`` calls real, so that padding may stand on either side; a prompt of which the pass holds
    no real token is left alone.  Without a mask the last position is meant.  On leaving, by an exception or interrupt
    too, the model is as it was.  Inside, the package's other functions refuse the model: their numbers would be those
    of another.

    Parameters
    ----------
    inputs : (n_layers,) array, or (n_prompts, n_layers)
        u, such as :func:`recommend` or :func:`minimum_energy` gives; or one for each row of every pass inside.
    positions
        ``last``: the last real token of every pass; in generation the prompt's last token, then each new one.
        ``prompt``: the last real token of a pass before which nothing lies in the cache; in generation the prompt's
        last token alone, which later ones see through its keys and values.  ``all``: every real token of the pass; in
        generation the whole prompt, then each new token.  The gains of ``all`` are
        ``adjoint_gains(..., positions="all")``.

    Raises
    ------
    InputError
        If the inputs or directions do not fit the model.  Inside, when a pass of several tokens has a mask of another
        shape, which does not tell padding; or rows have inputs of their own, and the pass has another number of them.
    ModelError
        If the model is being steered already.
    NumericalError
        Inside, when the pushed states overflow.

    Examples
    --------
    >>> advice = llvlit.recommend(model, splits.operating, directions, budget=0.3)
    >>> prompt = model.tokenizer("The plot was thin, and", return_tensors="pt")
    >>> with llvlit.steer(model, directions, advice.inputs):
    ...     steered = model.module.generate(**prompt, max_new_tokens=8, do_sample=False)
    >>> plain = model.module.generate(**prompt, max_new_tokens=8, do_sample=False)
    >>> model.tokenizer.decode(steered[0]) == model.tokenizer.decode(plain[0])
    False
    """
    vectors = as_directions(directions).on(model)
    inputs = array("inputs", inputs)
    inputs = array("inputs", inputs, (*["n_prompts"] * (inputs.ndim == 2), model.n_layers))
    pushed = _real_tokens if choice("positions", positions, MODES) == "all" else _last_tokens
    pushes = torch.as_tensor(inputs).to(vectors).unsqueeze(-1) * vectors[:-1]  # (..., n_layers, hidden_size)

    running = local()  # in each thread: what runs and holds the layers, the mask it was given, whether it goes on

    def note_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(running, "module", None) in (None, module):  # parts of it are given what it makes of the mask
            given = signature(module.forward).bind_partial(*args, **kwargs).arguments
            given = {**given.get("kwargs", {}), **given}
            running.module, running.mask = module, given.get("attention_mask")
            running.goes_on = positions == "prompt" and _goes_on(given)

    def forget_mask(module: nn.Module, *_: Any) -> None:
        if running.module is module:
            running.module = running.mask = None
            running.goes_on = False

    def pushed_tokens(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, places = pushed(hidden, getattr(running, "mask", None))
        return (rows[:0], places[:0]) if getattr(running, "goes_on", False) else (rows, places)

    def hook(layer: int) -> Any:
        def push(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0].clone()
            if inputs.ndim == 2 and len(inputs) != len(hidden):
                raise InputError(f"inputs are of {len(inputs)} prompts, and the pass has {len(hidden)}. Pass as many.")
            rows, places = pushed_tokens(hidden)
            hidden[rows, places] += pushes[rows, layer] if inputs.ndim == 2 else pushes[layer]
            return (hidden, *args[1:])

        return push

    def check_finite(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.isfinite(hidden[pushed_tokens(hidden)]).all():
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
                for module in _holders(model):
                    module.register_forward_pre_hook(note_mask, with_kwargs=True)
                    module.register_forward_hook(forget_mask, always_call=True)
                for layer in np.flatnonzero(inputs.reshape(-1, model.n_layers).any(axis=0)).tolist():
                    model.layers[layer].register_forward_pre_hook(hook(layer))
                model.layers[-1].register_forward_hook(check_finite)
            yield model
        finally:
            if entered:
                _remove_hooks(model)
    finally:  # again, for an interrupt that came in the midst of it
        if entered:
            _remove_hooks(model)


def _goes_on(given: dict[str, Any]) -> bool:
    """Whether tokens have passed before those of a pass, and lie in its cache, or their state does."""
    tokens: Any = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    mask: Any = given.get("attention_mask")
    if getattr(mask, "ndim", 0) == 2 and tokens is not None and mask.shape[1] > tokens.shape[1]:
        return True
    caches = (given.get(name) for name in ("past_key_values", "cache_params", "state"))
    cache: Any = next((each for each in caches if each is not None), None)
    if not hasattr(cache, "get_seq_length"):
        return cache is not None
    for seen in (cache.get_seq_length, cache.has_previous_state):
        with suppress(ValueError):  # a cache of recurrent layers alone has no length, one of others no state
            if seen():
                return True
    return False


def _real_tokens(hidden: torch.Tensor, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions of the real tokens in ``(n_prompts, n_tokens, hidden_size)``.

    The mask is that of the pass, or none; it may begin with tokens that passed before and lie in the cache.
    """
    n_prompts, n_tokens = hidden.shape[:2]
    if mask is None or (n_tokens == 1 and getattr(mask, "ndim", 0) != 2):
        rows, positions = hidden.new_ones(n_prompts, n_tokens).nonzero(as_tuple=True)
        return rows, positions
    if getattr(mask, "ndim", 0) != 2 or mask.shape[1] < n_tokens:
        came = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask={came} does not tell which of {n_tokens} tokens are padding, and steer acts on those "
            "that are none. Pass the mask of the prompts, (n_prompts, n_tokens), or none."
        )
    real = (mask[:, -n_tokens:] != 0).to(hidden.device).expand(n_prompts, n_tokens)
    rows, positions = real.nonzero(as_tuple=True)
    return rows, positions


def _last_tokens(hidden: torch.Tensor, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The last of each row's real tokens."""
    rows, positions = _real_tokens(hidden, mask)
    is_last = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])[: len(rows)]
    return rows[is_last], positions[is_last]


def _holders(model: LanguageModel) -> list[nn.Module]:
    """The model and those of its parts that hold all layers, from the outside in; which of them runs, it decides."""
    path = next(path for path, part in model.module.named_modules() if part is model.layers).split(".")
    return [model.module.get_submodule(".".join(path[:depth])) for depth in range(len(path))]


def _hooks(model: LanguageModel) -> Iterator[tuple[nn.Module, int]]:
    """Which modules have hooks of this one, and under which key."""
    for module in (*_holders(model), *model.layers):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield from ((module, key) for key, hook in hooks.items() if getattr(hook, "__module__", "") == __name__)


def _remove_hooks(model: LanguageModel) -> None:
    for module, key in list(_hooks(model)):
        for kind in ("pre_hooks_with_kwargs", "hooks_always_called", "pre_hooks", "hooks"):  # found by the last two
            getattr(module, f"_forward_{kind}").pop(key, None)
