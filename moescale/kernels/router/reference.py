"""The router in plain torch: the definition, differentiable."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    topk_ids: torch.Tensor
    """[T, K] int32: the chosen experts, most probable first."""
    topk_weights: torch.Tensor
    """[T, K] fp32: what each chosen expert's output is multiplied by. Differentiable."""
    tokens_per_expert: torch.Tensor
    """[E] int32: routed rows each expert receives."""
    aux_loss: torch.Tensor
    """Scalar fp32: the load-balancing loss, not yet times ``aux_loss_alpha``. Differentiable."""


def route(
    logits: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    normalize: bool,
    scaling: float,
    num_sequences: int,
) -> Routing:
    """As :func:`moescale.kernels.router.route`, whose arguments it takes checked."""
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(dim=-1)
    candidates = probabilities.detach()
    if num_groups > 1:
        candidates = _mask_groups(candidates, num_groups, top_k_groups)
    topk_ids = candidates.topk(top_k, dim=-1).indices
    topk_weights = probabilities.gather(1, topk_ids)
    if normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    else:
        topk_weights = topk_weights * scaling

    counts = torch.zeros(num_sequences, num_experts, dtype=torch.float32, device=logits.device)
    chosen = topk_ids.view(num_sequences, -1)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float32))
    # Relative load: 1 where an expert gets exactly its share.
    load = counts * (num_experts * num_sequences / (max(num_tokens, 1) * top_k))
    mean_probabilities = probabilities.view(num_sequences, -1, num_experts).mean(1)
    aux_loss = (load * mean_probabilities).sum(1).mean()
    return Routing(topk_ids.to(torch.int32), topk_weights, counts.sum(0).to(torch.int32), aux_loss)


def _mask_groups(probabilities: torch.Tensor, num_groups: int, top_k_groups: int) -> torch.Tensor:
    grouped = probabilities.unflatten(-1, (num_groups, -1))  # [T, groups, E / groups]
    chosen = grouped.amax(-1).topk(top_k_groups, dim=-1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter_(1, chosen, True)
    # Below every probability, so that a probability that underflowed to 0 still wins over a masked one.
    return grouped.masked_fill(~allowed.unsqueeze(-1), -1.0).flatten(1)
