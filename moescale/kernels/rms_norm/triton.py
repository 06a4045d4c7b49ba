"""Triton kernels of :mod:`moescale.kernels.rms_norm`: one read and one write of every row, fp32 inside."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moescale.kernels.rows import as_rows, num_programs

# Elements one program holds: 4 warps with 16 elements a thread, two 16-byte loads of bf16.
TILE_ELEMENTS = 2048


@triton.jit
def normed_rows(
    x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr, rows, cols,
    num_rows, num_cols, x_stride, residual_stride, eps, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store a tile of the norm, of the sum and of the reciprocal deviations; return that of the norm as it is stored.

    ``rows`` [ROWS, 1], ``cols`` [1, COLS].
    """
    mask = (rows < num_rows) & (cols < num_cols)
    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0)
    dtype = x.dtype
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0)
        # The residual stream is kept in the input's dtype: the norm must see the rounded sum.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(summed_ptr + rows * num_cols + cols, x, mask=mask)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / num_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    normalized = (wide * rstd).to(dtype).to(tl.float32)
    out = (normalized * weight).to(dtype)
    tl.store(out_ptr + rows * num_cols + cols, out, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    return out


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr,
    num_rows, num_cols, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    normed_rows(
        x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr, rows, tl.arange(0, COLS)[None, :],
        num_rows, num_cols, x_stride, residual_stride, eps, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    grad_out_ptr, grad_summed_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    num_rows, num_cols, grad_out_stride, grad_summed_stride, x_stride,
    HAS_GRAD_SUMMED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the rows and sums the weight's gradient over them, in a fixed order."""
    cols = tl.arange(0, COLS)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (rows < num_rows) & (cols < num_cols)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0)
        grad_out = tl.load(grad_out_ptr + rows * grad_out_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normalized = x.to(tl.float32) * rstd
        grad_weight += grad_out * normalized.to(x.dtype).to(tl.float32)
        grad_normalized = grad_out * weight
        projection = tl.sum(grad_normalized * normalized, axis=1, keep_dims=True) / num_cols
        grad_x = (grad_normalized - normalized * projection) * rstd
        if HAS_GRAD_SUMMED:
            grad_x += tl.load(grad_summed_ptr + rows * grad_summed_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + rows * num_cols + cols, grad_x, mask=mask)
    total = tl.sum(grad_weight, axis=0, keep_dims=True)
    tl.store(partial_ptr + tl.program_id(0) * num_cols + cols, total, mask=cols < num_cols)


def _tile(num_cols: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    cols = triton.next_power_of_2(num_cols)
    rows = max(1, TILE_ELEMENTS // cols)
    return rows, cols, min(max(rows * cols // 512, 1), 16)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    kernel: Any = _forward_kernel,
    more: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the norm, the sum (empty without ``residual``) and the reciprocal deviation of every row, fp32.

    ``kernel``: another one of these arguments, which also writes ``more``.
    """
    rows_x = as_rows(x)
    num_rows, num_cols = rows_x.shape
    rows_residual = rows_x if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rows, cols, num_warps = _tile(num_cols)
    if num_rows:
        kernel[(triton.cdiv(num_rows, rows),)](
            rows_x, rows_residual, weight, out, summed, rstd, *more,
            num_rows, num_cols, rows_x.stride(0), rows_residual.stride(0), eps,
            HAS_RESIDUAL=residual is not None, ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip
    return out, summed, rstd


def backward(
    grad_out: torch.Tensor,
    grad_summed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the norm's input (``grad_summed`` added) and of the weight."""
    rows_x, rows_grad = as_rows(x), as_rows(grad_out)
    rows_summed = rows_grad if grad_summed is None else as_rows(grad_summed)
    num_rows, num_cols = rows_x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, cols, num_warps = _tile(num_cols)
    programs = min(triton.cdiv(num_rows, rows), num_programs(x.device, per_multiprocessor=4))
    partial = torch.empty(programs, num_cols, dtype=torch.float32, device=x.device)
    if num_rows:
        _backward_kernel[(programs,)](
            rows_grad, rows_summed, rows_x, weight, rstd, grad_x, partial,
            num_rows, num_cols, rows_grad.stride(0), rows_summed.stride(0), rows_x.stride(0),
            HAS_GRAD_SUMMED=grad_summed is not None, ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)
