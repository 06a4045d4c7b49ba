"""Routed experts with frozen weights and a low-rank addition to each (LoRA, Hu et al. 2021, arXiv:2106.09685).

An adapter adds ``scale * B @ A`` to a weight [N, K], with A [r, K] and B [N, r]. The sum is never made: rows are
projected onto the rank by one grouped GEMM, and what that adds is multiplied in the epilogue of the frozen weight's own
GEMM, forward and backward. With x the rows, g the gradient of the result and w the frozen weight:

    y  = x w.T + (x A.T) (s B).T        dB = s g.T (x A.T)
    dx = g w   + (g s B) A              dA = (g s B).T x

No gradient of the frozen weights is made, and no merged copy of them. The adapters are fp32, multiplied in the dtype of
the rows; their gradients are summed in fp32 and added to buffers where there are any. Frozen weights in fp8
(:mod:`moescale.kernels.block_fp8`) are made plain one at a time, for each product that they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from moescale.kernels.backends import (
    KernelInputError,
    check_device,
    check_dtype,
    check_gradient_buffer,
    check_shape,
    choose_experts_backend,
)
from moescale.kernels.block_fp8 import ExpertScales, Weight, check_stored, detached_scales, plain, stored
from moescale.kernels.experts.operators import operators_of, returned
from moescale.kernels.experts.sort import sort_pairs


class ExpertAdapters(NamedTuple):
    """The adapters of a layer's experts, or their gradients: E experts, rank r."""

    gate_up_a: torch.Tensor
    """[E, r, H]"""
    gate_up_b: torch.Tensor
    """[E, 2F, r]"""
    down_a: torch.Tensor
    """[E, r, F]"""
    down_b: torch.Tensor
    """[E, H, r]"""

    def for_rows(self, dtype: torch.dtype, scale: float) -> ExpertAdapters:
        """The factors as the GEMMs take them: in the rows' dtype, ``scale`` in those that are multiplied last."""
        factors = (self.gate_up_a, self.gate_up_b * scale, self.down_a, self.down_b * scale)
        return ExpertAdapters(*(factor.to(dtype).contiguous() for factor in factors))


class Projected(NamedTuple):
    """Rows on the rank, kept for the backward: of the input (x A.T) and of the activation, each [R, r]."""

    rows: torch.Tensor
    activation: torch.Tensor


def choose_adapted_backend(device: torch.device, dtype: torch.dtype, requested: str = "auto") -> str:
    """As for experts without adapters; ``cute`` has no epilogue for the addition, so ``auto`` takes Triton instead."""
    backend = choose_experts_backend(device, dtype, requested)
    if backend == "cute":
        if requested == "cute":
            raise KernelInputError("kernels.backend ('cute') has no experts with adapters; use 'auto' or 'triton'")
        return "triton"
    return backend


def check_adapters(
    operator: str,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    adapters: ExpertAdapters,
    backend: str,
    scales: ExpertScales | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    """Refuse adapters that do not fit the weights, weights not in ``dtype`` or fp8, and a rank that the back end cannot
    align.
    """
    for name, weight, of_weight in zip(("gate_up", "down"), (gate_up, down), scales or (None, None), strict=True):
        check_stored(operator, name, weight, of_weight, dtype)
    num_experts, ffn2, hidden = gate_up.shape
    rank = adapters.gate_up_a.shape[1]
    shapes = {
        "gate_up_a": ((num_experts, rank, hidden), "[E, r, H]"),
        "gate_up_b": ((num_experts, ffn2, rank), "[E, 2F, r]"),
        "down_a": ((num_experts, rank, ffn2 // 2), "[E, r, F]"),
        "down_b": ((num_experts, hidden, rank), "[E, H, r]"),
    }
    for name, (shape, meaning) in shapes.items():
        factor = getattr(adapters, name)
        check_shape(operator, name, factor, shape, meaning)
        check_dtype(operator, name, factor, (torch.float32,))
        check_device(operator, name, factor, gate_up.device)
    multiple = 16 // dtype.itemsize
    if backend != "torch" and rank % multiple:
        raise KernelInputError(
            f"{operator}: lora.rank ({rank}) must be a multiple of {multiple} in {dtype} for the back end "
            f"{backend!r}; use such a rank, or the back end 'torch'"
        )


def adapted_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    adapters: ExpertAdapters,
    *,
    scale: float,
    scales: ExpertScales | None = None,
    gradients: ExpertAdapters | None = None,
    backend: str = "auto",
    recompute_up: bool = False,
) -> torch.Tensor:
    """As :func:`moescale.kernels.experts.experts`, with ``scale * B @ A`` added to each expert's weights.

    Differentiable in x, topk_weights and the adapters, not in the weights. ``scales``: of weights in fp8.
    ``gradients`` are fp32 buffers to which the backward adds those of the adapters; autograd then gets none.
    ``recompute_up``: as there.

    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    backend = choose_adapted_backend(x.device, x.dtype, backend)
    check_adapters("adapted_experts", gate_up, down, adapters, backend, scales, dtype=x.dtype)
    _check_buffers("adapted_experts", adapters, gradients)
    save_pre = torch.is_grad_enabled() and not recompute_up
    frozen = (gate_up.detach(), down.detach(), *detached_scales(scales))
    buffers = gradients or (None,) * 4
    return _adapted(x, topk_ids, topk_weights, *frozen, *adapters, *buffers, scale, backend, save_pre)[0]


def adapted_expert_mlp(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ends: torch.Tensor,
    adapters: ExpertAdapters,
    *,
    scale: float,
    scales: ExpertScales | None = None,
    gradients: ExpertAdapters | None = None,
    backend: str = "auto",
    recompute_up: bool = False,
) -> torch.Tensor:
    """As :func:`moescale.kernels.experts.expert_mlp` on rows [R, H] sorted by expert, with adapters as above."""
    backend = choose_adapted_backend(rows.device, rows.dtype, backend)
    check_adapters("adapted_expert_mlp", gate_up, down, adapters, backend, scales, dtype=rows.dtype)
    _check_buffers("adapted_expert_mlp", adapters, gradients)
    save_pre = torch.is_grad_enabled() and not recompute_up
    frozen = (gate_up.detach(), down.detach(), *detached_scales(scales))
    buffers = gradients or (None,) * 4
    return _adapted_mlp(rows, *frozen, ends, *adapters, *buffers, scale, backend, save_pre)[0]


def _check_buffers(operator: str, adapters: ExpertAdapters, gradients: ExpertAdapters | None) -> None:
    for name, factor, buffer in zip(ExpertAdapters._fields, adapters, gradients or (), strict=gradients is not None):
        check_gradient_buffer(operator, name, factor, buffer)


def adapted_forward(
    ops: SimpleNamespace,
    rows: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    ends: torch.Tensor,
    factors: ExpertAdapters,
    save_pre: bool,
    *,
    zero_tail: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Projected]:
    """Return the experts' result of ``rows``, the pre-activation (or empty), and what the backward needs on the rank.

    ``factors``: from :meth:`ExpertAdapters.for_rows`.
    """
    groups = ops.group_rows(ends, rows.shape[0])
    on_rank = ops.multiply_rows(rows, factors.gate_up_a, groups, kernel="project")
    low_rank = (on_rank, factors.gate_up_b)
    dtype = rows.dtype
    pre, act = ops.multiply_up(
        rows, plain(gate_up, dtype), groups, write_pre=save_pre, write_act=True, low_rank=low_rank
    )
    of_act = ops.multiply_rows(act, factors.down_a, groups, kernel="project")
    out = ops.multiply_rows(act, plain(down, dtype), groups, zero_tail=zero_tail, low_rank=(of_act, factors.down_b))
    return out, pre, Projected(on_rank, of_act)


def adapted_backward(
    ops: SimpleNamespace,
    grad_rows: torch.Tensor,
    rows: torch.Tensor,
    pre: torch.Tensor,
    projected: Projected,
    gate_up: Weight,
    down: Weight,
    ends: torch.Tensor,
    row_weights: torch.Tensor | None,
    factors: ExpertAdapters,
    buffers: Sequence[torch.Tensor | None],
    scale: float,
    *,
    zero_tail: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return the gradients of the rows, of their weights, and the four of the adapters: fp32, empty with a buffer."""
    groups, dtype = ops.group_rows(ends, rows.shape[0]), rows.dtype
    if pre.numel() == 0:
        low_rank = (projected.rows, factors.gate_up_b)
        pre, _ = ops.multiply_up(
            rows, plain(gate_up, dtype), groups, write_pre=True, write_act=False, low_rank=low_rank
        )
    on_rank = ops.multiply_rows(grad_rows, factors.down_b, groups, transposed=True, kernel="project")
    low_rank = (on_rank, factors.down_a)
    grad_pre, act, grad_weights = ops.multiply_down_dgrad(
        grad_rows, plain(down, dtype), pre, groups, row_weights, low_rank=low_rank
    )
    del pre
    of_act = projected.activation * scale
    if row_weights is not None:
        of_act = (of_act * row_weights.unsqueeze(1)).to(act.dtype)
    num_experts = gate_up.shape[0]
    of_down = adapter_gradients(ops, groups, num_experts, grad_rows, of_act, on_rank, act, buffers[2:])
    del act
    on_rank = ops.multiply_rows(grad_pre, factors.gate_up_b, groups, transposed=True, kernel="project")
    scaled = projected.rows * scale
    of_up = adapter_gradients(ops, groups, num_experts, grad_pre, scaled, on_rank, rows, buffers[:2])
    low_rank = (on_rank, factors.gate_up_a)
    grad = ops.multiply_rows(
        *(grad_pre, plain(gate_up, dtype), groups),
        transposed=True,
        zero_tail=zero_tail,
        kernel="up_dgrad",
        low_rank=low_rank,
    )
    return grad, grad_weights, [*of_up, *of_down]


def adapter_gradients(
    ops: SimpleNamespace,
    groups: Any,
    num_experts: int,
    grad: torch.Tensor,
    scaled_on_rank: torch.Tensor,
    grad_on_rank: torch.Tensor,
    rows: torch.Tensor,
    buffers: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Return the gradients of one weight's A [E, r, K] and B [E, N, r] in fp32, empty where added to its buffer.

    Shapes: ``grad`` [R, N] of the result; ``scaled_on_rank`` [R, r], s x A.T; ``grad_on_rank`` [R, r], g s B; ``rows``
    [R, K]. ``buffers``: of A and of B.
    """
    gradients = []
    for buffer, left, right, kernel in (
        (buffers[0], grad_on_rank, rows, "projection_wgrad"),
        (buffers[1], grad, scaled_on_rank, "factor_wgrad"),
    ):
        if buffer is not None:
            ops.weight_gradient(left, right, groups, buffer=buffer.data, kernel=kernel)
            gradients.append(left.new_empty(0, dtype=torch.float32))
        else:
            zeros = left.new_zeros((num_experts, left.shape[1], right.shape[1]), dtype=torch.float32)
            gradients.append(ops.weight_gradient(left, right, groups, buffer=zeros, kernel=kernel))
    return gradients


@torch.library.custom_op("moescale::adapted_experts", mutates_args=())
def _adapted(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_a: torch.Tensor,
    gate_up_b: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    gate_up_a_gradient: torch.Tensor | None,
    gate_up_b_gradient: torch.Tensor | None,
    down_a_gradient: torch.Tensor | None,
    down_b_gradient: torch.Tensor | None,
    scale: float,
    backend: str,
    save_pre: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """Return (y, pre-activation or empty, the two projections, row_pair, pair_row, ends)."""
    ops = operators_of(backend)
    top_k = topk_ids.shape[1]
    factors = ExpertAdapters(gate_up_a, gate_up_b, down_a, down_b).for_rows(x.dtype, scale)
    row_pair, pair_row, ends = sort_pairs(topk_ids, gate_up.shape[0], backend=backend)
    rows = ops.gather_rows(x.contiguous(), row_pair, pair_row, top_k)
    frozen = (stored(gate_up, gate_up_scale), stored(down, down_scale))
    out, pre, projected = adapted_forward(ops, rows, *frozen, ends, factors, save_pre)
    y = ops.combine_rows(out, pair_row, top_k, topk_weights.contiguous())
    return y, pre, *projected, row_pair, pair_row, ends


@_adapted.register_fake
def _(x, topk_ids, topk_weights, gate_up, down, gate_up_scale, down_scale, gate_up_a, *rest):
    save_pre = rest[-1]
    num_rows, rank = topk_ids.numel(), gate_up_a.shape[1]
    pre = x.new_empty((num_rows, gate_up.shape[1])) if save_pre else x.new_empty(0)
    projected = [x.new_empty((num_rows, rank)) for _ in range(2)]
    order = [topk_ids.new_empty(n, dtype=torch.int32) for n in (num_rows, num_rows, gate_up.shape[0])]
    return torch.empty_like(x, memory_format=torch.contiguous_format), pre, *projected, *order


@torch.library.custom_op("moescale::adapted_experts_backward", mutates_args=())
def _adapted_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    gate_up_a: torch.Tensor,
    gate_up_b: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    pre: torch.Tensor,
    on_rank: torch.Tensor,
    of_act: torch.Tensor,
    row_pair: torch.Tensor,
    pair_row: torch.Tensor,
    ends: torch.Tensor,
    gate_up_a_gradient: torch.Tensor | None,
    gate_up_b_gradient: torch.Tensor | None,
    down_a_gradient: torch.Tensor | None,
    down_b_gradient: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    ops = operators_of(backend)
    top_k = topk_weights.shape[1]
    weights = topk_weights.contiguous()
    grad_rows, grad_weights, grad_adapters = adapted_backward(
        ops,
        ops.gather_rows(grad.contiguous(), row_pair, pair_row, top_k),
        ops.gather_rows(x.contiguous(), row_pair, pair_row, top_k),
        pre,
        Projected(on_rank, of_act),
        stored(gate_up, gate_up_scale),
        stored(down, down_scale),
        ends,
        ops.sort_weights(weights, row_pair),
        ExpertAdapters(gate_up_a, gate_up_b, down_a, down_b).for_rows(x.dtype, scale),
        (gate_up_a_gradient, gate_up_b_gradient, down_a_gradient, down_b_gradient),
        scale,
    )
    grad_x = ops.combine_rows(grad_rows, pair_row, top_k)
    grad_weights = ops.order_by_pair(grad_weights, pair_row).view(topk_weights.shape)
    return grad_x, grad_weights, *grad_adapters


def _fake_gradients(adapters, buffers):
    return tuple(
        torch.empty_like(factor, memory_format=torch.contiguous_format) if buffer is None else factor.new_empty(0)
        for factor, buffer in zip(adapters, buffers, strict=True)
    )


@_adapted_backward.register_fake
def _(grad, x, topk_weights, gate_up, down, gate_up_scale, down_scale, *rest):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(topk_weights, memory_format=torch.contiguous_format)
    return grad_x, grad_weights, *_fake_gradients(rest[:4], rest[10:14])


def _setup(ctx, inputs, output) -> None:
    x, _, topk_weights, *rest = inputs
    ctx.buffers, ctx.scale, ctx.backend = rest[8:12], rest[12], rest[13]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, topk_weights, *rest[:8], *output[1:])


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 18
    grad_x, grad_weights, *grads = _adapted_backward(grad, *ctx.saved_tensors, *ctx.buffers, ctx.scale, ctx.backend)
    of_adapters = returned(grads, ctx.buffers, ctx.needs_input_grad[7:11])
    return grad_x, None, grad_weights, *(None,) * 4, *of_adapters, *(None,) * 7


_adapted.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("moescale::adapted_expert_mlp", mutates_args=())
def _adapted_mlp(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    ends: torch.Tensor,
    gate_up_a: torch.Tensor,
    gate_up_b: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    gate_up_a_gradient: torch.Tensor | None,
    gate_up_b_gradient: torch.Tensor | None,
    down_a_gradient: torch.Tensor | None,
    down_b_gradient: torch.Tensor | None,
    scale: float,
    backend: str,
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (result, pre-activation or empty, the two projections)."""
    ops = operators_of(backend)
    factors = ExpertAdapters(gate_up_a, gate_up_b, down_a, down_b).for_rows(rows.dtype, scale)
    frozen = (stored(gate_up, gate_up_scale), stored(down, down_scale))
    out, pre, projected = adapted_forward(ops, rows.contiguous(), *frozen, ends, factors, save_pre, zero_tail=True)
    return out, pre, *projected


@_adapted_mlp.register_fake
def _(rows, gate_up, down, gate_up_scale, down_scale, ends, gate_up_a, *rest):
    pre = rows.new_empty((rows.shape[0], gate_up.shape[1])) if rest[-1] else rows.new_empty(0)
    projected = [rows.new_empty((rows.shape[0], gate_up_a.shape[1])) for _ in range(2)]
    return torch.empty_like(rows, memory_format=torch.contiguous_format), pre, *projected


@torch.library.custom_op("moescale::adapted_expert_mlp_backward", mutates_args=())
def _adapted_mlp_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    ends: torch.Tensor,
    gate_up_a: torch.Tensor,
    gate_up_b: torch.Tensor,
    down_a: torch.Tensor,
    down_b: torch.Tensor,
    pre: torch.Tensor,
    on_rank: torch.Tensor,
    of_act: torch.Tensor,
    gate_up_a_gradient: torch.Tensor | None,
    gate_up_b_gradient: torch.Tensor | None,
    down_a_gradient: torch.Tensor | None,
    down_b_gradient: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_rows, _, (gate_up_a_grad, gate_up_b_grad, down_a_grad, down_b_grad) = adapted_backward(
        operators_of(backend),
        grad.contiguous(),
        rows.contiguous(),
        pre,
        Projected(on_rank, of_act),
        stored(gate_up, gate_up_scale),
        stored(down, down_scale),
        ends,
        None,
        ExpertAdapters(gate_up_a, gate_up_b, down_a, down_b).for_rows(rows.dtype, scale),
        (gate_up_a_gradient, gate_up_b_gradient, down_a_gradient, down_b_gradient),
        scale,
        zero_tail=True,
    )
    return grad_rows, gate_up_a_grad, gate_up_b_grad, down_a_grad, down_b_grad


@_adapted_mlp_backward.register_fake
def _(grad, rows, gate_up, down, gate_up_scale, down_scale, ends, *rest):
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return grad_rows, *_fake_gradients(rest[:4], rest[7:11])


def _mlp_setup(ctx, inputs, output) -> None:
    tensors, buffers = inputs[:10], inputs[10:14]
    ctx.buffers, ctx.scale, ctx.backend = buffers, inputs[14], inputs[15]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _mlp_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 17
    grad_rows, *grads = _adapted_mlp_backward(grad, *ctx.saved_tensors, *ctx.buffers, ctx.scale, ctx.backend)
    of_adapters = returned(grads, ctx.buffers, ctx.needs_input_grad[6:10])
    return grad_rows, *(None,) * 5, *of_adapters, *(None,) * 7


_adapted_mlp.register_autograd(_mlp_autograd, setup_context=_mlp_setup)
