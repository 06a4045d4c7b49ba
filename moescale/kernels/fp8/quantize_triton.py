"""Quantisation to e4m3 where a tensor is made: gather, SwiGLU, its backward; and the transposed copies.

A row's scale is the smallest power of two that brings its largest element to at most 448. So a row's numbers can be
brought to another such scale without a second rounding, except for those that become subnormal: the transposed copy,
contracted over rows, has one scale for each expert, the largest of its rows'. A row with an element that is not finite
has the scale inf, so that whatever is computed from it is not finite either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.formats import FP8_COPY_ROWS
from moescale.kernels.backends import triton_interpreted
from moescale.kernels.experts.row_tiles_triton import RowGroups, programs_of_rows
from moescale.kernels.fp8.scaled import E4M3, Copies, Scaled

INTERPRETED = tl.constexpr(triton_interpreted())
TILE = FP8_COPY_ROWS
"""Rows and columns that a program transposes at once."""


@triton.jit
def _power_of_two_scale(largest):
    """The smallest power of two s with largest / s <= 448, 2^-100 at least; inf, where ``largest`` is not finite."""
    ratio = tl.maximum(largest * (1 / 448), 7.888609052210118e-31)
    bits = (ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return tl.where(largest < float("inf"), bits, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def magnitudes(x):
    """The absolute elements of x as integers, which compare as the numbers do, NaN above all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def scale_of(sizes, AXIS: tl.constexpr = 0):
    """The scale along AXIS of what has these magnitudes; inf, where one is of NaN or inf."""
    return _power_of_two_scale(tl.max(sizes, AXIS).to(tl.float32, bitcast=True))


@triton.jit
def inverse_power(scale):
    """1 / scale, exactly, of a power of two; of inf, -inf: no product with it is finite."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x):
    """Round fp32 to e4m3, to nearest with ties to even, in hardware: inf becomes 448 there, and NaN stays NaN.

    The interpreter's own conversion truncates, so there the codes are made step by step.
    """
    if INTERPRETED:
        size = tl.minimum(tl.abs(x), 448.0)
        normal = size * 1048577.0
        normal = normal - (normal - size)
        subnormal = (size + 24576.0) - 24576.0
        rounded = tl.where(size < 0.015625, subnormal, normal).to(tl.float8e4nv)
        code = tl.where(x == x, rounded.to(tl.uint8, bitcast=True).to(tl.int32), 0x7F)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def _quantize_rows_kernel(
    x, pair_row, tokens, token_scales, rows, row_scales, H,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """tokens[t] = x[t] quantised, and rows[row of (t, k)] the same, for every k. With TOP_K 0 there are no rows."""
    token = tl.program_id(0).to(tl.int64)
    parts = ()
    largest = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        part = tl.load(x + token * H + column, mask=column < H, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitudes(part))
        parts = parts + (part,)  # type: ignore[assignment]
    scale = scale_of(largest)
    tl.store(token_scales + token, scale)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        part = to_e4m3(parts[i] * inverse_power(scale))
        tl.store(tokens + token * H + column, part, mask=column < H)
        for k in tl.static_range(TOP_K):
            row = tl.load(pair_row + token * TOP_K + k).to(tl.int64)
            tl.store(rows + row * H + column, part, mask=(column < H) & (row >= 0))
    for k in tl.static_range(TOP_K):
        row = tl.load(pair_row + token * TOP_K + k).to(tl.int64)
        tl.store(row_scales + row, scale, mask=row >= 0)


@triton.jit
def swiglu_row(pre, act, scales, row, F, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROUNDS: tl.constexpr):
    """Quantise silu(gate) * up of one row; where it ROUNDS, of its result in bf16."""
    first = row * F
    values = ()
    largest = tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        gate = tl.load(pre + 2 * first + column, mask=column < F, other=0.0).to(tl.float32)
        up = tl.load(pre + 2 * first + F + column, mask=column < F, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up
        if ROUNDS:
            value = value.to(tl.bfloat16).to(tl.float32)
        largest = tl.maximum(largest, magnitudes(value))
        values = values + (value,)  # type: ignore[assignment]
    scale = scale_of(largest)
    inverse = inverse_power(scale)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(act + first + column, to_e4m3(values[i] * inverse), mask=column < F)
    tl.store(scales + row, scale)


@triton.jit
def _swiglu_kernel(
    pre, act, scales, ends, num_experts, F, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WALKS: tl.constexpr
):
    """A row at a time, in parts of CHUNK columns that stay in registers; rows behind the last expert's are left alone.

    There is a program for every row; where programs WALK (``programs_of_rows``), each takes one row after another.
    """
    row, end = tl.program_id(0).to(tl.int64), tl.load(ends + num_experts - 1)
    if WALKS:
        for walked in tl.range(row, end.to(tl.int64), tl.num_programs(0)):
            swiglu_row(pre, act, scales, walked, F, CHUNK, CHUNKS, False)
    elif row < end:
        swiglu_row(pre, act, scales, row, F, CHUNK, CHUNKS, False)


@triton.jit
def _swiglu_backward_row(
    grad_act, pre, row_weights, grad_weights, grad_pre, grad_pre_scales, act, act_scales, row, F,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    first = row * F
    weight = tl.load(row_weights + row)
    values, grads_gate, grads_up = (), (), ()
    grad_weight = tl.zeros((CHUNK,), tl.float32)
    largest_value, largest_grad = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        inside = column < F
        grad = tl.load(grad_act + first + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(pre + 2 * first + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pre + 2 * first + F + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        value = silu * up
        grad_weight += grad * value
        grad *= weight
        value *= weight
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        grad_up = grad * silu
        largest_value = tl.maximum(largest_value, magnitudes(value))
        largest_grad = tl.maximum(largest_grad, tl.maximum(magnitudes(grad_gate), magnitudes(grad_up)))
        values = values + (value,)  # type: ignore[assignment]
        grads_gate = grads_gate + (grad_gate,)  # type: ignore[assignment]
        grads_up = grads_up + (grad_up,)  # type: ignore[assignment]
    tl.store(grad_weights + row, tl.sum(grad_weight, 0))
    of_grad, of_value = scale_of(largest_grad), scale_of(largest_value)
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        inside = column < F
        tl.store(grad_pre + 2 * first + column, to_e4m3(grads_gate[i] * inverse_power(of_grad)), mask=inside)
        tl.store(grad_pre + 2 * first + F + column, to_e4m3(grads_up[i] * inverse_power(of_grad)), mask=inside)
        tl.store(act + first + column, to_e4m3(values[i] * inverse_power(of_value)), mask=inside)
    tl.store(grad_pre_scales + row, of_grad)
    tl.store(act_scales + row, of_value)


@triton.jit
def _swiglu_backward_kernel(
    grad_act, pre, row_weights, grad_weights, grad_pre, grad_pre_scales, act, act_scales, ends, num_experts, F,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WALKS: tl.constexpr,
):  # fmt: skip
    """The bf16 kernel's computation on one row; the gradient of the pre-activation and the weighted activation in e4m3.

    Rows, parts and programs as of ``_swiglu_kernel``.
    """
    row, end = tl.program_id(0).to(tl.int64), tl.load(ends + num_experts - 1)
    if WALKS:
        for walked in tl.range(row, end.to(tl.int64), tl.num_programs(0)):
            _swiglu_backward_row(
                grad_act, pre, row_weights, grad_weights, grad_pre, grad_pre_scales, act, act_scales, walked, F,
                CHUNK, CHUNKS,
            )  # fmt: skip
    elif row < end:
        _swiglu_backward_row(
            grad_act, pre, row_weights, grad_weights, grad_pre, grad_pre_scales, act, act_scales, row, F, CHUNK, CHUNKS
        )


@triton.jit
def _padded_ends_kernel(ends, padded, num_experts, PADDING: tl.constexpr, EXPERTS: tl.constexpr):
    """padded[e] = the sum of the rows of the experts up to e, each rounded up to a multiple of PADDING."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    size = tl.where(inside, end - tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0), 0)
    tl.store(padded + expert, tl.cumsum(tl.cdiv(size, PADDING) * PADDING, 0), mask=inside)


@triton.jit
def _expert_scales_kernel(row_scales, row_pair, ends, scales, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """scales[e] = the largest scale of the expert's rows; 2^-100 for an expert without rows."""
    expert = tl.program_id(0)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    largest = tl.full((BLOCK,), 7.888609052210118e-31, tl.float32)
    for begin in tl.range(first, end, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < end
        if TOP_K:
            index = tl.load(row_pair + index, mask=inside, other=0) // TOP_K
        largest = tl.maximum(largest, tl.load(row_scales + index, mask=inside, other=0.0))
    tl.store(scales + expert, tl.max(largest, 0))


@triton.jit
def _transpose_kernel(
    rows, row_pair, row_scales, expert_scales, ends, padded, out, num_experts, C, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """out[c, padded row of r] = rows[r, c], brought to the scale of the row's expert; 0 where there is no row.

    With TOP_K, ``rows`` and ``row_scales`` are those of tokens, and row r is that of the pair row_pair[r].
    """
    experts = tl.arange(0, EXPERTS)
    known = experts < num_experts
    begin = tl.program_id(0) * ROWS
    padded_end = tl.load(padded + experts, mask=known, other=2147483647)
    expert = tl.sum((padded_end <= begin).to(tl.int32), 0)
    if expert >= num_experts:
        return
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    padded_first = tl.load(padded + expert - 1, mask=expert > 0, other=0)
    row = begin - padded_first + first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < tl.load(ends + expert)
    if TOP_K:
        row = tl.load(row_pair + row, mask=exists, other=0) // TOP_K
    factor = tl.load(row_scales + row, mask=exists, other=0.0) * inverse_power(tl.load(expert_scales + expert))
    mask = exists[:, None] & (column < C)[None, :]
    block = tl.load(rows + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)
    block = to_e4m3(block.to(tl.float32) * factor[:, None])
    target = column.to(tl.int64)[:, None] * P + begin + tl.arange(0, ROWS)[None, :]
    tl.store(out + target, tl.trans(block), mask=(column < C)[:, None])


@triton.jit
def _copies_kernel(weight, largest, rows, columns, scales, N, K, P, ROWS: tl.constexpr):
    """rows[e, n, k] = columns[k, e * N' + n] = weight[e, n, k] quantised; zero in columns without an n."""
    tiles = tl.cdiv(N, ROWS)
    expert = tl.program_id(0) // tiles
    begin = tl.program_id(0) % tiles * ROWS
    n = begin + tl.arange(0, ROWS)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    scale = _power_of_two_scale(tl.load(largest + expert))
    if (begin == 0) & (tl.program_id(1) == 0):
        tl.store(scales + expert, scale)
    index = (expert.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    block = to_e4m3(tl.load(weight + index, mask=mask, other=0.0).to(tl.float32) * inverse_power(scale))
    tl.store(rows + index, block, mask=mask)
    target = k.to(tl.int64)[:, None] * P + tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(columns + target, tl.trans(block), mask=(k < K)[:, None])


def cut_row(columns: int, *, whole: bool = False) -> dict[str, int]:
    """Return the launch of a program that holds a row of ``columns`` in parts, of which the last alone is not full.

    ``whole``: in one part, where that is full, too.
    """
    num_warps = 4 if columns <= 4096 else 8
    chunk = columns if whole and columns == triton.next_power_of_2(columns) else 128 * num_warps
    return {"CHUNK": chunk, "CHUNKS": triton.cdiv(columns, chunk), "num_warps": num_warps}


def empty_rows(rows: int, columns: int, device: torch.device) -> Scaled:
    """Memory for rows with scales, not written yet."""
    return Scaled(
        torch.empty((rows, columns), dtype=E4M3, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def quantize_rows(x: torch.Tensor, out: Scaled | None = None) -> Scaled:
    """Return x [R, H] in e4m3 with scales [R]."""
    tokens = out or empty_rows(x.shape[0], x.shape[1], x.device)
    _quantize(x, None, tokens, tokens, 0)
    return tokens


def gather_rows(x: torch.Tensor, pair_row: torch.Tensor, top_k: int) -> tuple[Scaled, Scaled]:
    """Return tokens x [T, H] in e4m3, sorted by expert [R, H] and as they are."""
    tokens, rows = (empty_rows(number, x.shape[1], x.device) for number in (x.shape[0], pair_row.numel()))
    _quantize(x, pair_row, tokens, rows, top_k)
    return rows, tokens


def _quantize(x: torch.Tensor, pair_row: torch.Tensor | None, tokens: Scaled, rows: Scaled, top_k: int) -> None:
    num_tokens, hidden = x.shape
    if num_tokens:
        _quantize_rows_kernel[(num_tokens,)](
            x, pair_row, *tokens, *rows, hidden, TOP_K=top_k, **cut_row(hidden, whole=True)
        )


def swiglu(pre: torch.Tensor, groups: RowGroups, out: Scaled | None = None) -> Scaled:
    """Return silu(gate) * up [R, F] in e4m3 with scales [R], of the pre-activation [R, 2F]."""
    num_rows, ffn = pre.shape[0], pre.shape[1] // 2
    act = out or empty_rows(num_rows, ffn, pre.device)
    if num_rows:
        programs, walks = programs_of_rows(groups)
        sizes = (groups.ends, groups.num_experts, ffn)
        _swiglu_kernel[(programs,)](pre, *act, *sizes, **cut_row(ffn), WALKS=walks)
    return act


def swiglu_backward(
    grad_act: torch.Tensor,
    pre: torch.Tensor,
    row_weights: torch.Tensor,
    groups: RowGroups,
    out: tuple[Scaled, Scaled, torch.Tensor] | None = None,
) -> tuple[Scaled, Scaled, torch.Tensor]:
    """Return the gradient of pre [R, 2F], the weighted activation [R, F], and the gradient of row_weights [R] fp32.

    ``grad_act`` [R, F]: of the activation before it is weighted.
    """
    num_rows, ffn = grad_act.shape
    grad_pre, act, grad_weights = out or (
        empty_rows(num_rows, 2 * ffn, pre.device),
        empty_rows(num_rows, ffn, pre.device),
        torch.empty(num_rows, dtype=torch.float32, device=pre.device),
    )
    if num_rows:
        programs, walks = programs_of_rows(groups)
        _swiglu_backward_kernel[(programs,)](
            grad_act,
            pre,
            row_weights,
            grad_weights,
            *grad_pre,
            *act,
            groups.ends,
            groups.num_experts,
            ffn,
            **cut_row(ffn),
            WALKS=walks,
        )
    return grad_pre, act, grad_weights


def pad_ends(ends: torch.Tensor) -> torch.Tensor:
    """Return the ends [E] of the experts' columns in transposed copies: each expert's a multiple of 128."""
    padded = torch.empty_like(ends)
    experts = max(64, triton.next_power_of_2(ends.numel()))
    _padded_ends_kernel[(1,)](ends, padded, ends.numel(), PADDING=TILE, EXPERTS=experts)
    return padded


def transpose_rows(
    rows: Scaled, groups: RowGroups, padded: torch.Tensor, *, row_pair: torch.Tensor | None = None, top_k: int = 0
) -> Scaled:
    """Return rows [R, C] with scales [R] as [C, P] with scales [E]; columns from ``padded[-1]`` on are unwritten.

    ``padded``: from :func:`pad_ends`. With ``row_pair`` [R], ``rows`` are those of tokens instead: fewer bytes.
    """
    columns = rows.data.shape[1]
    num_experts = groups.num_experts
    num_tiles = groups.num_rows // TILE + num_experts  # the most that any routing needs
    out = torch.empty((columns, num_tiles * TILE), dtype=E4M3, device=rows.data.device)
    scales = torch.empty(num_experts, dtype=torch.float32, device=rows.data.device)
    _expert_scales_kernel[(num_experts,)](rows.scales, row_pair, groups.ends, scales, TOP_K=top_k, BLOCK=1024)
    _transpose_kernel[(num_tiles, triton.cdiv(columns, TILE))](
        rows.data,
        row_pair,
        rows.scales,
        scales,
        groups.ends,
        padded,
        out,
        num_experts,
        columns,
        out.shape[1],
        ROWS=TILE,
        COLUMNS=TILE,
        EXPERTS=max(64, triton.next_power_of_2(num_experts)),
        TOP_K=top_k,
    )
    return Scaled(out, scales)


def write_copies(weight: torch.Tensor, largest: torch.Tensor, copies: Copies) -> None:
    """Quantise weight [E, N, K] into its copies. ``largest`` [E] fp32: each expert's largest absolute element."""
    num_experts, n, k = weight.shape
    tiles = triton.cdiv(n, TILE)
    _copies_kernel[(num_experts * tiles, triton.cdiv(k, TILE))](
        weight, largest, *copies, n, k, copies.columns.shape[1], ROWS=TILE, num_warps=8
    )
