"""A linear layer whose result and gradient of the input are products in e4m3; its weight's gradient is one in bf16."""

from __future__ import annotations

import torch

from moescale.formats import FP8_GEMM_MULTIPLE
from moescale.kernels.backends import KernelInputError, check_device, check_dtype, check_gradient_buffer, check_shape
from moescale.kernels.fp8 import kernels_for
from moescale.kernels.fp8.errors import note
from moescale.kernels.fp8.scaled import Copies, Scaled, check_scaled
from moescale.kernels.linear import add_product


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    copies: Copies,
    bias: torch.Tensor | None = None,
    *,
    quantized: Scaled | None = None,
    weight_gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` with x and weight rounded to e4m3.

    Shapes: x [..., K] bf16; weight [N, K] bf16; ``copies`` of it; bias [N]; result [..., N]. K and N are multiples of
    16. ``quantized``: the rows of x in e4m3, where they were made with it; else they are made here.
    ``weight_gradient``: as of :func:`moescale.kernels.linear.linear`.

    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    check_shape("fp8_linear", "weight", weight, (None, x.shape[-1]), "[N, K]")
    check_shape("fp8_linear", "copies", copies.rows, (1, *weight.shape), "those of weight")
    tensors = {"the input": x, "weight": weight}
    if quantized is not None:
        check_scaled("fp8_linear", "quantized", quantized, x)
    if bias is not None:
        check_shape("fp8_linear", "bias", bias, (weight.shape[0],), "[N]")
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        check_dtype("fp8_linear", name, tensor, (torch.bfloat16,))
    for name, tensor in (tensors | {"copies": copies.rows}).items():
        check_device("fp8_linear", name, tensor, x.device)
    if any(size % FP8_GEMM_MULTIPLE for size in weight.shape):
        raise KernelInputError(
            f"fp8_linear: weight has shape {tuple(weight.shape)}; both must be multiples of {FP8_GEMM_MULTIPLE}; "
            "use linear for it"
        )
    if weight_gradient is not None:
        check_gradient_buffer("fp8_linear", "weight", weight, weight_gradient)
        if not (x.requires_grad and weight.requires_grad):
            weight_gradient = None
    return _linear(x, weight, bias, *copies, *(quantized or (None, None)), weight_gradient)


def multiply(x: Scaled, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x [T, K] times ``weight`` [N, K] e4m3, whose rows are contiguous, times its ``scale`` [1]: [T, N] bf16."""
    if not (x.data.is_cuda and x.data.numel()):
        scaled = x.data.float() * x.scales.unsqueeze(-1)
        return (scaled @ (weight.float() * scale).T).bfloat16()
    scales = scale.expand(1, weight.shape[0]).contiguous()
    return torch._scaled_mm(
        x.data, weight.t(), x.scales.unsqueeze(-1), scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def weight_product(gradient: torch.Tensor, rows: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return the weight's gradient [N, K] of its result's gradient [R, N] and input [R, K], or add to ``buffer``."""
    if buffer is None:
        return gradient.t() @ rows
    add_product(buffer.data, gradient.t(), rows)
    return gradient.new_empty(0)


@torch.library.custom_op("moescale::fp8_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    data: torch.Tensor | None,
    data_scales: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if data is None or data_scales is None:
        scaled = kernels_for(x).quantize_rows(flat)
    else:
        scaled = Scaled(data, data_scales)
    note("linear input", lambda: flat, scaled)
    found = multiply(scaled, rows[0], scale)
    return (found if bias is None else found + bias).view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x, weight, bias, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("moescale::fp8_linear_backward", mutates_args=())
def _linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    weight_gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and of the weight; the latter is empty where it was added to its buffer."""
    n = grad.shape[-1]
    gradient, rows = grad.reshape(-1, n), x.reshape(-1, x.shape[-1])
    found = weight_product(gradient, rows, weight_gradient)
    scaled = kernels_for(grad).quantize_rows(gradient)
    note("linear gradient of the result", lambda: gradient, scaled)
    return multiply(scaled, columns[:, :n], scale).view(x.shape), found


@_linear_backward.register_fake
def _(grad, x, columns, scale, weight_gradient):
    shape = (grad.shape[-1], x.shape[-1]) if weight_gradient is None else (0,)
    return x.new_empty(x.shape), grad.new_empty(shape)


def _setup(ctx, inputs, output) -> None:
    x, _, _, _, columns, scale, _, _, ctx.weight_gradient = inputs
    ctx.save_for_backward(x, columns, scale)


def _backward(ctx, grad):
    grad_x, found = _linear_backward(grad.contiguous(), *ctx.saved_tensors, ctx.weight_gradient)
    grad_weight = found if ctx.weight_gradient is None and ctx.needs_input_grad[1] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias, *(None,) * 6


_linear.register_autograd(_backward, setup_context=_setup)
