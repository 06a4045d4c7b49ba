"""Stochastic rounding to bf16, and the random bits for it: a hash that the Triton kernel computes, too."""

from __future__ import annotations

import torch


def round_stochastically(x: torch.Tensor, random16: torch.Tensor) -> torch.Tensor:
    """Round fp32 ``x`` up or down to bf16, by random bits (int64 below 2^16) such that the mean is ``x``."""
    bits = x.view(torch.int32) + random16.int()
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def random_bits(count: int, seed: int, first_index: int, device: torch.device) -> torch.Tensor:
    """[count] int64 below 2^32: a hash of the seed and of each element's index."""
    index = torch.arange(first_index, first_index + count, device=device, dtype=torch.int64)
    return mix((index + seed * 0x9E3779B1) & 0xFFFFFFFF)


def mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit mixer (multiply and xor-shift), on int64 tensors holding 32 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
