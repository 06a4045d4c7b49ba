"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and behind a residual addition."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``weight * (x / sqrt(mean(x^2) + eps))`` over the last dim.

    Shapes: x [..., H]; weight [H]. The quotient is computed in fp32 and rounded to x's dtype before the gain, as the
    published DeepSeek-V2 code does.
    """
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``, both [..., H]: a block's output and the next norm."""
    summed = x + residual
    return rms_norm(summed, weight, eps), summed
