"""Ragged tensor descriptors: access to the rows of one expert inside the rows of all, clipped in hardware.

A descriptor clips accesses at the ends of the tensor, not at the end of an expert. Two extra leading dims make the end
movable: with strides 2^34 - s and s before the row stride s (elements), the coordinates (2^30, first + size,
2^30 - size + row) address row ``first + row``, because 2^30 * 2^34 elements wrap to 0 in 64-bit byte addresses, and the
row coordinate reaches the dim's length 2^30 exactly at row = size. Loads past the end then give zeros and stores past
it are dropped. The method is the one of ``triton.tools.ragged_tma``; it is spelled out here because that module's store
fails in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LIMIT = tl.constexpr(1 << 30)


def describe_rows(tensor: torch.Tensor, block_shape: list[int]) -> TensorDescriptor:
    """Return the ragged descriptor of ``tensor`` [R, C] or [R, 2, C], accessed in blocks of ``block_shape``."""
    row_stride = tensor.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, LIMIT.value, *tensor.shape[1:]]
    strides = [(1 << 34) - row_stride, row_stride, *tensor.stride()]
    return TensorDescriptor(tensor, shape, strides, [1, 1, *block_shape])


@triton.jit
def load_rows(descriptor, first, size, row, column):
    """Load a block [rows, columns] at ``row`` of the expert whose rows are [first, first + size)."""
    block = descriptor.load([LIMIT, first + size, LIMIT - size + row, column])
    return tl.reshape(block, (block.shape[2], block.shape[3]))


@triton.jit
def store_rows(descriptor, first, size, row, column, block):
    """Store a block [rows, columns], rounded to the descriptor's dtype; rows from ``size`` on are dropped."""
    block = tl.reshape(block.to(descriptor.dtype), (1, 1, block.shape[0], block.shape[1]))
    descriptor.store([LIMIT, first + size, LIMIT - size + row, column], block)


@triton.jit
def store_half(descriptor, first, size, row, half, column, block):
    """Store gate (half 0) or up (half 1) columns into rows [R, 2, F]: clipped at F, not at 2F."""
    block = tl.reshape(block.to(descriptor.dtype), (1, 1, block.shape[0], 1, block.shape[1]))
    descriptor.store([LIMIT, first + size, LIMIT - size + row, half, column], block)
