"""Matrices in e4m3 with their scales, and the copies of a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moescale.kernels.backends import KernelInputError, check_device, check_dtype, check_shape

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""


class Scaled(NamedTuple):
    """A matrix in e4m3 with the numbers that its elements are multiplied by."""

    data: torch.Tensor
    scales: torch.Tensor
    """fp32, powers of two: one a row, or one an expert."""


class Copies(NamedTuple):
    """The two copies of a weight [E, N, K]; of a linear layer's [N, K], E is 1."""

    rows: torch.Tensor
    """[E, N, K] e4m3"""
    columns: torch.Tensor
    """[K, E * N'] e4m3, transposed; N' is N rounded up to a multiple of 128, zero behind N."""
    scales: torch.Tensor
    """[E] fp32, of both."""


def check_scaled(operator: str, name: str, scaled: Scaled, x: torch.Tensor) -> None:
    """Raise KernelInputError unless ``scaled`` can be the rows of x [..., H]."""
    rows = x.shape[:-1].numel()
    check_shape(operator, name, scaled.data, (rows, x.shape[-1]), "the rows of x")
    check_shape(operator, f"{name}.scales", scaled.scales, (rows,), "one a row")
    check_dtype(operator, name, scaled.data, (E4M3,))
    check_dtype(operator, f"{name}.scales", scaled.scales, (torch.float32,))
    check_device(operator, name, scaled.data, x.device)
    if not (scaled.data.is_contiguous() and scaled.scales.is_contiguous()):
        raise KernelInputError(f"{operator}: {name} and its scales must be contiguous")
