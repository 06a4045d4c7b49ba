"""The root-mean-square norm, alone and after a residual addition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from moescale.kernels.fp8 import Scaled
from moescale.kernels.fp8.norm import quantizing_rms_norm
from moescale.kernels.normed_rope import normed_half_rope
from moescale.kernels.rms_norm import add_rms_norm, rms_norm


class Normed(NamedTuple):
    """What a norm returns to layers of which some multiply in fp8."""

    plain: torch.Tensor
    """[..., H]"""
    rows: Scaled
    """Those of ``plain`` in e4m3: [R, H]."""


Activation = torch.Tensor | Normed
"""What a layer takes whose input may come from a norm."""


def plain_of(x: Activation) -> torch.Tensor:
    """Return ``x`` in the compute dtype."""
    return x.plain if isinstance(x, Normed) else x


def rows_of(x: Activation) -> Scaled | None:
    """Return the rows of ``x`` in e4m3, if it has them."""
    return x.rows if isinstance(x, Normed) else None


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain, fp32 inside."""

    quantizes = False
    """Whether the result is quantised with it: a layer that reads it multiplies in fp8
    (:mod:`moescale.models.fp8_gemms`)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> Activation:
        if self.quantizes:
            plain, _, rows = quantizing_rms_norm(x, None, self.weight, self.eps)
            return Normed(plain, rows)
        return rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[Activation, torch.Tensor]:
        """Return the norm of ``x + residual``, and that sum, in one pass."""
        if self.quantizes:
            plain, summed, rows = quantizing_rms_norm(x, residual, self.weight, self.eps)
            return Normed(plain, rows), summed
        return add_rms_norm(x, residual, self.weight, self.eps)

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the norm of every head of ``x`` [B, S, N, D], its halves rotated, in one pass."""
        return normed_half_rope(x, self.weight, cos, sin, self.eps)
