"""The root-mean-square norm, alone and after a residual addition."""

from __future__ import annotations

import torch
from torch import nn

from moescale.kernels.normed_rope import normed_half_rope
from moescale.kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain, fp32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of ``x + residual``, and that sum, in one pass."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the norm of every head of ``x`` [B, S, N, D], its halves rotated, in one pass."""
        return normed_half_rope(x, self.weight, cos, sin, self.eps)
