"""Routed experts with all six products of forward and backward in e4m3.

A token's row is quantised once in a pass: by the norm that made it, or in the gather; the activation and the gradient
of the pre-activation by SwiGLU and its backward. For the gradients of weights, which contract rows, four tensors are
transposed, each with one scale for an expert. Saved are the input and the pre-activation in bf16, as without fp8.
"""

from __future__ import annotations

import torch

from moescale.kernels.backends import check_dtype, check_shape, debug_checks_enabled
from moescale.kernels.experts.operators import check_gradient_buffers, empty_results, returned
from moescale.kernels.experts.sort import check_ids
from moescale.kernels.fp8 import kernels_for
from moescale.kernels.fp8.errors import is_collecting, note_of_experts
from moescale.kernels.fp8.reference import exact_swiglu_backward
from moescale.kernels.fp8.rows import (
    check_weights,
    up_and_down,
    weight_gradients,
)
from moescale.kernels.fp8.scaled import E4M3, Copies, Scaled, check_scaled


def fp8_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_copies: Copies,
    down_copies: Copies,
    *,
    quantized: Scaled | None = None,
    tokens_per_expert: torch.Tensor | None = None,
    gate_up_gradient: torch.Tensor | None = None,
    down_gradient: torch.Tensor | None = None,
    recompute_up: bool = False,
) -> torch.Tensor:
    """As :func:`moescale.kernels.experts.experts`, with what its products read rounded to e4m3.

    Shapes: as there; x and both weights are bf16, ``gate_up_copies`` and ``down_copies`` those of the weights. H and F
    are multiples of 16. ``quantized``: the rows of x in e4m3, where they were made with it; else they are made here.
    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    check_shape("fp8_experts", "x", x, (None, None), "[T, H]")
    check_shape("fp8_experts", "topk_ids", topk_ids, (x.shape[0], None), "[T, K]")
    check_shape("fp8_experts", "topk_weights", topk_weights, tuple(topk_ids.shape), "[T, K]")
    check_dtype("fp8_experts", "topk_ids", topk_ids, (torch.int32, torch.int64))
    check_dtype("fp8_experts", "topk_weights", topk_weights, (torch.float32,))
    check_weights("fp8_experts", x, gate_up, down, gate_up_copies, down_copies)
    if quantized is not None:
        check_scaled("fp8_experts", "quantized", quantized, x)
    check_gradient_buffers("fp8_experts", gate_up, down, gate_up_gradient, down_gradient)
    if debug_checks_enabled():
        check_ids(topk_ids, gate_up.shape[0], tokens_per_expert)
    save_pre = torch.is_grad_enabled() and not recompute_up
    copies, buffers = (*gate_up_copies, *down_copies), (gate_up_gradient, down_gradient)
    given = quantized or (None, None)
    return _experts(x, topk_ids, topk_weights, gate_up, down, *copies, *buffers, *given, save_pre)[0]


@torch.library.custom_op("moescale::fp8_experts", mutates_args=())
def _experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_rows: torch.Tensor,
    gate_up_columns: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_rows: torch.Tensor,
    down_columns: torch.Tensor,
    down_scales: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
    data: torch.Tensor | None,
    data_scales: torch.Tensor | None,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, pre-activation or empty, row_pair, pair_row, ends)."""
    ops, top_k = kernels_for(x), topk_ids.shape[1]
    row_pair, pair_row, ends = ops.sort_pairs(topk_ids, gate_up.shape[0])
    if data is None or data_scales is None:
        rows, _ = ops.gather_rows(x.contiguous(), pair_row, top_k)
    else:
        rows = ops.gather_scaled(Scaled(data, data_scales), pair_row, top_k)
    groups = ops.group_rows(ends, row_pair.numel())
    weights = Scaled(gate_up_rows, gate_up_scales), Scaled(down_rows, down_scales)
    pre, out = up_and_down(ops, rows, *weights, groups, ends)
    y = ops.combine_rows(out, pair_row, top_k, topk_weights.contiguous())
    return y, pre if save_pre else x.new_empty(0), row_pair, pair_row, ends


@_experts.register_fake
def _(x, topk_ids, topk_weights, gate_up, down, *rest):
    return empty_results(x, topk_ids, gate_up, rest[-1])


@torch.library.custom_op("moescale::fp8_experts_backward", mutates_args=())
def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_rows: torch.Tensor,
    gate_up_columns: torch.Tensor,
    gate_up_scales: torch.Tensor,
    down_columns: torch.Tensor,
    down_scales: torch.Tensor,
    pre: torch.Tensor,
    row_pair: torch.Tensor,
    pair_row: torch.Tensor,
    ends: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, topk_weights, gate_up and down; one that was added to its buffer is empty."""
    ops, top_k = kernels_for(x), topk_weights.shape[1]
    groups, padded = ops.group_rows(ends, row_pair.numel()), ops.pad_ends(ends)
    hidden, ffn = x.shape[1], gate_up_rows.shape[1] // 2
    if pre.numel() == 0:
        rows, _ = ops.gather_rows(x.contiguous(), pair_row, top_k)
        pre = ops.multiply_rows(rows, Scaled(gate_up_rows, gate_up_scales), groups, 2 * ffn)
        del rows
    of_tokens = {"row_pair": row_pair, "top_k": top_k}
    grad_rows, grad_tokens = ops.gather_rows(grad.contiguous(), pair_row, top_k)
    of_down = Scaled(down_columns, down_scales)
    grad_act = ops.multiply_rows(grad_rows, of_down, groups, ffn, transposed=True)
    del grad_rows
    row_weights = ops.sort_weights(topk_weights.contiguous(), row_pair)
    grad_pre, act, grad_weights = ops.swiglu_backward(grad_act, pre, row_weights, groups)
    tokens = ops.quantize_rows(x.contiguous())
    if is_collecting():
        exact_grad_pre, exact_act, _ = exact_swiglu_backward(grad_act, pre, row_weights)
        note_of_experts("experts gradient of the pre-activation", exact_grad_pre, grad_pre, ends)
        note_of_experts("experts weighted activation", exact_act, act, ends)
        token = row_pair // top_k
        for name, exact, scaled in (("input", x, tokens), ("gradient of the result", grad, grad_tokens)):
            rows = Scaled(scaled.data.view(torch.uint8)[token].view(E4M3), scaled.scales[token])
            note_of_experts(f"experts {name}", exact[token], rows, ends)
    del grad_act
    buffers = gate_up_gradient, down_gradient
    grad_gate_up, grad_down = weight_gradients(
        ops, groups, padded, grad_tokens, act, grad_pre, tokens, buffers, **of_tokens
    )
    of_gate_up = Scaled(gate_up_columns, gate_up_scales)
    of_x = ops.multiply_rows(grad_pre, of_gate_up, groups, hidden, transposed=True)
    return (
        ops.combine_rows(of_x, pair_row, top_k),
        ops.order_by_pair(grad_weights, pair_row).view(topk_weights.shape),
        grad_gate_up if gate_up_gradient is None else x.new_empty(0),
        grad_down if down_gradient is None else x.new_empty(0),
    )


@_experts_backward.register_fake
def _(grad, x, topk_weights, gate_up_rows, gate_up_columns, gate_up_scales, down_columns, *rest):
    gate_up_gradient, down_gradient = rest[-2:]
    num_experts, ffn2, hidden = gate_up_rows.shape
    shapes = ((num_experts, ffn2, hidden), (num_experts, hidden, ffn2 // 2))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(topk_weights, memory_format=torch.contiguous_format),
        *(
            x.new_empty(shape if buffer is None else 0)
            for shape, buffer in zip(shapes, (gate_up_gradient, down_gradient), strict=True)
        ),
    )


def _setup(ctx, inputs, output) -> None:
    x, _, topk_weights, _, _, *copies = inputs[:11]
    ctx.buffers = inputs[11:13]
    _, pre, row_pair, pair_row, ends = output
    ctx.mark_non_differentiable(pre, row_pair, pair_row, ends)
    gate_up, (_, down_columns, down_scales) = copies[:3], copies[3:]
    ctx.save_for_backward(x, topk_weights, *gate_up, down_columns, down_scales, pre, row_pair, pair_row, ends)


def _backward(ctx, grad, *_):
    grad_x, grad_weights, *found = _experts_backward(grad, *ctx.saved_tensors, *ctx.buffers)
    return grad_x, None, grad_weights, *returned(found, ctx.buffers, ctx.needs_input_grad[3:5]), *(None,) * 11


_experts.register_autograd(_backward, setup_context=_setup)
