"""Arithmetic of training, for MFU: matrix products and causal attention, forward and backward, nothing recomputed."""

from __future__ import annotations

import torch

from moescale.config import ModelConfig
from moescale.lora import LoraSettings
from moescale.models.family import LayerList
from moescale.models.registry import family_of
from moescale.operators import Tensor, forward_flops, is_routed, operator

# Dense bf16 rates of the vendors' data sheets, in FLOP/s, by a part of the device's name.
_PEAK_BF16_FLOPS = (("H100", 989e12), ("H200", 989e12), ("H800", 989e12), ("B200", 2250e12), ("A100", 312e12))


def flops_per_token(config: ModelConfig, sequence_length: int, lora: LoraSettings | None = None) -> float:
    """Return the training FLOPs of a token: those of the operators' GEMMs and attention, forward and backward.

    A GEMM's backward is two GEMMs, one where its weight is frozen; attention counts half of the square, for it is
    causal. ``lora``: adapters that alone are trained, with three times the FLOPs of their forward.
    """
    family = family_of(config)
    dims = family.dims_of(config, 1, sequence_length)
    outside = LayerList(name="outside", operators=family.outside, indices=(0,))
    operators = (
        (layers.count, operator(name)) for layers in (*family.layers(config), outside) for name in layers.operators
    )
    total = 0.0
    for count, op in operators:
        if not count or op.kind == "elementwise":
            continue
        frozen = lora is not None and bool(op.parsed.weights)
        total += count * forward_flops(op, dims) * (1 + op.backward_flops_ratio - frozen)
        if lora is not None:
            rows = dims["k"] if is_routed(op) else 1
            for spot in op.adaptable:
                if lora.has_target(spot.module):
                    columns = spot.parts * Tensor.parse(spot.inputs).size(dims) + Tensor.parse(spot.outputs).size(dims)
                    total += count * 3 * 2 * rows * lora.rank * columns
    return total


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 rate in FLOP/s, or None where it is not known (the CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAK_BF16_FLOPS if part in name), None)
