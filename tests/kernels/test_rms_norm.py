"""RMSNorm alone and behind a residual addition: kernel against the published formula."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_accurate, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.kernels.backends import KernelInputError
from moescale.kernels.rms_norm import add_rms_norm, rms_norm
from synchronisation import synchronisation_refused

EPS = 1e-6


def norm(x: torch.Tensor, weight: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
    return (rms_norm(x, weight, EPS, backend=backend),)


def norm_of_sum(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
    return add_rms_norm(x, y, w, EPS, backend=backend)


def test_the_result_is_the_published_formula() -> None:
    x, weight = randn(2, 3, 8), randn(8, seed=1)
    expected = weight * (x / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()).float()
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", [(1, 4), (5, 40), (2, 3, 2049), (0, 16)])
def test_kernel_agrees_on_odd_sizes(shape: tuple[int, ...]) -> None:
    x, y, weight = randn(*shape), randn(*shape, seed=1), randn(shape[-1], seed=2)
    assert_accurate(norm, [x, weight])
    assert_accurate(norm_of_sum, [x, y, weight])


@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_reads_a_slice_of_a_wider_tensor() -> None:
    wide = randn(4, 6, 29, grad=False)
    assert_accurate(norm, [wide[..., :20].requires_grad_(), randn(20, seed=1)])
    assert_accurate(norm, [wide.transpose(1, 2)[..., :6].requires_grad_(), randn(6, seed=1)])


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(4, 130))
def test_kernel_agrees_on_any_shape(rows: int, cols: int) -> None:
    assert_accurate(norm_of_sum, [randn(rows, cols), randn(rows, cols, seed=1), randn(cols, seed=2)])


def test_an_unused_result_has_no_gradient() -> None:
    x, y, weight = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    _, summed = add_rms_norm(x, y, weight, EPS, backend="triton")
    grad_x, grad_weight = torch.autograd.grad(summed.sum(), (x, weight))
    assert (grad_x == 1).all() and (grad_weight == 0).all()


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(KernelInputError, match=r"rms_norm: weight has shape \(7,\).*\(8,\)"):
        rms_norm(randn(3, 8), randn(7), EPS)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", [(8192, 2048), (4097, 512), (3, 5120), (1, 4)])
def test_bf16_error_is_at_most_twice_plain_torch(shape: tuple[int, ...]) -> None:
    dtype = torch.bfloat16
    x, y, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[-1], dtype=dtype, seed=2)
    assert_accurate(norm, [x, weight])
    assert_accurate(norm_of_sum, [x, y, weight])


@pytest.mark.gpu
def test_repeated_runs_are_bit_identical_and_never_synchronise() -> None:
    x, weight = randn(4099, 2048, dtype=torch.bfloat16), randn(2048, dtype=torch.bfloat16, seed=1)
    rms_norm(x, weight, EPS)
    with synchronisation_refused():
        runs = [torch.autograd.grad(rms_norm(x, weight, EPS).sum(), (x, weight)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert x.is_cuda
