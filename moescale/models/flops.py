"""Arithmetic of training, for MFU: matrix products and causal attention, forward and backward, nothing recomputed."""

from __future__ import annotations

import torch

from moescale.config import ModelConfig
from moescale.models.family import LayerList
from moescale.models.registry import family_of
from moescale.operators import forward_flops, operator

# Dense bf16 rates of the vendors' data sheets, in FLOP/s, by a part of the device's name.
_PEAK_BF16_FLOPS = (("H100", 989e12), ("H200", 989e12), ("H800", 989e12), ("B200", 2250e12), ("A100", 312e12))


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the training FLOPs of a token: those of the operators' GEMMs and attention, forward and backward.

    A GEMM's backward is two GEMMs; attention counts half of the square, for it is causal.
    """
    family = family_of(config)
    dims = family.dims_of(config, 1, sequence_length)
    outside = LayerList(name="outside", operators=family.outside(config), count=1)
    operators = (
        (layers.count, operator(name)) for layers in (*family.layers(config), outside) for name in layers.operators
    )
    return sum(
        count * forward_flops(op, dims) * (1 + op.backward_flops_ratio)
        for count, op in operators
        if count and op.kind != "elementwise"
    )


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 rate in FLOP/s, or None where it is not known (the CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAK_BF16_FLOPS if part in name), None)
