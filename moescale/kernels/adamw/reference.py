"""AdamW in plain torch, in every state format, with the random bits that the Triton kernel draws."""

from __future__ import annotations

import torch

from moescale.kernels.adamw.rounding import random_bits
from moescale.kernels.adamw.state import (
    AdamWHyperparameters,
    AdamWState,
    master_weight,
    read_moments,
    write_master_weight,
    write_moments,
)


def update_fp32_fused(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    hyperparameters: AdamWHyperparameters,
    gradient_scale: torch.Tensor,
) -> None:
    """Everything in fp32: PyTorch has a fused operator for that, several times faster on the CPU."""
    h = hyperparameters
    assert state.master is not None
    torch._fused_adamw_(
        [state.master],
        [gradient.float() * gradient_scale],
        [state.first_moment],
        [state.second_moment],
        [],
        [torch.full((), float(h.num_updates), device=parameter.device)],
        lr=h.learning_rate,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=h.weight_decay,
        eps=h.eps,
        amsgrad=False,
        maximize=False,
    )
    if parameter.dtype != torch.float32:
        parameter.copy_(state.master)


def update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    hyperparameters: AdamWHyperparameters,
    gradient_scale: torch.Tensor,
    seed: int,
    first_index: int,
) -> None:
    """Update in any format; arguments as :func:`moescale.kernels.adamw.adamw_update` checked them."""
    h = hyperparameters
    random = random_bits(parameter.numel(), seed, first_index, parameter.device).view(parameter.shape)
    g = gradient.float() * gradient_scale
    first, second = read_moments(state)
    first = first + (g - first) * (1 - h.beta1)
    second = second + (g * g - second) * (1 - h.beta2)
    weight = master_weight(parameter, state)
    bias1, bias2 = 1 - h.beta1**h.num_updates, 1 - h.beta2**h.num_updates
    updated = weight * (1 - h.learning_rate * h.weight_decay)
    updated = updated - (h.learning_rate / bias1) * first / (second.sqrt() / bias2**0.5 + h.eps)
    write_moments(state, first, second, random)
    write_master_weight(parameter, state, updated, random)
