"""The order of (token, expert) pairs sorted by expert, computed on the device without synchronising."""

from __future__ import annotations

import torch

from moescale.kernels.backends import KernelInputError


def sort_pairs(
    topk_ids: torch.Tensor, num_experts: int, *, backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the pairs p = t * K + k of topk_ids [T, K] by expert, stably.

    Returns int32 tensors: ``row_pair`` [R], the pair of each sorted row; ``pair_row`` [R], the sorted row of each pair,
    -1 for an expert id outside [0, E); ``ends`` [E], the cumulative rows of each expert. Pairs with an id outside the
    range sort behind ``ends[-1]``.
    """
    if backend in ("triton", "cute"):  # CuTe has the products alone
        from moescale.kernels.experts import sort_triton

        return sort_triton.sort_pairs(topk_ids, num_experts)
    ids = topk_ids.reshape(-1)
    valid = (ids >= 0) & (ids < num_experts)
    ids = torch.where(valid, ids, num_experts).long()
    row_pair = ids.argsort(stable=True)
    rows = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    pair_row = torch.empty_like(rows).index_copy_(0, row_pair, rows)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    counts.index_add_(0, ids, torch.ones_like(rows))
    ends = counts[:-1].cumsum(0).to(torch.int32)
    return row_pair.to(torch.int32), torch.where(valid, pair_row, -1), ends


def check_ids(topk_ids: torch.Tensor, num_experts: int, tokens_per_expert: torch.Tensor | None) -> None:
    """Refuse expert ids outside [0, E) and counts that do not fit them. Synchronises: for debugging only."""
    outside = ((topk_ids < 0) | (topk_ids >= num_experts)).nonzero()
    if len(outside):
        token, k = outside[0].tolist()
        raise KernelInputError(
            f"topk_ids[{token}, {k}] is {topk_ids[token, k].item()}; expert ids must lie in [0, {num_experts}); "
            f"{len(outside)} of {topk_ids.numel()} do not"
        )
    counts = torch.bincount(topk_ids.reshape(-1), minlength=num_experts).tolist()
    if tokens_per_expert is not None and tokens_per_expert.tolist() != counts:
        raise KernelInputError(f"tokens_per_expert is {tokens_per_expert.tolist()}; topk_ids count {counts}")
