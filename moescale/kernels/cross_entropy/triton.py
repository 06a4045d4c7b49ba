"""Triton kernels of :mod:`moescale.kernels.cross_entropy`: losses of a chunk, its logits replaced by their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_VOCABULARY = 4096


@triton.jit
def _softmax_kernel(
    logits_ptr, targets_ptr, losses_ptr, vocabulary, row_stride, ignore_index,
    WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: running maximum and sum, then, on request, ``softmax - onehot`` over the logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    is_target = target != ignore_index
    logits_ptr += row * row_stride
    cols = tl.arange(0, BLOCK)
    # Per lane of the block, so that the reduction over lanes happens once.
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        mask = first + cols < vocabulary
        logits = tl.load(logits_ptr + first + cols, mask=mask, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, logits)
        # A lane that has seen nothing yet holds -inf: subtracting it would give NaN.
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe_top) + tl.exp(logits - safe_top)
        top = new_top
    row_top = tl.max(top, axis=0)
    normalizer = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
    target_logit = tl.load(logits_ptr + target, mask=is_target & (target >= 0) & (target < vocabulary), other=0.0)
    tl.store(losses_ptr + row, tl.where(is_target, normalizer - target_logit.to(tl.float32), 0.0))
    if WRITE_GRADIENT:
        # The target's logit must be read by every warp before its place is overwritten.
        tl.debug_barrier()
        for first in range(0, vocabulary, BLOCK):
            mask = first + cols < vocabulary
            logits = tl.load(logits_ptr + first + cols, mask=mask, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(logits - normalizer) - tl.where(first + cols == target, 1.0, 0.0)
            tl.store(logits_ptr + first + cols, tl.where(is_target, gradient, 0.0), mask=mask)


@triton.jit
def _scale_kernel(source_ptr, scale_ptr, target_ptr, numel, ADD: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    value = tl.load(source_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    if ADD:
        value += tl.load(target_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(target_ptr + offsets, value, mask=mask)


def softmax_losses(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, write_gradient: bool
) -> torch.Tensor:
    """Return the tokens' losses [T] fp32; ``write_gradient`` overwrites ``logits`` [T, V] with their gradient."""
    num_tokens, vocabulary = logits.shape
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _softmax_kernel[(num_tokens,)](
            logits, targets, losses, vocabulary, logits.stride(0), ignore_index,
            WRITE_GRADIENT=write_gradient, BLOCK=min(BLOCK_VOCABULARY, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return losses


def scaled(source: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``source * scale`` (a scalar on the device), rounded once."""
    target = torch.empty_like(source)
    _scale(source, scale, target, add=False)
    return target


def add_scaled(target: torch.Tensor, source: torch.Tensor, scale: torch.Tensor) -> None:
    """``target += source * scale``, rounded once."""
    _scale(source, scale, target, add=True)


def _scale(source: torch.Tensor, scale: torch.Tensor, target: torch.Tensor, *, add: bool) -> None:
    block, numel = 4096, source.numel()
    if numel:
        _scale_kernel[(triton.cdiv(numel, block),)](source, scale, target, numel, ADD=add, BLOCK=block)
