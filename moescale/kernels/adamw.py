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

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from moescale.kernels.backends import KernelInputError, choose_backend

BLOCK = 128
"""Values of a row that share one scale in the 8-bit format."""

MomentFormat = Literal["fp32", "bf16", "int8"]
MasterFormat = Literal["fp32", "bf16_remainder", "stochastic_bf16"]


@dataclass(frozen=True, kw_only=True)
class AdamWHyperparameters:
    """Coefficients of one update."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    num_updates: int
    """Updates so far, this one included: 1 for the first."""


@dataclass(frozen=True, kw_only=True)
class AdamWState:
    """State of one parameter of shape [..., C]; tensors not in its format are None."""

    first_moment: torch.Tensor
    """fp32, bf16 or int8, the parameter's shape."""
    second_moment: torch.Tensor
    """fp32, bf16 or uint8, the parameter's shape."""
    first_scale: torch.Tensor | None
    """fp32 [..., ceil(C / 128)], 8-bit format only."""
    second_scale: torch.Tensor | None
    master: torch.Tensor | None
    """fp32, the parameter's shape; the parameter itself where that is fp32."""
    remainder: torch.Tensor | None
    """int16, the parameter's shape: fp32 master bits minus the parameter's bits shifted up by 16."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors there are, by field name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def init_adamw_state(parameter: torch.Tensor, moments: MomentFormat, master: MasterFormat) -> AdamWState:
    """Zero moments and a master weight equal to ``parameter``.

    An fp32 parameter is its own master. A vector keeps fp32 moments in every format: it is small, and it may be divided
    anywhere, so blocks would not stay whole.
    """
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise KernelInputError(f"adamw: parameter has dtype {parameter.dtype}; it must be float32 or bfloat16")
    if parameter.dim() < 2:
        moments = "fp32"
    dtypes = {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "int8": (torch.int8, torch.uint8),
    }
    first, second = dtypes[moments]
    scales: list[torch.Tensor | None] = [None, None]
    if moments == "int8":
        shape = (*parameter.shape[:-1], -(-parameter.shape[-1] // BLOCK))
        scales = [torch.zeros(shape, dtype=torch.float32, device=parameter.device) for _ in range(2)]
    data = parameter.detach()
    own_master = remainder = None
    if data.dtype == torch.float32:
        own_master = data
    elif master == "fp32":
        own_master = data.float()
    elif master == "bf16_remainder":
        remainder = torch.zeros_like(data, dtype=torch.int16)
    return AdamWState(
        first_moment=torch.zeros_like(data, dtype=first),
        second_moment=torch.zeros_like(data, dtype=second),
        first_scale=scales[0],
        second_scale=scales[1],
        master=own_master,
        remainder=remainder,
    )


def master_weight(parameter: torch.Tensor, state: AdamWState) -> torch.Tensor:
    """The fp32 weight that updates act on: exact, or the bf16 weight itself where nothing more is kept."""
    if state.master is not None:
        return state.master
    if state.remainder is not None:
        return join_master(parameter.detach(), state.remainder)
    return parameter.detach().float()


def join_master(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 ``weight`` and its int16 ``remainder``, exactly."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def set_master_weight(parameter: torch.Tensor, state: AdamWState, weight: torch.Tensor) -> None:
    """Make ``weight`` (fp32) the weight that updates act on, and ``parameter`` its rounding."""
    with torch.no_grad():
        if state.master is not None:
            state.master.copy_(weight)
            if parameter.dtype != torch.float32:
                parameter.copy_(weight)
        elif state.remainder is not None:
            _split_master(weight, parameter, state.remainder)
        else:
            parameter.copy_(weight)


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
        from moescale.kernels import _adamw_triton

        _adamw_triton.update(parameter, gradient, state, hyperparameters, gradient_scale, seed, first_index)
    elif state.master is not None and state.first_moment.dtype == torch.float32:
        _update_fp32_fused(parameter, gradient, state, hyperparameters, gradient_scale)
    else:
        _update_in_torch(parameter, gradient, state, hyperparameters, gradient_scale, seed, first_index)


def _update_fp32_fused(
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


def _update_in_torch(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    hyperparameters: AdamWHyperparameters,
    gradient_scale: torch.Tensor,
    seed: int,
    first_index: int,
) -> None:
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


def _split_master(weight: torch.Tensor, parameter: torch.Tensor, remainder: torch.Tensor) -> None:
    bits = weight.view(torch.int32)
    # Ties round away from zero, not to even: so the remainder fits 16 bits, from -32768 to 32767.
    high = (bits + 0x8000) >> 16
    parameter.view(torch.int16).copy_(high.to(torch.int16))
    remainder.copy_((bits - (high << 16)).to(torch.int16))


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
