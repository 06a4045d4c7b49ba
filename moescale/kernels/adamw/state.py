"""The state that AdamW keeps of a parameter: its formats, and how each is read and written.

A format of moments is a pair of dtypes with :func:`read_moments` and :func:`write_moments`; one of master weights is a
field of :class:`AdamWState` with :func:`master_weight` and :func:`write_master_weight`. The Triton kernel repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moescale.formats import MOMENT_BLOCK, MasterFormat, MomentFormat
from moescale.kernels.adamw.rounding import mix, round_stochastically
from moescale.kernels.backends import KernelInputError

BLOCK = MOMENT_BLOCK
MOMENT_DTYPES: dict[MomentFormat, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
"""First and second moment in each format that there is an update for."""
MASTERS: tuple[MasterFormat, ...] = ("fp32", "bf16_remainder", "stochastic_bf16")
"""Formats of master weights that there is an update for."""


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
    for name, value, known in (("moments", moments, MOMENT_DTYPES), ("master", master, MASTERS)):
        if value not in known:
            raise KernelInputError(f"adamw: {name} ('{value}') must be one of {', '.join(known)}")
    first, second = MOMENT_DTYPES[moments]
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


def read_moments(state: AdamWState) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both moments in fp32, in the parameter's shape."""
    first = _read_moment(state.first_moment, state.first_scale, 3, 127)
    second = _read_moment(state.second_moment, state.second_scale, 4, 255)
    return first, second


def write_moments(state: AdamWState, first: torch.Tensor, second: torch.Tensor, random: torch.Tensor) -> None:
    """Store both moments (fp32); ``random`` (int64 below 2^32, the parameter's shape) decides the rounding."""
    random_first, random_second = random & 0xFFFF, random >> 16
    # Codes are drawn with all the bits there are for them, of which the second moment's are the whole number.
    draw_first, draw_second = random_first.float() / 2**16, random.float() / 2**32
    _write_moment(first, state.first_moment, state.first_scale, 3, 127, 0, random_first, draw_first)
    _write_moment(second, state.second_moment, state.second_scale, 4, 255, 1, random_second, draw_second)


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
        stored.copy_(value if stored.dtype == torch.float32 else round_stochastically(value, random16))
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


def write_master_weight(parameter: torch.Tensor, state: AdamWState, weight: torch.Tensor, random: torch.Tensor) -> None:
    """Set the updated master weight; where none is kept, round it stochastically to ``parameter`` by ``random``."""
    if state.master is None and state.remainder is None:
        parameter.copy_(round_stochastically(weight, mix(random ^ 0x9E3779B9) & 0xFFFF))
    else:
        set_master_weight(parameter, state, weight)


def _split_master(weight: torch.Tensor, parameter: torch.Tensor, remainder: torch.Tensor) -> None:
    bits = weight.view(torch.int32)
    # Ties round away from zero, not to even: so the remainder fits 16 bits, from -32768 to 32767.
    high = (bits + 0x8000) >> 16
    parameter.view(torch.int16).copy_(high.to(torch.int16))
    remainder.copy_((bits - (high << 16)).to(torch.int16))
