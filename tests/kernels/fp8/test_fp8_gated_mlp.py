"""The gated MLP in e4m3: bit for bit two linear layers in e4m3 with SwiGLU between, its buffers and its rules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from agreement import DEVICE

from moescale.kernels.backends import KernelInputError
from moescale.kernels.fp8 import Copies, Scaled, copies_of, mlp, reference
from moescale.kernels.fp8 import triton as kernels
from moescale.kernels.fp8.errors import collecting
from moescale.kernels.fp8.linear import fp8_linear
from moescale.kernels.fp8.mlp import fp8_mlp
from moescale.kernels.fp8.scaled import E4M3
from moescale.kernels.swiglu import swiglu
from synchronisation import synchronisation_refused
from tests.kernels.fp8.implementations import EITHER

pytestmark = [pytest.mark.usefixtures("poisoned_outputs"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
NAMES = ("out", "grad_x", "grad_gate_up", "grad_down")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def make(*shape: int, ffn: int) -> dict:
    hidden = shape[-1]
    gate_up, down = randn(2 * ffn, hidden, seed=1) * hidden**-0.5, randn(hidden, ffn, seed=2) * ffn**-0.5
    copies = {"gate_up_copies": copies_of(gate_up), "down_copies": copies_of(down)}
    leaves = {"x": randn(*shape), "gate_up": gate_up, "down": down}
    return {name: tensor.requires_grad_() for name, tensor in leaves.items()} | copies


def by_layers(x, gate_up, down, gate_up_copies, down_copies, *, parts, quantized=None, **buffers) -> torch.Tensor:
    of_gate_up, of_down = buffers.get("gate_up_gradient"), buffers.get("down_gradient")
    pre = fp8_linear(x, gate_up, gate_up_copies, quantized=quantized, weight_gradient=of_gate_up)
    act = swiglu(pre, backend="triton" if parts is kernels else "torch")
    return fp8_linear(act, down, down_copies, weight_gradient=of_down)


def results(run, inputs: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor | None]:
    out = run(**inputs, **options)
    leaves = [inputs[name] for name in ("x", "gate_up", "down")]
    gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def assert_same(found: dict, expected: dict) -> None:
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor is None) == (other is None), name
        assert tensor is None or torch.equal(tensor.view(torch.int16), other.view(torch.int16)), name


@EITHER
@pytest.mark.parametrize(("shape", "ffn"), [((7, 16), 32), ((2, 5, 48), 528), ((1, 144), 80), ((0, 16), 16)])
@pytest.mark.parametrize("has_rows", [False, True])
def test_it_is_two_linear_layers_with_swiglu_between(parts, shape, ffn, has_rows):
    inputs, grad = make(*shape, ffn=ffn), randn(*shape, seed=3)
    rows = parts.quantize_rows(inputs["x"].detach().flatten(0, -2)) if has_rows else None
    expected = results(by_layers, inputs, grad, parts=parts, quantized=rows)
    assert_same(results(fp8_mlp, inputs, grad, quantized=rows), expected)


@EITHER
def test_rows_of_all_magnitudes_and_such_that_are_not_finite_are_the_same(parts):
    inputs, grad = make(9, 48, ffn=80), randn(9, 48, seed=3)
    sizes = torch.logspace(-9, 9, 9, device=DEVICE)[:, None].bfloat16()
    x = inputs["x"].detach() * sizes
    x[2], x[3, 5] = 0, float("nan")
    grad = grad * sizes.flip(0)
    grad[4], grad[5, 7] = 0, float("inf")
    inputs["x"] = x.requires_grad_()
    found, expected = results(fp8_mlp, inputs, grad), results(by_layers, inputs, grad, parts=parts)
    for name, tensor in found.items():
        assert torch.equal(tensor.isfinite(), expected[name].isfinite()), name
        assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()), name
    assert found["out"].isfinite().all(1).tolist() == [row != 3 for row in range(9)]


@EITHER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradients_are_added_to_the_buffers_and_not_returned(parts, dtype):
    inputs, grad = make(24, 48, ffn=32), randn(24, 48, seed=3)
    both = []
    for run, options in ((fp8_mlp, {}), (by_layers, {"parts": parts})):
        buffers = {
            f"{name}_gradient": torch.full(inputs[name].shape, 0.5, dtype=dtype, device=DEVICE)
            for name in ("gate_up", "down")
        }
        for _ in range(2):
            found = results(run, inputs, grad, **buffers, **options)
        both.append((found, buffers))
    (found, buffers), (expected, others) = both
    assert found["grad_gate_up"] is None and found["grad_down"] is None
    assert_same(found, expected)
    assert all(torch.equal(buffer, others[name]) and (buffer != 0.5).any() for name, buffer in buffers.items())


@pytest.mark.parametrize("frozen", [("x",), ("gate_up",), ("down",), ("x", "gate_up")])
def test_without_a_gradient_of_its_own_a_buffer_is_left_alone(frozen):
    inputs, grad = make(6, 16, ffn=32), randn(6, 16, seed=3)
    inputs |= {name: inputs[name].detach() for name in frozen}
    both = []
    for run, options in ((fp8_mlp, {}), (by_layers, {"parts": reference})):
        buffers = {
            f"{name}_gradient": torch.zeros_like(inputs[name], requires_grad=False) for name in ("gate_up", "down")
        }
        out = run(**inputs, **buffers, **options)
        leaves = [inputs[name] for name in ("x", "gate_up", "down") if name not in frozen]
        both.append(([*torch.autograd.grad(out, leaves, grad, allow_unused=True)], [*buffers.values()]))
    for a, b in zip(*(found + buffers for found, buffers in both), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@EITHER
def test_strided_inputs_and_gradients_give_the_same(parts):
    inputs, grad = make(10, 48, ffn=32), randn(10, 48, seed=3)
    expected = results(fp8_mlp, inputs, grad)
    strided = inputs | {"x": inputs["x"].detach().t().contiguous().t().requires_grad_()}
    found = results(fp8_mlp, strided, torch.stack([grad, grad], 2)[..., 0])
    assert torch.equal(found["out"], expected["out"]) and torch.equal(found["grad_x"], expected["grad_x"])
    torch.testing.assert_close(found["grad_gate_up"], expected["grad_gate_up"])  # of cuBLAS, which sees the strides


@EITHER
def test_errors_of_rounding_are_those_of_linear_layers(parts, monkeypatch):
    monkeypatch.setattr(mlp, "swiglu", partial(swiglu, backend="triton" if parts is kernels else "torch"))
    inputs, grad = make(10, 48, ffn=32), randn(10, 48, seed=3)
    found = []
    for run, options in ((fp8_mlp, {}), (by_layers, {"parts": parts})):
        with collecting() as collector:
            results(run, inputs, grad, **options)
        found.append(collector.errors())
    assert found[0] == found[1] and set(found[0]) == {"linear input", "linear gradient of the result"}


def test_compiled_it_is_the_same_and_the_pre_activation_alone_is_saved():
    inputs, grad = make(2, 5, 48, ffn=32), randn(2, 5, 48, seed=3)
    compiled = torch.compile(fp8_mlp, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs, grad), results(fp8_mlp, inputs, grad))
    saved = []
    known = [inputs[name] for name in ("x", "gate_up", "down")] + [*inputs["gate_up_copies"], *inputs["down_copies"]]
    known = {tensor.untyped_storage()._cdata for tensor in known}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_mlp(**inputs)
    new = [tensor for tensor in saved if tensor.untyped_storage()._cdata not in known]
    assert [tuple(tensor.shape) for tensor in new] == [(10, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "ffn"), [(2048, 2816), (2048, 10944), (1024, 4096), (5120, 3072)])
def test_large_layers_are_bit_for_bit_the_same_and_never_synchronise(hidden, ffn):
    inputs, grad = make(4096, hidden, ffn=ffn), randn(4096, hidden, seed=3)
    results(fp8_mlp, inputs, grad)  # compiles, which may synchronise
    with synchronisation_refused():
        found = results(fp8_mlp, inputs, grad)
    assert_same(found, results(by_layers, inputs, grad, parts=kernels))


INPUTS = make(4, 32, ffn=48)
ROWS = reference.quantize_rows(INPUTS["x"].detach()[:3])
STRIDED = Scaled(torch.empty(4, 64, dtype=E4M3, device=DEVICE)[:, :32], torch.ones(4, device=DEVICE))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": INPUTS["x"][:, :16]}, r"down has shape \(32, 48\); it must be \[H, F\] = \(16, 'any'\)"),
        ({"gate_up": INPUTS["gate_up"][:48]}, r"gate_up has shape \(48, 32\); it must be \[2F, H\] = \(96, 32\)"),
        ({"x": INPUTS["x"].float()}, "x has dtype torch.float32; it must be bfloat16"),
        ({"down": INPUTS["down"].half()}, "down has dtype torch.float16; it must be bfloat16"),
        ({"down": INPUTS["down"].to("meta")}, "down is on meta; the other inputs are on"),
        (
            {"down_copies": Copies(*(part.to("meta") for part in INPUTS["down_copies"]))},
            "down_copies is on meta; the other inputs are on",
        ),
        (
            {"down_copies": INPUTS["gate_up_copies"]},
            r"down_copies has shape \(1, 96, 32\); it must be those of down",
        ),
        ({"quantized": ROWS}, r"quantized has shape \(3, 32\); it must be the rows of x = \(4, 32\)"),
        ({"quantized": STRIDED}, "quantized and its scales must be contiguous"),
        ({"quantized": Scaled(ROWS.data, ROWS.scales[:1])}, r"quantized has shape \(3, 32\)"),
        ({"down_gradient": INPUTS["gate_up"].detach()}, r"down_gradient has shape \(96, 32\); it must be the shape of"),
        ({"gate_up_gradient": INPUTS["gate_up"]}, "gate_up_gradient must be contiguous and not require a gradient"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(KernelInputError, match="^fp8_mlp: " + words):
        fp8_mlp(**(INPUTS | changes))


@pytest.mark.parametrize(("hidden", "ffn"), [(40, 48), (32, 24)])
def test_widths_that_are_not_multiples_of_16_are_refused(hidden, ffn):
    with pytest.raises(KernelInputError, match=rf"hidden size \({hidden}\) and intermediate size \({ffn}\) must"):
        fp8_mlp(**make(4, hidden, ffn=ffn))
