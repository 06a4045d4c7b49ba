"""The gpt-oss model: the shared decoder with attention that has sinks, windows and biases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moescale.kernels.attention import Documents, attention
from moescale.kernels.rope import half_rope
from moescale.models.blocks.gqa import rope_tables
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.norm import Activation
from moescale.models.cache import LayerCache
from moescale.models.gpt_oss.config import GptOssConfig
from moescale.models.transformer import Transformer


class SinkAttention(nn.Module):
    """[B, S, H] -> [B, S, H], causal, in some layers within a window; every head may also attend to nothing.

    ``sinks`` [N] are each head's score for that (model card, arXiv:2508.10925, section 2.2).
    """

    def __init__(self, config: GptOssConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window if layer in config.windowed_layers else None
        width, bias = config.head_dim, config.attention_bias
        self.q_proj = Linear(config.hidden_size, config.num_heads * width, bias=bias)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.sinks = nn.Parameter(torch.empty(config.num_heads))
        self.output = Linear(config.num_heads * width, config.hidden_size, bias=bias)

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
        q = half_rope(self.q_proj(x).unflatten(-1, (-1, width)), cos, sin)
        k = half_rope(self.k_proj(x).unflatten(-1, (-1, width)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, width))
        attend = attention if cache is None else cache.attention
        mixed = attend(
            q, k, v, softmax_scale=width**-0.5, documents=documents, window=self.window, sinks=self.sinks
        )  # [B, S, N, D]
        return self.output(mixed.flatten(-2))


def build(config: GptOssConfig) -> Transformer:
    """Build the model on the device of the context."""
    return Transformer(config, attention=SinkAttention, positions=rope_tables)
