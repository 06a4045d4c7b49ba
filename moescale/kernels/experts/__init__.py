"""Routed experts: each token's K chosen expert MLPs, weighted and summed; and the same MLP on rows sorted by expert.

Forward and backward are one custom operator each, so a compiled layer has no graph break. The backward saves the
input, the pre-activation and the routing; everything else is computed again (see ``experts.triton``). Experts may have
biases, and the clamped activation of gpt-oss. Frozen weights may be in fp8 (:mod:`moescale.kernels.block_fp8`): each is
made plain for each product that it is in.

Weight gradients can go straight into buffers: with ``gate_up_gradient`` / ``down_gradient`` given, the backward adds to
them inside the weight-gradient product and autograd gets no gradient for that weight. That saves writing the gradient,
reading it again and adding it, which at 64 experts costs as much memory traffic as the whole forward pass.

The operators do not declare this mutation, and write through ``.data``, which has a version counter of its own. A
declared one counts as an in-place change of a saved input, and a compiled layer then refuses a second forward before
the first backward, as pipeline schedules need. Nothing else in a layer's graph reads the buffers, so no order can be
broken by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moescale.kernels.backends import (
    KernelInputError,
    check_device,
    check_dtype,
    check_gradient_buffer,
    check_shape,
    choose_experts_backend,
    debug_checks_enabled,
)
from moescale.kernels.block_fp8 import ExpertScales as ExpertScales
from moescale.kernels.block_fp8 import Weight, check_stored, detached_scales, plain, stored
from moescale.kernels.experts.operators import check_gradient_buffers, empty_results, operators_of, returned
from moescale.kernels.experts.reference import ExpertBiases as ExpertBiases
from moescale.kernels.experts.sort import check_ids, sort_pairs
from moescale.kernels.swiglu.reference import SwigluClamp as SwigluClamp

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    scales: ExpertScales | None = None,
    tokens_per_expert: torch.Tensor | None = None,
    gate_up_gradient: torch.Tensor | None = None,
    down_gradient: torch.Tensor | None = None,
    biases: ExpertBiases | None = None,
    bias_gradients: ExpertBiases | None = None,
    clamp: SwigluClamp | None = None,
    backend: str = "auto",
    recompute_up: bool = False,
) -> torch.Tensor:
    """Return y[t] = sum_k topk_weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), e = topk_ids[t, k].

    Shapes: x [T, H]; topk_ids [T, K] int32 or int64; topk_weights [T, K] fp32; gate_up [E, 2F, H], gate rows first;
    down [E, H, F]; result [T, H] in the dtype of x, which the weights share. Differentiable in x, topk_weights and the
    weights. The sum over K runs in fp32 and in the order of k, so equal inputs give equal bits.

    ``gate_up_gradient`` and ``down_gradient`` are buffers (the weight's shape; its dtype or fp32) to which the backward
    adds; that weight's ``.grad`` then stays untouched. ``recompute_up`` saves no pre-activation [R, 2F] and computes
    the up-projection again in the backward. ``biases`` are added to both products, and their gradients to the buffers
    ``bias_gradients``, as those of the weights; ``clamp`` replaces the activation. ``scales``: of weights in fp8, which
    are frozen.

    A pair whose expert id lies outside [0, E) contributes nothing; with MOESCALE_DEBUG=1 it is an error, and so
    are ``tokens_per_expert`` [E] (the router's counts) that do not fit the ids.

    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    _check_experts(x, topk_ids, topk_weights, gate_up, down, scales)
    check_gradient_buffers("experts", gate_up, down, gate_up_gradient, down_gradient)
    _check_biases("experts", gate_up, down, biases, bias_gradients, x.dtype)
    backend = choose_experts_backend(x.device, x.dtype, backend)
    _check_alignment("experts", backend, gate_up, x.dtype)
    if debug_checks_enabled():
        check_ids(topk_ids, gate_up.shape[0], tokens_per_expert)
    save_pre = torch.is_grad_enabled() and not recompute_up
    buffers = (gate_up_gradient, down_gradient, *(bias_gradients or (None, None)))
    frozen = detached_scales(scales)
    biased = biases or (None, None)
    return _experts(x, topk_ids, topk_weights, gate_up, down, *biased, *frozen, *buffers, clamp, backend, save_pre)[0]


def expert_mlp(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ends: torch.Tensor,
    *,
    scales: ExpertScales | None = None,
    gate_up_gradient: torch.Tensor | None = None,
    down_gradient: torch.Tensor | None = None,
    biases: ExpertBiases | None = None,
    bias_gradients: ExpertBiases | None = None,
    clamp: SwigluClamp | None = None,
    backend: str = "auto",
    recompute_up: bool = False,
) -> torch.Tensor:
    """Return down[e] @ (silu(gate[e] @ row) * (up[e] @ row)) for rows sorted by expert, as behind an all-to-all.

    Shapes: rows [R, H]; gate_up [E, 2F, H], gate rows first; down [E, H, F]; ends [E] int32, the cumulative rows of
    each expert; result [R, H]. Rows from ``ends[-1]`` on belong to no expert: their result and gradient are zero.
    The other arguments and the errors are those of :func:`experts`.
    """
    num_experts, _, hidden = gate_up.shape
    check_shape("expert_mlp", "rows", rows, (None, hidden), "[R, H]")
    check_shape("expert_mlp", "ends", ends, (num_experts,), "[E]")
    check_dtype("expert_mlp", "ends", ends, (torch.int32,))
    check_device("expert_mlp", "ends", ends, rows.device)
    _check_weights("expert_mlp", rows, gate_up, down, scales)
    check_gradient_buffers("expert_mlp", gate_up, down, gate_up_gradient, down_gradient)
    _check_biases("expert_mlp", gate_up, down, biases, bias_gradients, rows.dtype)
    backend = choose_experts_backend(rows.device, rows.dtype, backend)
    _check_alignment("expert_mlp", backend, gate_up, rows.dtype)
    save_pre = torch.is_grad_enabled() and not recompute_up
    buffers = (gate_up_gradient, down_gradient, *(bias_gradients or (None, None)))
    frozen = detached_scales(scales)
    biased = biases or (None, None)
    return _expert_mlp(rows, gate_up, down, ends, *biased, *frozen, *buffers, clamp, backend, save_pre)[0]


def _check_experts(x, topk_ids, topk_weights, gate_up, down, scales) -> None:
    check_shape("experts", "x", x, (None, None), "[T, H]")
    check_shape("experts", "topk_ids", topk_ids, (x.shape[0], None), "[T, K]")
    check_shape("experts", "topk_weights", topk_weights, tuple(topk_ids.shape), "[T, K]")
    check_dtype("experts", "topk_ids", topk_ids, (torch.int32, torch.int64))
    check_dtype("experts", "topk_weights", topk_weights, (torch.float32,))
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        check_device("experts", name, tensor, x.device)
    _check_weights("experts", x, gate_up, down, scales)


def _check_weights(
    operator: str, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, scales: ExpertScales | None
) -> None:
    check_shape(operator, "down", down, (None, x.shape[1], None), "[E, H, F]")
    num_experts, hidden, ffn = down.shape
    check_shape(operator, "gate_up", gate_up, (num_experts, 2 * ffn, hidden), "[E, 2F, H]")
    check_dtype(operator, "the input", x, FLOATING)
    for name, weight, of_weight in zip(("gate_up", "down"), (gate_up, down), scales or (None, None), strict=True):
        check_stored(operator, name, weight, of_weight, x.dtype)
        check_device(operator, name, weight, x.device)


def _check_biases(
    operator: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    biases: ExpertBiases | None,
    bias_gradients: ExpertBiases | None,
    dtype: torch.dtype,
) -> None:
    if biases is None:
        if bias_gradients is not None:
            raise KernelInputError(f"{operator}: bias_gradients are given without biases; give both or neither")
        return
    for name, bias, weight, meaning in (
        ("gate_up_bias", biases.gate_up, gate_up, "[E, 2F]"),
        ("down_bias", biases.down, down, "[E, H]"),
    ):
        check_shape(operator, name, bias, tuple(weight.shape[:2]), meaning)
        check_dtype(operator, name, bias, (dtype,))
        check_device(operator, name, bias, weight.device)
    for name, bias, buffer in zip(("gate_up_bias", "down_bias"), biases, bias_gradients or (), strict=False):
        check_gradient_buffer(operator, name, bias, buffer)


def _check_alignment(operator: str, backend: str, gate_up: torch.Tensor, dtype: torch.dtype) -> None:
    """Tensor descriptors and grouped_mm need every row to start at a multiple of 16 bytes."""
    _, ffn2, hidden = gate_up.shape
    multiple = 16 // dtype.itemsize
    if backend != "torch" and (hidden % multiple or (ffn2 // 2) % multiple):
        raise KernelInputError(
            f"{operator}: hidden size ({hidden}) and expert intermediate size ({ffn2 // 2}) must be multiples of "
            f"{multiple} in {dtype} for the back end {backend!r}; use the back end 'torch'"
        )


def up_options(gate_up_bias: torch.Tensor | None, clamp: Sequence[float] | None) -> dict:
    """The arguments of ``multiply_up`` beyond those that every back end takes."""
    bias = {} if gate_up_bias is None else {"bias": gate_up_bias}
    return bias | clamp_option(clamp)


def clamp_option(clamp: Sequence[float] | None) -> dict:
    """The argument of the operators that know the activation, in back ends that have more than one."""
    return {} if clamp is None else {"clamp": SwigluClamp(*clamp)}


def _mlp_forward(ops, rows, gate_up, down, ends, save_pre, biases, clamp, *, zero_tail=False):
    groups, dtype = ops.group_rows(ends, rows.shape[0]), rows.dtype
    up = up_options(biases[0], clamp)
    pre, act = ops.multiply_up(rows, plain(gate_up, dtype), groups, write_pre=save_pre, write_act=True, **up)
    bias = {} if biases[1] is None else {"bias": biases[1]}
    return ops.multiply_rows(act, plain(down, dtype), groups, zero_tail=zero_tail, **bias), pre


def _mlp_backward(
    ops,
    grad_rows,
    rows,
    pre,
    gate_up,
    down,
    ends,
    row_weights,
    biases,
    buffers,
    clamp,
    is_frozen,
    *,
    zero_tail=False,
):
    """Return the gradients (rows, row weights, gate_up, down, their biases).

    Those of parameters that are frozen, have a buffer, or are not there are empty.
    """
    groups, dtype = ops.group_rows(ends, rows.shape[0]), rows.dtype
    if pre.numel() == 0:
        up = up_options(biases[0], clamp)
        pre, _ = ops.multiply_up(rows, plain(gate_up, dtype), groups, write_pre=True, write_act=False, **up)
    gate_up_gradient, down_gradient, *of_biases = (None if b is None else b.data for b in buffers)
    grad_pre, act, grad_weights = ops.multiply_down_dgrad(
        grad_rows, plain(down, dtype), pre, groups, row_weights, **clamp_option(clamp)
    )
    if biases[1] is not None and row_weights is not None:
        ops.add_bias_products(grad_weights, grad_rows, biases[1], groups)
    grad_gate_up = grad_down = None
    grad_biases = [None, None]
    if biases[0] is not None and not is_frozen:
        grad_biases[0] = ops.bias_gradient(grad_pre, groups, buffer=of_biases[0], kernel="up")
        grad_biases[1] = ops.bias_gradient(grad_rows, groups, row_weights, buffer=of_biases[1], kernel="down")
    if not is_frozen:
        grad_down = ops.weight_gradient(grad_rows, act, groups, buffer=down_gradient, kernel="down_wgrad")
    del act
    if not is_frozen:
        grad_gate_up = ops.weight_gradient(grad_pre, rows, groups, buffer=gate_up_gradient, kernel="up_wgrad")
    options = dict(transposed=True, zero_tail=zero_tail, kernel="up_dgrad")
    grad_rows = ops.multiply_rows(grad_pre, plain(gate_up, dtype), groups, **options)
    found = (grad_gate_up, grad_down, *grad_biases)
    return (
        grad_rows,
        grad_weights,
        *(
            rows.new_empty(0) if gradient is None or buffer is not None else gradient
            for gradient, buffer in zip(found, buffers, strict=True)
        ),
    )


@torch.library.custom_op("moescale::experts", mutates_args=())
def _experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
    gate_up_bias_gradient: torch.Tensor | None,
    down_bias_gradient: torch.Tensor | None,
    clamp: Sequence[float] | None,
    backend: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, pre-activation or empty, row_pair, pair_row, ends)."""
    ops = operators_of(backend)
    top_k = topk_ids.shape[1]
    row_pair, pair_row, ends = sort_pairs(topk_ids, gate_up.shape[0], backend=backend)
    rows = ops.gather_rows(x.contiguous(), row_pair, pair_row, top_k)
    biases = _contiguous(gate_up_bias, down_bias)
    weights = _stored(gate_up, down, gate_up_scale, down_scale)
    out, pre = _mlp_forward(ops, rows, *weights, ends, save_pre, biases, clamp)
    y = ops.combine_rows(out, pair_row, top_k, topk_weights.contiguous())
    return y, pre, row_pair, pair_row, ends


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _stored(gate_up, down, gate_up_scale, down_scale) -> tuple[Weight, Weight]:
    return stored(gate_up.contiguous(), gate_up_scale), stored(down.contiguous(), down_scale)


@_experts.register_fake
def _(x, topk_ids, topk_weights, gate_up, down, *rest):
    return empty_results(x, topk_ids, gate_up, rest[-1])


@torch.library.custom_op("moescale::experts_backward", mutates_args=())
def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    pre: torch.Tensor,
    row_pair: torch.Tensor,
    pair_row: torch.Tensor,
    ends: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
    gate_up_bias_gradient: torch.Tensor | None,
    down_bias_gradient: torch.Tensor | None,
    clamp: Sequence[float] | None,
    is_frozen: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    ops = operators_of(backend)
    top_k = topk_weights.shape[1]
    weights = topk_weights.contiguous()
    grad_rows, grad_weights, *of_parameters = _mlp_backward(
        ops,
        ops.gather_rows(grad.contiguous(), row_pair, pair_row, top_k),
        ops.gather_rows(x.contiguous(), row_pair, pair_row, top_k),
        pre,
        *_stored(gate_up, down, gate_up_scale, down_scale),
        ends,
        ops.sort_weights(weights, row_pair),
        _contiguous(gate_up_bias, down_bias),
        (gate_up_gradient, down_gradient, gate_up_bias_gradient, down_bias_gradient),
        clamp,
        is_frozen,
    )
    grad_x = ops.combine_rows(grad_rows, pair_row, top_k)
    grad_weights = ops.order_by_pair(grad_weights, pair_row).view(topk_weights.shape)
    return grad_x, grad_weights, *of_parameters


@_experts_backward.register_fake
def _(grad, x, topk_weights, gate_up, down, gate_up_bias, down_bias, *rest):
    buffers, is_frozen = rest[6:10], rest[-2]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(topk_weights, memory_format=torch.contiguous_format),
        *_fake_gradients(x, (gate_up, down, gate_up_bias, down_bias), buffers, is_frozen),
    )


def _fake_gradients(x, parameters, buffers, is_frozen):
    return [
        x.new_empty(0)
        if parameter is None or buffer is not None or is_frozen
        else torch.empty_like(parameter, memory_format=torch.contiguous_format)
        for parameter, buffer in zip(parameters, buffers, strict=True)
    ]


def _experts_setup(ctx, inputs, output) -> None:
    x, _, topk_weights, *parameters = inputs[:9]
    ctx.buffers, ctx.clamp, ctx.backend = inputs[9:13], inputs[13], inputs[14]
    _, pre, row_pair, pair_row, ends = output
    ctx.mark_non_differentiable(pre, row_pair, pair_row, ends)
    ctx.save_for_backward(x, topk_weights, *parameters, pre, row_pair, pair_row, ends)


def _experts_autograd(ctx, grad, *_):
    need = ctx.needs_input_grad[3:7]
    grad_x, grad_weights, *found = _experts_backward(
        grad, *ctx.saved_tensors, *ctx.buffers, ctx.clamp, not any(need), ctx.backend
    )
    return grad_x, None, grad_weights, *returned(found, ctx.buffers, need), *(None,) * 9


_experts.register_autograd(_experts_autograd, setup_context=_experts_setup)


@torch.library.custom_op("moescale::expert_mlp", mutates_args=())
def _expert_mlp(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ends: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
    gate_up_bias_gradient: torch.Tensor | None,
    down_bias_gradient: torch.Tensor | None,
    clamp: Sequence[float] | None,
    backend: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result, pre-activation or empty)."""
    ops = operators_of(backend)
    weights = _stored(gate_up, down, gate_up_scale, down_scale)
    biases = _contiguous(gate_up_bias, down_bias)
    return _mlp_forward(ops, rows.contiguous(), *weights, ends, save_pre, biases, clamp, zero_tail=True)


@_expert_mlp.register_fake
def _(rows, gate_up, down, ends, *rest):
    save_pre = rest[-1]
    pre = rows.new_empty((rows.shape[0], gate_up.shape[1])) if save_pre else rows.new_empty(0)
    return torch.empty_like(rows, memory_format=torch.contiguous_format), pre


@torch.library.custom_op("moescale::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    ends: torch.Tensor,
    pre: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
    gate_up_bias_gradient: torch.Tensor | None,
    down_bias_gradient: torch.Tensor | None,
    clamp: Sequence[float] | None,
    is_frozen: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_rows, _, *of_parameters = _mlp_backward(
        operators_of(backend),
        grad.contiguous(),
        rows.contiguous(),
        pre,
        *_stored(gate_up, down, gate_up_scale, down_scale),
        ends,
        None,
        _contiguous(gate_up_bias, down_bias),
        (gate_up_gradient, down_gradient, gate_up_bias_gradient, down_bias_gradient),
        clamp,
        is_frozen,
        zero_tail=True,
    )
    return grad_rows, *of_parameters


@_expert_mlp_backward.register_fake
def _(grad, rows, gate_up, down, gate_up_bias, down_bias, *rest):
    buffers, is_frozen = rest[4:8], rest[-2]
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        *_fake_gradients(rows, (gate_up, down, gate_up_bias, down_bias), buffers, is_frozen),
    )


def _expert_mlp_setup(ctx, inputs, output) -> None:
    rows, gate_up, down, ends, *others = inputs[:8]
    ctx.buffers, ctx.clamp, ctx.backend = inputs[8:12], inputs[12], inputs[13]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, gate_up, down, *others, ends, output[1])


def _expert_mlp_autograd(ctx, grad, _):
    need = (*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[4:6])
    grad_rows, *found = _expert_mlp_backward(
        grad, *ctx.saved_tensors, *ctx.buffers, ctx.clamp, not any(need), ctx.backend
    )
    of_weights, of_biases = found[:2], found[2:]
    return (
        grad_rows,
        *returned(of_weights, ctx.buffers[:2], need[:2]),
        None,
        *returned(of_biases, ctx.buffers[2:], need[2:]),
        *(None,) * 9,
    )


_expert_mlp.register_autograd(_expert_mlp_autograd, setup_context=_expert_mlp_setup)
