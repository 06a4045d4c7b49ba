"""A gated MLP of two linear layers in e4m3, as :func:`~moescale.kernels.fp8.linear.fp8_linear` with SwiGLU between.

Bit for bit the same. But SwiGLU quantises the activation and the gradient of gate and up where it makes them; the
activation in bf16, which only the gradient of ``down`` contracts, is made in the backward, not saved.
"""

from __future__ import annotations

import torch

from moescale.formats import FP8_GEMM_MULTIPLE
from moescale.kernels.backends import KernelInputError, check_device, check_dtype, check_gradient_buffer, check_shape
from moescale.kernels.experts.operators import returned
from moescale.kernels.fp8 import kernels_for
from moescale.kernels.fp8.errors import note
from moescale.kernels.fp8.linear import multiply, weight_product
from moescale.kernels.fp8.scaled import Copies, Scaled, check_scaled
from moescale.kernels.swiglu import swiglu


def fp8_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_copies: Copies,
    down_copies: Copies,
    *,
    quantized: Scaled | None = None,
    gate_up_gradient: torch.Tensor | None = None,
    down_gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``swiglu(x @ gate_up.T) @ down.T``, with what the products read rounded to e4m3.

    Shapes: x [..., H] bf16; gate_up [2F, H] and down [H, F] bf16; copies of them; result as x. H and F are multiples of
    16. ``quantized`` and the buffers: as of :func:`~moescale.kernels.fp8.linear.fp8_linear`.

    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    check_shape("fp8_mlp", "down", down, (x.shape[-1], None), "[H, F]")
    hidden, ffn = down.shape
    check_shape("fp8_mlp", "gate_up", gate_up, (2 * ffn, hidden), "[2F, H]")
    check_dtype("fp8_mlp", "x", x, (torch.bfloat16,))
    for name, weight, copies in (("gate_up", gate_up, gate_up_copies), ("down", down, down_copies)):
        check_dtype("fp8_mlp", name, weight, (torch.bfloat16,))
        check_device("fp8_mlp", name, weight, x.device)
        check_shape("fp8_mlp", f"{name}_copies", copies.rows, (1, *weight.shape), f"those of {name}")
        check_device("fp8_mlp", f"{name}_copies", copies.rows, x.device)
    if hidden % FP8_GEMM_MULTIPLE or ffn % FP8_GEMM_MULTIPLE:
        raise KernelInputError(
            f"fp8_mlp: hidden size ({hidden}) and intermediate size ({ffn}) must be multiples of {FP8_GEMM_MULTIPLE}; "
            "use linear for it"
        )
    if quantized is not None:
        check_scaled("fp8_mlp", "quantized", quantized, x)
    if gate_up_gradient is not None:
        check_gradient_buffer("fp8_mlp", "gate_up", gate_up, gate_up_gradient)
        if not (x.requires_grad and gate_up.requires_grad):
            gate_up_gradient = None
    if down_gradient is not None:
        check_gradient_buffer("fp8_mlp", "down", down, down_gradient)
        if not ((x.requires_grad or gate_up.requires_grad) and down.requires_grad):
            down_gradient = None
    given, buffers = quantized or (None, None), (gate_up_gradient, down_gradient)
    return _mlp(x, gate_up, down, *gate_up_copies, *down_copies, *given, *buffers)[0]


@torch.library.custom_op("moescale::fp8_mlp", mutates_args=())
def _mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_rows: torch.Tensor,
    gate_up_columns: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_rows: torch.Tensor,
    down_columns: torch.Tensor,
    down_scale: torch.Tensor,
    data: torch.Tensor | None,
    data_scales: torch.Tensor | None,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result and the pre-activation [R, 2F]."""
    ops, flat = kernels_for(x), x.reshape(-1, x.shape[-1])
    if data is None or data_scales is None:
        scaled = ops.quantize_rows(flat.contiguous())
    else:
        scaled = Scaled(data, data_scales)
    note("linear input", lambda: flat, scaled)
    pre = multiply(scaled, gate_up_rows[0], gate_up_scale)
    act = ops.gated_forward(pre)
    note("linear input", lambda: swiglu(pre), act)
    return multiply(act, down_rows[0], down_scale).view(x.shape), pre


@_mlp.register_fake
def _(x, gate_up, *rest):
    return x.new_empty(x.shape), x.new_empty((x.shape[:-1].numel(), gate_up.shape[0]))


@torch.library.custom_op("moescale::fp8_mlp_backward", mutates_args=())
def _mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pre: torch.Tensor,
    gate_up_columns: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_columns: torch.Tensor,
    down_scale: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, gate_up and down; one that was added to its buffer is empty."""
    ops, hidden, width = kernels_for(grad), x.shape[-1], pre.shape[1]
    gradient = grad.reshape(-1, hidden)
    scaled = ops.quantize_rows(gradient)
    note("linear gradient of the result", lambda: gradient, scaled)
    grad_act = multiply(scaled, down_columns[:, :hidden], down_scale)
    act, grad_pre, scaled = ops.gated_backward(grad_act, pre)
    del grad_act
    note("linear gradient of the result", lambda: grad_pre, scaled)
    grad_down = weight_product(gradient, act, down_gradient)
    del act
    grad_gate_up = weight_product(grad_pre, x.reshape(-1, hidden), gate_up_gradient)
    grad_x = multiply(scaled, gate_up_columns[:, :width], gate_up_scale)
    return grad_x.view(x.shape), grad_gate_up, grad_down


@_mlp_backward.register_fake
def _(grad, x, pre, gate_up_columns, gate_up_scale, down_columns, down_scale, gate_up_gradient, down_gradient):
    hidden, width = x.shape[-1], pre.shape[1]
    shapes = ((width, hidden), gate_up_gradient), ((hidden, width // 2), down_gradient)
    return x.new_empty(x.shape), *(grad.new_empty(shape if buffer is None else (0,)) for shape, buffer in shapes)


def _setup(ctx, inputs, output) -> None:
    x, _, _, _, gate_up_columns, gate_up_scale, _, down_columns, down_scale, _, _, *ctx.buffers = inputs
    _, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)  # one would be made for the pre-activation, too
    ctx.save_for_backward(x, pre, gate_up_columns, gate_up_scale, down_columns, down_scale)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 13
    grad_x, *found = _mlp_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.buffers)
    return grad_x, *returned(found, ctx.buffers, ctx.needs_input_grad[1:3]), *(None,) * 10


_mlp.register_autograd(_backward, setup_context=_setup)
