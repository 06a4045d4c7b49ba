"""The linear layer with a low-rank addition against the same layer with merged weights, with all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE, randn

from moescale.kernels.adapted_linear import adapted_linear
from moescale.kernels.backends import KernelInputError

SCALE = 0.75


def make(*shape: int, width: int = 12, rank: int = 4, parts: int = 1) -> list[torch.Tensor]:
    """x, weight, bias, a, b"""
    return [
        randn(*shape),
        randn(width, shape[-1], seed=1, grad=False),
        randn(width, seed=2, grad=False),
        randn(parts * rank, shape[-1], seed=3),
        randn(width, rank, seed=4),
    ]


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, parts: int) -> torch.Tensor:
    deltas = [b_part @ a_part for a_part, b_part in zip(a.chunk(parts), b.chunk(parts), strict=True)]
    return weight + SCALE * torch.cat(deltas)


@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 16), (1, 16), (0, 16)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_result_and_gradients_are_those_of_merged_weights(shape: tuple[int, ...], parts: int) -> None:
    x, weight, bias, a, b = make(*shape, parts=parts)
    ours = adapted_linear(x, weight, bias, a, b, scale=SCALE, num_parts=parts)
    plain = F.linear(x, merged(weight, a, b, parts), bias)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    grad = randn(*ours.shape, seed=5, grad=False)
    for got, wanted in zip(*(torch.autograd.grad(y, [x, a, b], grad) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_only_the_addition_sees_what_dropout_left() -> None:
    x, weight, bias, a, b = make(6, 16)
    dropped = randn(6, 16, seed=9)
    ours = adapted_linear(x, weight, bias, a, b, scale=SCALE, dropped=dropped)
    plain = F.linear(x, weight, bias) + SCALE * dropped @ a.T @ b.T
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(y.square().sum(), [x, dropped, a, b]) for y in (ours, plain))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_the_buffers_and_not_returned(dtype: torch.dtype) -> None:
    x, weight, bias, a, b = make(8, 16, parts=2)
    x, weight, bias = x.detach().to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype)
    y = adapted_linear(x, weight, bias, a, b, scale=SCALE, num_parts=2)
    wanted = torch.autograd.grad(y.sum(), [a, b])
    assert all(gradient.dtype == torch.float32 for gradient in wanted)
    buffers = tuple(torch.full_like(f, 0.5).detach() for f in (a, b))
    for _ in range(2):
        adapted_linear(x, weight, bias, a, b, scale=SCALE, num_parts=2, gradients=buffers).sum().backward()
    assert a.grad is None and b.grad is None
    for buffer, gradient in zip(buffers, wanted, strict=True):
        torch.testing.assert_close(buffer, 0.5 + 2 * gradient, rtol=1e-5, atol=1e-5)


def test_an_input_without_gradient_leaves_the_buffers_alone() -> None:
    x, weight, bias, a, b = make(8, 16)
    buffers = (torch.zeros_like(a).detach(), torch.zeros_like(b).detach())
    adapted_linear(x.detach(), weight, bias, a, b, scale=SCALE, gradients=buffers).sum().backward()
    assert a.grad is not None and a.grad.any() and b.grad is not None and b.grad.any()
    assert not buffers[0].any() and not buffers[1].any()


def test_a_compiled_layer_fills_the_buffers_too() -> None:
    x, weight, bias, a, b = make(8, 16)
    alone, compiled = ((torch.zeros_like(a).detach(), torch.zeros_like(b).detach()) for _ in range(2))

    def layer(x: torch.Tensor, buffers: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return adapted_linear(x, weight, bias, a, b, scale=SCALE, gradients=buffers).relu()

    layer(x, alone).sum().backward()
    torch.compile(layer, backend="aot_eager")(x, compiled).sum().backward()
    assert alone[0].any() and alone[1].any()
    torch.testing.assert_close(compiled, alone)


def test_in_bf16_the_error_is_at_most_twice_that_of_merged_weights() -> None:
    x, weight, _, a, b = make(64, 32, width=24, rank=8)
    exact = F.linear(x, merged(weight, a, b, 1))
    low = x.detach().bfloat16().requires_grad_()
    ours = adapted_linear(low, weight.bfloat16(), None, a, b, scale=SCALE)
    plain = F.linear(low, merged(weight, a, b, 1).bfloat16())
    grads = [torch.autograd.grad(y.float().square().sum(), [a, b]) for y in (exact, ours, plain)]
    for e, o, p in zip((exact, *grads[0]), (ours, *grads[1]), (plain, *grads[2]), strict=True):
        error, plain_error = (float((t.detach().float() - e.detach()).norm() / e.detach().norm()) for t in (o, p))
        assert error <= 2 * plain_error, (error, plain_error)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(a=(5, 16)), r"adapted_linear: a has shape .*must be \[P \* r, K\]"),
        (dict(b=(11, 4)), r"adapted_linear: b has shape .*must be \[N, r\]"),
        (dict(weight=(12, 15)), r"adapted_linear: weight has shape .*must be \[N, K\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    tensors = dict(zip(("x", "weight", "bias", "a", "b"), make(8, 16), strict=True))
    tensors |= {name: torch.zeros(shape, device=DEVICE) for name, shape in change.items()}
    with pytest.raises(KernelInputError, match=message):
        adapted_linear(*tensors.values(), scale=SCALE)
