"""Routes of a mixture of experts: whether a push sends the last token to other experts, where the output jumps."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from llvlit.engine.depth import DepthSystem
from llvlit.engine.layer import FrozenBatch
from llvlit.engine.models import LanguageModel, text_config
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.engine.tokenwise import token_finals

RARE = 0.05
"""Share of pushes beyond which a change of route is told, and which the amplitude that is suggested aims at."""


def has_routes(model: LanguageModel) -> bool:
    """Whether the model's configuration speaks of several experts."""
    return bool(re.search(r"experts\w*': ([2-9]|[1-9]\d)", str(text_config(model.module).to_dict())))


class RouteWatch(TorchFunctionMode):
    """Inside, each choice of the largest scores (``topk``) is noted; the last that a layer takes is its router's.

    The candidates of each prompt stand last in a layer's rows, the unpushed state first among them; a candidate's
    route has changed where its choice is another one than that state's, in any layer from its own on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.picks: list[torch.Tensor] = []
        self.segment: tuple[int, int, int] | None = None
        self.n_batches: dict[int, int] = defaultdict(int)  # so far, at each layer
        self.changed: dict[int, np.ndarray] = {}  # of each batch, (n_prompts, n_candidates - 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            self.picks.append(out[1])
        return out

    def enter(self, layer: int, n_prompts: int, n_candidates: int) -> None:
        """Called before each layer, with what will run in it."""
        self.leave()
        self.segment, self.picks = (layer, n_prompts, n_candidates), []

    def leave(self) -> None:
        """Compare what the candidates of the layer before were given."""
        if self.segment is None:
            return
        layer, n_prompts, n_candidates = self.segment
        batch, self.segment = self.n_batches[layer], None
        self.n_batches[layer] += 1
        before = self.changed.get(batch, np.zeros((n_prompts, 0), dtype=bool))
        now = np.zeros((n_prompts, n_candidates - 1), dtype=bool)
        now[:, : before.shape[1]] = before
        if self.picks and self.picks[-1].numel() % n_prompts == 0:
            n_picks = self.picks[-1].shape[-1]
            picks = self.picks[-1].sort(dim=-1).values.reshape(n_prompts, -1, n_picks)
            if picks.shape[1] > n_candidates:  # all tokens and the candidates in one call
                picks = picks[:, -n_candidates:]
                now |= (picks[:, 1:] != picks[:, :1]).any(dim=-1).cpu().numpy()
        self.changed[batch] = now

    def shares(self, n_sets: int) -> np.ndarray:
        """Share of prompts whose route a push changed, in either sign, ``(n_sets, n_layers)``."""
        self.leave()
        every = np.concatenate([self.changed[batch] for batch in sorted(self.changed)])
        return np.asarray(every.reshape(len(every), -1, n_sets, 2).any(axis=-1).mean(axis=0).T)


def tell_routes(name: str, shares: np.ndarray, amplitudes: Sequence[float], smallest: float) -> list[dict[str, Any]]:
    """What is told of routes that pushes of several sets changed, ``(n_sets, n_layers)``: metadata of each set.

    Where changes are not rare, one warning speaks of the set that has most.  The share of pushes that cross a border
    between routes is proportional to their length, as long as it is small.
    """
    told: list[dict[str, Any]] = [{"rerouted": each.tolist()} for each in shares]
    for one, worst, amplitude in zip(told, shares.max(axis=1), amplitudes, strict=True):
        if worst > RARE:
            one["suggested_amplitude"] = max(smallest, float(f"{amplitude * RARE / worst:.1e}"))
    chosen, layer = divmod(int(shares.argmax()), shares.shape[1])
    if shares.max() > RARE:
        warnings.warn(
            f"The router of {name} sends {shares.max():.0%} of the prompts, pushed by {amplitudes[chosen]:g} before "
            f"layer {layer}, to other experts (mean over layers: {shares[chosen].mean():.0%}). The output jumps there: "
            f"measured gains are no derivatives. Try amplitude={told[chosen]['suggested_amplitude']:g}, or "
            "adjoint_gains.",
            stacklevel=3,
        )
    return told


def rerouted_tokens(
    model: LanguageModel,
    texts: TokenizedPrompts,
    vectors: torch.Tensor,
    inputs: np.ndarray,
    *,
    horizon: int,
    everywhere: bool,
) -> np.ndarray:
    """Which texts ``(n_texts,)`` have a token that inputs ``(n_layers,)`` at many tokens send to other experts."""
    changed = np.zeros(len(texts), dtype=bool)
    given = torch.tensor(inputs).expand(1, 1, -1)
    for row in range(len(texts)):
        with RouteWatch() as routes:  # of the text as it is, and pushed, one after the other
            list(token_finals(model, texts.select([row]), vectors[:-1], given, horizon=horizon, everywhere=everywhere))
        picks = [each.sort(dim=-1).values for each in routes.picks]
        half = len(picks) // 2
        changed[row] = any(not torch.equal(*pair) for pair in zip(picks[:half], picks[half:], strict=True))
    return changed


def rerouted(system: DepthSystem, vectors: torch.Tensor, inputs: np.ndarray) -> np.ndarray:
    """Which prompts ``(n_prompts,)`` some of their inputs ``(n_prompts, k, n_layers)`` send to other experts.

    Where a layer runs whole prompts, nothing is seen.
    """
    changed = np.zeros(len(inputs), dtype=bool)
    candidates = system.states[:, :1].expand(-1, inputs.shape[1], -1)

    def watched(batch: FrozenBatch, piece: torch.Tensor) -> torch.Tensor:
        rest = layer.states[batch.members].unsqueeze(1)
        with RouteWatch() as routes:
            out = layer._replay(batch, torch.cat([rest, piece], dim=1))
        if routes.picks and batch.context.tokens is None:
            picks = routes.picks[-1].sort(dim=-1).values.reshape(len(rest), 1 + piece.shape[1], -1)
            changed[batch.members.cpu().numpy()] |= (picks[:, 1:] != picks[:, :1]).any(dim=-1).any(dim=-1).cpu().numpy()
        return out[:, 1:]

    for layer in system.layers:
        pushes = torch.as_tensor(inputs[..., layer.index]).to(candidates).unsqueeze(-1) * vectors[layer.index]
        candidates = layer._by_pieces(candidates + pushes, watched)
    return changed
