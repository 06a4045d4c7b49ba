"""The DeepSeek-V2 model: the shared decoder with multi-head latent attention."""

from __future__ import annotations

from moescale.models.blocks.mla import LatentAttention
from moescale.models.blocks.rope import rope_tables
from moescale.models.deepseek_v2.config import DeepSeekV2Config
from moescale.models.transformer import Transformer


def build(config: DeepSeekV2Config) -> Transformer:
    """Build the model on the device of the context."""
    return Transformer(config, attention=LatentAttention, positions=rope_tables)
