"""An OLMoE model's config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moescale.errors import ConfigError
from moescale.models.grouped.hf import read_shared, write_shared
from moescale.models.hf_fields import FieldRules, value_or
from moescale.models.hf_rope import read_half_split_positions
from moescale.models.hf_routing import read_aux_loss
from moescale.models.olmoe.config import OlmoeConfig

# Fields with one supported value, each with the values that mean it.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
}
_REQUIRED = tuple(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size num_experts num_experts_per_tok "
    "max_position_embeddings".split()
)
RULES = FieldRules(
    only=_ONLY,
    required=_REQUIRED,
    integers=frozenset(_REQUIRED) | {"head_dim", "num_key_value_heads", "num_local_experts"},
    numbers=frozenset({"rms_norm_eps", "rope_theta", "initializer_range", "router_aux_loss_coef"}),
    flags=frozenset({"norm_topk_prob", "tie_word_embeddings", "output_router_logits"}),
    others=frozenset({"model_type", "rope_parameters", "rope_scaling"}),
    aliases={"num_local_experts": "num_experts"},
)


def read_hf(document: Mapping[str, Any], path: str) -> OlmoeConfig:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    RULES.check(document, path)

    field = partial(value_or, document)
    num_heads = document["num_attention_heads"]
    try:
        rope_theta, yarn = read_half_split_positions(document)
        return OlmoeConfig(
            num_key_value_heads=field("num_key_value_heads", num_heads),
            head_dim=field("head_dim", document["hidden_size"] // max(1, num_heads)),
            dense_intermediate_size=document["intermediate_size"],
            expert_intermediate_size=document["intermediate_size"],
            num_experts=document["num_experts"],
            normalize_topk=field("norm_topk_prob", False),
            aux_loss_alpha=read_aux_loss(document, 0.01),
            **read_shared(document),
            rms_norm_eps=float(field("rms_norm_eps", 1e-5)),
            rope_theta=rope_theta,
            yarn=yarn,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_hf(config: OlmoeConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that has none yet; :func:`read_hf` gives ``config`` back."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "torch_dtype": dtype,
        **write_shared(config),
        "intermediate_size": config.expert_intermediate_size,
        "num_experts": config.num_experts,
        "norm_topk_prob": config.normalize_topk,
        "clip_qkv": None,
        "attention_bias": False,
        # Without them transformers takes those of the published tokenizer, and gives the row of token 1 no gradient.
        "pad_token_id": None,
        "eos_token_id": None,
    }
