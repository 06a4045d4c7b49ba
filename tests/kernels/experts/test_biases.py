"""Experts with biases and the clamped activation, in every backend that has them, against the definition."""

from __future__ import annotations

import pytest
import torch

from moescale.kernels import experts as experts_module
from moescale.kernels.backends import KernelInputError
from moescale.kernels.experts import ExpertBiases, SwigluClamp, expert_mlp, experts
from moescale.kernels.experts.reference import experts_reference
from moescale.kernels.swiglu.reference import clamped_swiglu
from tests.kernels.experts.test_experts import NEEDS_CUTE, make_inputs

# On the CPU, Triton runs in its interpreter (conftest.py), and plain torch plays the package of "cute".
BACKENDS = ["torch", "grouped_mm", "triton", "cute"]
CLAMP = SwigluClamp(1.702, 1.0)  # low enough that many values are clamped
SHAPES = [(13, 2, 3, 40, 24), (1, 1, 1, 16, 16), (37, 4, 9, 32, 24), (0, 2, 4, 16, 16)]


@pytest.fixture(autouse=True)
def plays_the_package_of_cute(request, monkeypatch):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "cute":
        request.getfixturevalue("cute")
        monkeypatch.setattr(experts_module, "choose_experts_backend", lambda device, dtype, requested: requested)


def make_biased(*shape):
    ids, (x, weights, gate_up, down) = make_inputs(*shape)
    generator = torch.Generator().manual_seed(3)
    biases = [torch.randn(w.shape[:2], generator=generator).requires_grad_() for w in (gate_up, down)]
    return ids, [x, weights, gate_up, down, *biases]


def run(function, ids, inputs, grad, **options):
    x, weights, gate_up, down, *biases = inputs
    y = function(x, ids, weights, gate_up, down, biases=ExpertBiases(*biases), clamp=CLAMP, **options)
    return (y, *torch.autograd.grad(y, inputs, grad))


def assert_matches_reference(ids, inputs, **options):
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    for number, (actual, expected) in enumerate(
        zip(run(experts, ids, inputs, grad, **options), run(experts_reference, ids, inputs, grad), strict=True)
    ):
        scale = expected.abs().max().clamp(min=1) if expected.numel() else 1
        torch.testing.assert_close(
            actual / scale, expected / scale, rtol=0, atol=1e-5, msg=lambda m, n=number: f"output {n}: {m}"
        )


def test_the_activation_is_the_published_one():
    gate_up = torch.tensor([[0.5, 9.0, -9.0, 0.25, 8.0, -8.0]])
    gate, up = torch.tensor([0.5, 7.0, -9.0]), torch.tensor([0.25, 7.0, -7.0])
    expected = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    torch.testing.assert_close(clamped_swiglu(gate_up, SwigluClamp(1.702, 7.0))[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_match_the_definition(backend, shape):
    assert_matches_reference(*make_biased(*shape), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "grouped_mm", pytest.param("triton", marks=pytest.mark.slow), "cute"])
def test_recomputing_the_up_projection_changes_nothing(backend):
    ids, inputs = make_biased(21, 3, 5, 32, 24)
    grad = torch.randn(21, 32)
    saved = run(experts, ids, inputs, grad, backend=backend)
    recomputed = run(experts, ids, inputs, grad, backend=backend, recompute_up=True)
    assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_with_an_id_out_of_range_contribute_nothing(backend):
    ids, inputs = make_biased(9, 2, 3, 16, 8)
    ids[0, 1], ids[4, 0], ids[8, 1] = -1, 3, 1000
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what nothing has written holds NaN
    try:
        assert_matches_reference(ids, inputs, backend=backend)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton", "cute"])
def test_gradients_are_added_to_the_buffers_and_not_returned(backend, buffer_dtype):
    ids, inputs = make_biased(17, 2, 3, 16, 24)
    inputs = [t.detach().to(buffer_dtype if t.dim() > 1 and t is not inputs[1] else t.dtype) for t in inputs]
    if buffer_dtype == torch.bfloat16 and backend != "torch":
        pytest.skip("the interpreter computes wrongly in bf16")
    x, weights, gate_up, down, *biases = (t.requires_grad_() for t in inputs)
    grad = torch.randn(17, 16, dtype=x.dtype)
    expected = run(experts, ids, [x, weights, gate_up, down, *biases], grad, backend=backend)
    buffers = [torch.full(t.shape, 0.5) for t in (gate_up, down, *biases)]
    for _ in range(2):
        y = experts(
            *(x, ids, weights, gate_up, down),
            gate_up_gradient=buffers[0],
            down_gradient=buffers[1],
            biases=ExpertBiases(*biases),
            bias_gradients=ExpertBiases(*buffers[2:]),
            clamp=CLAMP,
            backend=backend,
        )
        y.backward(grad)
    tolerance = 1e-5 if buffer_dtype == torch.float32 else 0.1
    for parameter, buffer, gradient in zip((gate_up, down, *biases), buffers, expected[3:], strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(buffer, 0.5 + 2 * gradient.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_belong_to_no_expert_have_zero_result_and_gradient(backend):
    _, (_, _, gate_up, down, *biases) = make_biased(1, 1, 3, 16, 8)
    rows = torch.randn(10, 16).requires_grad_()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    y = expert_mlp(rows, gate_up, down, ends, biases=ExpertBiases(*biases), clamp=CLAMP, backend=backend)
    y.backward(torch.ones_like(y))
    assert (y[7:] == 0).all() and (rows.grad[7:] == 0).all() and y[:7].abs().min() > 0
    counts = torch.tensor([2.0, 0.0, 5.0])
    torch.testing.assert_close(biases[1].grad, counts[:, None].expand_as(biases[1]).contiguous())
    assert biases[0].grad[1].abs().sum() == 0 and biases[0].grad[[0, 2]].abs().min() >= 0


def test_rows_of_a_rank_give_the_gradients_of_the_whole_layer():
    """expert_mlp on sorted rows, one row a token, is the layer with weight 1."""
    ids, inputs = make_biased(12, 1, 3, 16, 8)
    x, _, gate_up, down, *biases = inputs
    order = ids[:, 0].argsort(stable=True)
    ends = torch.bincount(ids[:, 0], minlength=3).cumsum(0).to(torch.int32)
    ones = torch.ones(12, 1)
    grad = torch.randn(12, 16)
    parameters = (gate_up, down, *biases)
    layer = experts_reference(x, ids, ones, gate_up, down, ExpertBiases(*biases), CLAMP)
    expected = torch.autograd.grad(layer, parameters, grad)
    y = expert_mlp(x[order], gate_up, down, ends, biases=ExpertBiases(*biases), clamp=CLAMP)
    for a, b in zip(torch.autograd.grad(y, parameters, grad[order]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["experts", "expert_mlp"])
def test_passes_opcheck(operator):
    ids, (x, weights, gate_up, down, *biases) = make_biased(6, 2, 3, 16, 8)
    rest = (*(None,) * 6, [1.702, 1.0], "torch", True)
    if operator == "experts":
        arguments = (x, ids, weights, gate_up, down, *biases, *rest)
        torch.library.opcheck(torch.ops.moescale.experts.default, arguments)
    else:
        ends = torch.tensor([2, 2, 6], dtype=torch.int32)
        torch.library.opcheck(torch.ops.moescale.expert_mlp.default, (x, gate_up, down, ends, *biases, *rest))


def test_compiles_without_graph_break_and_gives_the_same_gradients():
    ids, inputs = make_biased(12, 2, 3, 16, 8)
    grad = torch.randn(12, 16)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(experts, ids, inputs, grad), run(compiled, ids, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_cute_is_refused_where_it_cannot_run_for_biased_experts_too():
    ids, (x, weights, gate_up, down, *biases) = make_biased(4, 1, 2, 16, 8)
    with pytest.raises(KernelInputError, match="'cute'. needs a Hopper GPU"):
        experts(x, ids, weights, gate_up, down, backend="cute", biases=ExpertBiases(*biases))


@pytest.mark.gpu
@NEEDS_CUTE
@pytest.mark.parametrize("save_pre", [True, False])
def test_cute_is_as_near_to_fp32_as_triton(save_pre):
    ids, inputs = make_biased(300, 4, 7, 512, 176)
    ids[ids == 3] = 2  # an expert without rows
    scaled = [t.detach() * (0.05 if t.dim() == 3 else 1) for t in inputs]
    inputs = [t.cuda().to(torch.float32 if n == 1 else torch.bfloat16) for n, t in enumerate(scaled)]
    inputs, ids = [t.requires_grad_() for t in inputs], ids.cuda()
    grad = torch.randn_like(inputs[0])
    exact = run(experts_reference, ids, [t.detach().float().requires_grad_() for t in inputs], grad.float())
    options = {"recompute_up": not save_pre}
    cute, triton = (run(experts, ids, inputs, grad, backend=backend, **options) for backend in ("cute", "triton"))
    names = ("y", "x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    for name, a, b, c in zip(names, cute, triton, exact, strict=True):
        error, of_triton = ((found.float() - c).norm() / c.norm() for found in (a, b))
        assert error <= 1.1 * of_triton + 1e-4, (name, error, of_triton)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: ExpertBiases(b.gate_up[:, 1:], b.down), r"gate_up_bias has shape \(2, 15\); it must be \[E, 2F\]"),
        (lambda b: ExpertBiases(b.gate_up, b.down.double()), r"down_bias has dtype torch.float64"),
    ],
)
def test_biases_that_do_not_fit_are_refused(change, message):
    ids, (x, weights, gate_up, down, *biases) = make_biased(4, 1, 2, 16, 8)
    with pytest.raises(KernelInputError, match=message):
        experts(x, ids, weights, gate_up, down, biases=change(ExpertBiases(*biases)))


@pytest.mark.parametrize(
    "options", [{"biases": "short"}, {"bias_gradients": "alone"}, {"down_gradient": torch.zeros(2, 2)}]
)
def test_what_does_not_fit_rows_is_refused_by_the_operator_that_was_called(options):
    _, (x, _, gate_up, down, *biases) = make_biased(4, 1, 2, 16, 8)
    given = {"short": ExpertBiases(biases[0][:, 1:], biases[1]), "alone": ExpertBiases(*biases)}
    options = {name: given.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(KernelInputError, match="^expert_mlp: "):
        expert_mlp(x, gate_up, down, torch.tensor([2, 4], dtype=torch.int32), **options)
