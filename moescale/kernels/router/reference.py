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
    load: torch.Tensor
    """[E] int32: of the rows each expert receives, those of tokens that count and are no padding."""


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    counted: torch.Tensor | None,
    padding: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    normalize: bool,
    scaling: float,
    num_sequences: int,
) -> Routing:
    """As :func:`moescale.kernels.router.route`, whose arguments it takes checked."""
    if bias is not None:
        return _route_by_sigmoid(
            logits, bias, counted, padding, top_k, num_groups, top_k_groups, normalize, scaling, num_sequences
        )
    num_experts = logits.shape[1]
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

    aux_loss = _balance(topk_ids, probabilities, padding, num_sequences)
    rows, load = _rows_and_load(topk_ids, counted, padding, num_experts)
    return Routing(topk_ids.to(torch.int32), topk_weights, rows, aux_loss, load)


def _route_by_sigmoid(
    logits: torch.Tensor,
    bias: torch.Tensor,
    counted: torch.Tensor | None,
    padding: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    normalize: bool,
    scaling: float,
    num_sequences: int,
) -> Routing:
    num_experts = logits.shape[1]
    scores = logits.sigmoid()
    candidates = scores.detach() + bias
    if num_groups > 1:
        grouped = candidates.unflatten(-1, (num_groups, -1))  # [T, groups, E / groups]
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        candidates = _keep_groups(grouped, group_scores, top_k_groups, -torch.inf)
    topk_ids = candidates.topk(top_k, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        if top_k == 1:  # a constant, to which rounding would give a gradient
            topk_weights = topk_weights.detach()
    topk_weights = topk_weights * scaling

    # The loss balances what the scores alone would choose, group limits and bias left out.
    preferred = scores.detach().topk(top_k, dim=-1).indices
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    aux_loss = _balance(preferred, shares, padding, num_sequences)
    rows, load = _rows_and_load(topk_ids, counted, padding, num_experts)
    return Routing(topk_ids.to(torch.int32), topk_weights, rows, aux_loss, load)


def _rows_and_load(
    ids: torch.Tensor, counted: torch.Tensor | None, padding: torch.Tensor | None, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often tokens chose each expert, [E] int32: all of ``ids`` [T, K], and those that count and are no padding."""
    rows = _count(ids, 1, num_experts)[0].to(torch.int32)
    if counted is None and padding is None:
        return rows, rows
    counts = torch.ones(len(ids), dtype=torch.bool, device=ids.device) if counted is None else counted
    if padding is not None:
        counts = counts & ~padding
    return rows, _count(ids, 1, num_experts, counts)[0].to(torch.int32)


def _count(
    ids: torch.Tensor, num_sequences: int, num_experts: int, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, K] -> [sequences, E] fp32: how often tokens chose each expert, all or those that are ``counted`` [T] bool."""
    counts = torch.zeros(num_sequences, num_experts, dtype=torch.float32, device=ids.device)
    chosen = ids.reshape(num_sequences, -1)
    ones = torch.ones_like(chosen, dtype=torch.float32)
    if counted is not None:
        ones = counted[:, None].expand_as(ids).reshape(num_sequences, -1).float()
    return counts.scatter_add_(1, chosen, ones)


def _balance(ids: torch.Tensor, shares: torch.Tensor, padding: torch.Tensor | None, num_sequences: int) -> torch.Tensor:
    """The load-balancing loss of the experts that tokens prefer, [T, K], and of their shares [T, E]."""
    top_k, num_experts = ids.shape[1], shares.shape[1]
    of_sequences = shares.view(num_sequences, -1, num_experts)
    # Relative load: 1 where an expert gets exactly its share.
    if padding is None:
        counts = _count(ids, num_sequences, num_experts)
        load = counts * (num_experts * num_sequences / (max(shares.shape[0], 1) * top_k))
        mean_shares = of_sequences.mean(1)
    else:
        is_text = ~padding
        num_tokens = is_text.view(num_sequences, -1, 1).sum(1).clamp(min=1)  # [sequences, 1]
        load = _count(ids, num_sequences, num_experts, is_text) * num_experts / (num_tokens * top_k)
        mean_shares = of_sequences.where(is_text.view(num_sequences, -1, 1), 0.0).sum(1) / num_tokens
    return (load * mean_shares).sum(1).mean()


def _mask_groups(probabilities: torch.Tensor, num_groups: int, top_k_groups: int) -> torch.Tensor:
    grouped = probabilities.unflatten(-1, (num_groups, -1))  # [T, groups, E / groups]
    # Below every probability, so that a probability that underflowed to 0 still wins over a masked one.
    return _keep_groups(grouped, grouped.amax(-1), top_k_groups, -1.0)


def _keep_groups(grouped: torch.Tensor, scores: torch.Tensor, top_k_groups: int, masked: float) -> torch.Tensor:
    """[T, groups, E / groups] -> [T, E], with ``masked`` in all but the groups of the highest scores [T, groups]."""
    chosen = scores.topk(top_k_groups, dim=-1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter_(1, chosen, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), masked).flatten(1)
