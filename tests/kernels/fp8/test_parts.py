"""The kernels of fp8 GEMMs, each against its definition in plain torch: codes and scales bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from agreement import DEVICE

from fp8_recipe import relative_error
from moescale.kernels.fp8 import empty_copies, reference
from moescale.kernels.fp8 import triton as kernels
from moescale.kernels.fp8.scaled import E4M3, Copies, Scaled

IMPLEMENTATIONS = pytest.mark.parametrize("parts", [kernels, reference], ids=["triton", "torch"])
ROUNDING = 0.004 if DEVICE.type == "cuda" else 0.006
"""Of a result in bf16, relative: the interpreter truncates it."""
UNEVEN, LARGE, NONE = (5, 0, 1, 20), (130, 3), (0, 0, 0)
"""Rows of each expert: several tiles of rows, several steps of a weight gradient, and no row at all."""
WALKING = pytest.mark.parametrize("expected_rows", [None, 4], ids=["a program for every row", "programs walk"])
COUNTS = pytest.mark.parametrize("counts", [UNEVEN, (0, 17, 0), NONE])
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rows_of_all_kinds(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of many magnitudes: with outliers, with elements that become subnormal or zero, and all zero."""
    x = randn(num_rows, width, seed=seed, dtype=torch.float32)
    x *= torch.logspace(-12, 5, num_rows, device=DEVICE)[:, None]
    x[:, ::3] *= 1e-5
    x[:, 5] *= 300
    x[num_rows // 2] = 0
    return x.bfloat16()


def ends_of(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


def routing(counts: tuple[int, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """row_pair and pair_row of pairs in random order, of which those without an expert are three."""
    num_rows = sum(counts)
    num_pairs = -(-(num_rows + 3) // top_k) * top_k
    row_pair = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(1)).int()
    pair_row = torch.full_like(row_pair, -1)
    pair_row[row_pair[:num_rows].long()] = torch.arange(num_rows, dtype=torch.int32)
    return row_pair.to(DEVICE), pair_row.to(DEVICE)


def dequantised(rows: Scaled) -> torch.Tensor:
    return rows.data.double() * rows.scales.double()[:, None]


def assert_equal(found: Scaled | Copies, expected: Scaled | Copies) -> None:
    for a, b in zip(found, expected, strict=True):
        a, b = (t.contiguous().view(torch.uint8) if t.dtype == E4M3 else t for t in (a, b))
        assert torch.equal(a, b)


def assert_equal_to_rounding(found: Scaled, expected: Scaled) -> None:
    """What was computed before it was rounded differs in its last bits, so a few codes are neighbours."""
    assert torch.equal(found.scales, expected.scales)
    codes = [t.data.view(torch.uint8).int() for t in (found, expected)]
    apart = (codes[0] - codes[1]).abs()
    zeros = (found.data.float() == 0) & (expected.data.float() == 0)  # of either sign
    assert apart[~zeros].le(1).all() and apart[~zeros].float().mean() < 0.01


@IMPLEMENTATIONS
def test_every_number_of_bf16_is_rounded_as_torch_rounds_it(parts):
    bits = torch.arange(2**16, dtype=torch.int32, device=DEVICE).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()].view(-1, 510)
    rows = parts.quantize_rows(x)
    expected = (x.float() / rows.scales[:, None]).to(E4M3)
    assert torch.equal(rows.data.view(torch.uint8), expected.view(torch.uint8))
    tested = rows.data.float().abs()
    assert ((tested < 2**-6) & (tested > 0)).any(), "no subnormal number was tested"


@IMPLEMENTATIONS
def test_a_scale_is_the_smallest_power_of_two_that_a_row_fits_with(parts):
    x = rows_of_all_kinds(31, 96)
    x[3, 0], x[4, 0] = 448 * 8, 450 * 8  # the largest that fits, and the next in bf16
    largest, scales = x.float().abs().amax(1), parts.quantize_rows(x).scales
    filled = largest > 0
    assert scales.frexp().mantissa.eq(0.5).all()
    assert (largest / scales)[filled].gt(224).all() and (largest / scales).le(448).all()
    assert scales[3] == 8 and scales[4] == 16 and scales[~filled].eq(2.0**-100).all()


@pytest.mark.parametrize("width", [16, 80, 96, 272])
def test_quantised_rows_are_those_of_the_definition(width):
    x = rows_of_all_kinds(31, width)
    assert_equal(kernels.quantize_rows(x), reference.quantize_rows(x))


@pytest.mark.parametrize(("counts", "top_k"), [(UNEVEN, 1), (UNEVEN, 2), ((0, 17, 0), 3), (NONE, 2)])
def test_gathered_rows_are_those_of_the_definition(counts, top_k):
    _, pair_row = routing(counts, top_k)
    x = rows_of_all_kinds(pair_row.numel() // top_k, 80)
    (rows, tokens), (expected, expected_tokens) = (m.gather_rows(x, pair_row, top_k) for m in (kernels, reference))
    assert_equal(tokens, expected_tokens)
    placed = slice(sum(counts))
    assert_equal(Scaled(rows.data[placed], rows.scales[placed]), Scaled(expected.data[placed], expected.scales[placed]))


@pytest.mark.parametrize(("counts", "top_k"), [(UNEVEN, 1), (UNEVEN, 2), ((0, 17, 0), 3), (NONE, 2)])
def test_rows_gathered_in_e4m3_are_those_that_a_gather_quantises(counts, top_k):
    _, pair_row = routing(counts, top_k)
    x = rows_of_all_kinds(pair_row.numel() // top_k, 80)
    placed = slice(sum(counts))
    for parts in (kernels, reference):
        expected, tokens = parts.gather_rows(x, pair_row, top_k)
        rows = parts.gather_scaled(tokens, pair_row, top_k)
        assert_equal(*(Scaled(found.data[placed], found.scales[placed]) for found in (rows, expected)))


@pytest.mark.parametrize(
    ("counts", "top_k"), [(UNEVEN, 0), (UNEVEN, 1), (UNEVEN, 2), ((0, 17, 0), 3), (LARGE, 0), (LARGE, 2), (NONE, 2)]
)
def test_transposed_rows_are_those_of_the_definition(counts, top_k):
    ends, (row_pair, pair_row) = ends_of(*counts), routing(counts, top_k or 1)
    x = rows_of_all_kinds(pair_row.numel() // (top_k or 1), 144)
    found = {}
    for parts in (kernels, reference):
        groups, padded = parts.group_rows(ends, pair_row.numel()), parts.pad_ends(ends)
        of_tokens = {"row_pair": row_pair, "top_k": top_k} if top_k else {}
        transposed = parts.transpose_rows(reference.quantize_rows(x), groups, padded, **of_tokens)
        assert padded.dtype == torch.int32 and not (padded % 128).any()
        found[parts] = padded, Scaled(transposed.data[:, : padded[-1]], transposed.scales)
    assert torch.equal(found[kernels][0], found[reference][0])
    assert_equal(found[kernels][1], found[reference][1])


def test_an_expert_of_many_rows_has_the_largest_of_their_scales():
    ends, x = ends_of(1100, 2), randn(1102, 16)
    x[7] *= 64
    rows, found = reference.quantize_rows(x), {}
    for parts in (kernels, reference):
        found[parts] = parts.transpose_rows(rows, parts.group_rows(ends, 1102), parts.pad_ends(ends))
    assert torch.equal(found[kernels].scales, found[reference].scales)
    assert found[kernels].scales[0] == rows.scales[7] > rows.scales[8:].max()


@IMPLEMENTATIONS
@pytest.mark.parametrize("from_tokens", [False, True])
def test_transposed_rows_are_the_same_numbers_padded_with_zeros(parts, from_tokens):
    x, ends = randn(5, 40) * torch.tensor([1, 0.25, 8, 1, 4], device=DEVICE)[:, None], ends_of(3, 0, 6, 1)
    row_pair = torch.tensor([4, 0, 2, 1, 3, 9, 6, 8, 5, 7], device=DEVICE, dtype=torch.int32)
    pair_row = torch.empty_like(row_pair)
    pair_row[row_pair.long()] = torch.arange(10, device=DEVICE, dtype=torch.int32)
    rows, tokens = parts.gather_rows(x.bfloat16(), pair_row, 2)
    groups, padded = parts.group_rows(ends, 10), parts.pad_ends(ends)
    assert padded.tolist() == [128, 128, 256, 384]
    if from_tokens:
        transposed = parts.transpose_rows(tokens, groups, padded, row_pair=row_pair, top_k=2)
    else:
        transposed = parts.transpose_rows(rows, groups, padded)
    largest = [part.amax() for part in (rows.scales[:3], rows.scales[3:9], rows.scales[9:])]
    assert torch.equal(transposed.scales[[0, 2, 3]], torch.stack(largest))
    for expert, column, first, end in ((0, 0, 0, 3), (2, 128, 3, 9), (3, 256, 9, 10)):
        found = transposed.data[:, column : column + 128].double() * transposed.scales[expert].double()
        exact = dequantised(rows)[first:end].T
        # Exact but for numbers below the expert's normal range, whose spacing is 2^-9 of its scale.
        spacing = transposed.scales[expert].item() * 2**-9
        assert (found[:, : end - first] - exact).abs().max() <= spacing / 2
        assert not found[:, end - first :].any()


@pytest.mark.parametrize("shape", [(2, 144, 80), (1, 16, 272), (160, 48)])
def test_copies_of_a_weight_are_those_of_the_definition_and_hold_the_same_numbers(shape):
    weight = rows_of_all_kinds(shape[0] * shape[-2] if len(shape) == 3 else shape[0], shape[-1]).view(shape)
    stacked = weight if weight.dim() == 3 else weight[None]
    found = {}
    for parts in (kernels, reference):
        found[parts] = empty_copies(weight)
        parts.write_copies(stacked, stacked.abs().amax((1, 2)).float(), found[parts])
    assert_equal(found[kernels], found[reference])
    rows, columns, scales = found[kernels]
    expected = (stacked.float() / scales.view(-1, 1, 1)).to(E4M3)
    assert torch.equal(rows.float(), expected.float())
    num_experts, n, k = stacked.shape
    transposed = columns.view(torch.uint8).view(k, num_experts, -1).permute(1, 2, 0)
    assert torch.equal(transposed[:, :n], rows.view(torch.uint8)) and not transposed[:, n:].any()


@IMPLEMENTATIONS
def test_swiglu_and_its_backward_agree_with_autograd_to_a_rounding(parts):
    pre = randn(9, 2 * 80).float().requires_grad_()
    grad, weights = randn(9, 80, seed=1), randn(9, seed=2, dtype=torch.float32).requires_grad_()
    gate, up = pre.chunk(2, -1)
    act = F.silu(gate) * up
    weighted = act * weights[:, None]
    grad_pre, grad_weights = torch.autograd.grad(weighted, (pre, weights), grad.float())
    groups = parts.group_rows(ends_of(9), 9)
    assert relative_error(dequantised(parts.swiglu(pre.detach().bfloat16(), groups)), act) < 0.04
    found = parts.swiglu_backward(grad, pre.detach().bfloat16(), weights.detach(), groups)
    assert relative_error(dequantised(found[0]), grad_pre) < 0.04
    assert relative_error(dequantised(found[1]), weighted) < 0.04
    torch.testing.assert_close(found[2], grad_weights)


@WALKING
@pytest.mark.parametrize("width", [16, 144])
def test_swiglu_and_its_backward_are_those_of_the_definition_to_a_rounding(width, expected_rows):
    pre, grad = rows_of_all_kinds(13, 2 * width).clamp(-60, 60), rows_of_all_kinds(13, width, seed=1)
    weights = randn(13, seed=2, dtype=torch.float32)
    ends = ends_of(6, 7)
    groups = kernels.group_rows(ends, 13, expected_rows)
    assert_equal_to_rounding(kernels.swiglu(pre, groups), reference.swiglu(pre, ends))
    found, expected = (m.swiglu_backward(grad, pre, weights, g) for m, g in ((kernels, groups), (reference, ends)))
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert_equal_to_rounding(a, b)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=0)


@WALKING
def test_rows_behind_those_of_the_last_expert_are_left_as_they_are(expected_rows):
    groups = kernels.group_rows(ends_of(2, 0, 3), 8, expected_rows)
    out, grads = (kernels.empty_rows(8, width, DEVICE) for width in (16, 32))
    values = torch.empty(8, device=DEVICE)
    for tensor in (*out, *grads, values):
        tensor.view(torch.uint8).fill_(0x55)
    kernels.swiglu(randn(8, 32), groups, out=out)
    assert [(tensor.view(torch.uint8).view(8, -1) == 0x55).all(1).tolist() for tensor in out] == [
        [False] * 5 + [True] * 3
    ] * 2
    kernels.swiglu_backward(randn(8, 16), randn(8, 32), torch.ones(8, device=DEVICE), groups, out=(grads, out, values))
    for tensor in (*grads, *out, values):
        assert (tensor.view(torch.uint8).view(8, -1) == 0x55).all(1).tolist() == [False] * 5 + [True] * 3


@IMPLEMENTATIONS
@COUNTS
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_rows_times_a_weight_are_the_product_of_the_codes(parts, counts, transposed):
    """In fp64 from the numbers that the kernels take: what is left is their sum and the rounding to bf16."""
    n, k = 80, 144
    ends, num_rows = ends_of(*counts), sum(counts) + 2  # two of no expert
    rows, weight = reference.quantize_rows(rows_of_all_kinds(num_rows, k)), randn(len(counts), n, k)
    weight *= 8.0 ** torch.arange(len(counts), device=DEVICE)[:, None, None]  # so that every expert has its own scale
    copies = empty_copies(weight if not transposed else weight.mT)
    parts.write_copies(weight if not transposed else weight.mT.contiguous(), weight.abs().amax((1, 2)).float(), copies)
    stored = Scaled(copies.columns if transposed else copies.rows, copies.scales)
    out = parts.multiply_rows(rows, stored, parts.group_rows(ends, num_rows), n, transposed=transposed)
    matrices = (copies.rows.mT if transposed else copies.rows).double() * copies.scales.double()[:, None, None]
    first = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        exact = dequantised(rows)[first:end] @ matrix.T
        for a, b in zip(out[first:end], exact, strict=True):
            assert relative_error(a, b) < ROUNDING or torch.equal(a.double(), b)  # b is 0
        first = end


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("counts", "buffer_dtype"),
    [(UNEVEN, None), (LARGE, None), (NONE, None), (UNEVEN, torch.bfloat16), (UNEVEN, torch.float32)],
)
def test_weight_gradients_are_the_products_of_the_codes_and_are_added_up(parts, counts, buffer_dtype):
    m, n = 48, 80
    ends = ends_of(*counts)
    groups, padded = parts.group_rows(ends, sum(counts)), parts.pad_ends(ends)
    left, right = (
        parts.transpose_rows(reference.quantize_rows(randn(sum(counts), width, seed=width)), groups, padded)
        for width in (m, n)
    )
    exact, first = torch.zeros(len(counts), m, n, dtype=torch.float64, device=DEVICE), 0
    for expert, end in enumerate(padded.tolist()):
        product = left.data[:, first:end].double() @ right.data[:, first:end].double().T
        exact[expert] = product * left.scales[expert].double() * right.scales[expert].double()
        first = end
    if buffer_dtype is None:
        found = parts.weight_gradient(left, right, padded)
    else:
        found = torch.full((len(counts), m, n), 0.5, dtype=buffer_dtype, device=DEVICE)
        for _ in range(2):
            assert parts.weight_gradient(left, right, padded, buffer=found) is found
        exact = 0.5 + 2 * exact
    assert found.dtype == (buffer_dtype or torch.bfloat16)
    assert (
        relative_error(found, exact + 1e-30) < (1e-3 if buffer_dtype == torch.float32 else ROUNDING) or not exact.any()
    )
    if buffer_dtype is None:
        assert not found[[expert for expert, count in enumerate(counts) if not count]].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which the interpreter computes
@IMPLEMENTATIONS
def test_numbers_that_are_not_finite_stay_visible(parts, value):
    def finite(found: Scaled) -> torch.Tensor:
        return dequantised(Scaled(found.data, found.scales.expand(found.data.shape[0]))).isfinite().all(1)

    third_alone = [True, True, False, True]
    x = rows_of_all_kinds(4, 64).clamp(-60, 60)
    x[2, 7] = value
    assert finite(parts.quantize_rows(x)).tolist() == third_alone
    groups, ones = parts.group_rows(ends_of(4), 4), torch.ones(4, device=DEVICE)
    for pre in (x, x.flip(1)):  # among the gates, and among what they multiply
        assert finite(parts.swiglu(pre, groups)).tolist() == third_alone
        grad_pre, _, _ = parts.swiglu_backward(randn(4, 32), pre, ones, groups)
        assert finite(grad_pre).tolist() == third_alone
    grad_pre, _, _ = parts.swiglu_backward(x[:, :32].contiguous(), randn(4, 64), ones, groups)
    assert finite(grad_pre).tolist() == third_alone
    ends = ends_of(2, 2)
    transposed = parts.transpose_rows(parts.quantize_rows(x), parts.group_rows(ends, 4), parts.pad_ends(ends))
    values = transposed.data.double().view(64, 2, 128) * transposed.scales.double()[:, None]
    assert values[:, 0].isfinite().all() and not values[:, 1].isfinite().all()
    weight = randn(2, 16, 32)
    weight[1, 3, 4] = value
    copies = empty_copies(weight)
    largest = torch.linalg.vector_norm(weight.flatten(1), float("inf"), dim=1, dtype=torch.float32)
    parts.write_copies(weight, largest, copies)
    assert copies.scales.isfinite().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "ffn"), [(2048, 1408), (2880, 272)])
def test_codes_are_those_of_the_definition_at_the_sizes_of_models(hidden, ffn):
    tokens, top_k, num_experts = 1000, 6, 64
    x, act = rows_of_all_kinds(tokens, hidden), rows_of_all_kinds(tokens * top_k, ffn, seed=1)
    ids = torch.rand(tokens, num_experts, device=DEVICE).topk(top_k).indices
    ids[::7, 0] = -1
    row_pair, pair_row, ends = kernels.sort_pairs(ids, num_experts)
    number, found = int(ends[-1]), {}
    for parts in (kernels, reference):
        groups, padded = parts.group_rows(ends, row_pair.numel()), parts.pad_ends(ends)
        rows, of_tokens = parts.gather_rows(x, pair_row, top_k)
        transposed = parts.transpose_rows(of_tokens, groups, padded, row_pair=row_pair, top_k=top_k)
        of_rows = parts.transpose_rows(parts.quantize_rows(act), groups, padded)
        found[parts] = [Scaled(rows.data[:number], rows.scales[:number]), of_tokens]
        found[parts] += [Scaled(t.data[:, : padded[-1]], t.scales) for t in (transposed, of_rows)]
    for a, b in zip(found[kernels], found[reference], strict=True):
        assert_equal(a, b)


@pytest.mark.slow
def test_kernels_compile_for_hopper_with_every_launch_to_its_fp8_instructions():
    script = Path(__file__).with_name("fp8_ahead_of_time.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    products = {name for name in report if "gemm_triton" in name}
    assert len(products) == 8 and len(report) == 37
    for name, kernel in report.items():
        assert kernel["shared"] <= 227 * 1024, name
        assert ("e4m3.e4m3" in kernel["instructions"]) == (name in products), name
    norms = [kernel["sums"] for name, kernel in report.items() if "norm" in name and name.endswith("forward_kernel")]
    assert len(norms) == 10 and all(len(sums) == 1 for sums in norms)
    assert norms[::2] == norms[1::2], "a norm that quantises sums in another order: it is not the same to the bit"
