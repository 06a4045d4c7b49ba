"""What the Hugging Face folders of families with grouped-query attention have in common. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.models.family import HfNames
from moescale.models.grouped.config import GroupedQueryConfig
from moescale.models.hf_fields import value_or
from moescale.models.hf_rope import write_half_split_yarn
from moescale.models.hf_routing import PLAIN_ROUTING

NAMES = HfNames(
    whole={
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.router": "mlp.gate",
        "feed_forward.down": "mlp.down_proj",
    },
    gate_and_up={"feed_forward.gate_up": "mlp"},
    experts="mlp.experts",
)
"""Of decoders whose queries and keys are normed, as transformers names their tensors."""


def read_shared(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that all these families spell alike, with the same defaults."""
    return {
        "vocab_size": document["vocab_size"],
        "hidden_size": document["hidden_size"],
        "num_layers": document["num_hidden_layers"],
        "num_heads": document["num_attention_heads"],
        "top_k": document["num_experts_per_tok"],
        "tie_embeddings": value_or(document, "tie_word_embeddings", False),
        "max_sequence_length": document["max_position_embeddings"],
        "initializer_std": float(value_or(document, "initializer_range", 0.02)),
        **PLAIN_ROUTING,
    }


def write_shared(config: GroupedQueryConfig) -> dict[str, Any]:
    """Return the fields of config.json that all these families spell alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_experts_per_tok": config.top_k,
        "output_router_logits": config.aux_loss_alpha > 0,
        "router_aux_loss_coef": config.aux_loss_alpha,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_std,
        "max_position_embeddings": config.max_sequence_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": write_half_split_yarn(config.yarn),
        "tie_word_embeddings": config.tie_embeddings,
    }


def transformers_differences(config: GroupedQueryConfig) -> list[str]:
    """Return where transformers departs from what is trained here."""
    if config.aux_loss_alpha:
        return [
            "the balancing loss is taken layer by layer, and divided by top_k; transformers takes all layers at once"
        ]
    return []
