"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with normed queries and keys.

The norms take each head alone, as in Qwen3, or all heads at once, as in OLMoE.

Rotary positions rotate the two halves of a head against each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moescale.kernels.attention import Documents, attention
from moescale.kernels.rope import half_rope
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.norm import Activation, RMSNorm
from moescale.models.blocks.rope import tables
from moescale.models.cache import LayerCache
from moescale.models.grouped.config import GroupedQueryConfig


class GroupedQueryAttention(nn.Module):
    """[B, S, H] -> [B, S, H], causal; with ``documents`` tokens see only their own document."""

    def __init__(self, config: GroupedQueryConfig, *, norms_all_heads_at_once: bool = False) -> None:
        super().__init__()
        self.config = config
        self.norms_all_heads_at_once = norms_all_heads_at_once
        width = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_heads * width, bias=False)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * width, bias=False)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * width, bias=False)
        q_heads, k_heads = (config.num_heads, config.num_key_value_heads) if norms_all_heads_at_once else (1, 1)
        self.q_norm = RMSNorm(q_heads * width, config.rms_norm_eps)
        self.k_norm = RMSNorm(k_heads * width, config.rms_norm_eps)
        self.output = Linear(config.num_heads * width, config.hidden_size, bias=False)

    def norm_readers(self) -> Iterator[tuple[None, Linear]]:
        """The linear layers that read what the attention is given."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            yield None, layer

    def forward(
        self,
        x: Activation,
        cos: torch.Tensor,
        sin: torch.Tensor,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        width = self.config.head_dim
        q = self._normed_and_rotated(self.q_norm, self.q_proj(x), cos, sin)
        k = self._normed_and_rotated(self.k_norm, self.k_proj(x), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, width))
        attend = attention if cache is None else cache.attention
        mixed = attend(q, k, v, softmax_scale=width**-0.5, documents=documents)  # [B, S, N, D]
        return self.output(mixed.flatten(-2))

    def _normed_and_rotated(
        self, norm: RMSNorm, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[B, S, N * D] -> [B, S, N, D]."""
        heads = (-1, self.config.head_dim)
        if self.norms_all_heads_at_once:
            return half_rope(norm(projected).unflatten(-1, heads), cos, sin)
        return norm.rotated(projected.unflatten(-1, heads), cos, sin)


def rope_tables(
    config: GroupedQueryConfig, sequence_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and rotated pair, each [S, head_dim / 2] in fp32."""
    return tables(config.head_dim, config.rope_theta, config.yarn, sequence_length, device)
