"""Rotary positions in plain torch: the definition, differentiable."""

from __future__ import annotations

import torch


def mla_rope(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`moescale.kernels.rope.mla_rope`."""
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


def half_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As :func:`moescale.kernels.rope.half_rope`."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
