"""Where a result comes from: attached once, where it is written."""

from __future__ import annotations

from typing import Any

from llvlit.engine.models import LanguageModel
from llvlit.engine.tokens import TokenizedPrompts
from llvlit.provenance import environment


def origin(model: LanguageModel, tokens: TokenizedPrompts) -> dict[str, Any]:
    """Where numbers come from: the model, the prompts, the machine."""
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "prompts_fingerprint": tokens.prompts.fingerprint,
        "n_prompts": len(tokens),
        "n_cut": tokens.n_cut,
        **environment(model.device),
    }
