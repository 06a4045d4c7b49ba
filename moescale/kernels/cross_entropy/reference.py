"""The passes of the cross-entropy in plain torch: losses and gradient of a chunk's logits, scaled gradients."""

from __future__ import annotations

import torch


def softmax_losses(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [T] fp32 of ``logits`` [T, V] and, where wanted, the gradient of the logits in their dtype."""
    is_target = targets != ignore_index
    ids = targets.where(is_target, 0).unsqueeze(1)
    log_probabilities = logits.float().log_softmax(-1)
    losses = -log_probabilities.gather(1, ids).squeeze(1) * is_target
    if not wants_grad:
        return losses, logits
    gradient = log_probabilities.exp_().scatter_add_(1, ids, -torch.ones_like(ids, dtype=torch.float32))
    return losses, (gradient * is_target.unsqueeze(1)).to(logits.dtype)


def scaled(source: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``source * scale``, multiplied in fp32 and rounded once."""
    return torch.mul(source.float(), scale).to(source.dtype)


def add_scaled(target: torch.Tensor, source: torch.Tensor, scale: torch.Tensor) -> None:
    """Add ``source * scale`` to ``target`` in fp32, rounded once."""
    target.copy_(torch.addcmul(target.float(), source.float(), scale))
