"""Weights kept in fp8: e4m3 codes with an fp32 scale for each block of 128 x 128, as DeepSeek-V3 publishes them.

A weight [..., N, K] is ``code * scale`` with codes [..., N, K] and scales [..., ceil(N / 128), ceil(K / 128)]
(arXiv:2412.19437, section 3.3; blocks at the edges are smaller). A block's scale is its largest magnitude over 448, the
largest value of e4m3. Weights are quantised once, when they are loaded, and made plain for each product that they are
in: by :func:`plain`, within the operator that multiplies, so that nothing keeps the plain weight from one operator to
another and autograd saves the codes. The same bits on every device: each step is one correctly rounded operation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moescale.formats import FP8_BLOCK
from moescale.kernels.backends import KernelInputError, check_device, check_dtype, check_shape, runs_triton
from moescale.kernels.block_fp8 import reference

CODE_DTYPE = torch.float8_e4m3fn


class BlockFp8(NamedTuple):
    """A weight in fp8."""

    codes: torch.Tensor
    """[..., N, K] e4m3"""
    scales: torch.Tensor
    """[..., ceil(N / 128), ceil(K / 128)] fp32"""

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.codes.shape


class ExpertScales(NamedTuple):
    """The scales of a layer's routed experts, whose both weights are in fp8."""

    gate_up: torch.Tensor
    """[E, ceil(2F / 128), ceil(H / 128)]"""
    down: torch.Tensor
    """[E, ceil(H / 128), ceil(F / 128)]"""


Weight = torch.Tensor | BlockFp8
"""A plain weight, or one in fp8."""


def scales_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """The shape of the scales of a weight of ``shape`` [..., N, K]."""
    return (*shape[:-2], -(-shape[-2] // FP8_BLOCK), -(-shape[-1] // FP8_BLOCK))


def quantize(weight: torch.Tensor) -> BlockFp8:
    """Return ``weight`` [..., N, K], which must be finite, in fp8."""
    return BlockFp8(*reference.quantize(weight))


def stored(weight: torch.Tensor, scales: torch.Tensor | None) -> Weight:
    """The weight that a model keeps as a parameter, and another one of scales where it is in fp8."""
    return weight if scales is None else BlockFp8(weight, scales)


def plain(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return a plain weight as it is, and one in fp8 as a new tensor in ``dtype``: ``code * scale``, rounded once."""
    if isinstance(weight, torch.Tensor):
        return weight
    codes, scales = (tensor.contiguous() for tensor in weight)
    if runs_triton(codes.device, dtype, "auto"):
        from moescale.kernels.block_fp8 import triton

        return triton.dequantize(codes, scales, dtype)
    return reference.dequantize(codes, scales, dtype)


def detached_scales(scales: ExpertScales | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both scales without a gradient, None each of plain weights."""
    return (None, None) if scales is None else (scales.gate_up.detach(), scales.down.detach())


def check_stored(
    operator: str, name: str, weight: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Refuse a weight that is neither in ``dtype`` nor in fp8 with the scales that it needs.

    Raises KernelInputError.
    """
    if scales is None:
        return check_dtype(operator, name, weight, (dtype,))
    check_dtype(operator, name, weight, (CODE_DTYPE,))
    check_shape(operator, f"{name}_scale", scales, scales_shape(weight.shape), "a number for each block of 128 x 128")
    check_dtype(operator, f"{name}_scale", scales, (torch.float32,))
    check_device(operator, f"{name}_scale", scales, weight.device)
    if weight.requires_grad or scales.requires_grad:
        raise KernelInputError(f"{operator}: {name} is in fp8 and cannot be trained; freeze it")
