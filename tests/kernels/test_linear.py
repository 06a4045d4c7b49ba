"""The linear layer that adds its weight's gradient to a buffer, against torch's, which hands it to autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescale.kernels.backends import KernelInputError
from moescale.kernels.linear import linear

DTYPES = (torch.float32, torch.bfloat16)


def make(*shape: int, width: int = 12, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    tensors = [randn(*shape, dtype=dtype), randn(width, shape[-1], dtype=dtype, seed=1)]
    return [*tensors, randn(width, dtype=dtype, seed=2)] if bias else tensors


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], seed: int = 5) -> list[torch.Tensor | None]:
    grad = randn(*out.shape, dtype=out.dtype, seed=seed, grad=False)
    return list(torch.autograd.grad(out, inputs, grad, allow_unused=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 16), (1, 2, 3, 16), (0, 16)])
def test_result_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    inputs = make(*shape, bias=bias, dtype=dtype)
    buffer = torch.zeros_like(inputs[1], requires_grad=False)
    ours, plain = linear(*inputs, weight_gradient=buffer), F.linear(*inputs)
    assert torch.equal(ours, plain)
    grad_x, grad_weight, *grad_bias = gradients(ours, inputs)
    expected = gradients(plain, inputs)
    assert grad_weight is None
    for got, wanted in zip((grad_x, buffer, *grad_bias), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), inputs=st.integers(1, 30), outputs=st.integers(1, 30))
def test_gradients_on_any_shape(rows: int, inputs: int, outputs: int) -> None:
    x, weight = make(rows, inputs, width=outputs, bias=False)
    buffer = torch.zeros_like(weight, requires_grad=False)
    grad_x, _ = gradients(linear(x, weight, weight_gradient=buffer), [x, weight])
    expected = gradients(F.linear(x, weight), [x, weight])
    torch.testing.assert_close([grad_x, buffer], expected)


@pytest.mark.parametrize("buffer_dtype", DTYPES)
def test_two_micro_batches_of_bf16_add_up_in_the_buffer(buffer_dtype: torch.dtype) -> None:
    x, weight = make(64, 32, bias=False, dtype=torch.bfloat16)
    buffer = torch.full(weight.shape, 0.5, dtype=buffer_dtype, device=DEVICE)
    exact = torch.full(weight.shape, 0.5, device=DEVICE)
    for seed in (5, 6):
        out = linear(x, weight, weight_gradient=buffer)
        out.backward(randn(*out.shape, dtype=out.dtype, seed=seed, grad=False))
        exact += gradients(F.linear(x.float(), weight.float()), [x, weight], seed)[1].float()
    assert weight.grad is None and x.grad is not None
    # Sums of 64 products are 8 or so: each rounding to bf16 is off by at most 2^-8 of that.
    torch.testing.assert_close(buffer.float(), exact, rtol=2**-7, atol=0.1)


def test_the_sum_in_a_bf16_buffer_is_rounded_once() -> None:
    """1 + (2^-8 + 2^-17) is just above half a step of bf16; a product rounded by itself, to 2^-8, would add nothing."""
    x = torch.tensor([[2.0**-8], [2.0**-17]], dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    buffer = torch.ones_like(weight, requires_grad=False)
    linear(x, weight, weight_gradient=buffer).sum().backward()
    assert buffer.item() == 1 + 2.0**-7
    (rounded_before,) = torch.autograd.grad(F.linear(x, weight).sum(), weight)
    assert (1 + rounded_before).item() == 1


@pytest.mark.parametrize("frozen", ["x", "weight", "everything"])
def test_without_a_gradient_to_make_the_buffer_is_left_alone(frozen: str) -> None:
    x, weight = make(6, 8, bias=False)
    buffer = torch.zeros_like(weight, requires_grad=False)
    if frozen == "everything":
        with torch.no_grad():
            out = linear(x, weight, weight_gradient=buffer)
        assert not out.requires_grad
    else:
        frozen_x, frozen_weight = (t.detach() if name == frozen else t for name, t in (("x", x), ("weight", weight)))
        wanted = weight if frozen == "x" else x
        out, plain = linear(frozen_x, frozen_weight, weight_gradient=buffer), F.linear(frozen_x, frozen_weight)
        torch.testing.assert_close(gradients(out, [wanted]), gradients(plain, [wanted]))
    assert not buffer.any()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_add_to_their_buffers_over_interleaved_micro_batches(backend: str) -> None:
    """Without a graph break, and with a second forward before the first backward, as pipeline schedules run."""
    x, first, _ = make(2, 6, 8)
    second = randn(5, 12, seed=3)
    buffers = [torch.zeros_like(w, requires_grad=False) for w in (first, second)]

    def layers(x: torch.Tensor, buffers: list[torch.Tensor | None]) -> torch.Tensor:
        hidden = F.silu(linear(x, first, weight_gradient=buffers[0]))
        return linear(hidden, second, weight_gradient=buffers[1]) * 2

    expected = gradients(layers(x, [None, None]), [x, first, second])
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    outs = [compiled(x, buffers) for _ in range(2)]
    grads = [gradients(out, [x, first, second]) for out in outs]
    for grad_x, *others in grads:
        torch.testing.assert_close(grad_x, expected[0])
        assert others == [None, None]
    for buffer, wanted in zip(buffers, expected[1:], strict=True):
        torch.testing.assert_close(buffer, 2 * wanted)


@pytest.mark.parametrize("strides", ["gradient", "x"])
def test_non_contiguous_tensors_give_the_same(strides: str) -> None:
    x, weight = make(6, 8, bias=False)
    grad = randn(6, 12, seed=4, grad=False)
    expected = torch.autograd.grad(F.linear(x, weight), [x, weight], grad)
    if strides == "x":
        x = x.detach().t().contiguous().t().requires_grad_()
    else:
        grad = grad.t().contiguous().t()
    buffer = torch.zeros_like(weight, requires_grad=False)
    (grad_x,) = torch.autograd.grad(linear(x, weight, weight_gradient=buffer), [x], grad)
    torch.testing.assert_close((grad_x, buffer), expected)


def test_wrong_buffers_are_refused() -> None:
    x, weight = make(6, 8, bias=False)
    for buffer, message in (
        (torch.zeros(8, 12), r"linear: weight_gradient has shape \(8, 12\)"),
        (torch.zeros(12, 8).half(), "weight_gradient has dtype torch.float16; it must be float32"),
        (torch.zeros(12, 8, device="meta"), "weight_gradient is on meta"),
        (torch.zeros(8, 12).t(), "weight_gradient must be contiguous"),
    ):
        with pytest.raises(KernelInputError, match=message):
            linear(x, weight, weight_gradient=buffer if buffer.is_meta else buffer.to(DEVICE))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events", "ignore:.*no current CUDA context")
@pytest.mark.parametrize("buffer_dtype", DTYPES)
def test_on_the_gpu_the_gradient_is_added_inside_one_product(buffer_dtype: torch.dtype) -> None:
    x, weight = make(1024, 512, width=256, bias=False, dtype=torch.bfloat16)
    buffer = randn(256, 512, seed=8, grad=False).to(buffer_dtype)
    before, grad = buffer.float(), randn(1024, 256, seed=5, grad=False).bfloat16()
    exact = before + grad.float().t() @ x.detach().float()
    out = linear(x, weight, weight_gradient=buffer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(out, x, grad)
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if "emset" not in event.key]
    assert not any("elementwise" in kernel for kernel in kernels), kernels
    if buffer_dtype == torch.bfloat16:  # cuBLAS rounds the product, too, before it adds
        allowed = (exact.abs() + (exact - before).abs()) * 2.0**-8
    else:
        allowed = exact.abs() * 2.0**-20
    assert ((buffer.float() - exact).abs() <= allowed + 1e-3).all()
