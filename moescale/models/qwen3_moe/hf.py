"""A Qwen3-MoE model's config.json. Imports no torch.

Both spellings of the number of experts and of RoPE's base are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moescale.errors import ConfigError
from moescale.models.grouped.hf import read_shared, write_shared
from moescale.models.hf_fields import FieldRules, value_or
from moescale.models.hf_rope import read_half_split_positions
from moescale.models.hf_routing import read_aux_loss
from moescale.models.qwen3_moe.config import Qwen3MoeConfig

# Fields with one supported value, each with the values that mean it.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False, None),
}
_REQUIRED = tuple(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "moe_intermediate_size num_experts_per_tok max_position_embeddings".split()
)
RULES = FieldRules(
    only=_ONLY,
    required=_REQUIRED,
    integers=frozenset(_REQUIRED) | {"head_dim", "num_experts", "num_local_experts", "max_window_layers"},
    numbers=frozenset({"rms_norm_eps", "rope_theta", "initializer_range", "router_aux_loss_coef"}),
    flags=frozenset({"norm_topk_prob", "tie_word_embeddings", "output_router_logits"}),
    others=frozenset({"model_type", "rope_parameters", "rope_scaling"}),
)


def read_hf(document: Mapping[str, Any], path: str) -> Qwen3MoeConfig:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    RULES.check(document, path)

    field = partial(value_or, document)
    num_heads = document["num_attention_heads"]
    try:
        rope_theta, yarn = read_half_split_positions(document)
        return Qwen3MoeConfig(
            num_key_value_heads=document["num_key_value_heads"],
            head_dim=field("head_dim", document["hidden_size"] // max(1, num_heads)),
            dense_intermediate_size=document["intermediate_size"],
            expert_intermediate_size=document["moe_intermediate_size"],
            num_experts=_one_of(document, "num_experts", "num_local_experts"),
            normalize_topk=field("norm_topk_prob", False),
            aux_loss_alpha=read_aux_loss(document, 0.001),
            **read_shared(document),
            rms_norm_eps=float(field("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            yarn=yarn,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_hf(config: Qwen3MoeConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that has none yet; :func:`read_hf` gives ``config`` back."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": dtype,
        **write_shared(config),
        "head_dim": config.head_dim,
        "intermediate_size": config.dense_intermediate_size,
        "moe_intermediate_size": config.expert_intermediate_size,
        "num_experts": config.num_experts,
        "norm_topk_prob": config.normalize_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _one_of(document: Mapping[str, Any], *names: str) -> Any:
    """Return the value that a folder has under one of two names, or the same under both."""
    given = {name: document[name] for name in names if document.get(name) is not None}
    if not given:
        raise ConfigError(f"field '{names[0]}' is missing; it decides the shape of the model")
    if len(set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(f'{name} ({value})' for name, value in given.items())} differ; keep one")
    return next(iter(given.values()))
