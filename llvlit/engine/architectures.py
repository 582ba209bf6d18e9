"""Every causal language model of the installed transformers, tiny and random, and what a check says of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llvlit.checks import choice, sequence
from llvlit.engine.models import wrap_model
from llvlit.engine.oracle import FIRST_TOKEN, ArchitectureCheck, check_architecture, reason_of
from llvlit.errors import LlvlitError

N_LAYERS = 4
VOCABULARY = 128
LAYERS = r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|encoder_layers|depth)"
RULES: tuple[tuple[str, int], ...] = (
    (LAYERS, N_LAYERS),
    (r".*vocab(_size)?(_per_layer_input)?|vocab_offset", VOCABULARY),
    (r"num_lstm_layers|num_nextn_predict_layers|num_kv_shared_layers", 2),
    (r"num_expert_group|first_k_dense_replace|num_dense_layers|n_group|topk_group|num_mem_blocks", 1),
    (r".*num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|n_groups|mamba_n?_?groups|index_n_heads", 2),
    (r".*num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|num_shared_experts|n_shared_experts", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*(num_heads|n_head|n_heads|attention_heads|key_heads|value_heads)", 4),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|zero_expert_num|o_groups|rotary_dim", 4),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|attention_chunk_size", 6),
    (r"original_max_position_embeddings|floor_scale|log_scaling_n_floor|keep_window_size|index_topk", 8),
    (r".*(head_dim|dim_head|head_size|kv_channels|d_head|headdim|d_kv)", 8),
    (r"(mamba_)?chunk_size", 8),
    (r".*(lora_rank|lowrank|laurel_rank|mamba_d_state|state_size|norm_rank|per_layer_input|adapter_rank)", 8),
    (r".*(position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|_positions)", 64),
    (r".*(intermediate_size|ffn_dim|ff_dim|d_ff|dff|dim_ff|ffn_hidden_size|feed_forward_size|mlp_dim|d_inner)", 48),
    (
        r".*(hidden_size(_global)?|d_model|n_embd|emb_dim|embed_dim|embedding_size|proj_dim|embedding_dim|lru_width|adapter_\w+)",
        32,
    ),
)
"""Name of a whole number, and its size in a tiny model: so small that windows and thresholds are passed."""

LEFT_OUT = {"transformers_version", "architectures", "id2label", "label2id", "dtype", "per_layer_config"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BY_KIND = {"full_attention": ROPE, "sliding_attention": ROPE}
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": BY_KIND, "layer_types": list(BY_KIND) * 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "minimax": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "mixtral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "hybrid_layer_ids": [1, 3],
    },
}
"""What the rules do not say of a model type."""

VARIANTS = ("plain", "massive first token", "long rope", "decoder")
"""What is tried of each model type; what its configuration does not have is left out."""

COLUMNS = ("architecture", "status", "value", "derivative", "context", "dtype", "reason", "transformers")


def model_types() -> tuple[str, ...]:
    """Names of all model types with a causal language model, in the order of the alphabet."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def check_all(types: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A row for each variant of some model types; of all with ``model_types()``.

    Keys: ``type``, ``variant``, and those of ``COLUMNS``; see :class:`~llvlit.engine.oracle.ArchitectureCheck`.
    The status is ``not built`` where transformers itself cannot build the model or run it on token ids alone, and
    ``fault`` where the check ends in a foreign error.  What is refused is tried again as a decoder only, and what runs
    whole prompts, as the full model does, in no other variant.

    Raises
    ------
    InputError
        If there is no such model type.

    Examples
    --------
    >>> from llvlit.engine.architectures import check_all
    >>> [(row["variant"], row["status"]) for row in check_all(["bert"])]
    [('plain', 'refused'), ('decoder', 'exact')]
    """
    return _check([choice("type", each, model_types()) for each in sequence("types", types, "names of model types")])


def _check(types: Iterable[str]) -> Iterator[dict[str, Any]]:
    for model_type in types:
        plain: dict[str, Any] = {}
        for variant in VARIANTS:
            has_more = plain.get("status") == "exact" and plain["context"] != "whole prompts"
            if not plain or has_more or (plain["status"] == "refused" and variant == "decoder"):
                row = check_variant(model_type, variant)
                plain = plain or row
                if row:
                    yield {"type": model_type, "variant": variant, **dict.fromkeys(COLUMNS, ""), **row}


def check_variant(model_type: str, variant: str = "plain") -> dict[str, Any]:
    """A row of :func:`check_all` without its first two keys; empty where the model type has no such variant."""
    dtype, module = torch.float64, None
    row = {"architecture": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "transformers": version("transformers")}
    try:
        plain = tiny_config(model_type)
        options = _options(plain, variant)
        if options is None:
            return {}
        for dtype in (torch.float64, torch.float32):
            try:
                module = tiny_module(tiny_config(model_type, **options), dtype=dtype)
                with torch.no_grad():
                    module(input_ids=torch.arange(10).view(1, -1) + FIRST_TOKEN, use_cache=False)
                break
            except Exception:  # of a foreign model, anything
                if dtype == torch.float32:
                    raise
    except Exception as error:
        return {**row, "status": "not built", "reason": _told(error)}
    assert module is not None
    row["dtype"] = str(dtype).removeprefix("torch.")
    if variant.startswith("massive"):
        with torch.no_grad():
            embedding: Any = module.get_input_embeddings()
            embedding.weight[FIRST_TOKEN] *= 1e4
    try:
        found = check_architecture(wrap_model(module, _tokenizer(), name=model_type))
    except LlvlitError as error:
        found = ArchitectureCheck(row["architecture"], "refused", reason_of(error))
    except Exception as error:
        return {**row, "status": "fault", "reason": _told(error)}
    if found.status != "refused":
        row |= {"value": f"{found.value_deviation:.1e}", "derivative": f"{found.derivative_deviation:.1e}"}
    return {**row, "status": found.status, "context": found.context, "reason": found.reason}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _options(config: PretrainedConfig, variant: str) -> dict[str, Any] | None:
    """What makes a variant of a tiny configuration; None where there is no such variant."""
    if variant == "long rope":
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "default":
            return None
        n_factors = int(8 * rope.get("partial_rotary_factor", 1)) // 2  # a head has 8 numbers
        factors = {"short_factor": [1.0] * n_factors, "long_factor": [4.0] * n_factors}
        return {"rope_parameters": {**rope, **factors, "rope_type": "longrope", "original_max_position_embeddings": 8}}
    if variant == "decoder":
        return {"is_decoder": True} if getattr(config, "is_decoder", None) is False else None
    return {}


def tiny_config(model_type: str, **options: Any) -> PretrainedConfig:
    """Configuration of a model of few numbers, all kinds of layers of the default in it."""
    config = _shrink(CONFIG_MAPPING[model_type]().to_dict())
    return CONFIG_MAPPING[model_type](**deepcopy({**config, **options}))  # a configuration changes what it is given


def _shrink(config: Mapping[Any, Any]) -> dict[str, Any]:
    n_layers = next((config[key] for key in config if re.fullmatch(LAYERS, str(key))), None)
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in LEFT_OUT:
            continue
        if isinstance(value, dict):
            small[key] = _shrink(value)
        elif isinstance(value, list) and len(value) == n_layers:
            kinds = list({str(each): each for each in value}.values())
            small[key] = [kinds[number % len(kinds)] for number in range(N_LAYERS)]
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in RULES if re.fullmatch(pattern, key)), value)
            if key == "num_key_value_heads" and value == config.get("num_attention_heads"):
                size = 4  # as many as there are heads
            if re.fullmatch(r"(pad|bos|eos|sep|cls)_token_id", key) and value >= VOCABULARY:
                size = 0
            small[key] = min(value, size)
        else:
            small[key] = value
    return small | OPTIONS.get(config.get("model_type", ""), {})


def tiny_module(config: PretrainedConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Random model whose weights are large enough that every nonlinearity matters."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    for part in module.modules():
        if hasattr(getattr(part, "config", None), "_experts_implementation"):
            part.config._experts_implementation = "eager"  # the grouped kernel has no float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return module.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
