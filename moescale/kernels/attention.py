"""Causal attention with different widths of key and value, kept within documents where asked.

On CUDA cuDNN comes first: of the kernels that take a key wider than the value it is the fastest by a factor of two to
three, and needs no padding of the value. Where it refuses (fp32, odd widths), PyTorch's next kernel runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moescale.kernels.backends import check_dtype, check_shape

PREFERENCE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, document_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return ``softmax(softmax_scale * q @ k.T + mask) @ v``.

    Shapes: q, k [B, S, N, Dn+Dr]; v [B, S, N, Dv]; document_ids [B, S] int32 or None; result [B, S, N, Dv]. A token
    sees itself and earlier tokens, with ``document_ids`` only those of its own document.
    """
    check_shape("attention", "q", q, (None,) * 4, "[B, S, N, Dn+Dr]")
    check_shape("attention", "k", k, q.shape, "the shape of q")
    check_shape("attention", "v", v, (*q.shape[:3], None), "[B, S, N, Dv]")
    for name, tensor in (("k", k), ("v", v)):
        check_dtype("attention", name, tensor, (q.dtype,))
    mask = None
    if document_ids is not None:
        check_shape("attention", "document_ids", document_ids, q.shape[:2], "[B, S]")
        mask = _document_mask(document_ids)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(PREFERENCE, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=softmax_scale)
    return out.transpose(1, 2)


def _document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [B, 1, S, S], true where the row's token may see the column's."""
    return (document_ids[:, :, None] == document_ids[:, None, :]).tril().unsqueeze(1)
