"""Triton kernel of :mod:`moescale.kernels.block_fp8`: one program a block, each byte read once, each result written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.formats import FP8_BLOCK


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, out_ptr,
    num_rows, num_cols, row_blocks, col_blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes come as bytes, which GPUs without fp8 read as well; ROWS of a block's rows at a time."""
    block = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales_ptr + block)
    matrix = block // (row_blocks * col_blocks)
    row_block = block // col_blocks % row_blocks
    cols = block % col_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(0, BLOCK, ROWS):
        rows = row_block * BLOCK + start + tl.arange(0, ROWS)[:, None]
        mask = (rows < num_rows) & (cols < num_cols)
        place = (matrix * num_rows + rows) * num_cols + cols
        code = tl.load(codes_ptr + place, mask=mask, other=0).to(tl.int16)
        # Sign, exponent and mantissa in their places in fp16, whose exponent is biased by 8 more: exact, subnormal or
        # not.
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        tl.store(out_ptr + place, (value * scale).to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the reference, but for codes of NaN, which no weight has. Contiguous tensors."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if scales.numel():
        row_blocks, col_blocks = scales.shape[-2:]
        _dequantize_kernel[(scales.numel(),)](
            codes.view(torch.uint8), scales, out,
            codes.shape[-2], codes.shape[-1], row_blocks, col_blocks,
            BLOCK=FP8_BLOCK, ROWS=32, num_warps=4,
        )  # fmt: skip
    return out
