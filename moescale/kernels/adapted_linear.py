"""A linear layer with a frozen weight and a low-rank addition (LoRA, Hu et al. 2021, arXiv:2106.09685).

    y = x W.T + bias + s (x' A.T) B.T        dB = s g.T (x' A.T)
    dx = g W,   dx' = s (g B) A              dA = s (g B).T x'

x' is x, or x after dropout. What is added goes into the result by the epilogue of the second GEMM. The factors are
fp32, multiplied in the dtype of x; their gradients are summed in fp32, and added to buffers where there are any, under
the rules of :mod:`moescale.kernels.linear`. A weight of several stacked ones (gate and up of an MLP) has an adapter for
each: with P parts A is [P * r, K] and B [N, r], of which part p takes the p-th share of rows each.

A frozen weight may be in fp8 (:mod:`moescale.kernels.block_fp8`): both passes make it plain for their product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.library import custom_op

from moescale.kernels.backends import KernelInputError, check_dtype, check_gradient_buffer, check_shape
from moescale.kernels.block_fp8 import check_stored, plain, stored
from moescale.kernels.linear import add_product


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    num_parts: int = 1,
    dropped: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    gradients: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """Return ``x @ weight.T + bias + scale * dropped @ a.T @ b.T`` of every part; no gradient for weight and bias.

    Shapes: x [..., K]; weight [N, K]; bias [N]; a [P * r, K] and b [N, r] fp32; ``dropped`` as x, by default x itself;
    result [..., N]. ``weight_scale``: the scales of a weight in fp8. ``gradients``: fp32 buffers for those of a and b.
    They are left alone where x needs no gradient: autograd then gets those of the factors.

    Raises KernelInputError for shapes and dtypes that do not fit.
    """
    check_shape("adapted_linear", "weight", weight, (None, x.shape[-1]), "[N, K]")
    check_stored("adapted_linear", "weight", weight, weight_scale, x.dtype)
    check_shape("adapted_linear", "b", b, (weight.shape[0], None), "[N, r]")
    check_shape("adapted_linear", "a", a, (num_parts * b.shape[1], x.shape[-1]), "[P * r, K]")
    for name, factor in (("a", a), ("b", b)):
        check_dtype("adapted_linear", name, factor, (torch.float32,))
    if weight.shape[0] % num_parts:
        raise KernelInputError(f"adapted_linear: num_parts ({num_parts}) must divide the {weight.shape[0]} outputs")
    if not (torch.is_grad_enabled() and x.requires_grad):
        gradients = (None, None)
    for name, factor, buffer in zip("ab", (a, b), gradients, strict=True):
        if buffer is not None:
            check_gradient_buffer("adapted_linear", name, factor, buffer)
    bias = None if bias is None else bias.detach()
    weight_scale = None if weight_scale is None else weight_scale.detach()
    return _adapted_linear_op(x, weight.detach(), weight_scale, bias, a, b, dropped, *gradients, scale, num_parts)[0]


def _scaled_b(b: torch.Tensor, scale: float, num_parts: int, dtype: torch.dtype) -> torch.Tensor:
    """``scale * b`` as one matrix [N, P * r], block-diagonal."""
    b = (b * scale).to(dtype)
    return b if num_parts == 1 else torch.block_diag(*b.chunk(num_parts))


@custom_op("moescale::adapted_linear", mutates_args=())
def _adapted_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    dropped: torch.Tensor | None,
    a_gradient: torch.Tensor | None,
    b_gradient: torch.Tensor | None,
    scale: float,
    num_parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result and the input on the rank [T, P * r], which the backward needs."""
    source = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
    on_rank = torch.mm(source, a.to(x.dtype).t())
    out = F.linear(x.reshape(-1, x.shape[-1]), plain(stored(weight, weight_scale), x.dtype), bias)
    out.addmm_(on_rank, _scaled_b(b, scale, num_parts, x.dtype).t())
    return out.view(*x.shape[:-1], weight.shape[0]), on_rank


@_adapted_linear_op.register_fake
def _(x, weight, weight_scale, bias, a, b, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((x.shape[:-1].numel(), a.shape[0]))


@custom_op("moescale::adapted_linear_backward", mutates_args=())
def _adapted_linear_backward_op(
    grad: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    on_rank: torch.Tensor,
    a_gradient: torch.Tensor | None,
    b_gradient: torch.Tensor | None,
    scale: float,
    num_parts: int,
    wants_x: bool,
    is_dropped: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, of what was dropped, of a and of b; empty where not wanted, or added to a buffer."""
    rows, source_rows = grad.reshape(-1, weight.shape[0]), source.reshape(-1, source.shape[-1])
    grad_on_rank = torch.mm(rows, _scaled_b(b, scale, num_parts, grad.dtype))
    grad_x, grad_dropped = grad.new_empty(0), grad.new_empty(0)
    factor = a.to(grad.dtype)
    if is_dropped:
        grad_dropped = torch.mm(grad_on_rank, factor).view(source.shape)
    if wants_x:
        grad_x = torch.mm(rows, plain(stored(weight, weight_scale), grad.dtype))
        if not is_dropped:
            grad_x.addmm_(grad_on_rank, factor)
        grad_x = grad_x.view(source.shape)
    grad_a, grad_b = (
        torch.zeros_like(f, memory_format=torch.contiguous_format) if buffer is None else f.new_empty(0)
        for f, buffer in ((a, a_gradient), (b, b_gradient))
    )
    add_product(grad_a if a_gradient is None else a_gradient.data, grad_on_rank.t(), source_rows)
    sums = grad_b if b_gradient is None else b_gradient.data
    scaled = on_rank * scale
    for part, of_part, on_part in zip(
        sums.chunk(num_parts), rows.chunk(num_parts, 1), scaled.chunk(num_parts, 1), strict=True
    ):
        add_product(part, of_part.t(), on_part)
    return grad_x, grad_dropped, grad_a, grad_b


@_adapted_linear_backward_op.register_fake
def _(grad, source, weight, weight_scale, a, b, on_rank, a_gradient, b_gradient, *rest):
    wants_x, is_dropped = rest[-2:]
    return (
        grad.new_empty(source.shape if wants_x else (0,)),
        grad.new_empty(source.shape if is_dropped else (0,)),
        a.new_empty(a.shape if a_gradient is None else (0,)),
        b.new_empty(b.shape if b_gradient is None else (0,)),
    )


def _save(ctx, inputs, output):
    x, weight, weight_scale, _, a, b, dropped, *ctx.buffers, ctx.scale, ctx.num_parts = inputs
    ctx.is_dropped = dropped is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if dropped is None else dropped, weight, weight_scale, a, b, output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    wants_x = ctx.needs_input_grad[0]
    options = (*ctx.buffers, ctx.scale, ctx.num_parts, wants_x, ctx.is_dropped)
    grad_x, grad_dropped, *factors = _adapted_linear_backward_op(grad.contiguous(), *ctx.saved_tensors, *options)
    grad_a, grad_b = (g if buffer is None else None for g, buffer in zip(factors, ctx.buffers, strict=True))
    grad_dropped = grad_dropped if ctx.is_dropped else None
    return grad_x if wants_x else None, *(None,) * 3, grad_a, grad_b, grad_dropped, *(None,) * 4


_adapted_linear_op.register_autograd(_backward, setup_context=_save)
