"""Rows of strided tensors and grid sizes, as the element-wise kernels need them."""

from __future__ import annotations

import functools

import torch


def with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with the last dim contiguous; copies only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View [..., H] as [rows, H] with the last dim contiguous; copies only where no single row stride exists."""
    return with_unit_stride(x).reshape(-1, x.shape[-1])


@functools.cache
def num_programs(device: torch.device, *, per_multiprocessor: int) -> int:
    """Programs of a persistent grid; a fixed small number in the interpreter, where they run one after another."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor
