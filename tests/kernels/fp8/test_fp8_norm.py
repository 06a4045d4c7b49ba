"""The norm that quantises its result: bit for bit the plain norm, and the rows of quantising what that returns."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICE

from moescale.kernels.backends import KernelInputError
from moescale.kernels.fp8 import kernels_for, reference
from moescale.kernels.fp8.norm import quantizing_rms_norm
from moescale.kernels.fp8.scaled import E4M3
from moescale.kernels.rms_norm import add_rms_norm, rms_norm
from synchronisation import synchronisation_refused

EPS = 1e-6
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    integers = {torch.bfloat16: torch.int16, torch.float32: torch.int32, E4M3: torch.uint8}[a.dtype]
    assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def random_gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of norm and sum."""
    return randn(*x.shape, seed=3), randn(*x.shape, seed=4)


def results(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, grads, *, backend, quantizes=None):
    """[norm, sum or x, the gradients of all inputs for ``grads`` of norm and sum], and the rows."""
    rows = None
    if quantizes is not None:
        normed, summed, rows = quantizes(x, residual, weight, EPS, backend=backend)
    elif residual is None:
        normed, summed = rms_norm(x, weight, EPS, backend=backend), x
    else:
        normed, summed = add_rms_norm(x, residual, weight, EPS, backend=backend)
    inputs = [tensor for tensor in (x, residual, weight) if tensor is not None]
    gradients = torch.autograd.grad((normed, summed * 1), inputs, grads)
    return [normed.detach(), summed.detach(), *gradients], rows


@BACKENDS
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (2, 7, 272), (3, 2064), (0, 16)])
def test_norm_and_gradients_are_those_of_the_plain_norm_and_rows_those_of_its_result(shape, has_residual, backend):
    x, weight = randn(*shape).requires_grad_(), randn(shape[-1], seed=2).requires_grad_()
    residual = randn(*shape, seed=1).requires_grad_() if has_residual else None
    grads = random_gradients(x)
    found, rows = results(x, residual, weight, grads, backend=backend, quantizes=quantizing_rms_norm)
    expected, _ = results(x, residual, weight, grads, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    of_result = reference.quantize_rows(found[0].flatten(0, -2))
    for a, b in zip(rows, of_result, strict=True):
        assert_same_bits(a, b)
        assert not a.requires_grad


@BACKENDS
def test_a_slice_of_a_wider_tensor_is_normed_and_its_rows_are_whole(backend):
    wide, weight = randn(2, 6, 72), randn(48, seed=2)
    (found, _, rows), (expected, _, of_copy) = (
        quantizing_rms_norm(x, None, weight, EPS, backend=backend)
        for x in (wide[..., :48], wide[..., :48].contiguous())
    )
    for a, b in zip((found, *rows), (expected, *of_copy), strict=True):
        assert_same_bits(a, b)


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which the interpreter computes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_finite_scale_and_others_have(value, backend):
    x = randn(4, 48)
    x[2, 3] = value
    _, _, rows = quantizing_rms_norm(x, None, randn(48, seed=2), EPS, backend=backend)
    assert rows.scales.isfinite().tolist() == [True, True, False, True]
    assert rows.data.float()[[0, 1, 3]].isfinite().all()


@BACKENDS
def test_results_that_nobody_uses_have_no_gradient(backend):
    x, residual, weight = (randn(*shape).requires_grad_() for shape in ((3, 16), (3, 16), (16,)))
    _, summed, _ = quantizing_rms_norm(x, residual, weight, EPS, backend=backend)
    grad_x, grad_weight = torch.autograd.grad(summed.sum(), (x, weight), allow_unused=True)
    assert (grad_x == 1).all() and (grad_weight is None or not grad_weight.any())
    normed, _, _ = quantizing_rms_norm(x, residual, weight, EPS, backend=backend)
    plain, _ = add_rms_norm(x, residual, weight, EPS, backend=backend)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, residual, weight)) for out in (normed, plain)), strict=True):
        assert torch.equal(a, b)


@BACKENDS
def test_compiled_it_is_the_same(backend):
    x, residual, weight = (randn(*shape).requires_grad_() for shape in ((2, 5, 48), (2, 5, 48), (48,)))
    eager, compiled = [], []
    whole = torch.compile(quantizing_rms_norm, backend="aot_eager", fullgraph=True)
    for norm, found in ((quantizing_rms_norm, eager), (whole, compiled)):
        tensors, rows = results(x, residual, weight, random_gradients(x), backend=backend, quantizes=norm)
        found += [*tensors, *rows]
    for a, b in zip(eager, compiled, strict=True):
        assert_same_bits(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("width", "stride"), [(512, 576), (1536, 1536), (2048, 2048), (5120, 5120), (7168, 7168)])
def test_many_rows_are_bit_for_bit_the_same_and_never_synchronise(width, stride, has_residual):
    x = torch.randn(4096, stride, device=DEVICE).bfloat16()[:, :width].requires_grad_()
    residual = torch.randn(4096, width, device=DEVICE).bfloat16().requires_grad_() if has_residual else None
    weight = torch.randn(width, device=DEVICE).bfloat16().requires_grad_()
    grads = random_gradients(x)  # copied from the host
    results(x, residual, weight, grads, backend="auto", quantizes=quantizing_rms_norm)  # compiles, may synchronise
    with synchronisation_refused():
        found, rows = results(x, residual, weight, grads, backend="auto", quantizes=quantizing_rms_norm)
    expected, _ = results(x, residual, weight, grads, backend="auto")
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    for a, b in zip(rows, kernels_for(x).quantize_rows(found[0]), strict=True):
        assert_same_bits(a, b)


X = randn(4, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": X.float()}, "x has dtype torch.float32; it must be bfloat16"),
        ({"weight": X[0, :16]}, r"weight has shape \(16,\); it must be \[H\], H the last dim of x"),
        ({"residual": X[:2]}, r"residual has shape \(2, 32\); it must be the shape of x"),
        ({"residual": X.float()}, "residual has dtype torch.float32; it must be bfloat16"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(KernelInputError, match="^quantizing_rms_norm: " + words):
        quantizing_rms_norm(**({"x": X, "residual": X, "weight": X[0], "eps": EPS} | changes))
