"""The grouped GEMM on sorted rows, and the sorted order itself, around every tile edge."""

from __future__ import annotations

import pytest
import torch

from moescale.kernels import experts as experts_module
from moescale.kernels.experts import triton as kernels
from moescale.kernels.experts.sort import sort_pairs
from moescale.kernels.swiglu.reference import SwigluClamp

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


def product_and_gradients(rows, weight, ends, grad, backend, buffer=None):
    """The three GEMMs of a layer: the product, the gradient of the rows and that of the weight."""
    operators = experts_module.operators_of(backend)
    groups = operators.group_rows(ends, rows.shape[0])
    out = operators.multiply_rows(rows, weight, groups, zero_tail=True)
    grad_rows = operators.multiply_rows(grad, weight, groups, transposed=True, zero_tail=True, kernel="up_dgrad")
    return out, grad_rows, operators.weight_gradient(grad, rows, groups, buffer=buffer, kernel="up_wgrad")


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
    actual = product_and_gradients(rows.detach(), weight.detach(), ends, grad, backend)
    for a, e in zip(actual, (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("clamp", [None, SwigluClamp(1.702, 0.5)], ids=["swiglu", "clamped"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_backward_of_swiglu_is_the_same_where_programs_walk_the_rows(weighted, clamp):
    grad, pre, down = (torch.randn(*shape, device=DEVICE) for shape in ((20, 16), (20, 48), (3, 16, 24)))
    weights = torch.rand(20, device=DEVICE) if weighted else None
    found = []
    for expected_rows in (None, 6):
        out = tuple(torch.full(shape, float("nan"), device=DEVICE) for shape in ((20, 48), (20, 24), (20,)))
        groups = kernels.group_rows(ends_of(5, 0, 9), 20, expected_rows)
        kernels.multiply_down_dgrad(grad, down, pre, groups, weights, out=out, clamp=clamp)
        found.append(out[: 2 + weighted])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[:14], b[:14]) and a[:14].isfinite().all() and b[14:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_other_experts_rows_never_leak(backend):
    """Tiles overlap neighbouring experts' rows: NaN there must stay there, in results and in weight gradients."""
    counts = (5, 7, 20)
    rows = torch.randn(sum(counts), 16, device=DEVICE)
    rows[5:12] = float("nan")
    weight = torch.randn(3, 32, 16, device=DEVICE)
    grad = torch.ones(sum(counts), 32, device=DEVICE)
    out, _, grad_weight = product_and_gradients(rows, weight, ends_of(*counts), grad, backend)
    assert out[:5].isfinite().all() and out[12:].isfinite().all() and out[5:12].isnan().all()
    assert grad_weight[[0, 2]].isfinite().all() and grad_weight[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_outputs")
def test_every_element_is_written(backend):
    rows, weight = torch.randn(40, 20, device=DEVICE), torch.randn(4, 36, 20, device=DEVICE)
    grad = torch.ones(40, 36, device=DEVICE)
    results = product_and_gradients(rows, weight, ends_of(0, 17, 0, 16), grad, backend)
    out, grad_rows, grad_weight = results
    assert all(t.isfinite().all() for t in results)
    assert (out[33:] == 0).all() and (grad_rows[33:] == 0).all() and (grad_weight[[0, 2]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_to_a_buffer(backend, dtype):
    if dtype == torch.bfloat16 and (backend, DEVICE.type) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    rows = torch.randn(24, 16, device=DEVICE, dtype=dtype)
    weight = torch.randn(2, 32, 16, device=DEVICE, dtype=dtype)
    grad, ends = torch.ones(24, 32, device=DEVICE, dtype=dtype), ends_of(9, 15)
    _, _, expected = product_and_gradients(rows, weight, ends, grad, backend)
    for buffer_dtype in (dtype, torch.float32):
        buffer = torch.full(weight.shape, 2.0, device=DEVICE, dtype=buffer_dtype)
        _, _, result = product_and_gradients(rows, weight, ends, grad, backend, buffer)
        assert result is buffer
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
