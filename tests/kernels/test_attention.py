"""Causal attention with different widths of key and value, within documents."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICE, randn

from moescale.kernels.attention import attention


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, documents: torch.Tensor | None
) -> torch.Tensor:
    length = q.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = torch.einsum("bsnd,btnd->bnst", q.float(), k.float()) * scale
    return torch.einsum("bnst,btnd->bsnd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v.float())


@pytest.mark.parametrize("with_documents", [False, True])
def test_attention_is_causal_and_stays_within_documents(with_documents: bool) -> None:
    q, k, v = randn(2, 9, 3, 12), randn(2, 9, 3, 12, seed=1), randn(2, 9, 3, 8, seed=2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5] * 9], dtype=torch.int32, device=DEVICE)
    documents = documents if with_documents else None
    ours = attention(q, k, v, softmax_scale=0.4, document_ids=documents)
    expected = by_definition(q, k, v, 0.4, documents)
    assert ours.shape == (2, 9, 3, 8)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_packed_document_gets_what_it_gets_alone() -> None:
    q, k, v = randn(1, 8, 2, 6), randn(1, 8, 2, 6, seed=1), randn(1, 8, 2, 4, seed=2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32, device=DEVICE)
    packed = attention(q, k, v, softmax_scale=1.0, document_ids=documents)
    alone = attention(q[:, 3:], k[:, 3:], v[:, 3:], softmax_scale=1.0, document_ids=None)
    torch.testing.assert_close(packed[:, 3:], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("length", [2048, 300])
def test_bf16_error_is_at_most_twice_that_of_rounding_the_result(length: int, with_documents: bool) -> None:
    dtype = torch.bfloat16
    q, k = randn(2, length, 4, 192, dtype=dtype), randn(2, length, 4, 192, dtype=dtype, seed=1)
    v = randn(2, length, 4, 128, dtype=dtype, seed=2)
    documents = (torch.arange(length, device=DEVICE) // 120).to(torch.int32).expand(2, -1) if with_documents else None
    ours = attention(q, k, v, softmax_scale=0.07, document_ids=documents)
    expected = by_definition(q, k, v, 0.07, documents)
    direction = randn(2, length, 4, 128, dtype=dtype, seed=3, grad=False)
    gradients = torch.autograd.grad((ours * direction).sum(), (q, k, v))
    exact = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    for a, b in zip([ours, *gradients], [expected, *exact], strict=True):
        # bf16 rounds to 2^-9, probabilities and results once each: about 0.003 in the norm, doubled.
        assert (a.float() - b.float()).norm() < 0.006 * b.float().norm()
