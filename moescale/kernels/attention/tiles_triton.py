"""What forward and backward of attention in Triton share: tiles of rows, and scores over both parts of a width."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(base, rows, columns, row_stride, length, MASKED: tl.constexpr):
    """Rows of a [length, width] matrix; zeros beyond its end."""
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=(rows < length)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def scores_of(left, left_rest, right, right_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """left @ right.T over both parts of the width."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if REST > 0:
        scores = tl.dot(left_rest, tl.trans(right_rest), scores, input_precision=PRECISION)
    return scores
