"""Quantisation to e4m3 where a tensor is made: gather, SwiGLU, its backward; and the transposed copies.

A row's scale is the smallest power of two that brings its largest element to at most 448. So a row's numbers can be
brought to another such scale without a second rounding, except for those that become subnormal: the transposed copy,
contracted over rows, has one scale for each expert, the largest of its rows'. A weight has one scale for each expert,
from the largest element, which whoever wrote the weight knows: both copies are then made in one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8_gemm import BLOCK, Scaled
from moescale.kernels.backends import triton_interpreted

E4M3 = torch.float8_e4m3fn
INTERPRETED = tl.constexpr(triton_interpreted())


@triton.jit
def _power_of_two_scale(largest):
    """The smallest power of two s with largest / s <= 448; 2^-100 at least."""
    ratio = tl.maximum(largest * (1 / 448), 7.888609052210118e-31)
    bits = (ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _inverse(scale):
    """1 / scale, exactly, of a power of two."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _to_e4m3(x):
    """Round fp32 to e4m3, to nearest with ties to even, in hardware; the interpreter's own conversion truncates."""
    if INTERPRETED:
        normal = x * 1048577.0
        normal = normal - (normal - x)
        subnormal = (x + 24576.0) - 24576.0
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _quantise_rows_kernel(x, pair_row, tokens, rows, scales, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """tokens[t] = x[t] quantised, and rows[row of (t, k)] the same, for every k; scales are of rows.

    With TOP_K 0 there are no rows, and the scales are those of tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    part = tl.load(x + token * H + column, mask=inside, other=0.0).to(tl.float32)
    scale = _power_of_two_scale(tl.max(tl.abs(part), 0))
    part = _to_e4m3(part * _inverse(scale))
    tl.store(tokens + token * H + column, part, mask=inside)
    if TOP_K == 0:
        tl.store(scales + token, scale)
    for k in tl.static_range(TOP_K):
        row = tl.load(pair_row + token * TOP_K + k).to(tl.int64)
        tl.store(rows + row * H + column, part, mask=inside & (row >= 0))
        tl.store(scales + row, scale, mask=row >= 0)


@triton.jit
def _swiglu_kernel(pre, act, scales, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(pre + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    scale = _power_of_two_scale(tl.max(tl.abs(value), 0))
    tl.store(act + row * F + column, _to_e4m3(value * _inverse(scale)), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _swiglu_backward_kernel(
    grad_act,
    pre,
    row_weights,
    grad_weights,
    grad_pre,
    grad_pre_scales,
    act,
    act_scales,
    wide_grad_pre,
    F,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The bf16 kernel's computation on one row, with the gradient of the pre-activation quantised.

    HAS_WEIGHTS: also the gradient of the routing weight, and the weighted activation, quantised. WIDE: the weighted
    activation in bf16 over ``grad_act``, and the gradient of the pre-activation in bf16 too.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    grad = tl.load(grad_act + row * F + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(pre + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value = silu * up
    if HAS_WEIGHTS:
        weight = tl.load(row_weights + row)
        tl.store(grad_weights + row, tl.sum(grad * value, 0))
        grad *= weight
        value *= weight
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    grad_up = grad * silu
    scale = _power_of_two_scale(tl.max(tl.maximum(tl.abs(grad_gate), tl.abs(grad_up)), 0))
    inverse = _inverse(scale)
    tl.store(grad_pre + row * 2 * F + column, _to_e4m3(grad_gate * inverse), mask=inside)
    tl.store(grad_pre + row * 2 * F + F + column, _to_e4m3(grad_up * inverse), mask=inside)
    tl.store(grad_pre_scales + row, scale)
    if WIDE:
        tl.store(grad_act + row * F + column, value.to(pre.dtype.element_ty), mask=inside)
        tl.store(wide_grad_pre + row * 2 * F + column, grad_gate.to(pre.dtype.element_ty), mask=inside)
        tl.store(wide_grad_pre + row * 2 * F + F + column, grad_up.to(pre.dtype.element_ty), mask=inside)
    elif HAS_WEIGHTS:
        scale = _power_of_two_scale(tl.max(tl.abs(value), 0))
        tl.store(act + row * F + column, _to_e4m3(value * _inverse(scale)), mask=inside)
        tl.store(act_scales + row, scale)


@triton.jit
def _padded_ends_kernel(ends, padded, num_experts, PADDING: tl.constexpr, EXPERTS: tl.constexpr):
    """padded[e] = the sum of the rows of the experts up to e, each rounded up to a multiple of PADDING."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    size = tl.where(inside, end - tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0), 0)
    tl.store(padded + expert, tl.cumsum(tl.cdiv(size, PADDING) * PADDING, 0), mask=inside)


@triton.jit
def _expert_scales_kernel(row_scales, ends, scales, BLOCK: tl.constexpr):
    """scales[e] = the largest scale of the expert's rows; 2^-100 for an expert without rows."""
    expert = tl.program_id(0)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    largest = tl.full((BLOCK,), 7.888609052210118e-31, tl.float32)
    for begin in tl.range(first, end, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(row_scales + index, mask=index < end, other=0.0))
    tl.store(scales + expert, tl.max(largest, 0))


@triton.jit
def _transpose_kernel(
    rows,
    row_pair,
    row_scales,
    expert_scales,
    ends,
    padded,
    out,
    num_experts,
    C,
    P,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """out[c, padded row of r] = rows[r, c], brought to the scale of the row's expert; 0 where there is no row.

    With TOP_K, ``rows`` are those of tokens, and row r is that of the pair row_pair[r].
    """
    experts = tl.arange(0, EXPERTS)
    known = experts < num_experts
    begin = tl.program_id(0) * TILE
    padded_end = tl.load(padded + experts, mask=known, other=2147483647)
    expert = tl.sum((padded_end <= begin).to(tl.int32), 0)
    if expert >= num_experts:
        return
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    padded_first = tl.load(padded + expert - 1, mask=expert > 0, other=0)
    row = begin - padded_first + first + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = row < tl.load(ends + expert)
    factor = tl.load(row_scales + row, mask=exists, other=0.0) * _inverse(tl.load(expert_scales + expert))
    mask = exists[:, None] & (column < C)[None, :]
    if TOP_K:
        row = tl.load(row_pair + row, mask=exists, other=0) // TOP_K
    block = tl.load(rows + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)
    block = _to_e4m3(block.to(tl.float32) * factor[:, None])
    target = column.to(tl.int64)[:, None] * P + begin + tl.arange(0, TILE)[None, :]
    tl.store(out + target, tl.trans(block), mask=(column < C)[:, None])


@triton.jit
def _quantise_weight_kernel(weight, largest, rows, columns, scales, N, K, P, TILE: tl.constexpr):
    """rows[e, n, k] = columns[k, e * N' + n] = weight[e, n, k] quantised; zero in columns without an n."""
    tiles = tl.cdiv(N, TILE)
    expert = tl.program_id(0) // tiles
    begin = tl.program_id(0) % tiles * TILE
    n = begin + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    scale = _power_of_two_scale(tl.load(largest + expert))
    if (begin == 0) & (tl.program_id(1) == 0):
        tl.store(scales + expert, scale)
    index = (expert.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    block = _to_e4m3(tl.load(weight + index, mask=mask, other=0.0).to(tl.float32) * _inverse(scale))
    tl.store(rows + index, block, mask=mask)
    target = k.to(tl.int64)[:, None] * P + tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    tl.store(columns + target, tl.trans(block), mask=(k < K)[:, None])


def quantise_rows(x: torch.Tensor) -> Scaled:
    """Return x [R, H] as e4m3 rows with scales [R]."""
    rows = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch_quantise_rows(x, None, rows, None, scales, 0)
    return Scaled(data=rows, scales=scales)


def gather_rows(x: torch.Tensor, pair_row: torch.Tensor, top_k: int) -> tuple[Scaled, torch.Tensor]:
    """Return tokens x [T, H] as sorted e4m3 rows with scales [R], and the tokens [T, H] in e4m3."""
    tokens = torch.empty(x.shape, dtype=E4M3, device=x.device)
    rows = torch.empty((pair_row.numel(), x.shape[1]), dtype=E4M3, device=x.device)
    scales = torch.empty(pair_row.numel(), dtype=torch.float32, device=x.device)
    _launch_quantise_rows(x, pair_row, tokens, rows, scales, top_k)
    return Scaled(data=rows, scales=scales), tokens


def _launch_quantise_rows(x, pair_row, tokens, rows, scales, top_k):
    num_tokens, hidden = x.shape
    if num_tokens:
        block = triton.next_power_of_2(hidden)
        _quantise_rows_kernel[(num_tokens,)](x, pair_row, tokens, rows, scales, hidden, TOP_K=top_k, BLOCK=block)


def swiglu(pre: torch.Tensor) -> Scaled:
    """Return silu(gate) * up [R, F] in e4m3 with scales [R], of the pre-activation [R, 2F]."""
    num_rows, ffn = pre.shape[0], pre.shape[1] // 2
    act = torch.empty((num_rows, ffn), dtype=E4M3, device=pre.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=pre.device)
    if num_rows:
        _swiglu_kernel[(num_rows,)](pre, act, scales, ffn, BLOCK=triton.next_power_of_2(ffn))
    return Scaled(data=act, scales=scales)


def swiglu_backward(
    grad_act: torch.Tensor, pre: torch.Tensor, row_weights: torch.Tensor | None, *, wide: bool = False
) -> tuple[Scaled, Scaled | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of pre [R, 2F] in e4m3, the weighted activation [R, F], and more.

    Third the gradient of row_weights [R], fourth that of pre as it was before quantisation. Without row weights the
    activation is None, for the forward's can be used. ``wide``: the fourth is there, and ``grad_act`` becomes the
    weighted activation, instead of a new one in e4m3.
    """
    num_rows, ffn = grad_act.shape
    scales = [torch.empty(num_rows, dtype=torch.float32, device=pre.device) for _ in range(3)]
    grad_pre = torch.empty(pre.shape, dtype=E4M3, device=pre.device)
    weighted = row_weights is not None
    act = torch.empty(grad_act.shape, dtype=E4M3, device=pre.device) if weighted and not wide else None
    wide_grad_pre = torch.empty_like(pre) if wide else None
    if num_rows:
        _swiglu_backward_kernel[(num_rows,)](
            grad_act,
            pre,
            row_weights,
            scales[2],
            grad_pre,
            scales[0],
            act,
            scales[1],
            wide_grad_pre,
            ffn,
            BLOCK=triton.next_power_of_2(ffn),
            HAS_WEIGHTS=weighted,
            WIDE=wide,
        )
    return (
        Scaled(data=grad_pre, scales=scales[0]),
        None if act is None else Scaled(data=act, scales=scales[1]),
        scales[2] if weighted else None,
        wide_grad_pre,
    )


def pad_ends(ends: torch.Tensor) -> torch.Tensor:
    """Return the ends [E] of the experts' columns in transposed copies: each expert's a multiple of 128."""
    padded = torch.empty_like(ends)
    experts = max(64, triton.next_power_of_2(ends.numel()))
    _padded_ends_kernel[(1,)](ends, padded, ends.numel(), PADDING=BLOCK, EXPERTS=experts)
    return padded


def transpose_rows(
    rows: Scaled,
    ends: torch.Tensor,
    padded: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    row_pair: torch.Tensor | None = None,
    top_k: int = 0,
) -> Scaled:
    """Return rows [R, C] with scales [R] as [C, P] with scales [E]; columns from ``padded[-1]`` on are unwritten.

    With ``tokens`` [T, C] the data is read from there, by ``row_pair`` [R]: fewer bytes than the rows.
    """
    num_rows, columns = rows.data.shape
    num_experts = ends.numel()
    num_tiles = num_rows // BLOCK + num_experts  # the most that any routing needs
    out = torch.empty((columns, num_tiles * BLOCK), dtype=E4M3, device=rows.data.device)
    scales = torch.empty(num_experts, dtype=torch.float32, device=rows.data.device)
    _expert_scales_kernel[(num_experts,)](rows.scales, ends, scales, BLOCK=1024)
    _transpose_kernel[(num_tiles, triton.cdiv(columns, BLOCK))](
        rows.data if tokens is None else tokens,
        row_pair,
        rows.scales,
        scales,
        ends,
        padded,
        out,
        num_experts,
        columns,
        out.shape[1],
        TILE=BLOCK,
        COLUMNS=BLOCK,
        EXPERTS=max(64, triton.next_power_of_2(num_experts)),
        TOP_K=0 if tokens is None else top_k,
    )
    return Scaled(data=out, scales=scales)


def quantise_weight(weight: torch.Tensor, largest: torch.Tensor) -> tuple[Scaled, Scaled]:
    """Return weight [E, N, K] in e4m3 as [E, N, K] and as [K, E * N'], N' a multiple of 128; scales of both [E].

    ``largest`` [E] fp32: at least the largest absolute element of each expert.
    """
    num_experts, n, k = weight.shape
    tiles_n = triton.cdiv(n, BLOCK)
    rows = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    columns = torch.empty((k, num_experts * tiles_n * BLOCK), dtype=E4M3, device=weight.device)
    scales = torch.empty(num_experts, dtype=torch.float32, device=weight.device)
    _quantise_weight_kernel[(num_experts * tiles_n, triton.cdiv(k, BLOCK))](
        weight, largest, rows, columns, scales, n, k, columns.shape[1], TILE=BLOCK, num_warps=8
    )
    return Scaled(data=rows, scales=scales), Scaled(data=columns, scales=scales)
