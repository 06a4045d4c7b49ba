"""Routed experts with all six products of forward and backward in e4m3.

A token's row is quantised once, in the gather; the activation and the gradient of the pre-activation by SwiGLU and its
backward. For the gradients of weights, which contract rows, four tensors are transposed, each with one scale for an
expert. Saved are the input and the pre-activation in bf16, as without fp8.
"""

from __future__ import annotations

import torch

from moescale.formats import FP8_GEMM_MULTIPLE
from moescale.kernels.backends import (
    KernelInputError,
    check_device,
    check_dtype,
    check_gradient_buffer,
    check_shape,
    debug_checks_enabled,
)
from moescale.kernels.experts.operators import empty_results
from moescale.kernels.experts.sort import check_ids
from moescale.kernels.fp8 import kernels_for
from moescale.kernels.fp8.errors import is_collecting, note, note_of_experts
from moescale.kernels.fp8.reference import exact_swiglu, exact_swiglu_backward
from moescale.kernels.fp8.scaled import E4M3, Copies, Scaled


def fp8_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_copies: Copies,
    down_copies: Copies,
    *,
    tokens_per_expert: torch.Tensor | None = None,
    gate_up_gradient: torch.Tensor | None = None,
    down_gradient: torch.Tensor | None = None,
    recompute_up: bool = False,
) -> torch.Tensor:
    """As :func:`moescale.kernels.experts.experts`, with what its products read rounded to e4m3.

    Shapes: as there; x and both weights are bf16, ``gate_up_copies`` and ``down_copies`` those of the weights. H and F
    are multiples of 16. Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    _check(x, topk_ids, topk_weights, gate_up, down, gate_up_copies, down_copies)
    for name, weight, buffer in (("gate_up", gate_up, gate_up_gradient), ("down", down, down_gradient)):
        if buffer is not None:
            check_gradient_buffer("fp8_experts", name, weight, buffer)
    if debug_checks_enabled():
        check_ids(topk_ids, gate_up.shape[0], tokens_per_expert)
    save_pre = torch.is_grad_enabled() and not recompute_up
    copies, buffers = (*gate_up_copies, *down_copies), (gate_up_gradient, down_gradient)
    return _experts(x, topk_ids, topk_weights, gate_up, down, *copies, *buffers, save_pre)[0]


def _check(x, topk_ids, topk_weights, gate_up, down, gate_up_copies, down_copies) -> None:
    check_shape("fp8_experts", "x", x, (None, None), "[T, H]")
    check_shape("fp8_experts", "topk_ids", topk_ids, (x.shape[0], None), "[T, K]")
    check_shape("fp8_experts", "topk_weights", topk_weights, tuple(topk_ids.shape), "[T, K]")
    check_shape("fp8_experts", "down", down, (None, x.shape[1], None), "[E, H, F]")
    num_experts, hidden, ffn = down.shape
    check_shape("fp8_experts", "gate_up", gate_up, (num_experts, 2 * ffn, hidden), "[E, 2F, H]")
    check_dtype("fp8_experts", "topk_ids", topk_ids, (torch.int32, torch.int64))
    check_dtype("fp8_experts", "topk_weights", topk_weights, (torch.float32,))
    for name, weight, copies in (("gate_up", gate_up, gate_up_copies), ("down", down, down_copies)):
        check_dtype("fp8_experts", name, weight, (torch.bfloat16,))
        check_device("fp8_experts", name, weight, x.device)
        check_device("fp8_experts", f"{name}_copies", copies.rows, x.device)
        check_shape("fp8_experts", f"{name}_copies", copies.rows, tuple(weight.shape), f"those of {name}")
    check_dtype("fp8_experts", "x", x, (torch.bfloat16,))
    if hidden % FP8_GEMM_MULTIPLE or ffn % FP8_GEMM_MULTIPLE:
        raise KernelInputError(
            f"fp8_experts: hidden size ({hidden}) and expert intermediate size ({ffn}) must be multiples of "
            f"{FP8_GEMM_MULTIPLE}; use experts without fp8"
        )


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
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, pre-activation or empty, row_pair, pair_row, ends)."""
    ops, top_k = kernels_for(x), topk_ids.shape[1]
    row_pair, pair_row, ends = ops.sort_pairs(topk_ids, gate_up.shape[0])
    rows, _ = ops.gather_rows(x.contiguous(), pair_row, top_k)
    groups = ops.group_rows(ends, row_pair.numel())
    pre = ops.multiply_rows(rows, Scaled(gate_up_rows, gate_up_scales), groups, gate_up.shape[1], kernel="up")
    act = ops.swiglu(pre)
    note("experts activation", lambda: exact_swiglu(pre), act, ends)
    out = ops.multiply_rows(act, Scaled(down_rows, down_scales), groups, down.shape[1], kernel="down")
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
        pre = ops.multiply_rows(rows, Scaled(gate_up_rows, gate_up_scales), groups, 2 * ffn, kernel="up")
        del rows
    of_tokens = {"row_pair": row_pair, "top_k": top_k}
    grad_rows, grad_tokens = ops.gather_rows(grad.contiguous(), pair_row, top_k)
    of_down = Scaled(down_columns, down_scales)
    grad_act = ops.multiply_rows(grad_rows, of_down, groups, ffn, transposed=True, kernel="down_dgrad")
    del grad_rows
    row_weights = ops.sort_weights(topk_weights.contiguous(), row_pair)
    grad_pre, act, grad_weights = ops.swiglu_backward(grad_act, pre, row_weights)
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
    left = ops.transpose_rows(grad_tokens, groups, padded, **of_tokens)
    right = ops.transpose_rows(act, groups, padded)
    grad_down = ops.weight_gradient(left, right, padded, buffer=_data(down_gradient), kernel="down_wgrad")
    left = ops.transpose_rows(grad_pre, groups, padded)
    right = ops.transpose_rows(tokens, groups, padded, **of_tokens)
    grad_gate_up = ops.weight_gradient(left, right, padded, buffer=_data(gate_up_gradient), kernel="up_wgrad")
    del left, right
    of_gate_up = Scaled(gate_up_columns, gate_up_scales)
    of_x = ops.multiply_rows(grad_pre, of_gate_up, groups, hidden, transposed=True, kernel="up_dgrad")
    return (
        ops.combine_rows(of_x, pair_row, top_k),
        ops.order_by_pair(grad_weights, pair_row).view(topk_weights.shape),
        grad_gate_up if gate_up_gradient is None else x.new_empty(0),
        grad_down if down_gradient is None else x.new_empty(0),
    )


def _data(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return None if buffer is None else buffer.data


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
    of_weights = (
        gradient if buffer is None and needed else None
        for gradient, buffer, needed in zip(found, ctx.buffers, ctx.needs_input_grad[3:5], strict=True)
    )
    return grad_x, None, grad_weights, *of_weights, *(None,) * 9


_experts.register_autograd(_backward, setup_context=_setup)
