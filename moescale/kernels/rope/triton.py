"""Triton kernels of :mod:`moescale.kernels.rope`: one program per token moves all its heads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.rows import with_unit_stride


@triton.jit
def _rotate(x, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr, INVERSE: tl.constexpr):
    """Rotate adjacent pairs of [HEADS, 2 * PAIRS] in fp32; ``INVERSE`` applies the transposed matrix."""
    first, second = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    if INVERSE:
        sin = -sin
    rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(rotated, (HEADS, 2 * PAIRS))


@triton.jit
def _tables(cos_ptr, sin_ptr, position, rope_dim, PAIRS: tl.constexpr):
    pairs = tl.arange(0, PAIRS)[None, :]
    mask = pairs < rope_dim // 2
    offset = position * (rope_dim // 2) + pairs
    return tl.load(cos_ptr + offset, mask=mask, other=0.0), tl.load(sin_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _copy(source_ptr, target_ptr, heads, source_stride, target_stride, num_heads, dim, BLOCK: tl.constexpr):
    """Copy [num_heads, dim] between rows of different strides."""
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (heads < num_heads) & (cols < dim)
    value = tl.load(source_ptr + heads * source_stride + cols, mask=mask)
    tl.store(target_ptr + heads * target_stride + cols, value, mask=mask)


@triton.jit
def _forward_kernel(
    q_ptr, kv_ptr, k_rope_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    sequence_length, num_heads, nope_dim, rope_dim, value_dim,
    q_token, q_head, kv_token, kv_head, k_rope_token,
    HEADS: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    cols = tl.arange(0, 2 * PAIRS)[None, :]
    rope_mask = (heads < num_heads) & (cols < rope_dim)
    cos, sin = _tables(cos_ptr, sin_ptr, token % sequence_length, rope_dim, PAIRS)
    query_dim = nope_dim + rope_dim
    q_ptr += token * q_token
    kv_ptr += token * kv_token
    q_out_ptr += token * num_heads * query_dim
    k_out_ptr += token * num_heads * query_dim
    v_out_ptr += token * num_heads * value_dim

    q_rope = tl.load(q_ptr + heads * q_head + nope_dim + cols, mask=rope_mask, other=0.0).to(tl.float32)
    k_rope = tl.load(k_rope_ptr + token * k_rope_token + cols, mask=cols < rope_dim, other=0.0).to(tl.float32)
    _copy(q_ptr, q_out_ptr, heads, q_head, query_dim, num_heads, nope_dim, NOPE)
    _copy(kv_ptr, k_out_ptr, heads, kv_head, query_dim, num_heads, nope_dim, NOPE)
    _copy(kv_ptr + nope_dim, v_out_ptr, heads, kv_head, value_dim, num_heads, value_dim, VALUE)
    q_rotated = _rotate(q_rope, cos, sin, HEADS, PAIRS, False)
    k_rotated = tl.broadcast_to(_rotate(k_rope, cos, sin, 1, PAIRS, False), (HEADS, 2 * PAIRS))
    out = heads * query_dim + nope_dim + cols
    tl.store(q_out_ptr + out, q_rotated, mask=rope_mask)
    tl.store(k_out_ptr + out, k_rotated, mask=rope_mask)


@triton.jit
def _backward_kernel(
    grad_q_ptr, grad_k_ptr, grad_v_ptr, cos_ptr, sin_ptr, q_out_ptr, kv_out_ptr, k_rope_out_ptr,
    sequence_length, num_heads, nope_dim, rope_dim, value_dim,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    HEADS: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // sequence_length, token % sequence_length
    heads = tl.arange(0, HEADS)[:, None]
    cols = tl.arange(0, 2 * PAIRS)[None, :]
    rope_mask = (heads < num_heads) & (cols < rope_dim)
    cos, sin = _tables(cos_ptr, sin_ptr, position, rope_dim, PAIRS)
    query_dim = nope_dim + rope_dim
    kv_dim = nope_dim + value_dim
    grad_q_ptr += batch * q_batch + position * q_token
    grad_k_ptr += batch * k_batch + position * k_token
    grad_v_ptr += batch * v_batch + position * v_token
    q_out_ptr += token * num_heads * query_dim
    kv_out_ptr += token * num_heads * kv_dim

    q_rope = tl.load(grad_q_ptr + heads * q_head + nope_dim + cols, mask=rope_mask, other=0.0).to(tl.float32)
    k_rope = tl.load(grad_k_ptr + heads * k_head + nope_dim + cols, mask=rope_mask, other=0.0).to(tl.float32)
    _copy(grad_q_ptr, q_out_ptr, heads, q_head, query_dim, num_heads, nope_dim, NOPE)
    _copy(grad_k_ptr, kv_out_ptr, heads, k_head, kv_dim, num_heads, nope_dim, NOPE)
    _copy(grad_v_ptr, kv_out_ptr + nope_dim, heads, v_head, kv_dim, num_heads, value_dim, VALUE)
    q_rotated = _rotate(q_rope, cos, sin, HEADS, PAIRS, True)
    tl.store(q_out_ptr + heads * query_dim + nope_dim + cols, q_rotated, mask=rope_mask)
    # The heads share one rotated key: their gradients add up before the rotation is undone.
    k_rope_sum = tl.sum(k_rope, axis=0, keep_dims=True)
    k_rotated = _rotate(k_rope_sum, cos, sin, 1, PAIRS, True)
    tl.store(k_rope_out_ptr + token * rope_dim + cols, k_rotated, mask=cols < rope_dim)


def _per_token(x: torch.Tensor) -> torch.Tensor:
    """Merge batch and sequence of [B, S, ...]; copies only where they do not share one stride."""
    return with_unit_stride(x).flatten(0, 1)


def _blocks(num_heads: int, nope_dim: int, rope_dim: int, value_dim: int) -> dict[str, int]:
    return {
        "HEADS": triton.next_power_of_2(num_heads),
        "NOPE": triton.next_power_of_2(nope_dim),
        "PAIRS": triton.next_power_of_2(rope_dim // 2),
        "VALUE": triton.next_power_of_2(value_dim),
        "num_warps": 4 if num_heads <= 16 else 8,
    }


def forward(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value as :func:`moescale.kernels.rope.mla_rope` does, contiguous."""
    batch, length, num_heads, query_dim = q.shape
    rope_dim = k_rope.shape[-1]
    nope_dim = query_dim - rope_dim
    value_dim = kv.shape[-1] - nope_dim
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    v_out = torch.empty((batch, length, num_heads, value_dim), dtype=q.dtype, device=q.device)
    q, kv, k_rope = _per_token(q), _per_token(kv), _per_token(k_rope)
    if batch * length:
        _forward_kernel[(batch * length,)](
            q, kv, k_rope, cos.contiguous(), sin.contiguous(), q_out, k_out, v_out,
            length, num_heads, nope_dim, rope_dim, value_dim,
            q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), k_rope.stride(0),
            **_blocks(num_heads, nope_dim, rope_dim, value_dim),
        )  # fmt: skip
    return q_out, k_out, v_out


def backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, kv and k_rope, contiguous."""
    batch, length, num_heads, query_dim = grad_q.shape
    rope_dim, value_dim = 2 * cos.shape[-1], grad_v.shape[-1]
    nope_dim = query_dim - rope_dim
    q_out = torch.empty(grad_q.shape, dtype=grad_q.dtype, device=grad_q.device)
    kv_out = torch.empty((batch, length, num_heads, nope_dim + value_dim), dtype=grad_q.dtype, device=grad_q.device)
    k_rope_out = torch.empty((batch, length, rope_dim), dtype=grad_q.dtype, device=grad_q.device)
    # Attention returns gradients in [B, N, S, D] memory order: batch, token and head strides are all needed.
    grad_q, grad_k, grad_v = with_unit_stride(grad_q), with_unit_stride(grad_k), with_unit_stride(grad_v)
    if batch * length:
        _backward_kernel[(batch * length,)](
            grad_q, grad_k, grad_v, cos.contiguous(), sin.contiguous(), q_out, kv_out, k_rope_out,
            length, num_heads, nope_dim, rope_dim, value_dim,
            *grad_q.stride()[:3], *grad_k.stride()[:3], *grad_v.stride()[:3],
            **_blocks(num_heads, nope_dim, rope_dim, value_dim),
        )  # fmt: skip
    return q_out, kv_out, k_rope_out
