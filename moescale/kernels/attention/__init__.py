"""Attention in which a query sees an interval of keys that ends with its own: causal, kept within documents, windowed.

Keys and values may have widths of their own and fewer heads than the queries, and heads may have sinks. Where nothing
but causality is asked for, PyTorch takes the first of its kernels that can run: on an H100 or B200 cuDNN, which is
faster there by a factor of two to three and needs no padding of the value. The order is PyTorch's own, made at the
first attention of a process. It is not set here: a context around that first one would end by restoring the order from
before, and other models of the process would run in a slower kernel from then on.

Documents, windows and sinks run in Triton, without a mask (:mod:`moescale.kernels.attention.triton`). On Hopper the
optional package flash-attn-4 comes before both (:mod:`moescale.kernels.attention.cute`), but for windows, where Triton
is faster, and plain causal attention 256 wide, where cuDNN is.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F

from moescale.kernels.attention import reference
from moescale.kernels.attention.documents import LEAST_OFFSETS as LEAST_OFFSETS
from moescale.kernels.attention.documents import Documents as Documents
from moescale.kernels.attention.documents import visible_keys
from moescale.kernels.attention.intervals import interval_attention
from moescale.kernels.backends import (
    AttentionFeature,
    KernelInputError,
    check_dtype,
    check_shape,
    choose_attention_backend,
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    documents: Documents | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return ``softmax(softmax_scale * q @ k.T + mask) @ v``.

    Shapes: q [B, S, N, Dqk], k [B, S, Nkv, Dqk], v [B, S, Nkv, Dv]; result [B, S, N, Dv]. Nkv divides N, and the heads
    n of the queries share head ``n // (N // Nkv)`` of the keys. A token sees itself and earlier tokens, with
    ``documents`` only those of its own document, with ``window`` only the last so many, itself included. ``sinks`` [N]
    are scores of a key with value zero that all queries of a head see. Raises KernelInputError for what does not fit.
    """
    _check(q, k, v, softmax_scale, documents, window, sinks)
    features = _features(q, k, window, sinks)
    chosen = choose_attention_backend(
        q.device, q.dtype, (q.shape[-1], v.shape[-1]), backend, documents=documents is not None, features=features
    )
    if chosen == "cute":
        offsets = None if documents is None else documents.offsets
        return _cute_attention(q, k, v, offsets, window, sinks, softmax_scale)[0]
    if chosen == "triton":
        first, last = (None, None) if documents is None else (documents.first, documents.last)
        return interval_attention(q, k, v, first, last, window, sinks, softmax_scale)[0]
    return _torch_attention(q, k, v, softmax_scale, documents, window, sinks)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    documents: Documents | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> None:
    check_shape("attention", "q", q, (None,) * 4, "[B, S, N, Dqk]")
    batch, length, heads, width = q.shape
    check_shape("attention", "k", k, (batch, length, None, width), "[B, S, Nkv, Dqk]")
    check_shape("attention", "v", v, (*k.shape[:3], None), "[B, S, Nkv, Dv]")
    for name, tensor in (("k", k), ("v", v)):
        check_dtype("attention", name, tensor, (q.dtype,))
    if not k.shape[2] or heads % k.shape[2]:
        raise KernelInputError(f"attention: k has {k.shape[2]} heads; they must divide the {heads} of q")
    if softmax_scale <= 0:
        raise KernelInputError(f"attention: softmax_scale ({softmax_scale}) must be positive")
    if window is not None and window < 1:
        raise KernelInputError(f"attention: window ({window}) must be at least 1, the token itself, or None")
    if documents is not None:
        for name in ("first", "last"):
            check_shape("attention", f"documents.{name}", getattr(documents, name), (batch, length), "[B, S]")
    if sinks is not None:
        check_shape("attention", "sinks", sinks, (heads,), "[N]")
        check_dtype("attention", "sinks", sinks, (q.dtype, torch.float32))


def _features(
    q: torch.Tensor, k: torch.Tensor, window: int | None, sinks: torch.Tensor | None
) -> tuple[AttentionFeature, ...]:
    """What is asked for beyond causality and documents."""
    asked: dict[AttentionFeature, bool] = {
        "windows": window is not None,
        "sinks": sinks is not None,
        "grouped queries": k.shape[2] != q.shape[2],
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


def _torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    documents: Documents | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """PyTorch's kernels, with a mask of S x S for anything but causality; by the definition where heads have sinks."""
    visible = None
    if documents is not None or window is not None or sinks is not None:
        visible = visible_keys(q.shape[1], documents, window, q.device)
    if sinks is not None:
        assert visible is not None
        return reference.attention(q, k, v, visible, sinks, softmax_scale)
    mask = None if visible is None else visible.unsqueeze(1)
    is_grouped = k.shape[2] != q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=softmax_scale, enable_gqa=is_grouped
    )
    return out.transpose(1, 2)


def _cute() -> ModuleType:
    return importlib.import_module("moescale.kernels.attention.cute")


@torch.library.custom_op("moescale::cute_attention", mutates_args=())
def _cute_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result, fp32 logarithms of the sums of exponentials, in the package's layout)."""
    return _cute().forward(q, k, v, offsets, window, sinks, softmax_scale)


@_cute_attention.register_fake
def _(q, k, v, offsets, window, sinks, softmax_scale):
    batch, length, heads, _ = q.shape
    sums = (batch, heads, length) if offsets is None else (heads, batch * length)
    return v.new_empty((batch, length, heads, v.shape[-1])), q.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op("moescale::cute_attention_backward", mutates_args=())
def _cute_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    offsets: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and the sinks, the last one empty without them."""
    return _cute().backward(grad, q, k, v, out, sums, offsets, window, sinks, softmax_scale)


@_cute_attention_backward.register_fake
def _(grad, q, k, v, out, sums, offsets, window, sinks, softmax_scale):
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _cute_setup(ctx, inputs, output) -> None:
    q, k, v, offsets, ctx.window, sinks, ctx.softmax_scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, offsets, sinks)


def _cute_autograd(ctx, grad, _):
    *operands, offsets, sinks = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_sinks = _cute_attention_backward(
        grad, *operands, offsets, ctx.window, sinks, ctx.softmax_scale
    )
    return grad_q, grad_k, grad_v, None, None, grad_sinks if sinks is not None else None, None


_cute_attention.register_autograd(_cute_autograd, setup_context=_cute_setup)
