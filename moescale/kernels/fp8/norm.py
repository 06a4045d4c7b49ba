"""The norm of :mod:`moescale.kernels.rms_norm` that also quantises its result, for products in e4m3 that read it."""

from __future__ import annotations

import torch
from torch.library import custom_op

from moescale.kernels.backends import check_dtype, check_shape, runs_triton
from moescale.kernels.fp8.scaled import E4M3, Scaled
from moescale.kernels.rms_norm import add_rms_norm, normed_backward, rms_norm


def quantizing_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, Scaled]:
    """Return the norm of ``x + residual``, that sum, and the norm's rows [R, H] in e4m3, which have no gradient.

    Norm and sum are bit for bit those of :func:`moescale.kernels.rms_norm.add_rms_norm`, or without ``residual`` of
    ``rms_norm`` and ``x`` itself; the rows those of quantising the norm as it is returned.
    Shapes: x, residual [..., H] bf16; weight [H] bf16; norm and sum as x.

    Raises KernelInputError for shapes and dtypes that do not fit.
    """
    check_dtype("quantizing_rms_norm", "x", x, (torch.bfloat16,))
    check_shape("quantizing_rms_norm", "weight", weight, (x.shape[-1],), "[H], H the last dim of x")
    check_dtype("quantizing_rms_norm", "weight", weight, (x.dtype,))
    if residual is not None:
        check_shape("quantizing_rms_norm", "residual", residual, x.shape, "the shape of x")
        check_dtype("quantizing_rms_norm", "residual", residual, (x.dtype,))
    if runs_triton(x.device, x.dtype, backend):
        normed, summed, _, data, scales = _quantizing_norm_op(x, residual, weight, eps)
        return normed, x if residual is None else summed, Scaled(data, scales)
    if residual is None:
        normed, summed = rms_norm(x, weight, eps, backend="torch"), x
    else:
        normed, summed = add_rms_norm(x, residual, weight, eps, backend="torch")
    return normed, summed, Scaled(*_quantize_op(normed.detach()))


@custom_op("moescale::fp8_quantize", mutates_args=())
def _quantize_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from moescale.kernels.fp8 import reference

    return reference.quantize_rows(x.reshape(-1, x.shape[-1]).contiguous())


@_quantize_op.register_fake
def _(x):
    return _empty_rows(x)


@custom_op("moescale::fp8_rms_norm", mutates_args=())
def _quantizing_norm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from moescale.kernels.fp8 import norm_triton

    normed, summed, rstd, scaled = norm_triton.forward(x, residual, weight, eps)
    return normed, summed, rstd, *scaled


@_quantizing_norm_op.register_fake
def _(x, residual, weight, eps):
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    summed = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape), summed, rstd, *_empty_rows(x)


def _empty_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty((rows, x.shape[-1]), dtype=E4M3), x.new_empty(rows, dtype=torch.float32)


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, summed, rstd, data, scales = output
    ctx.mark_non_differentiable(rstd, data, scales)
    ctx.set_materialize_grads(False)  # they would be made for the rows, too
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, rstd)


def _backward(ctx, grad_out, grad_summed, *_):
    x, weight, rstd = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(x)
    grad_x, grad_weight = normed_backward(grad_out, grad_summed if ctx.has_residual else None, x, weight, rstd)
    return grad_x, grad_x if ctx.has_residual else None, grad_weight, None


_quantizing_norm_op.register_autograd(_backward, setup_context=_save)
