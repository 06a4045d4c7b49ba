"""The Qwen3-MoE model: the shared decoder with grouped-query attention."""

from __future__ import annotations

from moescale.models.blocks.gqa import GroupedQueryAttention, rope_tables
from moescale.models.qwen3_moe.config import Qwen3MoeConfig
from moescale.models.transformer import Transformer


def build(config: Qwen3MoeConfig) -> Transformer:
    """Build the model on the device of the context."""
    return Transformer(config, attention=lambda config, layer: GroupedQueryAttention(config), positions=rope_tables)
