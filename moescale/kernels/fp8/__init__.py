"""GEMMs whose operands are both in fp8: routed experts and linear layers that are trained (decision 26).

Weights stay in bf16, and gradients and results too. What a product reads is quantised to e4m3 by the kernel that makes
it: a row of tokens has a scale of its own, and so has each weight, of stacked experts each expert's. Scales are powers
of two and are applied to the sum, once. Hopper's tensor cores take 8-bit operands only where they lie contiguous along
the contraction, so a weight has two copies: as it is, for the forward, and transposed, for the gradient of its input.
The copies are written after each update of the weight (:func:`write_copies`), not in a micro-batch.
"""

from __future__ import annotations

from types import ModuleType

import torch

from moescale.formats import FP8_COPY_ROWS
from moescale.kernels.backends import HOPPER, runs_triton
from moescale.kernels.fp8.scaled import E4M3, Copies
from moescale.kernels.fp8.scaled import Scaled as Scaled


def empty_copies(weight: torch.Tensor) -> Copies:
    """Memory for the copies of a weight [E, N, K] or [N, K], not written yet."""
    num_experts, n, k = weight.shape if weight.dim() == 3 else (1, *weight.shape)
    padded = -(-n // FP8_COPY_ROWS) * FP8_COPY_ROWS
    return Copies(
        torch.empty((num_experts, n, k), dtype=E4M3, device=weight.device),
        torch.empty((k, num_experts * padded), dtype=E4M3, device=weight.device),
        torch.empty(num_experts, dtype=torch.float32, device=weight.device),
    )


@torch.no_grad()
def write_copies(weight: torch.Tensor, copies: Copies) -> None:
    """Quantise a weight [E, N, K] or [N, K] into its copies, in place: two reads of it, one write of each copy."""
    stacked = weight.detach() if weight.dim() == 3 else weight.detach().unsqueeze(0)
    largest = torch.linalg.vector_norm(stacked.flatten(1), float("inf"), dim=1, dtype=torch.float32)
    kernels_for(stacked).write_copies(stacked.contiguous(), largest, copies)


def copies_of(weight: torch.Tensor) -> Copies:
    """Return the copies of a weight [E, N, K] or [N, K], written."""
    copies = empty_copies(weight)
    write_copies(weight, copies)
    return copies


def objection_to_fp8(device: torch.device) -> str | None:
    """Return why GEMMs in fp8 cannot run there, and the remedy; None where they can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != HOPPER:
        capability = torch.cuda.get_device_capability(device)
        return (
            f"needs a Hopper GPU, CUDA capability {HOPPER}; {device} has {capability}; take one, or leave out "
            "--precision fp8"
        )
    return None


def kernels_for(tensor: torch.Tensor) -> ModuleType:
    """Return the module that implements the parts on the tensor's device: the kernels, or their definitions."""
    if runs_triton(tensor.device, torch.bfloat16, "auto"):
        from moescale.kernels.fp8 import triton

        return triton
    from moescale.kernels.fp8 import reference

    return reference
