"""The kernel of attention's forward in Triton: softmax online over the blocks of keys that a block of queries sees."""

from __future__ import annotations

import triton
import triton.language as tl

from moescale.kernels.attention.tiles_triton import LOG2_E, load_tile, scores_of


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
    q_rest,
    lows,
    rows,
    k_base,
    v_base,
    k_stride,
    v_stride,
    begin,
    end,
    length,
    scale,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    V_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the keys ``begin`` .. ``end`` to the running maximum, sum and result of a block of queries."""
    width = tl.arange(0, WIDTH)
    for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        keys = start + tl.arange(0, COLUMNS)
        k = load_tile(k_base, keys, width, k_stride, length, MASKED)
        k_rest = k
        if REST > 0:
            k_rest = load_tile(k_base + WIDTH, keys, tl.arange(0, REST), k_stride, length, MASKED)
        scores = scores_of(q, q_rest, k, k_rest, REST, PRECISION) * scale
        if MASKED:
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= lows[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = load_tile(v_base, keys, tl.arange(0, V_WIDTH), v_stride, length, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def attention_forward_kernel(
    q_base,
    k_base,
    v_base,
    first,
    sinks,
    out_base,
    sums,
    length,
    q_heads,
    q_strides_b,
    q_strides_s,
    q_strides_n,
    k_strides_b,
    k_strides_s,
    k_strides_n,
    v_strides_b,
    v_strides_s,
    v_strides_n,
    scale,
    window,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[b, s, n] and the base-2 logarithms of the sums of exponentials [b, n, s]; later blocks of queries first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // q_heads).to(tl.int64)
    head = tl.program_id(1) % q_heads
    q_base += batch * q_strides_b + head * q_strides_n
    k_base += batch * k_strides_b + (head // GROUP) * k_strides_n
    v_base += batch * v_strides_b + (head // GROUP) * v_strides_n
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    lows = tl.zeros((ROWS,), tl.int32)
    if DOCUMENTS:
        # Rows beyond the end repeat the last one's bound, which widens nothing.
        lows = tl.load(first + batch * length + tl.minimum(rows, length - 1))
    if WINDOW:
        lows = tl.maximum(lows, tl.minimum(rows, length - 1) - window + 1)
    q = load_tile(q_base, rows, tl.arange(0, WIDTH), q_strides_s, length, True)
    q_rest = q
    if REST > 0:
        q_rest = load_tile(q_base + WIDTH, rows, tl.arange(0, REST), q_strides_s, length, True)

    acc = tl.zeros((ROWS, V_WIDTH), tl.float32)
    # A finite start, so that a block in which a row sees nothing does not make 0 / 0 of it.
    row_max = tl.full((ROWS,), -1.0e30, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        row_max = tl.zeros((ROWS,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        row_sum += 1.0
    diagonal = (block * ROWS) // COLUMNS * COLUMNS
    end = tl.minimum((block + 1) * ROWS, length)
    begin = 0
    free = 0
    if DOCUMENTS or WINDOW:
        begin = tl.min(lows, 0) // COLUMNS * COLUMNS
        free = tl.minimum((tl.max(lows, 0) + COLUMNS - 1) // COLUMNS * COLUMNS, diagonal)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, q_rest, lows, rows, k_base, v_base, k_strides_s, v_strides_s, begin, free, length,
            scale, WIDTH, REST, V_WIDTH, COLUMNS, True, PRECISION, STAGES,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, q_rest, lows, rows, k_base, v_base, k_strides_s, v_strides_s, free, diagonal, length,
        scale, WIDTH, REST, V_WIDTH, COLUMNS, False, PRECISION, STAGES,
    )  # fmt: skip
    if DOCUMENTS or WINDOW:
        diagonal = tl.maximum(diagonal, begin)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, q_rest, lows, rows, k_base, v_base, k_strides_s, v_strides_s, diagonal, end, length,
        scale, WIDTH, REST, V_WIDTH, COLUMNS, True, PRECISION, STAGES,
    )  # fmt: skip

    out = acc / row_sum[:, None]
    columns = tl.arange(0, V_WIDTH)
    row_index = (batch * length + rows) * q_heads + head
    tl.store(
        out_base + row_index[:, None] * V_WIDTH + columns[None, :],
        out.to(out_base.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(sums + (batch * q_heads + head) * length + rows, row_max + tl.log2(row_sum), mask=inside)
