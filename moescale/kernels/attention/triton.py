"""Attention over intervals of keys in Triton: documents, windows, sinks and grouped queries, without a mask in memory.

Query i of a sequence sees the keys lo_i .. i, where lo_i = max(first_i, i - window + 1); so key j is seen by the
queries j .. hi_j, where hi_j = min(last_j, j + window - 1). A block of queries reads the bounds of its own rows, and
runs over the blocks of keys between them: those wholly inside need no comparison, those outside are never loaded.
Nothing depends on the host, so a recorded micro-batch may have other documents at every replay.

Softmax is computed online in base 2 (Dao, arXiv:2307.08691). The backward has two kernels, one that sums over queries
for each block of keys and one that sums over keys for each block of queries: 38% more arithmetic than one that adds to
the gradient of q by atomics, and the same bits every time.

A width that is the sum of two powers of two, such as 192 = 128 + 64, is held as two tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.attention.launch_config import Kernel, Launch, launch_for
from moescale.kernels.backends import attention_parts

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(base, rows, columns, row_stride, length, MASKED: tl.constexpr):
    """Rows of a [length, width] matrix; zeros beyond its end."""
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=(rows < length)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _scores(left, left_rest, right, right_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """left @ right.T over both parts of the width."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if REST > 0:
        scores = tl.dot(left_rest, tl.trans(right_rest), scores, input_precision=PRECISION)
    return scores


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
        k = _tile(k_base, keys, width, k_stride, length, MASKED)
        k_rest = k
        if REST > 0:
            k_rest = _tile(k_base + WIDTH, keys, tl.arange(0, REST), k_stride, length, MASKED)
        scores = _scores(q, q_rest, k, k_rest, REST, PRECISION) * scale
        if MASKED:
            seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= lows[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = _tile(v_base, keys, tl.arange(0, V_WIDTH), v_stride, length, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _forward_kernel(
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
    q = _tile(q_base, rows, tl.arange(0, WIDTH), q_strides_s, length, True)
    q_rest = q
    if REST > 0:
        q_rest = _tile(q_base + WIDTH, rows, tl.arange(0, REST), q_strides_s, length, True)

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


@triton.jit
def _delta_kernel(
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
    grad = _tile(grad_base + batch * g_b + head * g_n, rows, columns, g_s, length, True)
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
        q = _tile(q_base, rows, tl.arange(0, WIDTH), q_stride, length, MASKED)
        q_rest = q
        if REST > 0:
            q_rest = _tile(q_base + WIDTH, rows, tl.arange(0, REST), q_stride, length, MASKED)
        grad = _tile(grad_base, rows, tl.arange(0, V_WIDTH), grad_stride, length, MASKED)
        if MASKED:
            row_sums = tl.load(sums + rows, mask=rows < length, other=0.0)
            row_delta = tl.load(delta + rows, mask=rows < length, other=0.0)
        else:
            row_sums = tl.load(sums + rows)
            row_delta = tl.load(delta + rows)
        weights = tl.exp2(_scores(k, k_rest, q, q_rest, REST, PRECISION) * scale - row_sums[None, :])
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
def _backward_keys_kernel(
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
    k = _tile(k_base, keys, width, k_strides_s, length, True)
    k_rest = k
    if REST > 0:
        k_rest = _tile(k_base + WIDTH, keys, rest, k_strides_s, length, True)
    v = _tile(v_base, keys, columns, v_strides_s, length, True)
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
        k = _tile(k_base, keys, tl.arange(0, WIDTH), k_stride, length, MASKED)
        k_rest = k
        if REST > 0:
            k_rest = _tile(k_base + WIDTH, keys, tl.arange(0, REST), k_stride, length, MASKED)
        v = _tile(v_base, keys, tl.arange(0, V_WIDTH), v_stride, length, MASKED)
        weights = tl.exp2(_scores(q, q_rest, k, k_rest, REST, PRECISION) * scale - row_sums[:, None])
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
def _backward_queries_kernel(
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
    q = _tile(q_base, rows, width, q_strides_s, length, True)
    q_rest = q
    if REST > 0:
        q_rest = _tile(q_base + WIDTH, rows, rest, q_strides_s, length, True)
    grad = _tile(
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


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result [B, S, N, Dv], base-2 logarithms of the sums of exponentials [B, N, S] fp32)."""
    batch, length, heads, _ = q.shape
    q, k, v = (_with_rows(x) for x in (q, k, v))
    out = v.new_empty((batch, length, heads, v.shape[-1]))
    sums = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    launch = _launch("forward", q, v)
    if out.numel():
        _forward_kernel[(triton.cdiv(length, launch.rows), batch * heads)](
            q,
            k,
            v,
            first,
            sinks,
            out,
            sums,
            length,
            heads,
            *_strides(q, k, v),
            softmax_scale * LOG2_E.value,
            window or 0,
            DOCUMENTS=first is not None,
            SINKS=sinks is not None,
            **_constants(q, k, v, window, launch),
        )
    return out, sums


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and of the sinks, the last empty without them."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    q, k, v, grad = (_with_rows(x) for x in (q, k, v, grad))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(sums)
    if out.numel():
        grad_strides = grad.stride()[:3]
        _delta_kernel[(triton.cdiv(length, DELTA_ROWS), batch * heads)](
            out, grad, delta, length, heads, *grad_strides, V_WIDTH=v.shape[-1], ROWS=DELTA_ROWS
        )
        scales = (softmax_scale * LOG2_E.value, softmax_scale, window or 0)
        strides = (*_strides(q, k, v), *grad_strides)
        launch = _launch("backward_keys", q, v)
        _backward_keys_kernel[(triton.cdiv(length, launch.columns), batch * kv_heads)](
            q,
            k,
            v,
            grad,
            last,
            sums,
            delta,
            dk,
            dv,
            length,
            heads,
            *strides,
            *scales,
            DOCUMENTS=last is not None,
            **_constants(q, k, v, window, launch),
        )
        launch = _launch("backward_queries", q, v)
        _backward_queries_kernel[(triton.cdiv(length, launch.rows), batch * heads)](
            q,
            k,
            v,
            grad,
            first,
            sums,
            delta,
            dq,
            length,
            heads,
            *strides,
            *scales,
            DOCUMENTS=first is not None,
            **_constants(q, k, v, window, launch),
        )
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    # A sink's value is zero, so of its score only the share that it takes from the others has a gradient.
    shares = torch.exp2(sinks.float()[None, :, None] * LOG2_E.value - sums)
    return dq, dk, dv, -(shares * delta).sum((0, 2)).to(sinks.dtype)


DELTA_ROWS = 64


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last dim contiguous, and rows that begin at multiples of 16 bytes."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return x if x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _constants(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, launch: Launch) -> dict:
    parts = attention_parts(q.shape[-1])
    assert parts is not None
    return dict(
        GROUP=q.shape[2] // k.shape[2],
        WIDTH=parts[0],
        REST=parts[1],
        V_WIDTH=v.shape[-1],
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        WINDOW=window is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
    )


def _launch(kernel: Kernel, q: torch.Tensor, v: torch.Tensor) -> Launch:
    return launch_for(kernel, q.shape[-1], v.shape[-1], itemsize=q.element_size(), capability=_capability(q.device))


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
