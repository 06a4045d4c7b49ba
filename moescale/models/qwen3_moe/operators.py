"""The operators of grouped-query attention with normed heads, and the layers of a Qwen3-MoE model. Imports no torch.

Dims: those of :mod:`moescale.models.grouped.operators`.
"""

from __future__ import annotations

from moescale.models.family import LayerList
from moescale.models.layer_operators import decoder_layers
from moescale.models.qwen3_moe.config import Qwen3MoeConfig

_ATTENTION = ("q_proj", "gqa_key_value", "gqa_q_norm_rope", "gqa_k_norm_rope", "gqa_attention")


def layers(config: Qwen3MoeConfig) -> tuple[LayerList, ...]:
    """Return the operators of a dense and of an MoE layer."""
    return decoder_layers(config, _ATTENTION)
