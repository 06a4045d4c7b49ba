"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and behind a residual addition.

The quotient is computed in fp32 and rounded to x's dtype before the gain, as the published DeepSeek-V2 code does.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

from moescale.kernels.backends import check_dtype, check_shape, runs_triton
from moescale.kernels.rms_norm import reference

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto") -> torch.Tensor:
    """Return ``weight * (x / sqrt(mean(x^2) + eps))`` over the last dim.

    Shapes: x [..., H]; weight [H]; result as x.
    """
    _check("rms_norm", x, weight)
    if runs_triton(x.device, x.dtype, backend):
        return _rms_norm_op(x, None, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``: a block's output joins the residual stream and is normed.

    Shapes: x, residual [..., H]; weight [H]; both results as x.
    """
    _check("add_rms_norm", x, weight)
    check_shape("add_rms_norm", "residual", residual, x.shape, "the shape of x")
    check_dtype("add_rms_norm", "residual", residual, (x.dtype,))
    if runs_triton(x.device, x.dtype, backend):
        normalized, summed, _ = _rms_norm_op(x, residual, weight, eps)
        return normalized, summed
    summed = x + residual
    return reference.rms_norm(summed, weight, eps), summed


def _check(operator: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    check_dtype(operator, "x", x, FLOAT_DTYPES)
    check_shape(operator, "weight", weight, (x.shape[-1],), "[H], H the last dim of x")
    check_dtype(operator, "weight", weight, (x.dtype,))


@custom_op("moescale::rms_norm", mutates_args=())
def _rms_norm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from moescale.kernels.rms_norm import triton

    return triton.forward(x, residual, weight, eps)


@_rms_norm_op.register_fake
def _(x, residual, weight, eps):
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else (0,)), rstd


@custom_op("moescale::rms_norm_backward", mutates_args=())
def normed_backward(
    grad_out: torch.Tensor,
    grad_summed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the norm's input, ``grad_summed`` added, and of the weight."""
    from moescale.kernels.rms_norm import triton

    return triton.backward(grad_out, grad_summed, x, weight, rstd)


@normed_backward.register_fake
def _(grad_out, grad_summed, x, weight, rstd):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, summed, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, rstd)


def _backward(ctx, grad_out, grad_summed, grad_rstd):
    x, weight, rstd = ctx.saved_tensors
    grad_summed = grad_summed if ctx.has_residual else None
    grad_x, grad_weight = normed_backward(grad_out, grad_summed, x, weight, rstd)
    return grad_x, grad_x if ctx.has_residual else None, grad_weight, None


_rms_norm_op.register_autograd(_backward, setup_context=_save)
