"""A linear layer whose backward adds the weight's gradient to a buffer, inside the product that makes it.

Without a buffer (inference, fp32 weights, weights divided over ranks) it is ``torch.nn.functional.linear`` and nothing
else. With one, autograd gets no gradient for the weight: that saves writing it, reading it again and adding it. A sum
in fp32 is rounded once; one in bf16 also before it is added, as autograd would round it, too. The operators do not
declare that they write to the buffer, for the reason given in :mod:`moescale.kernels.experts`; a compiled backward
keeps them because it needs what else they return.

A frozen weight may be in fp8 (:mod:`moescale.kernels.block_fp8`): both passes make it plain for their product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from moescale.kernels.backends import check_gradient_buffer, check_shape
from moescale.kernels.block_fp8 import BlockFp8, check_stored, plain


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``.

    Shapes: x [..., K]; weight [N, K]; bias [N]; result [..., N].

    ``weight_gradient`` is a buffer (the weight's shape; its dtype or fp32) to which the backward adds; ``weight.grad``
    then stays untouched. It is left alone where ``x`` needs no gradient itself: autograd then gets the weight's.
    """
    if weight_gradient is None or not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):
        return F.linear(x, weight, bias)
    check_gradient_buffer("linear", "weight", weight, weight_gradient)
    return _linear_op(x, weight, bias, weight_gradient)


def frozen_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`linear` with a weight [N, K] in fp8 and its scales; neither it nor the bias has a gradient.

    Raises KernelInputError for shapes and dtypes that do not fit.
    """
    check_shape("frozen_linear", "weight", weight, (None, x.shape[-1]), "[N, K]")
    check_stored("frozen_linear", "weight", weight, weight_scale, x.dtype)
    return _frozen_linear_op(x, weight.detach(), weight_scale.detach(), None if bias is None else bias.detach())


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``; on a GPU, and wherever all have one dtype, inside the product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


@custom_op("moescale::linear", mutates_args=())
def _linear_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_gradient: torch.Tensor
) -> torch.Tensor:
    return F.linear(x, weight, bias)


@_linear_op.register_fake
def _(x, weight, bias, weight_gradient):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@custom_op("moescale::linear_backward", mutates_args=())
def _linear_backward_op(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, weight_gradient: torch.Tensor
) -> torch.Tensor:
    """Add the weight's gradient to its buffer, return that of x."""
    rows = grad.reshape(-1, weight.shape[0])
    add_product(weight_gradient.data, rows.t(), x.reshape(-1, weight.shape[1]))
    return torch.mm(rows, weight).view(x.shape)


@_linear_backward_op.register_fake
def _(grad, x, weight, weight_gradient):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, weight, _, ctx.weight_gradient = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    grad_x = _linear_backward_op(grad, *ctx.saved_tensors, ctx.weight_gradient)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias, None


_linear_op.register_autograd(_backward, setup_context=_save)


@custom_op("moescale::frozen_linear", mutates_args=())
def _frozen_linear_op(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, plain(BlockFp8(codes, scales), x.dtype), bias)


@_frozen_linear_op.register_fake
def _(x, codes, scales, bias):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@custom_op("moescale::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward_op(grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.matmul(grad, plain(BlockFp8(codes, scales), grad.dtype))


@_frozen_linear_backward_op.register_fake
def _(grad, codes, scales):
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _frozen_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _frozen_backward(ctx, grad):
    return _frozen_linear_backward_op(grad, *ctx.saved_tensors), None, None, None


_frozen_linear_op.register_autograd(_frozen_backward, setup_context=_frozen_save)
