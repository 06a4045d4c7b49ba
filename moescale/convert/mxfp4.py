"""MXFP4 (OCP Microscaling Formats specification 1.0): blocks of 32 four-bit floats that share a power of two."""

from __future__ import annotations

import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7 of E2M1; codes 8 to 15 are their negatives."""
_NAN_SCALE = 255


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the values [..., 32 G] in bf16 of ``blocks`` [..., G, 16] uint8 with ``scales`` [..., G] uint8.

    The first value of a byte is in its lower half. A scale s stands for 2 ** (s - 127), 255 for NaN. The values have
    two mantissa bits, so bf16 holds them exactly; those beyond its range become infinite.
    """
    codes = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float64)
    values = codes[torch.stack((blocks & 15, blocks >> 4), dim=-1).long()].flatten(-2)  # [..., G, 32]
    exponents = torch.arange(256, dtype=torch.float64) - 127
    powers = torch.pow(torch.tensor(2.0, dtype=torch.float64), exponents)
    powers[_NAN_SCALE] = torch.nan
    return (values * powers[scales.long()].unsqueeze(-1)).to(torch.bfloat16).flatten(-2)
