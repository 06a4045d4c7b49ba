"""SwiGLU in plain torch: the definition, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` [..., F] for ``gate_up`` [..., 2F], whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
