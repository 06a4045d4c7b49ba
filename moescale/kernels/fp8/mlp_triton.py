"""SwiGLU of a dense MLP and its backward, quantised where they are made; results in bf16 as of the kernels without fp8.

What is quantised is rounded to bf16 first, as if it had been written and read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.fp8.quantize_triton import (
    cut_row,
    empty_rows,
    inverse_power,
    magnitudes,
    scale_of,
    swiglu_row,
    to_e4m3,
)
from moescale.kernels.fp8.scaled import Scaled


@triton.jit
def _gated_forward_kernel(pre, data, scales, F, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """One row."""
    swiglu_row(pre, data, scales, tl.program_id(0).to(tl.int64), F, CHUNK, CHUNKS, True)


@triton.jit
def _gated_backward_kernel(
    grad_act, pre, act, grad_pre, data, scales, F, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """One row of the activation and of the gradient of gate and up, in bf16; of the latter also in e4m3.

    In parts of CHUNK columns that stay in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    grads_gate, grads_up = (), ()
    largest = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        inside = column < F
        of_gate, of_up = row * 2 * F + column, row * 2 * F + F + column
        grad = tl.load(grad_act + row * F + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(pre + of_gate, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre + of_up, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(act + row * F + column, (silu * up).to(tl.bfloat16), mask=inside)
        grad_gate = (grad * up * (sigmoid + silu * (1 - sigmoid))).to(tl.bfloat16)
        grad_up = (grad * silu).to(tl.bfloat16)
        tl.store(grad_pre + of_gate, grad_gate, mask=inside)
        tl.store(grad_pre + of_up, grad_up, mask=inside)
        grad_gate, grad_up = grad_gate.to(tl.float32), grad_up.to(tl.float32)
        largest = tl.maximum(largest, tl.maximum(magnitudes(grad_gate), magnitudes(grad_up)))
        grads_gate = grads_gate + (grad_gate,)  # type: ignore[assignment]
        grads_up = grads_up + (grad_up,)  # type: ignore[assignment]
    scale = scale_of(largest)
    tl.store(scales + row, scale)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(data + row * 2 * F + column, to_e4m3(grads_gate[i] * inverse_power(scale)), mask=column < F)
        tl.store(data + row * 2 * F + F + column, to_e4m3(grads_up[i] * inverse_power(scale)), mask=column < F)


def gated_forward(pre: torch.Tensor) -> Scaled:
    """Return silu(gate) * up [R, F], rounded to bf16, in e4m3, of the contiguous pre-activation [R, 2F]."""
    num_rows, ffn = pre.shape[0], pre.shape[1] // 2
    act = empty_rows(num_rows, ffn, pre.device)
    if num_rows:
        _gated_forward_kernel[(num_rows,)](pre, *act, ffn, **cut_row(ffn))
    return act


def gated_backward(grad_act: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Scaled]:
    """Return the activation [R, F] and the gradient of pre [R, 2F] in bf16, and the latter in e4m3."""
    num_rows, ffn = grad_act.shape
    act, grad_pre = torch.empty_like(grad_act), torch.empty_like(pre)
    scaled = empty_rows(num_rows, 2 * ffn, pre.device)
    if num_rows:
        _gated_backward_kernel[(num_rows,)](grad_act, pre, act, grad_pre, *scaled, ffn, **cut_row(ffn))
    return act, grad_pre, scaled
