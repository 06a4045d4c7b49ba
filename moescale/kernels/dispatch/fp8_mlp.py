"""As :mod:`moescale.kernels.dispatch.mlp`, with all products in e4m3: rows arrive quantised, with a scale each."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from moescale.kernels.dispatch.triton import RowOrder
from moescale.kernels.fp8.rows import of_columns, of_rows, weight_gradients
from moescale.kernels.fp8.scaled import Copies, Scaled


def forward_rows(
    ops: ModuleType,
    rows: Scaled,
    gate_up: Copies,
    down: Copies,
    order: RowOrder,
    *,
    kept: int,
    expected_rows: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write the results of ``rows`` [C, H] to ``out`` [C, H]; return the pre-activation [kept, 2F] of the first."""
    max_rows, ffn = rows.data.shape[0], down.rows.shape[2]
    act = ops.empty_rows(max_rows, ffn, out.device)
    pre = out.new_empty((kept, 2 * ffn))
    for part, ends, keeps in _parts(order, kept, max_rows):
        groups = ops.group_rows(ends, part.stop - part.start, expected_rows=expected_rows)
        target = pre if keeps else None
        part_pre = ops.multiply_rows(_slice(rows, part), of_rows(gate_up), groups, 2 * ffn, out=target)
        ops.swiglu(part_pre, groups, out=_slice(act, part))
        del part_pre
    groups = ops.group_rows(order.ends, max_rows, expected_rows=expected_rows)
    ops.multiply_rows(act, of_rows(down), groups, out.shape[1], out=out)
    return pre


def backward_rows(
    ops: ModuleType,
    rows: Scaled,
    grad_rows: Scaled,
    pre: torch.Tensor,
    gate_up: Copies,
    down: Copies,
    order: RowOrder,
    *,
    expected_rows: int,
    out: torch.Tensor,
    values: torch.Tensor,
    buffers: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradients of the rows to ``out`` [C, H] and of their routing weights to ``values`` [C] fp32.

    ``grad_rows`` [C, H] are those of the rows' results before they are weighted. Returns the gradients of gate and up
    and of down, or ``buffers``, to which they are added.
    """
    (max_rows, hidden), ffn, kept = rows.data.shape, down.rows.shape[2], pre.shape[0]
    groups = ops.group_rows(order.ends, max_rows, expected_rows=expected_rows)
    grad_act = ops.multiply_rows(grad_rows, of_columns(down), groups, ffn, transposed=True)
    grad_pre, act = (ops.empty_rows(max_rows, width, out.device) for width in (2 * ffn, ffn))
    for part, ends, keeps in _parts(order, kept, max_rows):
        part_groups = ops.group_rows(ends, part.stop - part.start, expected_rows=expected_rows)
        part_pre = pre
        if not keeps:
            part_pre = ops.multiply_rows(_slice(rows, part), of_rows(gate_up), part_groups, 2 * ffn)
        target = _slice(grad_pre, part), _slice(act, part), values[part]
        weights = order.row_weights[part]
        ops.swiglu_backward(grad_act[part], part_pre, weights, part_groups, out=target)
        del part_pre
    del grad_act
    padded = ops.pad_ends(order.ends)
    found = weight_gradients(ops, groups, padded, grad_rows, act, grad_pre, rows, buffers)
    ops.multiply_rows(grad_pre, of_columns(gate_up), groups, hidden, transposed=True, out=out)
    return found


def _parts(order: RowOrder, kept: int, max_rows: int) -> Iterator[tuple[slice, torch.Tensor, bool]]:
    """The further rows and those whose pre-activation is kept, if there are any, with the ends of their experts."""
    for part, ends, keeps in (
        (slice(kept, max_rows), order.further_ends, False),
        (slice(0, kept), order.kept_ends, True),
    ):
        if part.start < part.stop:
            yield part, ends, keeps


def _slice(rows: Scaled, part: slice) -> Scaled:
    return Scaled(rows.data[part], rows.scales[part])
