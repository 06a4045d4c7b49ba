"""Launches of the GEMMs in e4m3, for products of rows and weight gradients; what they do on an H200: decision 26."""

from __future__ import annotations

import dataclasses
import functools

import torch

from moescale.kernels.experts.launch_config import LaunchConfig

ROWS = LaunchConfig(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4, group_m=8)
GRADIENTS = dataclasses.replace(ROWS, group_m=4)
INTERPRETED = LaunchConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=1, flatten=False)


@functools.cache
def find_launch(kernel: str, device: torch.device, *, wide: bool = False) -> LaunchConfig:
    """Return the launch of ``kernel``: one of the six products of an expert MLP.

    ``wide``: the result is in fp32, which is stored in narrower parts to take the same shared memory.
    """
    if device.type != "cuda":
        return INTERPRETED
    launch = GRADIENTS if kernel.endswith("wgrad") else ROWS
    return dataclasses.replace(launch, store_splits=4) if wide else launch
