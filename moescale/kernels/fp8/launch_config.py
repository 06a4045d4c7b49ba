"""Launches of the GEMMs in e4m3, for products of rows and weight gradients; what they do on an H200: decision 26."""

from __future__ import annotations

import dataclasses
import functools

import torch

from moescale.kernels.experts.launch_config import LaunchConfig

ROWS = LaunchConfig(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4, group_m=8)
GRADIENTS = dataclasses.replace(ROWS, group_m=4)
TALL_GRADIENTS = dataclasses.replace(GRADIENTS, block_m=GRADIENTS.block_n, block_n=GRADIENTS.block_m)
INTERPRETED = LaunchConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=1, flatten=False)


@functools.cache
def find_launch(device: torch.device, *, gradient: tuple[int, int] | None = None, wide: bool = False) -> LaunchConfig:
    """Return the launch of a product of rows, or of the ``gradient`` of a weight of this shape.

    The tile of a gradient lies along the dim that it fills. ``wide``: the result is in fp32, which is stored in
    narrower parts to take the same shared memory.
    """
    if device.type != "cuda":
        return INTERPRETED
    if gradient is None:
        return ROWS
    rows, columns = gradient
    is_tall = columns % GRADIENTS.block_n > 0 and rows % TALL_GRADIENTS.block_m == 0
    launch = TALL_GRADIENTS if is_tall else GRADIENTS
    return dataclasses.replace(launch, store_splits=4) if wide else launch
