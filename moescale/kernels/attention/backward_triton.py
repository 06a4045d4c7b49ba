"""The kernels of attention's backward in Triton: one sums over queries for each block of keys, one the other way."""

from __future__ import annotations

import triton
import triton.language as tl

from moescale.kernels.attention.tiles_triton import load_tile, scores_of


@triton.jit
def attention_delta_kernel(
    out_base, grad_base, delta, length, q_heads, g_b, g_s, g_n, V_WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """delta[b, n, s] = sum over the width of out * grad, in fp32."""
    batch = (tl.program_id(1) // q_heads).to(tl.int64)
    head = tl.program_id(1) % q_heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    columns = tl.arange(0, V_WIDTH)
    row_index = (batch * length + rows) * q_heads + head
    out = tl.load(out_base + row_index[:, None] * V_WIDTH + columns[None, :], mask=inside[:, None], other=0.0)
    grad = load_tile(grad_base + batch * g_b + head * g_n, rows, columns, g_s, length, True)
    total = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + (batch * q_heads + head) * length + rows, total, mask=inside)


@triton.jit
def _add_queries(
    dk,
    dk_rest,
    dv,
    k,
    k_rest,
    v,
    keys,
    highs,
    q_base,
    grad_base,
    sums,
    delta,
    q_stride,
    grad_stride,
    begin,
    end,
    length,
    scale,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add what the queries ``begin`` .. ``end`` give to the gradients of a block of keys; all tiles transposed."""
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        q = load_tile(q_base, rows, tl.arange(0, WIDTH), q_stride, length, MASKED)
        q_rest = q
        if REST > 0:
            q_rest = load_tile(q_base + WIDTH, rows, tl.arange(0, REST), q_stride, length, MASKED)
        grad = load_tile(grad_base, rows, tl.arange(0, V_WIDTH), grad_stride, length, MASKED)
        if MASKED:
            row_sums = tl.load(sums + rows, mask=rows < length, other=0.0)
            row_delta = tl.load(delta + rows, mask=rows < length, other=0.0)
        else:
            row_sums = tl.load(sums + rows)
            row_delta = tl.load(delta + rows)
        weights = tl.exp2(scores_of(k, k_rest, q, q_rest, REST, PRECISION) * scale - row_sums[None, :])
        if MASKED:
            seen = (rows[None, :] >= keys[:, None]) & (rows[None, :] <= highs[:, None]) & (rows < length)[None, :]
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = (weights * (dp - row_delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv


@triton.jit
def attention_backward_keys_kernel(
    q_base,
    k_base,
    v_base,
    grad_base,
    last,
    sums,
    delta,
    dk_base,
    dv_base,
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
    g_strides_b,
    g_strides_s,
    g_strides_n,
    scale,
    softmax_scale,
    window,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a block of keys and values of one head, summed over the queries that see them, of all its heads."""
    block = tl.program_id(0)
    kv_heads = q_heads // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    k_base += batch * k_strides_b + kv_head * k_strides_n
    v_base += batch * v_strides_b + kv_head * v_strides_n
    keys = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = keys < length
    highs = tl.zeros((COLUMNS,), tl.int32) + (length - 1)
    if DOCUMENTS:
        highs = tl.load(last + batch * length + tl.minimum(keys, length - 1))
    if WINDOW:
        highs = tl.minimum(highs, tl.minimum(keys, length - 1) + window - 1)
    width = tl.arange(0, WIDTH)
    rest = tl.arange(0, REST if REST > 0 else 16)
    columns = tl.arange(0, V_WIDTH)
    k = load_tile(k_base, keys, width, k_strides_s, length, True)
    k_rest = k
    if REST > 0:
        k_rest = load_tile(k_base + WIDTH, keys, rest, k_strides_s, length, True)
    v = load_tile(v_base, keys, columns, v_strides_s, length, True)
    dk = tl.zeros((COLUMNS, WIDTH), tl.float32)
    dk_rest = tl.zeros((COLUMNS, REST if REST > 0 else 16), tl.float32)
    dv = tl.zeros((COLUMNS, V_WIDTH), tl.float32)

    begin = block * COLUMNS // ROWS * ROWS
    # The first block of queries of which each sees every key, as far as causality goes.
    free = tl.minimum(((block + 1) * COLUMNS - 1 + ROWS - 1) // ROWS * ROWS, length)
    end = tl.minimum(tl.max(highs, 0) + 1, length)
    # From here on some query no longer sees some key, or lies beyond the sequence.
    full_end = tl.maximum((tl.min(highs, 0) + 1) // ROWS * ROWS, free)
    free = tl.minimum(free, end)
    full_end = tl.minimum(full_end, end // ROWS * ROWS)
    full_end = tl.maximum(full_end, free)
    for group in range(GROUP):
        head = kv_head * GROUP + group
        q_head = q_base + batch * q_strides_b + head * q_strides_n
        grad_head = grad_base + batch * g_strides_b + head * g_strides_n
        sums_head = sums + (batch * q_heads + head) * length
        delta_head = delta + (batch * q_heads + head) * length
        dk, dk_rest, dv = _add_queries(
            dk, dk_rest, dv, k, k_rest, v, keys, highs, q_head, grad_head, sums_head, delta_head, q_strides_s,
            g_strides_s, begin, free, length, scale, WIDTH, REST, V_WIDTH, ROWS, True, PRECISION, STAGES,
        )  # fmt: skip
        dk, dk_rest, dv = _add_queries(
            dk, dk_rest, dv, k, k_rest, v, keys, highs, q_head, grad_head, sums_head, delta_head, q_strides_s,
            g_strides_s, free, full_end, length, scale, WIDTH, REST, V_WIDTH, ROWS, False, PRECISION, STAGES,
        )  # fmt: skip
        dk, dk_rest, dv = _add_queries(
            dk, dk_rest, dv, k, k_rest, v, keys, highs, q_head, grad_head, sums_head, delta_head, q_strides_s,
            g_strides_s, full_end, end, length, scale, WIDTH, REST, V_WIDTH, ROWS, True, PRECISION, STAGES,
        )  # fmt: skip

    key_index = (batch * length + keys) * kv_heads + kv_head
    dk_rows = dk_base + key_index[:, None] * (WIDTH + REST)
    tl.store(dk_rows + width[None, :], (dk * softmax_scale).to(dk_base.dtype.element_ty), mask=inside[:, None])
    if REST > 0:
        tl.store(
            dk_rows + WIDTH + rest[None, :],
            (dk_rest * softmax_scale).to(dk_base.dtype.element_ty),
            mask=inside[:, None],
        )
    tl.store(
        dv_base + key_index[:, None] * V_WIDTH + columns[None, :], dv.to(dv_base.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def _add_keys(
    dq,
    dq_rest,
    q,
    q_rest,
    grad,
    lows,
    rows,
    row_sums,
    row_delta,
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
    """Add what the keys ``begin`` .. ``end`` give to the gradient of a block of queries."""
    for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        keys = start + tl.arange(0, COLUMNS)
        k = load_tile(k_base, keys, tl.arange(0, WIDTH), k_stride, length, MASKED)
        k_rest = k
        if REST > 0:
            k_rest = load_tile(k_base + WIDTH, keys, tl.arange(0, REST), k_stride, length, MASKED)
        v = load_tile(v_base, keys, tl.arange(0, V_WIDTH), v_stride, length, MASKED)
        weights = tl.exp2(scores_of(q, q_rest, k, k_rest, REST, PRECISION) * scale - row_sums[:, None])
        if MASKED:
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= lows[:, None])
            weights = tl.where(seen, weights, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (weights * (dp - row_delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if REST > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit
def attention_backward_queries_kernel(
    q_base,
    k_base,
    v_base,
    grad_base,
    first,
    sums,
    delta,
    dq_base,
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
    g_strides_b,
    g_strides_s,
    g_strides_n,
    scale,
    softmax_scale,
    window,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of a block of queries of one head, summed over the keys that it sees; later blocks first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // q_heads).to(tl.int64)
    head = tl.program_id(1) % q_heads
    k_base += batch * k_strides_b + (head // GROUP) * k_strides_n
    v_base += batch * v_strides_b + (head // GROUP) * v_strides_n
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    lows = tl.zeros((ROWS,), tl.int32)
    if DOCUMENTS:
        lows = tl.load(first + batch * length + tl.minimum(rows, length - 1))
    if WINDOW:
        lows = tl.maximum(lows, tl.minimum(rows, length - 1) - window + 1)
    width = tl.arange(0, WIDTH)
    rest = tl.arange(0, REST if REST > 0 else 16)
    q_base += batch * q_strides_b + head * q_strides_n
    q = load_tile(q_base, rows, width, q_strides_s, length, True)
    q_rest = q
    if REST > 0:
        q_rest = load_tile(q_base + WIDTH, rows, rest, q_strides_s, length, True)
    grad = load_tile(
        grad_base + batch * g_strides_b + head * g_strides_n, rows, tl.arange(0, V_WIDTH), g_strides_s, length, True
    )
    row_sums = tl.load(sums + (batch * q_heads + head) * length + rows, mask=inside, other=0.0)
    row_delta = tl.load(delta + (batch * q_heads + head) * length + rows, mask=inside, other=0.0)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    dq_rest = tl.zeros((ROWS, REST if REST > 0 else 16), tl.float32)

    diagonal = (block * ROWS) // COLUMNS * COLUMNS
    end = tl.minimum((block + 1) * ROWS, length)
    begin = 0
    free = 0
    if DOCUMENTS or WINDOW:
        begin = tl.min(lows, 0) // COLUMNS * COLUMNS
        free = tl.minimum((tl.max(lows, 0) + COLUMNS - 1) // COLUMNS * COLUMNS, diagonal)
        dq, dq_rest = _add_keys(
            dq, dq_rest, q, q_rest, grad, lows, rows, row_sums, row_delta, k_base, v_base, k_strides_s, v_strides_s,
            begin, free, length, scale, WIDTH, REST, V_WIDTH, COLUMNS, True, PRECISION, STAGES,
        )  # fmt: skip
    dq, dq_rest = _add_keys(
        dq, dq_rest, q, q_rest, grad, lows, rows, row_sums, row_delta, k_base, v_base, k_strides_s, v_strides_s,
        free, diagonal, length, scale, WIDTH, REST, V_WIDTH, COLUMNS, False, PRECISION, STAGES,
    )  # fmt: skip
    if DOCUMENTS or WINDOW:
        diagonal = tl.maximum(diagonal, begin)
    dq, dq_rest = _add_keys(
        dq, dq_rest, q, q_rest, grad, lows, rows, row_sums, row_delta, k_base, v_base, k_strides_s, v_strides_s,
        diagonal, end, length, scale, WIDTH, REST, V_WIDTH, COLUMNS, True, PRECISION, STAGES,
    )  # fmt: skip

    row_index = (batch * length + rows) * q_heads + head
    dq_rows = dq_base + row_index[:, None] * (WIDTH + REST)
    tl.store(dq_rows + width[None, :], (dq * softmax_scale).to(dq_base.dtype.element_ty), mask=inside[:, None])
    if REST > 0:
        tl.store(
            dq_rows + WIDTH + rest[None, :],
            (dq_rest * softmax_scale).to(dq_base.dtype.element_ty),
            mask=inside[:, None],
        )
