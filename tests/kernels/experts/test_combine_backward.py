"""The backward of combining rows that came back from other ranks: Triton against plain torch, and against autograd."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICE, randn

from moescale.kernels.experts import reference
from moescale.kernels.experts import triton as experts_triton

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def make(tokens: int, top_k: int, hidden: int, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Slots of which some belong to no pair, and pairs of which some have no slot."""
    generator = torch.Generator().manual_seed(tokens + hidden)
    pairs = tokens * top_k
    order = torch.randperm(max(pairs, slots), generator=generator)[:slots]
    slot_pair = torch.where(order < pairs, order, 0).to(torch.int32)
    pair_slot = torch.full((pairs,), -1, dtype=torch.int32)
    used = (order < pairs).nonzero().flatten()
    pair_slot[order[used]] = used.to(torch.int32)
    rows = randn(slots, hidden, dtype=dtype, seed=1)
    return rows, randn(tokens, top_k, seed=2), slot_pair.to(DEVICE), pair_slot.to(DEVICE)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, top_k, hidden, slots", [(5, 2, 16, 10), (7, 3, 40, 33), (1, 1, 2050, 1), (4, 2, 8, 3)]
)
def test_gradients_are_those_of_autograd(tokens: int, top_k: int, hidden: int, slots: int, dtype: torch.dtype) -> None:
    rows, weights, slot_pair, pair_slot = make(tokens, top_k, hidden, slots, dtype)
    grad = randn(tokens, hidden, dtype=dtype, seed=3, grad=False)
    out = reference.combine_rows(rows.float(), pair_slot, top_k, weights)
    expected = torch.autograd.grad(out, (rows, weights), grad.float())
    used = pair_slot[pair_slot >= 0].long()
    for operators in (experts_triton, reference):
        grad_rows, values = operators.combine_rows_backward(grad, rows.detach(), slot_pair, weights.detach())
        grad_weights = operators.order_by_pair(values, pair_slot).view_as(weights)
        assert grad_rows.isfinite().all() and grad_rows.dtype == dtype
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(grad_rows[used].float(), expected[0][used].float(), **tolerance)
        torch.testing.assert_close(grad_weights, expected[1], **tolerance)
        assert (grad_weights.flatten()[pair_slot < 0] == 0).all()
