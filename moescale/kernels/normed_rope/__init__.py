"""The norm of every head of queries or keys and its rotation, in one pass, as Qwen3-MoE's attention needs them.

Both are limited by memory: in two steps every head is read and written twice.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

from moescale.kernels.backends import KernelInputError, check_device, check_dtype, check_shape, runs_triton
from moescale.kernels.normed_rope import reference
from moescale.kernels.rms_norm import FLOAT_DTYPES


def normed_half_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Return ``half_rope(rms_norm(x, weight, eps), cos, sin)``: every head is normed, then its halves are rotated.

    Shapes: x [B, S, N, D], D even; weight [D], shared by all heads; cos, sin [S, D/2] fp32, without gradient; result
    as x. In plain torch the result is bit for bit that of the two steps. The kernel rounds to x's dtype where they do,
    the quotient and the norm; it adds the squares in another order, and it keeps the gradient of the norm in fp32.

    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    _check(x, weight, cos, sin)
    if runs_triton(x.device, x.dtype, backend):
        return _normed_half_rope_op(x, weight, cos, sin, eps)
    return reference.normed_half_rope(x, weight, cos, sin, eps)


def _check(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    operator = "normed_half_rope"
    check_shape(operator, "x", x, (None,) * 4, "[B, S, N, D]")
    check_dtype(operator, "x", x, FLOAT_DTYPES)
    width = x.shape[-1]
    if width == 0 or width % 2:
        raise KernelInputError(f"{operator}: x has heads of width {width}; it must be even and not 0")
    check_shape(operator, "weight", weight, (width,), "[D], D the last dim of x")
    check_dtype(operator, "weight", weight, (x.dtype,))
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(operator, name, table, (x.shape[1], width // 2), "[S, D/2]")
        check_dtype(operator, name, table, (torch.float32,))
    for name, tensor in (("weight", weight), ("cos", cos), ("sin", sin)):
        check_device(operator, name, tensor, x.device)


@custom_op("moescale::normed_half_rope", mutates_args=())
def _normed_half_rope_op(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    from moescale.kernels.normed_rope import triton

    return triton.forward(x, weight, cos, sin, eps)


@_normed_half_rope_op.register_fake
def _(x, weight, cos, sin, eps):
    return x.new_empty(x.shape)


@custom_op("moescale::normed_half_rope_backward", mutates_args=())
def _normed_half_rope_backward_op(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from moescale.kernels.normed_rope import triton

    return triton.backward(grad_out, x, weight, cos, sin, eps)


@_normed_half_rope_backward_op.register_fake
def _(grad_out, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _backward(ctx, grad_out):
    return (*_normed_half_rope_backward_op(grad_out, *ctx.saved_tensors, ctx.eps), None, None, None)


_normed_half_rope_op.register_autograd(_backward, setup_context=_save)
