"""Triton kernels of :mod:`moescale.kernels.swiglu`, fp32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.rows import as_rows

BLOCK_COLS = 1024


@triton.jit
def _forward_kernel(gate_up_ptr, out_ptr, num_cols, gate_up_stride, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = cols < num_cols
    gate_ptr = gate_up_ptr + row * gate_up_stride + cols
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_cols + cols, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _backward_kernel(grad_ptr, gate_up_ptr, out_ptr, num_cols, grad_stride, gate_up_stride, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = cols < num_cols
    gate_ptr = gate_up_ptr + row * gate_up_stride + cols
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_cols, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate_ptr = out_ptr + row * 2 * num_cols + cols
    tl.store(grad_gate_ptr, grad * up * (sigmoid + silu * (1 - sigmoid)), mask=mask)
    tl.store(grad_gate_ptr + num_cols, grad * silu, mask=mask)


def _grid(num_rows: int, num_cols: int) -> tuple[tuple[int, int], int]:
    cols = min(BLOCK_COLS, triton.next_power_of_2(num_cols))
    return (num_rows, triton.cdiv(num_cols, cols)), cols


def forward(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2F] -> [..., F]."""
    rows = as_rows(gate_up)
    num_cols = rows.shape[1] // 2
    out = torch.empty((*gate_up.shape[:-1], num_cols), dtype=gate_up.dtype, device=gate_up.device)
    grid, cols = _grid(rows.shape[0], num_cols)
    if out.numel():
        _forward_kernel[grid](rows, out, num_cols, rows.stride(0), COLS=cols, num_warps=4)
    return out


def backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """[..., F], [..., 2F] -> [..., 2F]."""
    rows, rows_grad = as_rows(gate_up), as_rows(grad)
    num_cols = rows_grad.shape[1]
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grid, cols = _grid(rows.shape[0], num_cols)
    if out.numel():
        _backward_kernel[grid](
            rows_grad, rows, out, num_cols, rows_grad.stride(0), rows.stride(0), COLS=cols, num_warps=4
        )
    return out
