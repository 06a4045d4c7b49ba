"""Linear cross-entropy: chunked and fused against logits that exist."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE, assert_accurate, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescale import formats
from moescale.kernels import cross_entropy
from moescale.kernels.cross_entropy import linear_cross_entropy

BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and vocabulary blocks, the last ones ragged, also for small inputs."""
    from moescale.kernels.cross_entropy import triton

    monkeypatch.setattr(formats, "LOGIT_CHUNK_TOKENS", 16)
    monkeypatch.setattr(triton, "BLOCK_VOCABULARY", 16)


def make(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    targets[::5] = -100
    return [randn(tokens, hidden, dtype=dtype), randn(vocabulary, hidden, dtype=dtype, seed=1), targets]


def materialised(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 16, 41])
def test_loss_and_gradients_with_a_factor_in_front(backend: str, tokens: int) -> None:
    hidden, weight, targets = make(tokens, 12, 37)
    targets[0] = 36
    results = []
    for loss in (linear_cross_entropy(hidden, weight, targets, backend=backend), materialised(hidden, weight, targets)):
        # Not 1 and not a power of two: the factor must reach the gradients, once.
        results.append((loss.detach(), *torch.autograd.grad(0.3 * loss, (hidden, weight))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(1, 40), hidden=st.integers(1, 20), vocabulary=st.integers(1, 60))
def test_loss_and_gradients_on_any_shape(tokens: int, hidden: int, vocabulary: int) -> None:
    x, weight, targets = make(tokens, hidden, vocabulary)
    ours = linear_cross_entropy(x, weight, targets, backend="triton")
    expected = materialised(x, weight, targets)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(loss, (x, weight)) for loss in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_validation_computes_no_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make(20, 8, 23)
    expected = materialised(hidden, weight, targets)
    monkeypatch.setattr(cross_entropy, "_accumulate_product", None)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, backend=backend), expected)


def test_one_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier: list[weakref.ref] = []
    softmax_losses, product = cross_entropy.reference.softmax_losses, F.linear

    def watched_softmax(*arguments):
        losses, grad_logits = softmax_losses(*arguments)
        earlier.append(weakref.ref(grad_logits))
        return losses, grad_logits

    def watched_product(*arguments):
        assert all(reference() is None for reference in earlier), "an earlier chunk is still there"
        logits = product(*arguments)
        earlier.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(cross_entropy.reference, "softmax_losses", watched_softmax)
    monkeypatch.setattr(cross_entropy.F, "linear", watched_product)
    linear_cross_entropy(*make(41, 8, 23), backend="torch")
    assert len(earlier) == 2 * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_input_needs_a_gradient(backend: str, wanted: int) -> None:
    *inputs, targets = make(20, 8, 23)
    expected = torch.autograd.grad(materialised(*inputs, targets), inputs[wanted])
    inputs[1 - wanted] = inputs[1 - wanted].detach()
    ours = torch.autograd.grad(linear_cross_entropy(*inputs, targets, backend=backend), inputs[wanted])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_without_a_target_contribute_nothing(backend: str) -> None:
    hidden, weight, targets = make(20, 8, 23)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), backend=backend)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_logits_that_overflow_exp_are_exact() -> None:
    hidden, weight, targets = make(17, 8, 23)
    big = (hidden.detach() * 500).requires_grad_()
    ours = linear_cross_entropy(big, weight, targets, backend="triton")
    torch.testing.assert_close(ours, materialised(big, weight, targets))


def test_the_operator_compiles_without_a_graph_break() -> None:
    hidden, weight, targets = make(20, 8, 23)
    compiled = torch.compile(
        lambda h: linear_cross_entropy(h, weight, targets, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    ours = torch.autograd.grad(compiled(hidden), (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(materialised(hidden, weight, targets), (hidden, weight)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_weight_gradient_is_added_to_its_buffer(backend: str, compiled: bool) -> None:
    hidden, weight, targets = make(41, 12, 37)
    buffer = torch.full_like(weight, 0.5, requires_grad=False)
    expected = torch.autograd.grad(0.3 * materialised(hidden, weight, targets), (hidden, weight))

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, weight_gradient=buffer, backend=backend)

    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number in (1, 2):
        hidden.grad = None
        (0.3 * loss(hidden)).backward()
        assert weight.grad is None
        torch.testing.assert_close(hidden.grad, expected[0])
        torch.testing.assert_close(buffer, 0.5 + number * expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_gradients_are_added_to_an_fp32_buffer_without_rounding(backend: str) -> None:
    hidden, weight, targets = make(20, 8, 23, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, backend=backend), weight)
    buffer = torch.zeros(weight.shape, device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, targets, weight_gradient=buffer, backend=backend)
    (0.3 * loss).backward()
    torch.testing.assert_close(buffer, gradient.float() * 0.3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_of_hidden_the_buffer_is_left_alone(backend: str) -> None:
    hidden, weight, targets = make(20, 8, 23)
    buffer = torch.zeros_like(weight, requires_grad=False)
    expected = torch.autograd.grad(materialised(hidden, weight, targets), weight)
    loss = linear_cross_entropy(hidden.detach(), weight, targets, weight_gradient=buffer, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, weight), expected)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets, weight_gradient=buffer, backend=backend)
    frozen.backward()
    assert not buffer.any()


@pytest.mark.parametrize("tokens, most", [(100, 4), (1000, 4), (20, 2), (1, 1)])
def test_the_weight_gradient_is_rounded_at_most_four_times(tokens: int, most: int, monkeypatch) -> None:
    products = []
    accumulate = cross_entropy._accumulate_product
    monkeypatch.setattr(
        cross_entropy, "_accumulate_product", lambda *args, **kwargs: products.append(accumulate(*args, **kwargs))
    )
    hidden, weight, targets = make(tokens, 8, 23)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert len(products) == most


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("size", [(300, 256, 10001), (2048, 512, 4096), (1, 64, 102400)])
def test_bf16_error_is_at_most_twice_plain_torch(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from moescale.kernels.cross_entropy import triton

    monkeypatch.setattr(formats, "LOGIT_CHUNK_TOKENS", 512)
    monkeypatch.setattr(triton, "BLOCK_VOCABULARY", 4096)
    hidden, weight, targets = make(*size, dtype=torch.bfloat16)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
        if backend == "torch":
            return (materialised(hidden, weight, targets),)
        return (linear_cross_entropy(hidden, weight, targets, backend=backend),)

    with torch.no_grad():
        weight *= size[1] ** -0.5
    assert_accurate(loss, [hidden, weight])
