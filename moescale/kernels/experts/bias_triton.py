"""Triton kernels for the gradients that the biases of experts take part in; the biases are added in the GEMMs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.experts.row_tiles_triton import RowGroups


@triton.jit
def _bias_gradient_kernel(
    grad,
    row_weights,
    out,
    ends,
    N,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BY_PAIRS: tl.constexpr,
):
    """out[e, n] (+)= sum over the rows r of expert e of w[r] * grad[r, n]; one program for BLOCK columns of an expert.

    So the order of the sum depends on the number of rows alone, and equal inputs give equal bits. BY_PAIRS: the columns
    of grad alternate between the first and the second half of those of out.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in tl.range(first, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        offset = row.to(tl.int64)[:, None] * N + column[None, :]
        part = tl.load(grad + offset, mask=(row < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            part *= tl.load(row_weights + row, mask=row < end, other=0.0)[:, None]
        total += part
    sums = tl.sum(total, 0)
    if BY_PAIRS:
        column = column % 2 * (N // 2) + column // 2
    target = out + expert.to(tl.int64) * N + column
    if ACCUMULATE:
        sums += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bias_products_kernel(row_values, grad, bias, ends, num_experts, N, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """row_values[r] += sum_n grad[r, n] * bias[e, n], one row a program; rows of no expert are left as they are."""
    row = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    end = tl.load(ends + experts, mask=experts < num_experts, other=0x7FFFFFFF)
    expert = tl.sum((end <= row).to(tl.int32), 0)
    if expert >= num_experts:
        return
    products = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(0, N, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < N
        value = tl.load(grad + row.to(tl.int64) * N + column, mask=inside, other=0.0).to(tl.float32)
        products += value * tl.load(bias + expert * N + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(row_values + row, tl.load(row_values + row) + tl.sum(products, 0))


def bias_gradient(
    grad: torch.Tensor,
    groups: RowGroups,
    row_weights: torch.Tensor | None = None,
    *,
    buffer: torch.Tensor | None = None,
    kernel: str = "down",
    by_pairs: bool = False,
) -> torch.Tensor:
    """Return the sum of the rows ``grad`` [R, N] of each expert, [E, N], or add it to ``buffer`` in place.

    ``row_weights`` [R] fp32: what each row is multiplied by. Sums run in fp32. ``kernel``: the GEMM of the bias, ``up``
    or ``down``. ``by_pairs``: the columns of a gradient of ``up`` alternate between gate and up; those of the result
    have the gates first.
    """
    num_columns = grad.shape[1]
    out = grad.new_empty((groups.num_experts, num_columns)) if buffer is None else buffer
    block = min(128, triton.next_power_of_2(num_columns))
    _bias_gradient_kernel[(groups.num_experts, triton.cdiv(num_columns, block))](
        grad,
        row_weights,
        out,
        groups.ends,
        num_columns,
        ROWS=32,
        BLOCK=block,
        HAS_WEIGHTS=row_weights is not None,
        ACCUMULATE=buffer is not None,
        BY_PAIRS=by_pairs and kernel == "up",
    )
    return out


def add_bias_products(row_values: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor, groups: RowGroups) -> None:
    """Add to ``row_values`` [R] fp32 the products of the rows ``grad`` [R, N] and ``bias`` [E, N] of their expert.

    It is what the bias contributes to the gradient of a row's routing weight.
    """
    num_rows, num_columns = grad.shape
    if num_rows:
        _bias_products_kernel[(num_rows,)](
            row_values,
            grad,
            bias,
            groups.ends,
            groups.num_experts,
            num_columns,
            EXPERTS=triton.next_power_of_2(groups.num_experts),
            BLOCK=min(1024, triton.next_power_of_2(num_columns)),
        )
