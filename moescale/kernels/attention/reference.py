"""Attention by its definition, in plain torch: all scores of a micro-batch are kept at once."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """As :func:`moescale.kernels.attention.attention`, with ``visible`` [B or 1, S, T] bool; softmax in fp32 or fp64.

    k and v may have another number T of tokens than q.

    A sink is the score of a key that every query of its head sees and whose value is zero (gpt-oss model card,
    arXiv:2508.10925, section 2.2).
    """
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1))  # [B, S, Nkv, N / Nkv, Dqk]
    scores = torch.einsum("bsgnd,btgd->bgnst", grouped, k) * softmax_scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(1, 2)  # [B, N, S, T]
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(batch, heads, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype).unflatten(1, (kv_heads, -1))
    return torch.einsum("bgnst,btgd->bsgnd", weights, v).flatten(2, 3)
