"""The expert MLP in every back end against its definition, output and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.kernels.backends import HOPPER, KernelInputError, cute_available
from moescale.kernels.block_fp8 import quantize
from moescale.kernels.experts import expert_mlp, experts
from moescale.kernels.experts.reference import experts_reference
from synchronisation import synchronisation_refused

BACKENDS = ["torch", "grouped_mm", "triton"]  # on the CPU, Triton runs in its interpreter (conftest.py)
RUNS_CUTE = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER and cute_available("experts")
NEEDS_CUTE = pytest.mark.skipif(not RUNS_CUTE, reason="needs a Hopper GPU and pip install 'moescale[cute]'")
GPU_BACKENDS = ["triton", pytest.param("cute", marks=NEEDS_CUTE)]


def make_inputs(tokens, top_k, num_experts, hidden, ffn, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    ids = scores.topk(min(top_k, num_experts)).indices.int()
    x = torch.randn(tokens, hidden, generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    gate_up = torch.randn(num_experts, 2 * ffn, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_experts, hidden, ffn, generator=generator) * ffn**-0.5
    return ids, [t.requires_grad_() for t in (x, weights, gate_up, down)]


def run(function, ids, inputs, grad, **options):
    x, weights, gate_up, down = inputs
    y = function(x, ids, weights, gate_up, down, **options)
    return (y, *torch.autograd.grad(y, inputs, grad))


def assert_matches_reference(ids, inputs, tolerance=1e-5, **options):
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    expected = run(experts_reference, ids, inputs, grad)
    actual = run(experts, ids, inputs, grad, **options)
    for name, a, e in zip(("y", "x", "topk_weights", "gate_up", "down"), actual, expected, strict=True):
        scale = e.abs().max().clamp(min=1) if e.numel() else 1
        torch.testing.assert_close(a / scale, e / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(13, 2, 3, 40, 24), (1, 1, 1, 16, 16), (21, 8, 9, 32, 24), (0, 2, 4, 16, 16)])
def test_output_and_gradients_match_the_definition(backend, shape):
    ids, inputs = make_inputs(*shape)
    assert_matches_reference(ids, inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_the_up_projection_changes_nothing(backend):
    ids, inputs = make_inputs(21, 3, 5, 32, 24)
    grad = torch.randn(21, 32)
    saved = run(experts, ids, inputs, grad, backend=backend)
    recomputed = run(experts, ids, inputs, grad, backend=backend, recompute_up=True)
    assert all(torch.equal(a, b) for a, b in zip(saved, recomputed, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_at_one_expert_leave_the_others_without_gradient(backend):
    ids, inputs = make_inputs(19, 1, 4, 16, 8)
    ids = torch.full_like(ids, 2)
    assert_matches_reference(ids, inputs, backend=backend)
    grads = run(experts, ids, inputs, torch.ones(19, 16), backend=backend)
    assert grads[3][[0, 1, 3]].abs().sum() == 0 and grads[3][2].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradients_are_added_to_the_buffers_and_not_returned(backend):
    ids, inputs = make_inputs(17, 2, 3, 16, 24)
    x, weights, gate_up, down = inputs
    grad = torch.randn(17, 16)
    expected = run(experts, ids, inputs, grad, backend=backend)
    buffers = [torch.full_like(gate_up, 0.5), torch.full_like(down, -0.25)]
    for _ in range(2):
        y = experts(
            x, ids, weights, gate_up, down, gate_up_gradient=buffers[0], down_gradient=buffers[1], backend=backend
        )
        y.backward(grad)
    assert gate_up.grad is None and down.grad is None
    torch.testing.assert_close(buffers[0], 0.5 + 2 * expected[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffers[1], -0.25 + 2 * expected[4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, 2 * expected[1], rtol=1e-5, atol=1e-5)


@pytest.fixture
def uninitialized_is_nan():
    """Tensors that nothing has written yet hold NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_with_an_id_out_of_range_contribute_nothing(backend):
    ids, inputs = make_inputs(9, 2, 3, 16, 8)
    ids[0, 1], ids[4, 0], ids[8, 1] = -1, 3, 1000
    assert_matches_reference(ids, inputs, backend=backend)


def test_ids_out_of_range_are_an_error_in_debug_mode(monkeypatch):
    ids, (x, weights, gate_up, down) = make_inputs(9, 2, 3, 16, 8)
    ids[4, 0] = 3
    monkeypatch.setenv("MOESCALE_DEBUG", "1")
    with pytest.raises(KernelInputError, match=r"topk_ids\[4, 0\] is 3; expert ids must lie in \[0, 3\); 1 of 18"):
        experts(x, ids, weights, gate_up, down)


def test_wrong_counts_of_the_router_are_an_error_in_debug_mode(monkeypatch):
    ids, (x, weights, gate_up, down) = make_inputs(4, 1, 2, 16, 8)
    ids[:] = 1
    monkeypatch.setenv("MOESCALE_DEBUG", "1")
    with pytest.raises(KernelInputError, match=r"tokens_per_expert is \[4, 0\]; topk_ids count \[0, 4\]"):
        experts(x, ids, weights, gate_up, down, tokens_per_expert=torch.tensor([4, 0]))


@settings(max_examples=5, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 1000),
    backend=st.sampled_from(BACKENDS),
)
def test_random_shapes_match_the_definition(shape, seed, backend):
    tokens, top_k, num_experts, hidden, ffn = shape
    ids, inputs = make_inputs(tokens, top_k, num_experts, 8 * hidden, 4 * ffn, seed=seed)
    assert_matches_reference(ids, inputs, backend=backend)


def test_non_contiguous_inputs_give_the_same_result():
    ids, inputs = make_inputs(11, 2, 3, 16, 8)
    grad = torch.randn(16, 11).t()
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in inputs]
    ids_strided = ids.t().contiguous().t()
    for a, b in zip(run(experts, ids, inputs, grad), run(experts, ids_strided, strided, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_belong_to_no_expert_have_zero_result_and_gradient(backend):
    _, (_, _, gate_up, down) = make_inputs(1, 1, 3, 16, 8)
    rows = torch.randn(10, 16)
    rows[7:] = float("nan")
    rows.requires_grad_()
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    y = expert_mlp(rows, gate_up, down, ends, backend=backend)
    y.backward(torch.ones_like(y))
    assert (y[7:] == 0).all() and (rows.grad[7:] == 0).all()
    assert y[:7].isfinite().all() and y[:7].abs().min() > 0 and gate_up.grad.isfinite().all()


_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize("operator", ["experts", "expert_mlp"])
def test_passes_opcheck(operator, in_fp8):
    ids, (x, weights, gate_up, down) = make_inputs(6, 2, 3, 16, 8)
    scales, checks = (None, None), [*_CHECKS]
    if in_fp8:
        checks.remove("test_schema")  # which multiplies inputs: torch does not do that in fp8
        (gate_up, down), scales = zip(*(quantize(weight.detach()) for weight in (gate_up, down)), strict=True)
    if operator == "experts":
        arguments = (x, ids, weights, gate_up, down, None, None, *scales, *(None,) * 5, "torch", True)
        torch.library.opcheck(torch.ops.moescale.experts.default, arguments, test_utils=checks)
    else:
        ends = torch.tensor([2, 2, 6], dtype=torch.int32)
        arguments = (x, gate_up, down, ends, None, None, *scales, *(None,) * 5, "torch", True)
        torch.library.opcheck(torch.ops.moescale.expert_mlp.default, arguments, test_utils=checks)


def test_compiles_without_graph_break_and_gives_the_same_gradients():
    ids, inputs = make_inputs(12, 2, 3, 16, 8)
    grad = torch.randn(12, 16)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(experts, ids, inputs, grad), run(compiled, ids, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_layer_accumulates_into_buffers_over_interleaved_micro_batches():
    """Pipeline schedules run a second forward before the first backward: buffers change between the two."""
    ids, inputs = make_inputs(12, 2, 3, 16, 8)
    x, weights, gate_up, down = inputs
    grad = torch.randn(12, 16)
    expected = run(experts, ids, inputs, grad)
    buffers = [torch.zeros_like(gate_up), torch.zeros_like(down)]
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    first, second = (
        compiled(x, ids, weights, gate_up, down, gate_up_gradient=buffers[0], down_gradient=buffers[1])
        for _ in range(2)
    )
    first.backward(grad)
    second.backward(grad)
    torch.testing.assert_close(buffers[0], 2 * expected[3])
    torch.testing.assert_close(buffers[1], 2 * expected[4])


WRONG_INPUTS = {
    "x_dims": (dict(x=torch.zeros(2, 3, 16)), r"experts: x has shape \(2, 3, 16\); it must be \[T, H\]"),
    "ids_tokens": (dict(ids=torch.zeros(5, 2, dtype=torch.int32)), r"topk_ids has shape \(5, 2\); it must be \[T, K\]"),
    "ids_dtype": (dict(ids=torch.zeros(4, 2)), "topk_ids has dtype torch.float32; it must be int32, int64"),
    "weights_dtype": (dict(weights=torch.zeros(4, 2).bfloat16()), "topk_weights has dtype torch.bfloat16; it must be"),
    "gate_up_shape": (dict(gate_up=torch.zeros(3, 15, 16)), r"gate_up has shape \(3, 15, 16\).*= \(3, 16, 16\)"),
    "down_dtype": (dict(down=torch.zeros(3, 16, 8).half()), "down has dtype torch.float16; it must be float32"),
    "device": (dict(weights=torch.zeros(4, 2, device="meta")), "topk_weights is on meta; the other inputs are on cpu"),
    "backend": (dict(backend="trition"), "kernels.backend .'trition'. must be one of .*did you mean 'triton'"),
    "buffer": (dict(gate_up_gradient=torch.zeros(3, 8, 16)), r"gate_up_gradient has shape \(3, 8, 16\)"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_are_refused_with_their_values(case):
    changed, message = WRONG_INPUTS[case]
    ids, (x, weights, gate_up, down) = make_inputs(4, 2, 3, 16, 8)
    arguments = dict(x=x, ids=ids, weights=weights, gate_up=gate_up, down=down) | changed
    positional = [arguments.pop(name) for name in ("x", "ids", "weights", "gate_up", "down")]
    with pytest.raises(KernelInputError, match=message):
        experts(*positional, **arguments)


@pytest.mark.parametrize("hidden, ffn", [(18, 8), (16, 6)])
def test_rows_not_aligned_to_16_bytes_need_the_torch_backend(hidden, ffn):
    ids, inputs = make_inputs(5, 2, 3, hidden, ffn)
    assert_matches_reference(ids, inputs, backend="torch")
    with pytest.raises(KernelInputError, match="must be multiples of 4 in torch.float32.*use the back end 'torch'"):
        experts(inputs[0], ids, *inputs[1:], backend="grouped_mm")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens, top_k, num_experts",
    [*itertools.product((1, 127, 128, 129, 1000), (1, 2), (1, 7)), (300, 8, 256), (2000, 6, 64), (0, 2, 4)],
)
@pytest.mark.parametrize("hidden, ffn", [(512, 176), (72, 264)])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_bf16_error_is_at_most_twice_that_of_plain_torch(backend, tokens, top_k, num_experts, hidden, ffn):
    # The error of a few numbers is chance: draws are pooled until there are about 64 tokens.
    seeds = range(max(1, 64 // max(tokens, 1)) if tokens else 1)
    sums = sum(squares(backend, seed, (tokens, min(top_k, num_experts), num_experts, hidden, ffn)) for seed in seeds)
    ours, plain, size = sums.sqrt().unbind()
    assert (ours <= 2 * plain + 1e-4 * size).all(), (ours, plain, size)


def squares(backend, seed, sizes):
    """Squares of our error, of plain torch's and of the result, [3, 5], for y and every gradient."""
    tokens, hidden = sizes[0], sizes[3]
    ids, inputs = make_inputs(*sizes, seed=seed)
    ids = ids.cuda()
    exact = [t.detach().double().cuda().requires_grad_() for t in inputs]
    half = [t.detach().cuda().requires_grad_() if i == 1 else t.detach().bfloat16().cuda().requires_grad_()
            for i, t in enumerate(inputs)]  # fmt: skip
    grad = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()
    for e, h in zip(exact, half, strict=True):
        e.data.copy_(h.data)
    reference = run(experts_reference, ids, exact, grad.double())
    plain = run(experts, ids, half, grad, backend="torch")
    ours = run(experts, ids, half, grad, backend=backend)
    assert all(o.isfinite().all() for o in ours)
    found = [[t.detach() for t in results] for results in zip(ours, plain, reference, strict=True)]
    rows = [[(o - r).norm(), (p - r).norm(), r.norm()] for o, p, r in found]
    return torch.tensor(rows, dtype=torch.float64).T ** 2


@pytest.mark.gpu
@pytest.mark.parametrize("with_buffers", [False, True])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_repeated_runs_are_bit_identical_and_never_synchronise(backend, with_buffers):
    ids, inputs = make_inputs(700, 6, 64, 512, 176)
    ids = ids.cuda()
    half = [t.detach().cuda().to(torch.float32 if i == 1 else torch.bfloat16) for i, t in enumerate(inputs)]
    half = [t.requires_grad_(not with_buffers or i < 2) for i, t in enumerate(half)]
    buffers = {}
    if with_buffers:
        buffers = {
            f"{name}_gradient": torch.zeros_like(w) for name, w in zip(("gate_up", "down"), half[2:], strict=True)
        }
    grad = torch.randn(700, 512, device="cuda").bfloat16()

    def results() -> list[torch.Tensor]:
        for buffer in buffers.values():
            buffer.zero_()
        y = experts(half[0], ids, *half[1:], backend=backend, **buffers)
        gradients = torch.autograd.grad(y, [t for t in half if t.requires_grad], grad)
        return [y.detach(), *gradients, *(buffer.clone() for buffer in buffers.values())]

    first = results()  # compiles, which may synchronise
    with synchronisation_refused():
        runs = [results() for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(first, run, strict=True))


@pytest.mark.gpu
@NEEDS_CUTE
@pytest.mark.parametrize("buffer_dtype", [None, torch.bfloat16, torch.float32])
def test_cute_equals_triton_on_rows_with_a_tail_and_empty_experts(buffer_dtype):
    _, (_, _, gate_up, down) = make_inputs(1, 1, 7, 512, 176)
    gate_up, down = gate_up.detach().cuda().bfloat16(), down.detach().cuda().bfloat16()
    ends = torch.tensor([0, 3, 132, 132, 500, 501, 501], dtype=torch.int32, device="cuda")
    source = torch.randn(600, 512, device="cuda").bfloat16()
    source[501:] = float("nan")

    def results(backend: str) -> list[torch.Tensor]:
        rows, weights = source.clone().requires_grad_(), [w.clone().requires_grad_() for w in (gate_up, down)]
        buffers = {}
        if buffer_dtype is not None:
            names = ("gate_up_gradient", "down_gradient")
            buffers = {n: torch.ones_like(w, dtype=buffer_dtype) for n, w in zip(names, (gate_up, down), strict=True)}
        y = expert_mlp(rows, *weights, ends, backend=backend, **buffers)
        y.backward(torch.ones_like(y))
        assert (y[501:] == 0).all() and (rows.grad[501:] == 0).all()
        return [y.detach(), rows.grad, *(buffers.values() if buffers else (w.grad for w in weights))]

    for cute, triton in zip(results("cute"), results("triton"), strict=True):
        assert cute.isfinite().all() and (cute - triton).norm() <= 0.01 * triton.norm()
