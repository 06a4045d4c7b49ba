"""Experts with low-rank additions against the definition with merged weights, with all gradients."""

from __future__ import annotations

import pytest
import torch

from moescale.kernels.backends import KernelInputError
from moescale.kernels.experts import experts
from moescale.kernels.experts.adapted import ExpertAdapters, adapted_expert_mlp, adapted_experts
from moescale.kernels.experts.reference import experts_reference

BACKENDS = ["torch", "grouped_mm", "triton"]  # on the CPU, Triton runs in its interpreter (conftest.py)
SCALE = 0.75


def make_inputs(tokens, top_k, num_experts, hidden, ffn, rank):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices.int()
    x = torch.randn(tokens, hidden, generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    frozen = (randn(num_experts, 2 * ffn, hidden), randn(num_experts, hidden, ffn))
    adapters = ExpertAdapters(
        randn(num_experts, rank, hidden),
        randn(num_experts, 2 * ffn, rank),
        randn(num_experts, rank, ffn),
        randn(num_experts, hidden, rank),
    )
    return ids, [x.requires_grad_(), weights.requires_grad_(), *(a.requires_grad_() for a in adapters)], frozen


def merged(frozen, adapters):
    gate_up_a, gate_up_b, down_a, down_b = adapters
    return frozen[0] + SCALE * gate_up_b @ gate_up_a, frozen[1] + SCALE * down_b @ down_a


def assert_all_close(actual, expected, tolerance=1e-5):
    names = ("y", "x", "topk_weights", *ExpertAdapters._fields)
    for name, a, e in zip(names, actual, expected, strict=True):
        scale = e.abs().max().clamp(min=1) if e.numel() else 1
        torch.testing.assert_close(a / scale, e / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = [(13, 2, 3, 40, 24, 8), (1, 1, 1, 16, 16, 4), (11, 2, 4, 32, 48, 80), (0, 2, 4, 16, 16, 8)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("recompute_up", "shape"),
    [
        pytest.param(recompute, shape, marks=pytest.mark.slow if recompute and shape[-1] == 80 else ())
        for recompute in (False, True)
        for shape in SHAPES
    ],
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_output_and_gradients_are_those_of_merged_weights(backend, shape, recompute_up):
    ids, inputs, frozen = make_inputs(*shape)
    x, weights, *adapters = inputs
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y = adapted_experts(
        x, ids, weights, *frozen, ExpertAdapters(*adapters), scale=SCALE, backend=backend, recompute_up=recompute_up
    )
    expected = experts_reference(x, ids, weights, *merged(frozen, adapters))
    assert_all_close(
        (y, *torch.autograd.grad(y, inputs, grad)), (expected, *torch.autograd.grad(expected, inputs, grad))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_outputs")
def test_sorted_rows_are_multiplied_the_same_and_rows_of_no_expert_give_zeros(backend):
    _, (rows, _, *adapters), frozen = make_inputs(23, 1, 3, 32, 24, 8)
    ends = torch.tensor([5, 5, 19], dtype=torch.int32)  # the second expert has no rows, four rows have no expert
    y = adapted_expert_mlp(rows, *frozen, ends, ExpertAdapters(*adapters), scale=SCALE, backend=backend)
    ids = torch.tensor([0] * 5 + [2] * 14 + [3] * 4).unsqueeze(1)
    expected = experts_reference(rows, ids, torch.ones(23, 1), *merged(frozen, adapters))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    inputs = [rows, *adapters]
    for a, e in zip(
        (y, *torch.autograd.grad(y, inputs, grad)), (expected, *torch.autograd.grad(expected, inputs, grad)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5)
    assert y[19:].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_added_to_the_buffers_and_not_returned(backend):
    ids, inputs, frozen = make_inputs(17, 2, 3, 16, 24, 8)
    x, weights, *adapters = inputs
    y = adapted_experts(x, ids, weights, *frozen, ExpertAdapters(*adapters), scale=SCALE, backend=backend)
    expected = torch.autograd.grad(y.sum(), adapters)
    buffers = ExpertAdapters(*(torch.full_like(a, 0.5).detach() for a in adapters))
    for _ in range(2):
        adapted_experts(
            x, ids, weights, *frozen, ExpertAdapters(*adapters), scale=SCALE, gradients=buffers, backend=backend
        ).sum().backward()
    assert all(adapter.grad is None for adapter in adapters)
    for buffer, gradient in zip(buffers, expected, strict=True):
        torch.testing.assert_close(buffer, 0.5 + 2 * gradient, rtol=1e-5, atol=1e-5)


GPU = pytest.param("triton", "cuda", marks=pytest.mark.gpu)  # the interpreter multiplies no bf16


@pytest.mark.parametrize("backend, device", [("torch", "cpu"), GPU])
def test_in_bf16_the_error_is_at_most_twice_that_of_merged_weights(backend, device):
    ids, inputs, frozen = make_inputs(48, 2, 3, 64, 32, 16)
    ids, inputs = ids.to(device), [t.detach().to(device).requires_grad_() for t in inputs]
    frozen = tuple(w.to(device) for w in frozen)
    x, weights, *adapters = inputs
    exact = experts_reference(x, ids, weights, *merged(frozen, adapters))
    low, low_frozen = x.detach().bfloat16().requires_grad_(), tuple(w.bfloat16() for w in frozen)
    y = adapted_experts(low, ids, weights, *low_frozen, ExpertAdapters(*adapters), scale=SCALE, backend=backend)
    plain = experts_reference(low, ids, weights, *(w.bfloat16() for w in merged(frozen, adapters)))
    grads = [torch.autograd.grad(out.float().square().sum(), adapters) for out in (exact, y, plain)]
    for e, a, p in zip((exact, *grads[0]), (y, *grads[1]), (plain, *grads[2]), strict=True):
        error, plain_error = ((t.detach().float() - e.detach()).norm() / e.detach().norm() for t in (a, p))
        assert a.isfinite().all() and error <= 2 * plain_error, (float(error), float(plain_error))
    assert all(gradient.dtype == torch.float32 for gradient in grads[1])


def test_a_compiled_layer_has_no_graph_break():
    ids, inputs, frozen = make_inputs(16, 2, 3, 16, 16, 8)
    x, weights, *adapters = inputs

    def layer(x, weights, *adapters):
        return adapted_experts(x, ids, weights, *frozen, ExpertAdapters(*adapters), scale=SCALE) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for a, e in zip(actual, torch.autograd.grad(layer(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_experts_without_adapters_get_no_gradient_and_the_input_the_same(backend):
    ids, (x, weights, *_), frozen = make_inputs(17, 2, 3, 16, 24, 8)
    trained = [w.clone().requires_grad_() for w in frozen]
    expected = torch.autograd.grad(experts(x, ids, weights, *trained, backend=backend).sum(), [x, weights])
    actual = torch.autograd.grad(experts(x, ids, weights, *frozen, backend=backend).sum(), [x, weights])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_rank_that_the_back_end_cannot_align_is_refused():
    ids, (x, weights, *adapters), frozen = make_inputs(4, 1, 2, 16, 16, 6)
    with pytest.raises(KernelInputError, match=r"lora.rank \(6\) must be a multiple of 4 .* or the back end 'torch'"):
        adapted_experts(x, ids, weights, *frozen, ExpertAdapters(*adapters), scale=SCALE, backend="triton")


def test_factors_that_do_not_fit_the_weights_are_refused():
    ids, (x, weights, *adapters), frozen = make_inputs(4, 1, 2, 16, 16, 8)
    adapters[1] = adapters[1][:, :-1]
    with pytest.raises(KernelInputError, match=r"gate_up_b has shape \(2, 31, 8\); it must be \[E, 2F, r\]"):
        adapted_experts(x, ids, weights, *frozen, ExpertAdapters(*adapters), scale=SCALE)
