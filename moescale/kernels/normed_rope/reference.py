"""The norm of every head and then its rotation, in plain torch: the definition, differentiable."""

from __future__ import annotations

import torch

from moescale.kernels.rms_norm.reference import rms_norm
from moescale.kernels.rope.reference import half_rope


def normed_half_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """As :func:`moescale.kernels.normed_rope.normed_half_rope`."""
    return half_rope(rms_norm(x, weight, eps), cos, sin)
