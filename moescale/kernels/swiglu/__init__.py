"""The gated activation ``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202). Saves its input and nothing else."""

from __future__ import annotations

import torch
from torch.library import custom_op

from moescale.kernels.backends import KernelInputError, runs_triton
from moescale.kernels.swiglu import reference


def swiglu(gate_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Return ``silu(gate) * up`` [..., F] for ``gate_up`` [..., 2F], whose first half is the gate."""
    if gate_up.shape[-1] % 2:
        raise KernelInputError(
            f"swiglu: gate_up has shape {tuple(gate_up.shape)}; its last dim must be even, [..., 2F]"
        )
    if runs_triton(gate_up.device, gate_up.dtype, backend):
        return _swiglu_op(gate_up)
    return reference.swiglu(gate_up)


@custom_op("moescale::swiglu", mutates_args=())
def _swiglu_op(gate_up: torch.Tensor) -> torch.Tensor:
    from moescale.kernels.swiglu import triton

    return triton.forward(gate_up)


@_swiglu_op.register_fake
def _(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@custom_op("moescale::swiglu_backward", mutates_args=())
def _swiglu_backward_op(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    from moescale.kernels.swiglu import triton

    return triton.backward(grad, gate_up)


@_swiglu_backward_op.register_fake
def _(grad, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _swiglu_backward_op(grad, *ctx.saved_tensors)


_swiglu_op.register_autograd(_backward, setup_context=_save)
