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

from moescale.kernels.attention.backward_triton import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_delta_kernel,
)
from moescale.kernels.attention.forward_triton import attention_forward_kernel
from moescale.kernels.attention.launch_config import Kernel, Launch, launch_for
from moescale.kernels.attention.tiles_triton import LOG2_E
from moescale.kernels.backends import attention_parts

DELTA_ROWS = 64


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
        attention_forward_kernel[(triton.cdiv(length, launch.rows), batch * heads)](
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
        attention_delta_kernel[(triton.cdiv(length, DELTA_ROWS), batch * heads)](
            out, grad, delta, length, heads, *grad_strides, V_WIDTH=v.shape[-1], ROWS=DELTA_ROWS
        )
        scales = (softmax_scale * LOG2_E.value, softmax_scale, window or 0)
        strides = (*_strides(q, k, v), *grad_strides)
        launch = _launch("backward_keys", q, v)
        attention_backward_keys_kernel[(triton.cdiv(length, launch.columns), batch * kv_heads)](
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
        attention_backward_queries_kernel[(triton.cdiv(length, launch.rows), batch * heads)](
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
