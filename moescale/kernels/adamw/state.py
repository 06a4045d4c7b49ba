"""The state that AdamW keeps of a parameter, in several formats, and the master weight that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moescale.formats import MOMENT_BLOCK, MasterFormat, MomentFormat
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


def _split_master(weight: torch.Tensor, parameter: torch.Tensor, remainder: torch.Tensor) -> None:
    bits = weight.view(torch.int32)
    # Ties round away from zero, not to even: so the remainder fits 16 bits, from -32768 to 32767.
    high = (bits + 0x8000) >> 16
    parameter.view(torch.int16).copy_(high.to(torch.int16))
    remainder.copy_((bits - (high << 16)).to(torch.int16))
