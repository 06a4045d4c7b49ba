"""Cross-entropy of a linear layer's logits, without ever holding a micro-batch's logits.

Tokens go through in chunks. Where gradients are wanted they are computed in the same pass, while a chunk's logits
exist; the backward then only multiplies by the incoming gradient (the method of Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 1024


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """Return the sum over target tokens of ``-log softmax(hidden @ weight.T)[target]``, a scalar in fp32.

    Shapes: hidden [T, H]; weight [V, H]; targets [T] int64, ``ignore_index`` where a token has none.
    """
    # Inside a Function, needs_input_grad ignores no_grad: a validation pass must not compute gradients.
    wants_grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, ignore_index, wants_grad and hidden.requires_grad, wants_grad and weight.requires_grad
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, wants_hidden, wants_weight):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits = F.linear(hidden[chunk], weight).float()
            is_target = targets[chunk] != ignore_index
            ids = targets[chunk].where(is_target, 0).unsqueeze(1)
            log_probabilities = logits.log_softmax(-1)
            loss -= (log_probabilities.gather(1, ids).squeeze(1) * is_target).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad_logits = log_probabilities.exp_().scatter_add_(1, ids, -torch.ones_like(ids, dtype=torch.float32))
            grad_logits = (grad_logits * is_target.unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad_loss).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            *(None,) * 4,
        )
