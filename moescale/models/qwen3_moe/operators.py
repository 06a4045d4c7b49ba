"""The operators of grouped-query attention with normed heads, and the layers of a Qwen3-MoE model. Imports no torch.

Dims: those of :mod:`moescale.models.grouped.operators`.
"""

from __future__ import annotations

from moescale.models.family import LayerList
from moescale.models.grouped.operators import grouped_dims
from moescale.models.layer_operators import OUTSIDE, decoder_layers
from moescale.models.qwen3_moe.config import Qwen3MoeConfig

_ATTENTION = ("q_proj", "gqa_key_value", "gqa_q_norm", "gqa_k_norm", "gqa_rope", "gqa_attention")


def layers(config: Qwen3MoeConfig) -> tuple[LayerList, ...]:
    """Return the operators of a dense and of an MoE layer."""
    return decoder_layers(config, _ATTENTION)


def outside(config: Qwen3MoeConfig) -> tuple[str, ...]:
    """Return the operators that are in no layer."""
    return OUTSIDE


def dims(config: Qwen3MoeConfig) -> dict[str, int]:
    """Return the sizes of the dims that do not depend on the batch."""
    return grouped_dims(config)


def biases(config: Qwen3MoeConfig) -> int:
    """Return 0: the family has none."""
    return 0
