"""What the Hugging Face folders of families with grouped-query attention have in common. Imports no torch."""

from __future__ import annotations

from moescale.models.family import HfNames
from moescale.models.grouped.config import GroupedQueryConfig

NAMES = HfNames(
    outside_layers={
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    layer_prefix="model.layers.{layer}.",
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


def transformers_differences(config: GroupedQueryConfig) -> list[str]:
    """Return where transformers departs from what is trained here."""
    if config.aux_loss_alpha:
        return [
            "the balancing loss is taken layer by layer, and divided by top_k; transformers takes all layers at once"
        ]
    return []
