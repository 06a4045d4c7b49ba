"""The definition of weights in fp8, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moescale.formats import FP8_BLOCK

MAX_CODE = 448.0
"""The largest value of e4m3."""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of ``weight`` [..., N, K]."""
    rows, columns = weight.shape[-2:]
    wide = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = wide.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))  # [..., N / 128, 128, K / 128, 128]
    # By a tensor: CUDA multiplies with the inverse of a number, which is rounded twice.
    scales = blocks.abs().amax((-3, -1)) / torch.full((), MAX_CODE, device=weight.device)
    # The smallest normal number keeps the quotient finite where all of a block is zero, or next to it.
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    codes = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    codes = codes.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return codes.contiguous(), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight in ``dtype``."""
    rows, columns = codes.shape[-2:]
    of_element = scales.repeat_interleave(FP8_BLOCK, -2)[..., :rows, :]
    of_element = of_element.repeat_interleave(FP8_BLOCK, -1)[..., :columns]
    return (codes.float() * of_element).to(dtype)
