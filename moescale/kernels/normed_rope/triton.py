"""Triton kernels of :mod:`moescale.kernels.normed_rope`: every head is read and written once, fp32 inside.

A program's tile is [TOKENS, HEADS, PAIRS], once for each half of a head, so that a half's elements find their partners
of the other half at the same place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.rows import num_programs, with_unit_stride

# Elements of x that one program holds, the fastest of a sweep on an H200 with 32 and 4 heads of 128.
FORWARD_ELEMENTS, FORWARD_WARPS = 4096, 4
BACKWARD_ELEMENTS, BACKWARD_WARPS = 4096, 8
# Programs of the backward on a multiprocessor.
BACKWARD_PROGRAMS = 2


@triton.jit
def _place(tile, sequence_length, head_blocks, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Tokens of a tile, their batches and positions, [TOKENS, 1, 1], and its heads, [1, HEADS, 1], all in int64."""
    tokens = tile // head_blocks * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    heads = tile % head_blocks * HEADS + tl.arange(0, HEADS)[None, :, None]
    batches, positions = tokens // sequence_length, tokens % sequence_length  # divided in int32, which is faster
    return tokens.to(tl.int64), batches.to(tl.int64), positions.to(tl.int64), heads.to(tl.int64)


@triton.jit
def _halves(ptr, offset, mask, PAIRS: tl.constexpr):
    first = tl.load(ptr + offset, mask=mask, other=0.0)
    return first, tl.load(ptr + offset + PAIRS, mask=mask, other=0.0)


@triton.jit
def _tables(
    cos_ptr, sin_ptr, positions, cols, mask, PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a tile's tokens, of one token once for all heads."""
    offset = positions * PAIRS + cols
    if TOKENS > 1:
        # [TOKENS, 1, PAIRS] gets another layout, and the tile goes to it through shared memory, and back.
        offset = tl.broadcast_to(offset, (TOKENS, HEADS, COLS))
    return tl.load(cos_ptr + offset, mask=mask, other=0.0), tl.load(sin_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _row_sum(x):
    return tl.sum(x, axis=2, keep_dims=True)


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    num_tokens, sequence_length, num_heads, head_blocks, x_batch, x_token, x_head, eps,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tokens, batches, positions, heads = _place(tl.program_id(0), sequence_length, head_blocks, TOKENS, HEADS)
    cols = tl.arange(0, COLS)[None, None, :]
    mask = (tokens < num_tokens) & (cols < PAIRS)
    x_offset = batches * x_batch + positions * x_token + heads * x_head + cols
    first, second = _halves(x_ptr, x_offset, mask, PAIRS)
    dtype = first.dtype
    cos, sin = _tables(cos_ptr, sin_ptr, positions, cols, mask, PAIRS, TOKENS, HEADS, COLS)
    first_weight, second_weight = _halves(weight_ptr, cols, cols < PAIRS, PAIRS)

    first, second = first.to(tl.float32), second.to(tl.float32)
    rstd = tl.rsqrt(_row_sum(first * first + second * second) / (2 * PAIRS) + eps)
    first, second = (first * rstd).to(dtype).to(tl.float32), (second * rstd).to(dtype).to(tl.float32)
    first = (first * first_weight.to(tl.float32)).to(dtype).to(tl.float32)
    second = (second * second_weight.to(tl.float32)).to(dtype).to(tl.float32)
    out_offset = (tokens * num_heads + heads) * (2 * PAIRS) + cols
    tl.store(out_ptr + out_offset, first * cos - second * sin, mask=mask)
    tl.store(out_ptr + out_offset + PAIRS, second * cos + first * sin, mask=mask)


@triton.jit
def _backward_kernel(
    grad_out_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, grad_x_ptr, partial_ptr,
    num_tokens, sequence_length, num_heads, head_blocks, num_tiles,
    grad_batch, grad_token, grad_head, x_batch, x_token, x_head, eps,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Each program walks its share of the tiles and sums the weight's gradient over them, in a fixed order."""
    cols = tl.arange(0, COLS)[None, None, :]
    first_weight, second_weight = _halves(weight_ptr, cols, cols < PAIRS, PAIRS)
    first_weight, second_weight = first_weight.to(tl.float32), second_weight.to(tl.float32)
    first_sum = tl.zeros((TOKENS, HEADS, COLS), dtype=tl.float32)
    second_sum = tl.zeros((TOKENS, HEADS, COLS), dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tokens, batches, positions, heads = _place(tile, sequence_length, head_blocks, TOKENS, HEADS)
        mask = (tokens < num_tokens) & (cols < PAIRS)
        x_offset = batches * x_batch + positions * x_token + heads * x_head + cols
        x_first, x_second = _halves(x_ptr, x_offset, mask, PAIRS)
        grad_offset = batches * grad_batch + positions * grad_token + heads * grad_head + cols
        grad_first, grad_second = _halves(grad_out_ptr, grad_offset, mask, PAIRS)
        cos, sin = _tables(cos_ptr, sin_ptr, positions, cols, mask, PAIRS, TOKENS, HEADS, COLS)

        dtype = x_first.dtype
        first, second = x_first.to(tl.float32), x_second.to(tl.float32)
        rstd = tl.rsqrt(_row_sum(first * first + second * second) / (2 * PAIRS) + eps)
        first, second = first * rstd, second * rstd
        grad_first, grad_second = grad_first.to(tl.float32), grad_second.to(tl.float32)
        turned_first = grad_first * cos + grad_second * sin
        turned_second = grad_second * cos - grad_first * sin
        first_sum += turned_first * first.to(dtype).to(tl.float32)
        second_sum += turned_second * second.to(dtype).to(tl.float32)
        turned_first, turned_second = turned_first * first_weight, turned_second * second_weight
        projection = _row_sum(turned_first * first + turned_second * second) / (2 * PAIRS)
        out_offset = (tokens * num_heads + heads) * (2 * PAIRS) + cols
        tl.store(grad_x_ptr + out_offset, (turned_first - first * projection) * rstd, mask=mask)
        tl.store(grad_x_ptr + out_offset + PAIRS, (turned_second - second * projection) * rstd, mask=mask)
    cols = tl.arange(0, COLS)
    partial = tl.program_id(0) * (2 * PAIRS) + cols
    tl.store(partial_ptr + partial, tl.sum(tl.sum(first_sum, axis=0), axis=0), mask=cols < PAIRS)
    tl.store(partial_ptr + partial + PAIRS, tl.sum(tl.sum(second_sum, axis=0), axis=0), mask=cols < PAIRS)


def _tile(num_heads: int, width: int, elements: int) -> dict[str, int]:
    """A tile's pairs, tokens and heads: its heads divide the model's, so that a tile has no others."""
    cols = triton.next_power_of_2(width // 2)
    rows = max(1, elements // (2 * cols))
    heads = min(num_heads & -num_heads, rows)
    return {"PAIRS": width // 2, "COLS": cols, "TOKENS": rows // heads, "HEADS": heads}


def forward(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the normed and rotated heads, contiguous."""
    batch, length, num_heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = with_unit_stride(x)
    if x.numel():
        tile = _tile(num_heads, width, FORWARD_ELEMENTS)
        head_blocks = num_heads // tile["HEADS"]
        _forward_kernel[(triton.cdiv(batch * length, tile["TOKENS"]) * head_blocks,)](
            x, weight.contiguous(), cos.contiguous(), sin.contiguous(), out,
            batch * length, length, num_heads, head_blocks, *x.stride()[:3], eps,
            **tile, num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return out


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x, contiguous, and of the weight."""
    batch, length, num_heads, width = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return grad_x, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    # Attention returns gradients in [B, N, S, D] memory order: batch, token and head strides are all needed.
    grad_out, x = with_unit_stride(grad_out), with_unit_stride(x)
    tile = _tile(num_heads, width, BACKWARD_ELEMENTS)
    head_blocks = num_heads // tile["HEADS"]
    num_tiles = triton.cdiv(batch * length, tile["TOKENS"]) * head_blocks
    programs = min(num_tiles, num_programs(x.device, per_multiprocessor=BACKWARD_PROGRAMS))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad_out, x, weight.contiguous(), cos.contiguous(), sin.contiguous(), grad_x, partial,
        batch * length, length, num_heads, head_blocks, num_tiles,
        *grad_out.stride()[:3], *x.stride()[:3], eps,
        **tile, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)
