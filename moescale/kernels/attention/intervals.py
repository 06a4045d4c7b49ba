"""The operator that runs attention's Triton kernels, with its gradients."""

from __future__ import annotations

import torch
from torch.library import custom_op


@custom_op("moescale::interval_attention", mutates_args=())
def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`moescale.kernels.attention.attention`, and the base-2 logarithms of the sums [B, N, S] fp32.

    ``first`` and ``last`` are those of :class:`Documents`.
    """
    from moescale.kernels.attention import triton

    return triton.forward(q, k, v, first, window, sinks, softmax_scale)


@interval_attention.register_fake
def _(q, k, v, first, last, window, sinks, softmax_scale):
    batch, length, heads, _ = q.shape
    return v.new_empty((batch, length, heads, v.shape[-1])), q.new_empty((batch, heads, length), dtype=torch.float32)


@custom_op("moescale::interval_attention_backward", mutates_args=())
def _interval_attention_backward(
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
    from moescale.kernels.attention import triton

    return triton.backward(grad, q, k, v, out, sums, first, last, window, sinks, softmax_scale)


@_interval_attention_backward.register_fake
def _(grad, q, k, v, out, sums, first, last, window, sinks, softmax_scale):
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _setup(ctx, inputs, output) -> None:
    q, k, v, first, last, ctx.window, sinks, ctx.softmax_scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, first, last, sinks)


def _autograd(ctx, grad, _):
    q, k, v, out, sums, first, last, sinks = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_sinks = _interval_attention_backward(
        grad, q, k, v, out, sums, first, last, ctx.window, sinks, ctx.softmax_scale
    )
    return grad_q, grad_k, grad_v, None, None, None, grad_sinks if sinks is not None else None, None


interval_attention.register_autograd(_autograd, setup_context=_setup)
