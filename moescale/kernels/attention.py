"""Causal attention with different widths of key and value, kept within documents where asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, document_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return ``softmax(softmax_scale * q @ k.T + mask) @ v``.

    Shapes: q, k [B, S, N, Dn+Dr]; v [B, S, N, Dv]; document_ids [B, S] int32 or None; result [B, S, N, Dv]. A token
    sees itself and earlier tokens, with ``document_ids`` only those of its own document.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if document_ids is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
    else:
        mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril().unsqueeze(1)  # [B, 1, S, S]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2)
