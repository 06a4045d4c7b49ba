"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) in its training form.

Keys and values come from one compressed vector per token; positions enter through a separate rotary part of the query
and one rotary key that all heads share. Training materialises keys and values: absorbing the up-projection into the
query, as inference does, costs more arithmetic at training lengths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moescale.kernels.attention import Documents, attention
from moescale.kernels.rope import mla_rope
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.norm import Activation, RMSNorm
from moescale.models.blocks.rope import softmax_scale
from moescale.models.cache import LayerCache
from moescale.models.latent.config import LatentAttentionConfig

LATENT_NORM_EPS = 1e-6
"""The published code gives the q and kv latent norms this eps whatever ``rms_norm_eps`` is."""


class LatentAttention(nn.Module):
    """[B, S, H] -> [B, S, H], causal; with ``documents`` tokens see only their own document."""

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale(config)
        hidden, heads, bias = config.hidden_size, config.num_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_down = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_up = Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_down = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.output = Linear(heads * config.v_head_dim, hidden, bias=bias)

    def norm_readers(self) -> Iterator[tuple[RMSNorm | None, Linear]]:
        """The linear layers that read a norm's result, and which; None: what the attention is given."""
        if self.config.q_lora_rank is None:
            yield None, self.q_proj
        else:
            yield None, self.q_down
            yield self.q_norm, self.q_up
        yield None, self.kv_down
        yield self.kv_norm, self.kv_up

    def forward(
        self,
        x: Activation,
        cos: torch.Tensor,
        sin: torch.Tensor,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        heads = self.config.num_heads
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_up(self.q_norm(self.q_down(x)))
        latent, k_rope = self.kv_down(x).split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        kv = self.kv_up(self.kv_norm(latent))
        q, k, v = mla_rope(q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (heads, -1)), k_rope, cos, sin)
        attend = attention if cache is None else cache.attention
        mixed = attend(q, k, v, softmax_scale=self.softmax_scale, documents=documents)  # [B, S, N, Dv]
        return self.output(mixed.flatten(-2))
