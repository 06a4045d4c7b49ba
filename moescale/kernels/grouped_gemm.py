"""Grouped GEMM on rows sorted by expert: one matrix product per expert, ragged in the number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moescale.kernels.backends import choose_backend


def grouped_gemm(
    rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Return ``rows[r] @ weight[e].T`` for every row r of expert e.

    Shapes: rows [R, K] sorted by expert; weight [E, N, K]; ends [E] int32, the cumulative row count of each expert;
    result [R, N].
    """
    backend = choose_backend(rows.device, rows.dtype, backend)
    if backend == "torch":
        bounds = [0, *ends.tolist()]
        return torch.cat([rows[s:e] @ w.T for s, e, w in zip(bounds[:-1], bounds[1:], weight, strict=True)])
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
