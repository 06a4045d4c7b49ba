"""Launches of the GEMMs in e4m3, measured on an H200 (``benchmarks/results/h200/fp8_experts.json``)."""

from __future__ import annotations

import dataclasses
import functools

import torch

from moescale.kernels.experts.launch_config import LaunchConfig

LARGE = LaunchConfig(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4, group_m=4)
SMALL = LaunchConfig(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3, programs_per_sm=2, group_m=4)
INTERPRETED = LaunchConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=1, flatten=False)
FEW_ROWS = 512
"""Rows of an expert below which a weight gradient's result is most of its traffic; small tiles store it sooner."""


@functools.cache
def find_launch(kernel: str, device: torch.device, rows_per_expert: int, *, wide: bool = False) -> LaunchConfig:
    """Return the launch of ``kernel``: one of the six products of an expert MLP.

    ``wide``: the result is in fp32, which is stored in narrower parts to take the same shared memory.
    """
    if device.type != "cuda":
        return INTERPRETED
    launch = SMALL if kernel.endswith("wgrad") and rows_per_expert < FEW_ROWS else LARGE
    return dataclasses.replace(launch, store_splits=4) if wide else launch
