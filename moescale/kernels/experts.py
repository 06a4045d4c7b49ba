"""Routed experts: each token's K chosen expert MLPs, weighted and summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moescale.kernels.backends import choose_backend
from moescale.kernels.grouped_gemm import grouped_gemm


def experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    tokens_per_expert: torch.Tensor | None = None,
    backend: str = "auto",
    recompute_up: bool = False,
) -> torch.Tensor:
    """Return ``y[t] = sum_k topk_weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))``, e = topk_ids[t, k].

    Shapes: x [T, H]; topk_ids [T, K] int32; topk_weights [T, K] fp32; gate_up [E, 2F, H], gate rows first; down
    [E, H, F]; result [T, H]. ``recompute_up`` saves no pre-activation and computes it again in the backward.
    """
    backend = choose_backend(x.device, x.dtype, backend)
    num_tokens, top_k = topk_ids.shape
    num_experts, _, _ = gate_up.shape
    order = topk_ids.reshape(-1).argsort(stable=True)
    if tokens_per_expert is None:
        tokens_per_expert = F.one_hot(topk_ids.reshape(-1).long(), num_experts).sum(0)
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    gate, up = grouped_gemm(rows, gate_up, ends, backend=backend).chunk(2, dim=-1)
    out = grouped_gemm(F.silu(gate) * up, down, ends, backend=backend)
    unsorted = torch.empty_like(out).index_copy(0, order, out).view(num_tokens, top_k, -1)
    return (unsorted * topk_weights.unsqueeze(-1).to(unsorted.dtype)).sum(1)
