"""AdamW on one tensor, one pass over memory, in several state formats.

Moments are fp32, bf16, or 8 bits per value with one fp32 scale per block of 128 values of a row. The weight the model
computes with has beside it an fp32 master weight; or, where it is bf16, the 16 bits that bf16 rounds away, which
together with it are exactly the fp32 master; or nothing, and updates are rounded stochastically to bf16.

Every rounding to fewer bits than fp32 is stochastic and unbiased: rounding to nearest loses every update smaller than
half a step, so a second moment in 8 or 16 bits would never decay. The random bits are a hash of (seed, element index),
so a step can be repeated exactly, on any division of the tensor along its first dim.

Source: Loshchilov & Hutter 2019, algorithm 2; block-wise quantised states: Dettmers et al. 2022 (arXiv:2110.02861),
with power-law codes in place of their table: value = scale * (code / 127)^3 for the first moment, and
scale * (code / 255)^4 for the second, whose smallest code is 1, so that a denominator never vanishes.
"""

from __future__ import annotations

import torch

from moescale.kernels.adamw import reference
from moescale.kernels.adamw.state import (
    BLOCK,
    MASTERS,
    MOMENT_DTYPES,
    AdamWHyperparameters,
    AdamWState,
    init_adamw_state,
    join_master,
    master_weight,
    set_master_weight,
)
from moescale.kernels.backends import KernelInputError, choose_backend

__all__ = [
    "BLOCK",
    "MASTERS",
    "MOMENT_DTYPES",
    "AdamWHyperparameters",
    "AdamWState",
    "adamw_update",
    "init_adamw_state",
    "join_master",
    "master_weight",
    "set_master_weight",
]


@torch.no_grad()
def adamw_update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    hyperparameters: AdamWHyperparameters,
    *,
    gradient_scale: torch.Tensor,
    seed: int,
    first_index: int = 0,
    backend: str = "auto",
) -> None:
    """Update ``parameter`` and ``state`` in place.

    Args:
        gradient: the parameter's shape, fp32 or bf16; read only.
        gradient_scale: fp32 scalar on the device; the gradient is multiplied by it (clipping).
        seed: 32 bits; use another one for every tensor and step.
        first_index: index, in the whole tensor, of this part's first element.
    """
    if gradient.shape != parameter.shape:
        raise KernelInputError(
            f"adamw: gradient has shape {tuple(gradient.shape)}; it must be {tuple(parameter.shape)}"
        )
    if not (parameter.is_contiguous() and gradient.is_contiguous()):
        raise KernelInputError("adamw: parameter and gradient must be contiguous")
    if parameter.numel() == 0:
        return
    if choose_backend(parameter.device, parameter.dtype, backend) == "triton":
        from moescale.kernels.adamw import triton

        triton.update(parameter, gradient, state, hyperparameters, gradient_scale, seed, first_index)
    elif state.master is not None and state.first_moment.dtype == torch.float32:
        reference.update_fp32_fused(parameter, gradient, state, hyperparameters, gradient_scale)
    else:
        reference.update(parameter, gradient, state, hyperparameters, gradient_scale, seed, first_index)
