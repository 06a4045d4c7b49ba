"""SwiGLU in plain torch: the definition, differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class SwigluClamp(NamedTuple):
    """The variant of gpt-oss (model card, arXiv:2508.10925, section 2.1), with g and u clamped gate and up.

    ``g * sigmoid(alpha * g) * (u + 1)``, where g is at most ``limit``, and u between ``-limit`` and ``limit``.
    """

    alpha: float
    limit: float


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` [..., F] for ``gate_up`` [..., 2F], whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(gate_up: torch.Tensor, clamp: SwigluClamp) -> torch.Tensor:
    """Return what :class:`SwigluClamp` says, [..., F] for ``gate_up`` [..., 2F], whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=clamp.limit)
    return gate * torch.sigmoid(clamp.alpha * gate) * (up.clamp(-clamp.limit, clamp.limit) + 1)
