"""The MLP of routed experts in e4m3 on rows that are sorted by expert, as behind an all-to-all; its parts and checks.

:mod:`moescale.kernels.fp8.routed` has the same between tokens of one rank, :mod:`moescale.kernels.dispatch.fp8_mlp`
between peers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moescale.formats import FP8_GEMM_MULTIPLE
from moescale.kernels.backends import (
    KernelInputError,
    check_device,
    check_dtype,
    check_shape,
)
from moescale.kernels.experts.operators import check_gradient_buffers, returned
from moescale.kernels.fp8 import kernels_for
from moescale.kernels.fp8.errors import note
from moescale.kernels.fp8.reference import exact_swiglu
from moescale.kernels.fp8.scaled import Copies, Scaled


def fp8_expert_mlp(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ends: torch.Tensor,
    *,
    gate_up_copies: Copies,
    down_copies: Copies,
    gate_up_gradient: torch.Tensor | None = None,
    down_gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`moescale.kernels.experts.expert_mlp`, with what its products read rounded to e4m3.

    Shapes: rows [R, H] bf16; ends [E] int32; the others as of :func:`moescale.kernels.fp8.routed.fp8_experts`. Results
    and gradients of rows from ``ends[-1]`` on are undefined. Saved are the rows in e4m3 and the pre-activation in bf16.
    Raises KernelInputError for shapes, dtypes and devices that do not fit.
    """
    check_shape("fp8_expert_mlp", "rows", rows, (None, None), "[R, H]")
    check_weights("fp8_expert_mlp", rows, gate_up, down, gate_up_copies, down_copies)
    check_shape("fp8_expert_mlp", "ends", ends, (gate_up.shape[0],), "[E]")
    check_dtype("fp8_expert_mlp", "ends", ends, (torch.int32,))
    check_device("fp8_expert_mlp", "ends", ends, rows.device)
    check_gradient_buffers("fp8_expert_mlp", gate_up, down, gate_up_gradient, down_gradient)
    return _ExpertMlp.apply(rows, gate_up, down, ends, gate_up_copies, down_copies, (gate_up_gradient, down_gradient))


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        ends: torch.Tensor,
        gate_up_copies: Copies,
        down_copies: Copies,
        buffers: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> torch.Tensor:
        ops = kernels_for(x)
        rows, groups = ops.quantize_rows(x.contiguous()), ops.group_rows(ends, x.shape[0])
        pre, out = up_and_down(ops, rows, of_rows(gate_up_copies), of_rows(down_copies), groups, ends)
        ctx.save_for_backward(*rows, pre, ends, *of_columns(gate_up_copies), *of_columns(down_copies))
        ctx.buffers = buffers
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        data, scales, pre, ends, *columns = ctx.saved_tensors
        of_gate_up, of_down = Scaled(*columns[:2]), Scaled(*columns[2:])
        hidden, ffn = data.shape[1], pre.shape[1] // 2
        ops = kernels_for(grad)
        groups, padded = ops.group_rows(ends, data.shape[0]), ops.pad_ends(ends)
        grad_rows = ops.quantize_rows(grad.contiguous())
        grad_act = ops.multiply_rows(grad_rows, of_down, groups, ffn, transposed=True)
        ones = torch.ones(data.shape[0], dtype=torch.float32, device=data.device)
        grad_pre, act, _ = ops.swiglu_backward(grad_act, pre, ones, groups)
        del grad_act
        found = weight_gradients(ops, groups, padded, grad_rows, act, grad_pre, Scaled(data, scales), ctx.buffers)
        grad_x = ops.multiply_rows(grad_pre, of_gate_up, groups, hidden, transposed=True)
        need = ctx.needs_input_grad[1:3]
        return grad_x, *returned(found, ctx.buffers, need), None, None, None, None


def of_rows(copies: Copies) -> Scaled:
    """What the forward reads of a weight."""
    return Scaled(copies.rows, copies.scales)


def of_columns(copies: Copies) -> Scaled:
    """What the gradient of the input reads of it."""
    return Scaled(copies.columns, copies.scales)


def up_and_down(
    ops: ModuleType, rows: Scaled, gate_up: Scaled, down: Scaled, groups: Any, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pre-activation [R, 2F] and the result [R, H] of rows [R, H]. Weights: as :func:`of_rows`."""
    pre = ops.multiply_rows(rows, gate_up, groups, gate_up.data.shape[1])
    act = ops.swiglu(pre, groups)
    note("experts activation", lambda: exact_swiglu(pre), act, ends)
    return pre, ops.multiply_rows(act, down, groups, down.data.shape[1])


def weight_gradients(
    ops: ModuleType,
    groups: Any,
    padded: torch.Tensor,
    grads: Scaled,
    act: Scaled,
    grad_pre: Scaled,
    inputs: Scaled,
    buffers: tuple[torch.Tensor | None, torch.Tensor | None],
    **of_tokens: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up, and of down, of what each expert's rows contract; or add to ``buffers``.

    ``grads`` [R, H] are those of the results; ``inputs`` [R, H]. With ``of_tokens`` of ``transpose_rows`` both are
    tokens' instead.
    """
    of_gate_up, of_down = (None if buffer is None else buffer.data for buffer in buffers)
    left = ops.transpose_rows(grads, groups, padded, **of_tokens)
    right = ops.transpose_rows(act, groups, padded)
    grad_down = ops.weight_gradient(left, right, padded, buffer=of_down)
    left = ops.transpose_rows(grad_pre, groups, padded)
    right = ops.transpose_rows(inputs, groups, padded, **of_tokens)
    return ops.weight_gradient(left, right, padded, buffer=of_gate_up), grad_down


def check_weights(
    operator: str,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_copies: Copies,
    down_copies: Copies,
) -> None:
    """Raise KernelInputError unless x [.., H], the weights and their copies fit each other."""
    check_shape(operator, "down", down, (None, x.shape[1], None), "[E, H, F]")
    num_experts, hidden, ffn = down.shape
    check_shape(operator, "gate_up", gate_up, (num_experts, 2 * ffn, hidden), "[E, 2F, H]")
    for name, weight, copies in (("gate_up", gate_up, gate_up_copies), ("down", down, down_copies)):
        check_dtype(operator, name, weight, (torch.bfloat16,))
        check_device(operator, name, weight, x.device)
        check_device(operator, f"{name}_copies", copies.rows, x.device)
        check_shape(operator, f"{name}_copies", copies.rows, tuple(weight.shape), f"those of {name}")
    check_dtype(operator, "x", x, (torch.bfloat16,))
    if hidden % FP8_GEMM_MULTIPLE or ffn % FP8_GEMM_MULTIPLE:
        raise KernelInputError(
            f"{operator}: hidden size ({hidden}) and expert intermediate size ({ffn}) must be multiples of "
            f"{FP8_GEMM_MULTIPLE}; use experts without fp8"
        )
