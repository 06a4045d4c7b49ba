"""The grouped GEMM on sorted rows, and the sorted order itself, around every tile edge."""

from __future__ import annotations

import pytest
import torch

from moescale.kernels.backends import KernelInputError
from moescale.kernels.expert_order import sort_pairs
from moescale.kernels.grouped_gemm import grouped_gemm

BACKENDS = ["torch", "grouped_mm", "triton"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ends_of(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)


def expected_product(rows, weight, ends):
    out = torch.zeros(rows.shape[0], weight.shape[1], device=rows.device)
    begin = 0
    for w, end in zip(weight, ends.tolist(), strict=True):
        out[begin:end] = rows[begin:end] @ w.T
        begin = end
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "counts", [(1,), (15, 16, 17), (0, 0, 5), (33, 0, 0), (0, 0), (1, 31, 32), (48, 1, 0, 2)], ids=str
)
@pytest.mark.parametrize("n, k", [(32, 16), (36, 20), (4, 52)])
def test_product_and_gradients_at_tile_edges(backend, counts, n, k):
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(counts) + 3  # three rows beyond the last expert
    rows = torch.randn(num_rows, k, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(len(counts), n, k, generator=generator).to(DEVICE).requires_grad_()
    ends = ends_of(*counts)
    grad = torch.randn(num_rows, n, generator=generator).to(DEVICE)
    expected = expected_product(rows, weight, ends)
    expected_grads = torch.autograd.grad(expected, (rows, weight), grad)
    actual = grouped_gemm(rows, weight, ends, backend=backend)
    grads = torch.autograd.grad(actual, (rows, weight), grad)
    for a, e in zip((actual, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_other_experts_rows_never_leak(backend):
    """Tiles overlap neighbouring experts' rows: NaN there must stay there, in results and in weight gradients."""
    counts = (5, 7, 20)
    rows = torch.randn(sum(counts), 16, device=DEVICE)
    rows[5:12] = float("nan")
    rows.requires_grad_()
    weight = torch.randn(3, 32, 16, device=DEVICE).requires_grad_()
    out = grouped_gemm(rows, weight, ends_of(*counts), backend=backend)
    out.backward(torch.ones_like(out))
    assert out[:5].isfinite().all() and out[12:].isfinite().all() and out[5:12].isnan().all()
    assert weight.grad[[0, 2]].isfinite().all() and weight.grad[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_outputs")
def test_every_element_is_written(backend):
    rows = torch.randn(40, 20, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 36, 20, device=DEVICE, requires_grad=True)
    out = grouped_gemm(rows, weight, ends_of(0, 17, 0, 16), backend=backend)
    grads = torch.autograd.grad(out, (rows, weight), torch.ones_like(out))
    assert all(t.isfinite().all() for t in (out, *grads))
    assert (out[33:] == 0).all() and (grads[0][33:] == 0).all() and (grads[1][[0, 2]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_to_a_buffer(backend, dtype):
    if dtype == torch.bfloat16 and (backend, DEVICE.type) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    rows = torch.randn(24, 16, device=DEVICE, dtype=dtype)
    weight = torch.randn(2, 32, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    ends = ends_of(9, 15)
    out = grouped_gemm(rows, weight, ends, backend=backend)
    (expected,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    for buffer_dtype in (dtype, torch.float32):
        buffer = torch.full(weight.shape, 2.0, device=DEVICE, dtype=buffer_dtype)
        out = grouped_gemm(rows, weight, ends, weight_gradient=buffer, backend=backend)
        out.backward(torch.ones_like(out))
        assert weight.grad is None
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(buffer.float(), 2 + expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens, top_k, num_experts", [(0, 2, 3), (1, 1, 1), (100, 3, 7), (300, 8, 256), (5, 1, 64)])
def test_pairs_are_sorted_stably(backend, tokens, top_k, num_experts):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), dtype=torch.int32, generator=generator).to(DEVICE)
    row_pair, pair_row, ends = sort_pairs(ids, num_experts, backend=backend)
    valid = ((ids >= 0) & (ids < num_experts)).flatten()
    chosen = torch.where(valid, ids.flatten(), num_experts)
    assert row_pair.tolist() == chosen.argsort(stable=True).tolist()
    assert ends.tolist() == torch.bincount(chosen, minlength=num_experts + 1)[:-1].cumsum(0).tolist()
    assert (pair_row[~valid] == -1).all()
    assert row_pair[pair_row[valid].long()].tolist() == valid.nonzero().flatten().tolist()


def test_wrong_shapes_are_refused_with_their_values():
    rows, weight, ends = torch.zeros(4, 16), torch.zeros(2, 8, 16), torch.tensor([2, 4], dtype=torch.int32)
    with pytest.raises(KernelInputError, match=r"grouped_gemm: rows has shape \(4, 12\); it must be \[R, K\]"):
        grouped_gemm(rows[:, :12], weight, ends)
    with pytest.raises(KernelInputError, match="ends has dtype torch.int64; it must be int32"):
        grouped_gemm(rows, weight, ends.long())
    with pytest.raises(KernelInputError, match=r"weight_gradient has shape \(2, 16, 8\)"):
        grouped_gemm(rows, weight, ends, weight_gradient=torch.zeros(2, 16, 8))
    with pytest.raises(KernelInputError, match="multiples of 4 in torch.float32"):
        grouped_gemm(torch.zeros(4, 15), torch.zeros(2, 8, 15), ends, backend="grouped_mm")


def test_passes_opcheck():
    rows, weight = torch.randn(6, 16, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.moescale.grouped_gemm.default, (rows, weight, ends, None, "torch"))
