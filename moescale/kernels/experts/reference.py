"""The expert MLP from separate PyTorch operators: the back ends ``torch`` and ``grouped_mm``.

The same functions as ``experts.triton``, and the formulas that it fuses. ``torch`` takes the experts one by one (it
reads the row counts on the host); ``grouped_mm`` uses PyTorch's grouped product and does not synchronise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moescale.kernels.swiglu.reference import SwigluClamp, clamped_swiglu, swiglu


class ExpertBiases(NamedTuple):
    """The biases of a layer's experts, or their gradients."""

    gate_up: torch.Tensor
    """[E, 2F], those of the gates first."""
    down: torch.Tensor
    """[E, H]"""


def experts_reference(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    biases: ExpertBiases | None = None,
    clamp: SwigluClamp | None = None,
) -> torch.Tensor:
    """The definition of :func:`experts`, differentiable: every expert on every token, at weight 0 if not chosen."""
    out = torch.zeros_like(x)
    for expert, (gate_up_weight, down_weight) in enumerate(zip(gate_up, down, strict=True)):
        weight = (topk_weights * (topk_ids == expert)).sum(1, keepdim=True).to(x.dtype)
        pre = F.linear(x, gate_up_weight, None if biases is None else biases.gate_up[expert])
        act = swiglu(pre) if clamp is None else clamped_swiglu(pre, clamp)
        out = out + weight * F.linear(act, down_weight, None if biases is None else biases.down[expert])
    return out


def multiply_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    *,
    transposed: bool = False,
    zero_tail: bool = False,
    kernel: str = "",
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """Return rows [R, K] times weight [E, N, K] of their expert (``transposed``: [E, K, N]) as [R, N], plus ``bias``.

    Rows that belong to no expert are left unwritten, or zeroed with ``zero_tail``. ``kernel`` has no meaning here.
    ``low_rank``: further rows [R, r] and their factor [E, N, r] (``transposed``: [E, r, N]), whose GEMM is added.
    ``bias`` [E, N]: that of the expert is added to each of its rows.
    """
    matrices = weight if transposed else weight.transpose(-2, -1)
    if backend == "grouped_mm":
        out = F.grouped_mm(rows, matrices, offs=ends)
    else:
        out = rows.new_empty((rows.shape[0], matrices.shape[-1]))
        for matrix, begin, end in _row_ranges(matrices, ends):
            torch.mm(rows[begin:end], matrix, out=out[begin:end])
    if low_rank is not None:
        out += multiply_rows(*low_rank, ends, transposed=transposed, backend=backend)
    if bias is not None:
        out += bias[_expert_of_rows(ends, out.shape[0])]
    if zero_tail:
        tail = torch.arange(out.shape[0], device=out.device) >= ends[-1]
        out.masked_fill_(tail.unsqueeze(1), 0)
    return out


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    *,
    buffer: torch.Tensor | None = None,
    kernel: str = "",
    backend: str,
) -> torch.Tensor:
    """Return left[rows of e].T @ right[rows of e] for every expert, [E, M, N], or add it to ``buffer`` in place."""
    if backend == "grouped_mm":
        gradient = F.grouped_mm(left.t(), right, offs=ends)
        return gradient if buffer is None else buffer.add_(gradient)
    gradient = left.new_zeros((ends.numel(), left.shape[1], right.shape[1])) if buffer is None else buffer
    for matrix, begin, end in _row_ranges(gradient, ends):
        matrix += left[begin:end].T @ right[begin:end]
    return gradient


def bias_gradient(
    grad: torch.Tensor,
    ends: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    *,
    buffer: torch.Tensor | None = None,
    kernel: str = "",
) -> torch.Tensor:
    """Return the sum of the rows ``grad`` [R, N] of each expert, [E, N], or add it to ``buffer`` in place.

    ``row_weights`` [R] fp32: what each row is multiplied by. Sums run in fp32.
    """
    rows = grad.float() if row_weights is None else grad.float() * row_weights.unsqueeze(1)
    outside = torch.arange(rows.shape[0], device=rows.device) >= ends[-1]
    sums = rows.new_zeros((ends.numel(), rows.shape[1]))
    sums.index_add_(0, _expert_of_rows(ends, rows.shape[0]), rows.masked_fill(outside.unsqueeze(1), 0))
    return sums.to(grad.dtype) if buffer is None else buffer.copy_(buffer.float() + sums)


def add_bias_products(row_values: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor, ends: torch.Tensor) -> None:
    """Add to ``row_values`` [R] fp32 the products of the rows ``grad`` [R, N] and ``bias`` [E, N] of their expert.

    It is what the bias contributes to the gradient of a row's routing weight.
    """
    row_values += (grad.float() * bias.float()[_expert_of_rows(ends, grad.shape[0])]).sum(1)


def _expert_of_rows(ends: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[R] int64: the expert of each sorted row; of rows that belong to none, the last."""
    rows = torch.arange(num_rows, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, rows, right=True).clamp(max=ends.numel() - 1)


def _row_ranges(matrices: torch.Tensor, ends: torch.Tensor):
    begin = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        yield matrix, begin, end
        begin = end


def group_rows(ends: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return what the products need to know of the rows: here the experts' cumulative counts themselves."""
    return ends


def gather_rows(x: torch.Tensor, row_pair: torch.Tensor, pair_row: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return x [T, H] as sorted rows [R, H]."""
    return x[row_pair // top_k]


def combine_rows(
    rows: torch.Tensor, pair_row: torch.Tensor, top_k: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the (weighted) sum of each token's rows, [T, H], in fp32 before the result is rounded."""
    pairs = rows[pair_row.clamp(min=0)].float().masked_fill((pair_row < 0).unsqueeze(1), 0)
    pairs = pairs.view(-1, top_k, rows.shape[1])
    return (pairs if weights is None else pairs * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def combine_rows_backward(
    grad_out: torch.Tensor, rows: torch.Tensor, row_pair: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the combined rows [R, H], and [R] fp32 of the weight that each was multiplied by."""
    grad = grad_out[row_pair // weights.shape[1]].float()
    return (grad * weights.reshape(-1, 1)[row_pair]).to(rows.dtype), (grad * rows).sum(1)


def sort_weights(weights: torch.Tensor, row_pair: torch.Tensor) -> torch.Tensor:
    """Return the routing weight [R] of every sorted row."""
    return weights.reshape(-1)[row_pair]


def multiply_up(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    ends: torch.Tensor,
    *,
    write_pre: bool,
    write_act: bool,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    clamp: SwigluClamp | None = None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pre-activation [R, 2F] and the activation [R, F]; one that is not written is empty."""
    pre = multiply_rows(rows, gate_up, ends, low_rank=low_rank, bias=bias, backend=backend)
    act = rows.new_empty(0)
    if write_act:
        act = swiglu(pre) if clamp is None else clamped_swiglu(pre, clamp)
    return pre if write_pre else rows.new_empty(0), act


def multiply_down_dgrad(
    grad_out: torch.Tensor,
    down: torch.Tensor,
    pre: torch.Tensor,
    ends: torch.Tensor,
    row_weights: torch.Tensor | None,
    *,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    clamp: SwigluClamp | None = None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (grad_pre [R, 2F], weighted activation [R, F], gradient [R] of the row weights)."""
    grad = multiply_rows(grad_out, down, ends, transposed=True, low_rank=low_rank, backend=backend).float()
    gate, up = pre.float().chunk(2, dim=-1)
    if clamp is None:
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        act = silu * up
        slope, gated = sigmoid + silu * (1 - sigmoid), silu
    else:
        slope_is_zero, gated_is_zero = gate > clamp.limit, up.abs() > clamp.limit
        gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit) + 1
        sigmoid = (clamp.alpha * gate).sigmoid()
        silu = gate * sigmoid
        act = silu * up
        slope = (sigmoid + clamp.alpha * silu * (1 - sigmoid)).masked_fill(slope_is_zero, 0)
        gated = silu.masked_fill(gated_is_zero, 0)
    grad_weights = (grad * act).sum(1)
    if row_weights is not None:
        grad, act = grad * row_weights.unsqueeze(1), act * row_weights.unsqueeze(1)
    grad_pre = torch.cat((grad * up * slope, grad * gated), dim=-1)
    return grad_pre.to(pre.dtype), act.to(pre.dtype), grad_weights


def order_by_pair(row_values: torch.Tensor, pair_row: torch.Tensor) -> torch.Tensor:
    """Return for every pair the value [R] of its sorted row; 0 for a pair without a row."""
    return row_values[pair_row.clamp(min=0)].masked_fill(pair_row < 0, 0)
