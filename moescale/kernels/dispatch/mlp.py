"""The expert MLP on rows that arrived from peers: [C, H] buffers for any routing, of which the device knows the ends.

The first ``kept`` rows keep their pre-activation for the backward, the others compute it again there: what a layer
keeps has a fixed size, as a recorded graph needs, and no routing is refused or cut. Ordinarily there are no others, and
their GEMM is a launch over no tiles.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from moescale.kernels.dispatch.triton import RowOrder


def forward_rows(
    ops: SimpleNamespace,
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: RowOrder,
    *,
    kept: int,
    expected_rows: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write the results of ``rows`` [C, H] to ``out`` [C, H]; return the pre-activation [kept, 2F] of the first."""
    max_rows, ffn = rows.shape[0], down.shape[2]
    act = rows.new_empty((max_rows, ffn))
    pre = rows.new_empty((kept, 2 * ffn))
    if kept:
        groups = ops.group_rows(order.kept_ends, kept, expected_rows=expected_rows)
        ops.multiply_up(rows[:kept], gate_up, groups, write_pre=True, write_act=True, pre=pre, act=act[:kept])
    if kept < max_rows:
        groups = ops.group_rows(order.further_ends, max_rows - kept, expected_rows=expected_rows)
        ops.multiply_up(rows[kept:], gate_up, groups, write_pre=False, write_act=True, act=act[kept:])
    groups = ops.group_rows(order.ends, max_rows, expected_rows=expected_rows)
    ops.multiply_rows(act, down, groups, out=out)
    return pre


def backward_rows(
    ops: SimpleNamespace,
    rows: torch.Tensor,
    grad_rows: torch.Tensor,
    pre: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: RowOrder,
    *,
    expected_rows: int,
    out: torch.Tensor,
    values: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write the gradients of the rows to ``out`` [C, H] and of their routing weights to ``values`` [C] fp32.

    ``grad_rows`` [C, H] are those of the rows' results before they are weighted. Returns the gradients (gate_up, down),
    each None where it was added to a buffer.
    """
    max_rows, ffn, kept = rows.shape[0], down.shape[2], pre.shape[0]
    grad_pre, act = rows.new_empty((max_rows, 2 * ffn)), rows.new_empty((max_rows, ffn))
    parts = [(slice(0, kept), order.kept_ends, pre), (slice(kept, max_rows), order.further_ends, None)]
    for part, ends, part_pre in parts:
        num_rows = part.stop - part.start
        if num_rows == 0:
            continue
        groups = ops.group_rows(ends, num_rows, expected_rows=expected_rows)
        if part_pre is None:
            part_pre, _ = ops.multiply_up(rows[part], gate_up, groups, write_pre=True, write_act=False)
        ops.multiply_down_dgrad(
            grad_rows[part],
            down,
            part_pre,
            groups,
            order.row_weights[part],
            out=(grad_pre[part], act[part], values[part]),
        )
        del part_pre
    groups = ops.group_rows(order.ends, max_rows, expected_rows=expected_rows)
    grad_down = ops.weight_gradient(grad_rows, act, groups, buffer=down_gradient, kernel="down_wgrad")
    del act
    grad_gate_up = ops.weight_gradient(grad_pre, rows, groups, buffer=gate_up_gradient, kernel="up_wgrad")
    ops.multiply_rows(grad_pre, gate_up, groups, transposed=True, kernel="up_dgrad", out=out)
    return (grad_gate_up if gate_up_gradient is None else None, grad_down if down_gradient is None else None)
