"""The norm of :mod:`moescale.kernels.rms_norm` that quantises its result, and tokens in e4m3 to the rows of experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.fp8.quantize_triton import empty_rows, inverse_power, magnitudes, scale_of, to_e4m3
from moescale.kernels.fp8.scaled import Scaled
from moescale.kernels.rms_norm import triton as rms_norm
from moescale.kernels.rms_norm.triton import normed_rows


@triton.jit
def _quantizing_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr, data_ptr, scales_ptr,
    num_rows, num_cols, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    out = normed_rows(
        x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr, rows, cols,
        num_rows, num_cols, x_stride, residual_stride, eps, HAS_RESIDUAL,
    ).to(tl.float32)  # fmt: skip
    scale = scale_of(magnitudes(out), 1)[:, None]
    # Eight elements a thread, as of bf16: with sixteen the mean square would be summed in another order.
    target = tl.max_contiguous(data_ptr + rows * num_cols + cols, [1, 8])
    mask = (rows < num_rows) & (cols < num_cols)
    tl.store(target, to_e4m3(out * inverse_power(scale)), mask=mask)
    tl.store(scales_ptr + rows, scale, mask=rows < num_rows)


@triton.jit
def _scaled_gather_kernel(
    data_ptr, scales_ptr, pair_row, rows_ptr, row_scales_ptr, num_words, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """rows[row of (t, k)] = data[t] for every k, in words of two codes."""
    token = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    inside = word < num_words
    codes = tl.load(data_ptr + token * num_words + word, mask=inside)
    scale = tl.load(scales_ptr + token)
    for k in tl.static_range(TOP_K):
        row = tl.load(pair_row + token * TOP_K + k).to(tl.int64)
        tl.store(rows_ptr + row * num_words + word, codes, mask=inside & (row >= 0))
        tl.store(row_scales_ptr + row, scale, mask=row >= 0)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Scaled]:
    """As :func:`moescale.kernels.rms_norm.triton.forward`, and the norm's rows [R, H] in e4m3."""
    scaled = empty_rows(x.shape[:-1].numel(), x.shape[-1], x.device)
    found = rms_norm.forward(x, residual, weight, eps, kernel=_quantizing_forward_kernel, more=scaled)
    return *found, scaled


def gather_scaled(tokens: Scaled, pair_row: torch.Tensor, top_k: int) -> Scaled:
    """Return tokens [T, H] sorted by expert, [R, H]."""
    num_tokens, hidden = tokens.data.shape
    rows = empty_rows(pair_row.numel(), hidden, tokens.data.device)
    if num_tokens:
        words = hidden // 2
        _scaled_gather_kernel[(num_tokens,)](
            tokens.data.view(torch.int16), tokens.scales, pair_row, rows.data.view(torch.int16), rows.scales, words,
            TOP_K=top_k, BLOCK=triton.next_power_of_2(words),
        )  # fmt: skip
    return rows
