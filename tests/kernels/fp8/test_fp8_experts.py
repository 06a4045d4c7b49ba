"""Routed experts in e4m3: their error against fp64 beside that of a published recipe, their buffers and their rules."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICE

from fp8_recipe import Exact, relative_error
from moescale.kernels.backends import KernelInputError
from moescale.kernels.fp8 import Copies, copies_of, reference, routed
from moescale.kernels.fp8 import triton as kernels
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.fp8.scaled import E4M3, Scaled
from synchronisation import synchronisation_refused
from tests.kernels.fp8.implementations import EITHER, EITHER_IN_TIME, INTERPRETED, SLOW_TRITON

PLACES = ("x", "topk_weights", "gate_up", "down", "grad")
NAMES = ("out", "grad_x", "grad_topk_weights", "grad_gate_up", "grad_down")
# Rows of no expert are not written, and numpy, in which the interpreter computes, warns of what they hold.
pytestmark = [pytest.mark.usefixtures("poisoned_outputs"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make(ids: torch.Tensor, num_experts: int, hidden: int, ffn: int) -> dict[str, torch.Tensor]:
    """What is differentiated, by the names of :func:`fp8_experts`, and the ids."""
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE) + 0.1
    leaves = {
        "x": randn(ids.shape[0], hidden),
        "topk_weights": weights,
        "gate_up": randn(num_experts, 2 * ffn, hidden, seed=1) * hidden**-0.5,
        "down": randn(num_experts, hidden, ffn, seed=2) * ffn**-0.5,
    }
    return {"topk_ids": ids.to(DEVICE)} | {name: tensor.requires_grad_() for name, tensor in leaves.items()}


def run(inputs: dict[str, torch.Tensor], grad: torch.Tensor, **options) -> dict[str, torch.Tensor | None]:
    copies = {f"{name}_copies": copies_of(inputs[name]) for name in ("gate_up", "down")}
    out = fp8_experts(**inputs, **(copies | options))
    leaves = [inputs[name] for name in ("x", "topk_weights", "gate_up", "down")]
    gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def judged(inputs: dict[str, torch.Tensor], grad: torch.Tensor, quantises: bool) -> dict[str, torch.Tensor]:
    plain = {name: tensor.detach() for name, tensor in inputs.items()}
    return Exact(dtype=torch.float64, quantises=quantises).experts(**plain, grad=grad)


def random_ids(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices.int()


def routings() -> dict[str, torch.Tensor]:
    """By name, the experts of a few tokens out of four."""
    some_of_none = random_ids(5, 2, 4)
    some_of_none[1, 0] = some_of_none[3] = -1
    return {
        "even": random_ids(13, 2, 4),
        "all rows on one expert": torch.full((13, 1), 2),
        "an expert with one row, and two empty ones": torch.tensor([[0]] * 6 + [[3]]),
        "pairs of no expert": some_of_none,
        "no pair of any expert": torch.full((2, 2), -1),
        "no tokens": torch.zeros(0, 2, dtype=torch.int64),
    }


IN_TIME = ("an expert with one row, and two empty ones", "pairs of no expert", "no pair of any expert", "no tokens")
"""Of the routings, those that the interpreter takes in time."""


@pytest.mark.parametrize(
    ("name", "parts"),
    [(name, "torch") for name in routings()]
    + [pytest.param(name, "triton", marks=() if name in IN_TIME else SLOW_TRITON.marks) for name in routings()],
    indirect=["parts"],
)
def test_result_and_gradients_are_near_the_exact_ones_for_any_routing(parts, name):
    """At sizes that are multiples of 16, and not of the 128 of a tile."""
    ids = routings()[name]
    inputs, grad = make(ids, 4, 48, 80), randn(ids.shape[0], 48, seed=3)
    found, exact = run(inputs, grad), judged(inputs, grad, quantises=False)
    for result in NAMES:
        assert found[result].shape == exact[result].shape and found[result].isfinite().all(), result
        difference, scale = (t.double().norm() for t in (found[result] - exact[result], exact[result]))
        assert difference <= 0.12 * scale, result
    assert not found["grad_topk_weights"][ids.to(DEVICE) < 0].any()
    absent = [expert for expert in range(4) if expert not in ids]
    assert not found["grad_gate_up"][absent].any() and not found["grad_down"][absent].any()


@pytest.mark.parametrize("parts", ["torch"] if INTERPRETED else ["triton", "torch"], indirect=True)
def test_errors_are_at_most_a_twentieth_above_those_of_the_recipe(parts):
    """The ratio is 1.03 to 1.05, so the size is one at which chance does not decide, too large for the interpreter."""
    inputs, grad = make(random_ids(2048, 2, 2), 2, 512, 384), randn(2048, 512, seed=3)
    found = run(inputs, grad)
    recipe, exact = (judged(inputs, grad, quantises) for quantises in (True, False))
    for name, value in exact.items():
        assert relative_error(found[name], value) < 1.05 * relative_error(recipe[name], value), name


@EITHER_IN_TIME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradients_are_added_to_the_buffers_twice_and_not_returned(parts, dtype):
    inputs, grad = make(random_ids(9, 2, 3), 3, 32, 48), randn(9, 32, seed=3)
    plain = run(inputs, grad)
    buffers = {
        f"{name}_gradient": torch.full(inputs[name].shape, 0.5, dtype=dtype, device=DEVICE)
        for name in ("gate_up", "down")
    }
    for _ in range(2):
        found = run(inputs, grad, **buffers)
        assert found["grad_gate_up"] is None and found["grad_down"] is None
        assert all(torch.equal(found[name], plain[name]) for name in NAMES[:3])
    for name in ("gate_up", "down"):
        expected = 0.5 + 2 * plain[f"grad_{name}"].double()
        assert relative_error(buffers[f"{name}_gradient"], expected) < 0.008, name


@EITHER_IN_TIME
def test_a_buffer_of_one_weight_leaves_the_other_to_autograd(parts):
    inputs, grad = make(random_ids(9, 2, 3), 3, 32, 48), randn(9, 32, seed=3)
    buffer = torch.zeros(inputs["down"].shape, dtype=torch.bfloat16, device=DEVICE)
    found, plain = run(inputs, grad, down_gradient=buffer), run(inputs, grad)
    assert found["grad_down"] is None and torch.equal(buffer, plain["grad_down"])
    assert torch.equal(found["grad_gate_up"], plain["grad_gate_up"])


@EITHER_IN_TIME
def test_recomputing_the_up_projection_changes_nothing(parts):
    inputs, grad = make(routings()["pairs of no expert"], 4, 32, 48), randn(5, 32, seed=3)
    saved, recomputed = run(inputs, grad), run(inputs, grad, recompute_up=True)
    assert all(torch.equal(saved[name], recomputed[name]) for name in NAMES)


@EITHER_IN_TIME
@pytest.mark.parametrize("recompute_up", [False, True])
def test_rows_that_are_quantised_already_give_the_same(parts, recompute_up):
    inputs, grad = make(routings()["pairs of no expert"], 4, 32, 48), randn(5, 32, seed=3)
    rows = parts.quantize_rows(inputs["x"].detach())
    expected = run(inputs, grad, recompute_up=recompute_up)
    found = run(inputs, grad, quantized=rows, recompute_up=recompute_up)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    other = run(inputs, grad, quantized=rows._replace(scales=2 * rows.scales), recompute_up=recompute_up)
    assert not torch.equal(other["out"], expected["out"]), "what was given is not what is multiplied"


@EITHER
def test_strided_inputs_and_gradients_give_the_same(parts):
    inputs, grad = make(random_ids(4, 1, 2), 2, 32, 16), randn(4, 32, seed=3)
    expected = run(inputs, grad)
    strided = {name: torch.stack([t.detach()] * 2, -1)[..., 0] for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    strided = {name: t.requires_grad_(t.is_floating_point()) for name, t in strided.items()}
    found = run(strided, grad.t().contiguous().t())
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("where", "value", "parts"),
    [(where, float(value), "torch") for where in PLACES for value in ("nan", "inf", "-inf")]
    + [("x", float("nan"), "triton"), ("gate_up", float("inf"), "triton")]
    + [
        pytest.param(where, float(value), "triton", marks=SLOW_TRITON.marks)
        for where in PLACES
        for value in ("nan", "inf", "-inf")
    ],
    indirect=["parts"],
)
def test_numbers_that_are_not_finite_stay_visible(parts, where, value):
    ids = torch.tensor([[0], [1], [1], [0]])
    inputs, grad = make(ids, 2, 32, 16), randn(4, 32, seed=3)
    tensor = grad if where == "grad" else inputs[where].detach().clone()
    tensor.view(tensor.shape[0], -1)[1, 0] = value  # of token 1, or of expert 1
    if where != "grad":
        inputs[where] = tensor.requires_grad_()
    found = run(inputs, grad)
    finite = {name: found[name].isfinite().flatten(1) for name in NAMES}
    if where in ("gate_up", "down"):
        assert not finite["out"][1:3].any() and finite["out"][[0, 3]].all()
        assert not finite["grad_x"][1:3].all(1).any() and finite["grad_x"][[0, 3]].all()
    elif where == "grad":
        assert not finite["grad_x"][1].all() and finite["grad_x"][[0, 2, 3]].all()
    else:
        assert not finite["out"][1].any() and finite["out"][[0, 2, 3]].all()
        assert not finite["grad_x"][1].all() and finite["grad_x"][[0, 2, 3]].all()
    of_weights = finite["grad_gate_up"].all(1).tolist(), finite["grad_down"].all(1).tolist()
    assert of_weights == ([True, False], [True, True] if where == "down" else [True, False])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(1, 1, 1), (127, 2, 7), (129, 1, 4), (300, 8, 256), (2000, 6, 64)]
)
@pytest.mark.parametrize(("hidden", "ffn"), [(512, 176), (144, 272)])
def test_kernels_give_what_their_definitions_give(tokens, top_k, num_experts, hidden, ffn, monkeypatch):
    """To what a sum in another order and its rounding change: now and then the code that a number becomes."""
    inputs = make(random_ids(tokens, top_k, num_experts), num_experts, hidden, ffn)
    grad, found = randn(tokens, hidden, seed=3), {}
    for parts in (kernels, reference):
        monkeypatch.setattr(routed, "kernels_for", lambda tensor, parts=parts: parts)
        found[parts] = run(inputs, grad)
    for name in NAMES:
        ours, defined = (found[parts][name].float() for parts in (kernels, reference))
        assert ours.isfinite().all() and (ours - defined).norm() <= 0.03 * defined.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_dtype", [None, torch.bfloat16, torch.float32])
def test_repeated_runs_are_bit_identical_and_never_synchronise(buffer_dtype):
    inputs, grad = make(random_ids(700, 6, 64), 64, 512, 176), randn(700, 512, seed=3)
    buffers = (
        {}
        if buffer_dtype is None
        else {
            f"{name}_gradient": torch.zeros_like(inputs[name], dtype=buffer_dtype, requires_grad=False)
            for name in ("gate_up", "down")
        }
    )

    def results() -> list[torch.Tensor]:
        for buffer in buffers.values():
            buffer.zero_()
        found = [t for t in run(inputs, grad, **buffers).values() if t is not None]
        return [*found, *(buffer.clone() for buffer in buffers.values())]

    first = results()  # compiles, which may synchronise
    with synchronisation_refused():
        again = [results() for _ in range(3)]
    assert all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))


IDS = random_ids(4, 2, 3)
INPUTS = make(IDS, 3, 32, 48)
ROWS = reference.quantize_rows(INPUTS["x"].detach()[:3])
STRIDED = Scaled(torch.empty(4, 64, dtype=E4M3, device=DEVICE)[:, :32], torch.ones(4, device=DEVICE))
COPIES = {f"{name}_copies": copies_of(INPUTS[name]) for name in ("gate_up", "down")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": INPUTS["x"][0]}, r"x has shape \(32,\); it must be \[T, H\]"),
        ({"topk_ids": INPUTS["topk_ids"][:3]}, r"topk_ids has shape \(3, 2\); it must be \[T, K\] = \(4, 'any'\)"),
        ({"topk_weights": INPUTS["topk_weights"][:, :1]}, r"topk_weights has shape \(4, 1\); it must be \[T, K\]"),
        (
            {"down": INPUTS["down"][:, :16]},
            r"down has shape \(3, 16, 48\); it must be \[E, H, F\] = \('any', 32, 'any'",
        ),
        ({"gate_up": INPUTS["gate_up"][:2]}, r"gate_up has shape \(2, 96, 32\); it must be \[E, 2F, H\] = \(3, 96, 32"),
        ({"topk_ids": INPUTS["topk_ids"].float()}, "topk_ids has dtype torch.float32; it must be int32, int64"),
        (
            {"topk_weights": INPUTS["topk_weights"].bfloat16()},
            "topk_weights has dtype torch.bfloat16; it must be float3",
        ),
        ({"x": INPUTS["x"].float()}, "x has dtype torch.float32; it must be bfloat16"),
        ({"gate_up": INPUTS["gate_up"].half()}, "gate_up has dtype torch.float16; it must be bfloat16"),
        ({"down": INPUTS["down"].float()}, "down has dtype torch.float32; it must be bfloat16"),
        ({"down": INPUTS["down"].to("meta")}, "down is on meta; the other inputs are on"),
        (
            {"gate_up_copies": Copies(*(part.to("meta") for part in COPIES["gate_up_copies"]))},
            "gate_up_copies is on meta; the other inputs are on",
        ),
        ({"down_copies": COPIES["gate_up_copies"]}, r"down_copies has shape \(3, 96, 32\); it must be those of down"),
        (
            {"gate_up_copies": COPIES["down_copies"]},
            r"gate_up_copies has shape \(3, 32, 48\); it must be those of gate",
        ),
        ({"quantized": ROWS}, r"quantized has shape \(3, 32\); it must be the rows of x = \(4, 32\)"),
        ({"quantized": STRIDED}, "quantized and its scales must be contiguous"),
        ({"down_gradient": INPUTS["gate_up"].detach()}, r"down_gradient has shape \(3, 96, 32\); it must be the shape"),
        (
            {"gate_up_gradient": INPUTS["gate_up"].detach().half()},
            "gate_up_gradient has dtype torch.float16; it must be",
        ),
        ({"down_gradient": INPUTS["down"]}, "down_gradient must be contiguous and not require a gradient itself"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(KernelInputError, match="^fp8_experts: " + words):
        fp8_experts(**(INPUTS | COPIES | changes))


@pytest.mark.parametrize(("hidden", "ffn"), [(40, 48), (32, 24)])
def test_widths_that_are_not_multiples_of_16_are_refused(hidden, ffn):
    with pytest.raises(
        KernelInputError, match=rf"hidden size \({hidden}\) and expert intermediate size \({ffn}\) must"
    ):
        run(make(IDS, 3, hidden, ffn), randn(4, hidden))


def test_ids_out_of_range_are_an_error_in_debug_mode(monkeypatch):
    monkeypatch.setenv("MOESCALE_DEBUG", "1")
    ids = INPUTS["topk_ids"].clone()
    ids[2, 0] = 3
    with pytest.raises(KernelInputError, match=r"topk_ids\[2, 0\] is 3; expert ids must lie in \[0, 3\); 1 of 8"):
        fp8_experts(**(INPUTS | COPIES | {"topk_ids": ids}))
    with pytest.raises(KernelInputError, match="tokens_per_expert is"):
        fp8_experts(**INPUTS, **COPIES, tokens_per_expert=torch.tensor([4, 4, 4], device=DEVICE))
