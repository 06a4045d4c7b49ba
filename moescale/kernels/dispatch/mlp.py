"""The expert MLP on rows that arrived from peers: [C, H] buffers for any routing, of which the device knows the ends.

The first ``kept`` rows keep their pre-activation for the backward, the others compute it again there: what a layer
keeps has a fixed size, as a recorded graph needs, and no routing is refused or cut. Ordinarily there are no others, and
their GEMM is a launch over no tiles. Weights in fp8 are made plain once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moescale.kernels.block_fp8 import Weight, plain
from moescale.kernels.dispatch.triton import RowOrder
from moescale.kernels.experts import ExpertBiases, SwigluClamp, clamp_option, up_options
from moescale.kernels.experts.adapted import ExpertAdapters, Projected, adapter_gradients


def forward_rows(
    ops: SimpleNamespace,
    rows: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    order: RowOrder,
    *,
    kept: int,
    expected_rows: int,
    out: torch.Tensor,
    factors: ExpertAdapters | None = None,
    biases: ExpertBiases | None = None,
    clamp: SwigluClamp | None = None,
) -> tuple[torch.Tensor, Projected | None]:
    """Write the results of ``rows`` [C, H] to ``out`` [C, H]; return the pre-activation [kept, 2F] of the first.

    With ``factors`` of low-rank additions (:mod:`moescale.kernels.experts.adapted`) also what their backward needs.
    """
    max_rows, ffn = rows.shape[0], down.shape[2]
    groups = ops.group_rows(order.ends, max_rows, expected_rows=expected_rows)
    on_rank = None if factors is None else ops.multiply_rows(rows, factors.gate_up_a, groups, kernel="project")
    act = rows.new_empty((max_rows, ffn))
    pre = rows.new_empty((kept, 2 * ffn))
    plain_gate_up = plain(gate_up, rows.dtype)
    for part, ends, keeps in (
        (slice(0, kept), order.kept_ends, True),
        (slice(kept, max_rows), order.further_ends, False),
    ):
        if part.start == part.stop:
            continue
        part_groups = ops.group_rows(ends, part.stop - part.start, expected_rows=expected_rows)
        options = dict(write_pre=keeps, write_act=True, act=act[part]) | _addition(on_rank, part, factors)
        options |= up_options(biases and biases.gate_up, clamp)
        ops.multiply_up(rows[part], plain_gate_up, part_groups, **(options | {"pre": pre} if keeps else options))
    del plain_gate_up
    if factors is None or on_rank is None:
        bias = {} if biases is None else {"bias": biases.down}
        ops.multiply_rows(act, plain(down, rows.dtype), groups, out=out, **bias)
        return pre, None
    of_act = ops.multiply_rows(act, factors.down_a, groups, kernel="project")
    ops.multiply_rows(act, plain(down, rows.dtype), groups, out=out, low_rank=(of_act, factors.down_b))
    return pre, Projected(on_rank, of_act)


def _addition(on_rank: torch.Tensor | None, part: slice, factors: ExpertAdapters | None) -> dict:
    if on_rank is None or factors is None:
        return {}
    return {"low_rank": (on_rank[part], factors.gate_up_b)}


def backward_rows(
    ops: SimpleNamespace,
    rows: torch.Tensor,
    grad_rows: torch.Tensor,
    pre: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    order: RowOrder,
    *,
    expected_rows: int,
    out: torch.Tensor,
    values: torch.Tensor,
    gate_up_gradient: torch.Tensor | None,
    down_gradient: torch.Tensor | None,
    biases: ExpertBiases | None = None,
    bias_gradients: ExpertBiases | None = None,
    clamp: SwigluClamp | None = None,
    is_frozen: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Write the gradients of the rows to ``out`` [C, H] and of their routing weights to ``values`` [C] fp32.

    ``grad_rows`` [C, H] are those of the rows' results before they are weighted. Returns the gradients (gate_up, down,
    their biases), each None where the parameter is frozen or not there, or it was added to a buffer.
    """
    grad_pre, act, groups, _ = _backward_of_down(
        ops, rows, grad_rows, pre, gate_up, down, order, expected_rows, values, None, None, biases, clamp
    )
    grad_biases: list[torch.Tensor | None] = [None, None]
    if biases is not None:
        ops.add_bias_products(values, grad_rows, biases.down, groups)
    if biases is not None and not is_frozen:
        buffers = bias_gradients or (None, None)
        of_gate_up = ops.bias_gradient(grad_pre, groups, buffer=buffers[0], kernel="up")
        of_down = ops.bias_gradient(grad_rows, groups, order.row_weights, buffer=buffers[1], kernel="down")
        grad_biases = [None, None] if bias_gradients else [of_gate_up, of_down]
    grad_down = grad_gate_up = None
    if not is_frozen:
        grad_down = ops.weight_gradient(grad_rows, act, groups, buffer=down_gradient, kernel="down_wgrad")
    del act
    if not is_frozen:
        grad_gate_up = ops.weight_gradient(grad_pre, rows, groups, buffer=gate_up_gradient, kernel="up_wgrad")
    ops.multiply_rows(grad_pre, plain(gate_up, rows.dtype), groups, transposed=True, kernel="up_dgrad", out=out)
    return (
        grad_gate_up if gate_up_gradient is None else None,
        grad_down if down_gradient is None else None,
        *grad_biases,
    )


def backward_adapted_rows(
    ops: SimpleNamespace,
    rows: torch.Tensor,
    grad_rows: torch.Tensor,
    pre: torch.Tensor,
    projected: Projected,
    gate_up: Weight,
    down: Weight,
    order: RowOrder,
    *,
    expected_rows: int,
    out: torch.Tensor,
    values: torch.Tensor,
    factors: ExpertAdapters,
    buffers: Sequence[torch.Tensor | None],
    scale: float,
) -> list[torch.Tensor]:
    """As :func:`backward_rows` of frozen weights; returns the four gradients of their adapters, empty with a buffer."""
    grad_pre, act, groups, on_rank = _backward_of_down(
        ops, rows, grad_rows, pre, gate_up, down, order, expected_rows, values, factors, projected
    )
    assert on_rank is not None
    weighted = Projected(
        projected.rows * scale, (projected.activation * scale * order.row_weights.unsqueeze(1)).to(act.dtype)
    )
    of_down = adapter_gradients(
        ops, groups, gate_up.shape[0], grad_rows, weighted.activation, on_rank, act, buffers[2:]
    )
    del act
    on_rank = ops.multiply_rows(grad_pre, factors.gate_up_b, groups, transposed=True, kernel="project")
    of_up = adapter_gradients(ops, groups, gate_up.shape[0], grad_pre, weighted.rows, on_rank, rows, buffers[:2])
    options = dict(transposed=True, kernel="up_dgrad", out=out, low_rank=(on_rank, factors.gate_up_a))
    ops.multiply_rows(grad_pre, plain(gate_up, rows.dtype), groups, **options)
    return [*of_up, *of_down]


def _backward_of_down(
    ops, rows, grad_rows, pre, gate_up, down, order, expected_rows, values, factors, projected, biases=None, clamp=None
) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor | None]:
    """Return (grad_pre [C, 2F], weighted activation [C, F], groups, the results' gradients on the rank, or None)."""
    max_rows, ffn, kept = rows.shape[0], down.shape[2], pre.shape[0]
    groups = ops.group_rows(order.ends, max_rows, expected_rows=expected_rows)
    on_rank = None
    if factors is not None:
        on_rank = ops.multiply_rows(grad_rows, factors.down_b, groups, transposed=True, kernel="project")
    grad_pre, act = rows.new_empty((max_rows, 2 * ffn)), rows.new_empty((max_rows, ffn))
    first, further = slice(0, kept), slice(kept, max_rows)
    further_pre = None
    if kept < max_rows:
        further_groups = ops.group_rows(order.further_ends, max_rows - kept, expected_rows=expected_rows)
        options = dict(write_pre=True, write_act=False) | up_options(biases and biases.gate_up, clamp)
        options |= _addition(None if projected is None else projected.rows, further, factors)
        further_pre, _ = ops.multiply_up(rows[further], plain(gate_up, rows.dtype), further_groups, **options)
    plain_down = plain(down, rows.dtype)
    for part, ends, part_pre in ((further, order.further_ends, further_pre), (first, order.kept_ends, pre)):
        num_rows = part.stop - part.start
        if num_rows == 0:
            continue
        part_groups = ops.group_rows(ends, num_rows, expected_rows=expected_rows)
        addition = {} if on_rank is None else {"low_rank": (on_rank[part], factors.down_a)}
        ops.multiply_down_dgrad(
            grad_rows[part],
            plain_down,
            part_pre,
            part_groups,
            order.row_weights[part],
            out=(grad_pre[part], act[part], values[part]),
            **addition,
            **clamp_option(clamp),
        )
        del part_pre
        further_pre = None
    return grad_pre, act, groups, on_rank
