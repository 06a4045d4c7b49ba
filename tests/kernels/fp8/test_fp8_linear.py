"""The linear layer in e4m3: its error against fp64 beside that of a published recipe, its buffers and its rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE

from fp8_recipe import Exact, relative_error
from moescale.kernels.backends import KernelInputError
from moescale.kernels.fp8 import Copies, Scaled, copies_of, empty_copies, reference, write_copies
from moescale.kernels.fp8.linear import fp8_linear
from synchronisation import synchronisation_refused
from tests.kernels.fp8.implementations import EITHER, EITHER_IN_TIME

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def make(*shape: int, width: int = 80) -> tuple[torch.Tensor, torch.Tensor, Copies]:
    x, weight = randn(*shape).requires_grad_(), (randn(width, shape[-1], seed=1) / 12).requires_grad_()
    return x, weight, copies_of(weight)


def results(x: torch.Tensor, weight: torch.Tensor, copies: Copies, grad: torch.Tensor, **options) -> dict:
    out = fp8_linear(x, weight, copies, **options)
    gradients = torch.autograd.grad(out, (x, weight), grad, allow_unused=True)
    return {"out": out.detach()} | dict(zip(("grad_x", "grad_weight"), gradients, strict=True))


@EITHER_IN_TIME
def test_errors_are_at_most_a_twentieth_above_those_of_the_recipe(parts):
    x, weight, copies = make(160, 272, width=144)
    grad = randn(160, 144, seed=2)
    found = results(x, weight, copies, grad)
    recipe, exact = (
        Exact(dtype=torch.float64, quantises=quantises).linear(x.detach(), weight.detach(), grad)
        for quantises in (True, False)
    )
    for name, value in exact.items():
        assert relative_error(found[name], value) < 1.05 * relative_error(recipe[name], value), name
    assert relative_error(found["grad_weight"], exact["grad_weight"]) < 0.01, "the weight's gradient is in bf16"


@EITHER
@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 48), (1, 144), (0, 16), (2, 0, 16)])
def test_any_shape_is_that_of_torchs_linear(parts, shape):
    x, weight, copies = make(*shape)
    bias = randn(80, seed=3).requires_grad_()
    ours, plain = fp8_linear(x, weight, copies, bias), F.linear(x, weight, bias)
    grad = randn(*ours.shape, seed=2)
    inputs = (x, weight, bias)
    found, expected = (torch.autograd.grad(out, inputs, grad) for out in (ours, plain))
    for a, b in zip((ours, *found), (plain, *expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all()
        assert not a.numel() or (a - b).float().norm() <= 0.08 * b.float().norm()


@EITHER_IN_TIME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradients_are_added_to_the_buffer_twice_and_not_returned(parts, dtype):
    x, weight, copies = make(24, 48)
    grad = randn(24, 80, seed=2)
    exact = 0.5 + 2 * grad.double().T @ x.detach().double()
    buffer = torch.full(weight.shape, 0.5, dtype=dtype, device=DEVICE)
    plain = results(x, weight, copies, grad)
    for _ in range(2):
        found = results(x, weight, copies, grad, weight_gradient=buffer)
        assert found.pop("grad_weight") is None
        assert all(torch.equal(value, plain[name]) for name, value in found.items())
    assert relative_error(buffer, exact) < 0.005


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_without_a_gradient_of_its_own_the_buffer_is_left_alone(frozen):
    x, weight, copies = make(6, 16)
    buffer = torch.zeros(weight.shape, dtype=torch.bfloat16, device=DEVICE)
    inputs = {"x": x, "weight": weight}
    inputs[frozen] = inputs[frozen].detach()
    grad = randn(6, 80, seed=2)
    wanted = weight if frozen == "x" else x
    out = fp8_linear(inputs["x"], inputs["weight"], copies, weight_gradient=buffer)
    (found,) = torch.autograd.grad(out, wanted, grad)
    expected = results(x, weight, copies, grad)["grad_weight" if frozen == "x" else "grad_x"]
    assert torch.equal(found, expected) and not buffer.any()


@EITHER
def test_strided_inputs_and_gradients_give_the_same(parts):
    x, weight, copies = make(10, 48)
    grad = randn(10, 80, seed=2)
    expected = results(x, weight, copies, grad)
    strided = x.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    constant = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(10, 80)
    cases = [
        (results(strided, weight, copies, grad.t().contiguous().t()), expected),
        (results(x, weight, copies, torch.stack([grad, grad], 2)[..., 0]), expected),
        (results(x, weight, copies, constant), results(x, weight, copies, constant.contiguous())),
    ]
    for found, same in cases:
        assert torch.equal(found["out"], same["out"]) and torch.equal(found["grad_x"], same["grad_x"])
        torch.testing.assert_close(found["grad_weight"], same["grad_weight"])  # of cuBLAS, which sees the strides


@EITHER
def test_rows_that_are_quantised_already_give_the_same(parts):
    x, weight, copies = make(2, 5, 48)
    grad, rows = randn(2, 5, 80, seed=2), parts.quantize_rows(x.detach().flatten(0, 1))
    expected, found = (results(x, weight, copies, grad, quantized=given) for given in (None, rows))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    halved = results(x, weight, copies, grad, quantized=Scaled(rows.data, rows.scales / 2))
    assert torch.equal(halved.pop("out"), expected.pop("out") / 2), "what was given is not what is multiplied"
    assert all(torch.equal(value, expected[name]) for name, value in halved.items())


@EITHER
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which the interpreter computes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_stay_visible(parts, value):
    x, weight, copies = make(5, 48)
    grad = randn(5, 80, seed=2)
    bad_x, bad_grad, bad_weight = x.detach().clone(), grad.clone(), weight.detach().clone()
    bad_x[2, 3] = bad_grad[2, 3] = bad_weight[2, 3] = value
    found = results(bad_x.requires_grad_(), weight, copies, grad)
    assert found["out"].isfinite().all(1).tolist() == [True, True, False, True, True]
    assert not found["grad_weight"].isfinite().all()
    found = results(x, weight, copies, bad_grad)
    assert found["grad_x"].isfinite().all(1).tolist() == [True, True, False, True, True]
    assert not found["grad_weight"].isfinite().all()
    write_copies(bad_weight, copies)
    found = results(x, bad_weight.requires_grad_(), copies, grad)
    assert not found["out"].isfinite().any() and not found["grad_x"].isfinite().any()


@pytest.mark.gpu
def test_repeated_runs_are_bit_identical_and_never_synchronise():
    x, weight, copies = make(300, 2048, width=576)
    grad, buffer = randn(300, 576, seed=2), torch.zeros(576, 2048, device=DEVICE)

    def run() -> list[torch.Tensor]:
        buffer.zero_()
        write_copies(weight, copies)
        found = results(x, weight, copies, grad, weight_gradient=buffer)
        return [found["out"], found["grad_x"], buffer.clone()]

    first = run()  # compiles, which may synchronise
    with synchronisation_refused():
        again = [run() for _ in range(3)]
    assert all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))


X, WEIGHT, COPIES = make(4, 32, width=48)
ROWS = reference.quantize_rows(X.detach()[:, :16])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": X[:, :16]}, r"weight has shape \(48, 32\); it must be \[N, K\] = \('any', 16\)"),
        ({"copies": empty_copies(WEIGHT[:32])}, r"copies has shape \(1, 32, 32\); it must be those of weight"),
        ({"x": X.float()}, r"the input has dtype torch.float32; it must be bfloat16"),
        ({"weight": WEIGHT.half()}, r"weight has dtype torch.float16; it must be bfloat16"),
        ({"bias": WEIGHT[0]}, r"bias has shape \(32,\); it must be \[N\] = \(48,\)"),
        ({"bias": WEIGHT[:, 0].float()}, r"bias has dtype torch.float32; it must be bfloat16"),
        ({"weight": torch.empty(48, 32, dtype=torch.bfloat16, device="meta")}, "weight is on meta; the other"),
        ({"copies": empty_copies(WEIGHT.to("meta"))}, "copies is on meta; the other inputs are on"),
        ({"quantized": ROWS}, r"quantized has shape \(4, 16\); it must be the rows of x = \(4, 32\)"),
        (
            {"quantized": Scaled(X.detach(), ROWS.scales)},
            "quantized has dtype torch.bfloat16; it must be float8_e4m3fn",
        ),
        ({"weight_gradient": WEIGHT.detach()[:16]}, r"weight_gradient has shape \(16, 32\); it must be the shape of"),
        (
            {"weight_gradient": WEIGHT.detach().half()},
            r"weight_gradient has dtype torch.float16; it must be bfloat16, ",
        ),
        (
            {"weight_gradient": WEIGHT.detach().clone().requires_grad_()},
            "weight_gradient must be contiguous and not require a grad",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(KernelInputError, match="^fp8_linear: " + words):
        fp8_linear(**({"x": X, "weight": WEIGHT, "copies": COPIES} | changes))


@pytest.mark.parametrize(("width", "inputs"), [(40, 32), (48, 24)])
def test_widths_that_are_not_multiples_of_16_are_refused(width, inputs):
    with pytest.raises(
        KernelInputError, match=rf"weight has shape \({width}, {inputs}\); both must be multiples of 16"
    ):
        fp8_linear(*make(4, inputs, width=width))
