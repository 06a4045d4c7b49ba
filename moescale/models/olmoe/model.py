"""The OLMoE model: the shared decoder with grouped-query attention, normed over all heads at once."""

from __future__ import annotations

from moescale.models.blocks.gqa import GroupedQueryAttention, rope_tables
from moescale.models.olmoe.config import OlmoeConfig
from moescale.models.transformer import Transformer


def build(config: OlmoeConfig) -> Transformer:
    """Build the model on the device of the context."""
    return Transformer(
        config,
        attention=lambda config, layer: GroupedQueryAttention(config, norms_all_heads_at_once=True),
        positions=rope_tables,
    )
