"""AdamW in plain torch, with the random bits that the Triton kernel draws too."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moescale.kernels.adamw.state import BLOCK, AdamWHyperparameters, AdamWState, master_weight, set_master_weight


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
    random_first, random_weight = random & 0xFFFF, _mix(random ^ 0x9E3779B9) & 0xFFFF
    # Codes are drawn with all the bits there are for them, of which the second moment's are the whole number.
    draw_first, draw_second = random_first.float() / 2**16, random.float() / 2**32
    g = gradient.float() * gradient_scale
    first = _read_moment(state.first_moment, state.first_scale, 3, 127)
    second = _read_moment(state.second_moment, state.second_scale, 4, 255)
    first = first + (g - first) * (1 - h.beta1)
    second = second + (g * g - second) * (1 - h.beta2)
    weight = master_weight(parameter, state)
    bias1, bias2 = 1 - h.beta1**h.num_updates, 1 - h.beta2**h.num_updates
    updated = weight * (1 - h.learning_rate * h.weight_decay)
    updated = updated - (h.learning_rate / bias1) * first / (second.sqrt() / bias2**0.5 + h.eps)
    _write_moment(first, state.first_moment, state.first_scale, 3, 127, 0, random_first, draw_first)
    _write_moment(second, state.second_moment, state.second_scale, 4, 255, 1, random >> 16, draw_second)
    if state.master is None and state.remainder is None:
        parameter.copy_(_round_stochastically(updated, random_weight))
    else:
        set_master_weight(parameter, state, updated)


def _round_stochastically(x: torch.Tensor, random16: torch.Tensor) -> torch.Tensor:
    bits = x.view(torch.int32) + random16.int()
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _read_moment(stored: torch.Tensor, scale: torch.Tensor | None, power: int, levels: int) -> torch.Tensor:
    if scale is None:
        return stored.float()
    codes = _blocks(stored.float()) / levels
    values = (codes if power == 3 else codes.abs()).pow(power) * scale.unsqueeze(-1)
    return values.flatten(-2)[..., : stored.shape[-1]]


def _write_moment(
    value: torch.Tensor,
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    power: int,
    levels: int,
    smallest: int,
    random16: torch.Tensor,
    draw: torch.Tensor,
) -> None:
    if scale is None:
        stored.copy_(value if stored.dtype == torch.float32 else _round_stochastically(value, random16))
        return
    magnitude = _blocks(value.abs())
    scale.copy_(magnitude.amax(-1))
    relative = magnitude / scale.clamp(min=1e-38).unsqueeze(-1) * float(levels) ** power
    below = relative.pow(1 / power).floor().clamp(max=levels - 1)
    # The chance to round up makes the value, not the code, right on average.
    chance = (relative - below.pow(power)) / ((below + 1).pow(power) - below.pow(power))
    codes = below + (_blocks(draw) < chance)
    codes = codes.clamp(min=smallest).flatten(-2)[..., : value.shape[-1]]
    stored.copy_(codes * value.sign() if power == 3 else codes)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [..., ceil(C / 128), 128], padded with zeros."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def random_bits(count: int, seed: int, first_index: int, device: torch.device) -> torch.Tensor:
    """[count] int64 below 2^32: a hash of the seed and of each element's index."""
    index = torch.arange(first_index, first_index + count, device=device, dtype=torch.int64)
    return _mix((index + seed * 0x9E3779B1) & 0xFFFFFFFF)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit mixer (multiply and xor-shift), on int64 tensors holding 32 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
