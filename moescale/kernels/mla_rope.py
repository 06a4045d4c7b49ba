"""Rotary positions and head layout of multi-head latent attention, in one pass.

Source: DeepSeek-V2 (arXiv:2405.04434, section 2.1.3). Each head's query and key are a part without positions (Dn) and
a rotated part (Dr); the rotated key is shared by all heads.
"""

from __future__ import annotations

import torch


def mla_rope(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate the positional parts and lay out query, key and value for attention.

    Shapes: q [B, S, N, Dn+Dr]; kv [B, S, N, Dn+Dv]; k_rope [B, S, Dr]; cos, sin [S, Dr/2] fp32; results q and k
    [B, S, N, Dn+Dr], v [B, S, N, Dv]. Adjacent elements form a rotated pair, and stay adjacent in the result.
    """
    rope_dim = k_rope.shape[-1]
    nope_dim = q.shape[-1] - rope_dim
    q_nope, q_rope = q.split([nope_dim, rope_dim], dim=-1)
    k_nope, v = kv.split([nope_dim, kv.shape[-1] - nope_dim], dim=-1)
    q_out = torch.cat([q_nope, _rotate(q_rope, cos[:, None], sin[:, None])], dim=-1)
    k_rotated = _rotate(k_rope, cos, sin).unsqueeze(2).expand(-1, -1, q.shape[2], -1)
    return q_out, torch.cat([k_nope, k_rotated], dim=-1), v


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
