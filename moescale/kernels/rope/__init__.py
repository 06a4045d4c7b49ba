"""Rotary positions and head layout of multi-head latent attention, in one pass: no cat, no expand, no padding of V.

Source: DeepSeek-V2 (arXiv:2405.04434, section 2.1.3). Each head's query and key are a part without positions (Dn) and
a rotated part (Dr); the rotated key is shared by all heads. The published code moves a rotated pair's elements to the
two halves of Dr; here they stay adjacent, which changes neither Q K^T nor the memory order that is read.
"""

from __future__ import annotations

import torch
from torch.library import custom_op

from moescale.kernels.backends import check_dtype, check_shape, runs_triton
from moescale.kernels.rope import reference


def mla_rope(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate the positional parts in fp32 and lay out query, key and value for attention.

    Shapes: q [B, S, N, Dn+Dr]; kv [B, S, N, Dn+Dv]; k_rope [B, S, Dr]; cos, sin [S, Dr/2] fp32, without gradient;
    results q and k [B, S, N, Dn+Dr], v [B, S, N, Dv]. Adjacent elements form a rotated pair and stay adjacent.
    """
    _check(q, kv, k_rope, cos, sin)
    if runs_triton(q.device, q.dtype, backend):
        return _mla_rope_op(q, kv, k_rope, cos, sin)
    return reference.mla_rope(q, kv, k_rope, cos, sin)


def half_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of every head against each other, in fp32 and in plain torch on every device.

    Shapes: x [B, S, N, D]; cos, sin [S, D/2] fp32, without gradient; result as x.
    """
    check_shape("half_rope", "x", x, (None,) * 4, "[B, S, N, D]")
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape("half_rope", name, table, (x.shape[1], x.shape[-1] // 2), "[S, D/2]")
        check_dtype("half_rope", name, table, (torch.float32,))
    return reference.half_rope(x, cos, sin)


def _check(q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    check_shape("mla_rope", "q", q, (None,) * 4, "[B, S, N, Dn+Dr]")
    batch, length, num_heads, _ = q.shape
    check_shape("mla_rope", "kv", kv, (batch, length, num_heads, None), "[B, S, N, Dn+Dv]")
    check_shape("mla_rope", "k_rope", k_rope, (batch, length, None), "[B, S, Dr]")
    pairs = k_rope.shape[-1] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape("mla_rope", name, table, (length, pairs), "[S, Dr/2]")
        check_dtype("mla_rope", name, table, (torch.float32,))
    for name, tensor in (("kv", kv), ("k_rope", k_rope)):
        check_dtype("mla_rope", name, tensor, (q.dtype,))


@custom_op("moescale::mla_rope", mutates_args=())
def _mla_rope_op(
    q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from moescale.kernels.rope import triton

    return triton.forward(q, kv, k_rope, cos, sin)


@_mla_rope_op.register_fake
def _(q, kv, k_rope, cos, sin):
    value_dim = kv.shape[-1] - (q.shape[-1] - k_rope.shape[-1])
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty((*q.shape[:3], value_dim))


@custom_op("moescale::mla_rope_backward", mutates_args=())
def _mla_rope_backward_op(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from moescale.kernels.rope import triton

    return triton.backward(grad_q, grad_k, grad_v, cos, sin)


@_mla_rope_backward_op.register_fake
def _(grad_q, grad_k, grad_v, cos, sin):
    rope_dim = 2 * cos.shape[-1]
    kv_dim = grad_q.shape[-1] - rope_dim + grad_v.shape[-1]
    return (
        grad_q.new_empty(grad_q.shape),
        grad_q.new_empty((*grad_q.shape[:3], kv_dim)),
        grad_q.new_empty((*grad_q.shape[:2], rope_dim)),
    )


def _save(ctx, inputs, output):
    _, _, _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_q, grad_k, grad_v):
    return (*_mla_rope_backward_op(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None)


_mla_rope_op.register_autograd(_backward, setup_context=_save)
