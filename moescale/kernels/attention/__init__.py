"""Causal attention with different widths of key and value, kept within documents where asked.

On CUDA cuDNN comes first: of the kernels that PyTorch has for a key wider than the value it is the fastest by a factor
of two to three, and needs no padding of the value. Where it refuses (fp32, odd widths), PyTorch's next kernel runs. On
Hopper the optional package flash-attn-4 is faster still, most of all within documents, where it needs no mask
(:mod:`moescale.kernels.attention.cute`).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moescale.kernels.backends import check_dtype, check_shape, choose_attention_backend

PREFERENCE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LEAST_OFFSETS = 64


class Documents(NamedTuple):
    """Where documents lie in the sequences of a micro-batch."""

    ids: torch.Tensor
    """[B, S] int32: the tokens of a document, and no others of their sequence, have the same."""
    offsets: torch.Tensor
    """int32: where each document begins in the tokens [B * S], in order; then B * S, at least once."""

    @classmethod
    def from_starts(cls, starts: torch.Tensor, device: torch.device, least_offsets: int = LEAST_OFFSETS) -> Documents:
        """Return the documents that begin where ``starts`` [B, S] bool, on the CPU, says; and with each sequence.

        The length of ``offsets`` is a power of two of at least ``least_offsets``: what is compiled or recorded for one
        length serves all micro-batches of at most as many documents.
        """
        starts = starts.clone()
        starts[:, 0] = True
        begins = starts.flatten().nonzero().flatten().to(torch.int32)
        length = max(least_offsets, 1 << len(begins).bit_length())
        offsets = F.pad(begins, (0, length - len(begins)), value=starts.numel())
        ids = starts.cumsum(-1, dtype=torch.int32)
        if device.type == "cuda":
            ids, offsets = ids.pin_memory(), offsets.pin_memory()
        return cls(ids.to(device, non_blocking=True), offsets.to(device, non_blocking=True))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    documents: Documents | None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return ``softmax(softmax_scale * q @ k.T + mask) @ v``.

    Shapes: q, k [B, S, N, Dn+Dr]; v [B, S, N, Dv]; result [B, S, N, Dv]. A token sees itself and earlier tokens, with
    ``documents`` only those of its own document. Raises KernelInputError for what does not fit.
    """
    check_shape("attention", "q", q, (None,) * 4, "[B, S, N, Dn+Dr]")
    check_shape("attention", "k", k, q.shape, "the shape of q")
    check_shape("attention", "v", v, (*q.shape[:3], None), "[B, S, N, Dv]")
    for name, tensor in (("k", k), ("v", v)):
        check_dtype("attention", name, tensor, (q.dtype,))
    if documents is not None:
        check_shape("attention", "documents.ids", documents.ids, q.shape[:2], "[B, S]")
    if choose_attention_backend(q.device, q.dtype, (q.shape[-1], v.shape[-1]), backend) == "cute":
        return _cute_attention(q, k, v, None if documents is None else documents.offsets, softmax_scale)[0]
    mask = None if documents is None else _document_mask(documents.ids)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(PREFERENCE, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=softmax_scale)
    return out.transpose(1, 2)


def _document_mask(ids: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [B, 1, S, S], true where the row's token may see the column's."""
    return (ids[:, :, None] == ids[:, None, :]).tril().unsqueeze(1)


def _cute() -> ModuleType:
    return importlib.import_module("moescale.kernels.attention.cute")


@torch.library.custom_op("moescale::cute_attention", mutates_args=())
def _cute_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor | None, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result, fp32 logarithms of the sums of exponentials, in the package's layout)."""
    return _cute().forward(q, k, v, offsets, softmax_scale)


@_cute_attention.register_fake
def _(q, k, v, offsets, softmax_scale):
    batch, length, heads, _ = q.shape
    sums = (batch, heads, length) if offsets is None else (heads, batch * length)
    return v.new_empty(v.shape), q.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op("moescale::cute_attention_backward", mutates_args=())
def _cute_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    offsets: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _cute().backward(grad, q, k, v, out, sums, offsets, softmax_scale)


@_cute_attention_backward.register_fake
def _(grad, q, k, v, out, sums, offsets, softmax_scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cute_setup(ctx, inputs, output) -> None:
    q, k, v, offsets, ctx.softmax_scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, offsets)


def _cute_autograd(ctx, grad, _):
    return *_cute_attention_backward(grad, *ctx.saved_tensors, ctx.softmax_scale), None, None


_cute_attention.register_autograd(_cute_autograd, setup_context=_cute_setup)
