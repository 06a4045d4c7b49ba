"""The router: which experts each token goes to, with which weights, and the load-balancing loss.

Source: DeepSeek-V2 (arXiv:2405.04434, sections 2.2.1 and 2.2.2) and its published modelling code. The softmax runs
over all experts before group limiting; gradients flow through probabilities only, never through the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


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


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weight.T`` in fp32: products of bf16 inputs are exact, sums are fp32.

    Shapes: x [T, H]; weight [E, H]; result [T, E] fp32.
    """
    return F.linear(x.float(), weight.float())


def route(
    logits: torch.Tensor,
    *,
    top_k: int,
    group_limited: bool,
    normalize_topk: bool,
    routed_scaling_factor: float,
    num_sequences: int | None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    backend: str = "auto",
) -> Routing:
    """Choose ``top_k`` experts per token from ``logits`` [T, E] fp32.

    ``group_limited`` first keeps the ``top_k_groups`` groups (of E / num_groups neighbouring experts) with the highest
    maximum. With ``normalize_topk`` and top_k > 1 the weights are divided by their sum, otherwise multiplied by
    ``routed_scaling_factor``. The auxiliary loss balances the T tokens as a whole, or each of ``num_sequences`` equal
    sequences by itself and is then their mean.
    """
    del backend
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(dim=-1)
    candidates = probabilities.detach()
    if group_limited:
        candidates = _mask_groups(candidates, num_groups, top_k_groups)
    topk_ids = candidates.topk(top_k, dim=-1).indices
    topk_weights = probabilities.gather(1, topk_ids)
    if normalize_topk and top_k > 1:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    else:
        topk_weights = topk_weights * routed_scaling_factor

    sequences = 1 if num_sequences is None else num_sequences
    counts = torch.zeros(sequences, num_experts, dtype=torch.float32, device=logits.device)
    counts.scatter_add_(1, topk_ids.view(sequences, -1), torch.ones_like(topk_weights.detach().view(sequences, -1)))
    # Relative load: 1 where an expert gets exactly its share.
    load = counts * (num_experts * sequences / (num_tokens * top_k))
    mean_probabilities = probabilities.view(sequences, -1, num_experts).mean(1)
    aux_loss = (load * mean_probabilities).sum(1).mean()
    return Routing(topk_ids.to(torch.int32), topk_weights, counts.sum(0).to(torch.int32), aux_loss)


def _mask_groups(probabilities: torch.Tensor, num_groups: int, top_k_groups: int) -> torch.Tensor:
    grouped = probabilities.unflatten(-1, (num_groups, -1))  # [T, groups, E / groups]
    chosen = grouped.amax(-1).topk(top_k_groups, dim=-1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter_(1, chosen, True)
    # Below every probability, so that a probability that underflowed to 0 still wins over a masked one.
    return grouped.masked_fill(~allowed.unsqueeze(-1), -1.0).flatten(1)
