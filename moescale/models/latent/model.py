"""The model of a family with latent attention: the shared decoder with :class:`LatentAttention`."""

from __future__ import annotations

from moescale.models.blocks.mla import LatentAttention
from moescale.models.blocks.rope import rope_tables
from moescale.models.latent.config import LatentAttentionConfig
from moescale.models.transformer import Transformer


def build(config: LatentAttentionConfig) -> Transformer:
    """Build the model on the device of the context."""
    return Transformer(config, attention=lambda config, layer: LatentAttention(config), positions=rope_tables)
