"""The fp8 experiment of ``benchmarks/fp8``: what its kernels compute, and how far that is from fp64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fp8_experts as fp8
import fp8_quantise as quantise
from fp8_gemm import LARGE, Scaled, multiply_rows
from fp8_recipe import Exact, block_quantise, relative_error
from moescale.kernels.experts.launch_config import KERNELS, LaunchConfig
from moescale.kernels.experts.row_tiles_triton import group_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = LaunchConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=1, flatten=False)
LAUNCH = LARGE if torch.cuda.is_available() else SMALL
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ends_of(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


def dequantised(rows: Scaled) -> torch.Tensor:
    return rows.data.double() * rows.scales.double()[:, None]


def test_rows_have_power_of_two_scales_and_are_rounded_as_torch_rounds():
    x = randn(9, 100) * torch.logspace(-20, 5, 9, device=DEVICE)[:, None]
    x[4] = 0
    x[:, ::3] *= 1e-5  # become subnormal, or zero
    rows = quantise.quantise_rows(x)
    largest = x.abs().amax(1)
    filled = largest > 0
    assert rows.scales.frexp().mantissa.eq(0.5).all()
    assert (largest / rows.scales)[filled].gt(224).all() and (largest / rows.scales).le(448).all()
    expected = (x / rows.scales[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(rows.data.float(), expected.float())
    tested = rows.data[filled].float().abs()
    assert ((tested < 2**-6) & (tested > 0)).any(), "no subnormal number was tested"


def test_gather_quantises_a_token_once_for_all_its_rows():
    x, pair_row = randn(3, 64), torch.tensor([4, 1, -1, 0, 2, 3], device=DEVICE, dtype=torch.int32)
    rows, tokens = quantise.gather_rows(x, pair_row, 2)
    expected = quantise.quantise_rows(x)
    token_of_row = torch.tensor([1, 0, 2, 2, 0], device=DEVICE)
    assert torch.equal(tokens.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(rows.data[:5].view(torch.uint8), expected.data[token_of_row].view(torch.uint8))
    assert torch.equal(rows.scales[:5], expected.scales[token_of_row])


@pytest.mark.parametrize("from_tokens", [False, True])
def test_transposed_rows_are_the_same_numbers_padded_with_zeros(from_tokens):
    x, ends = randn(5, 40) * torch.tensor([1, 0.25, 8, 1, 4], device=DEVICE)[:, None], ends_of(3, 0, 6, 1)
    row_pair = torch.tensor([4, 0, 2, 1, 3, 9, 6, 8, 5, 7], device=DEVICE, dtype=torch.int32)
    pair_row = torch.empty_like(row_pair)
    pair_row[row_pair.long()] = torch.arange(10, device=DEVICE, dtype=torch.int32)
    rows = fp8.Rows.gathered(x, row_pair, pair_row, 2)
    padded = quantise.pad_ends(ends)
    assert padded.tolist() == [128, 128, 256, 384]
    if from_tokens:
        transposed = rows.transposed(ends, padded)
    else:
        transposed = quantise.transpose_rows(rows.scaled, ends, padded)
    scales = rows.scaled.scales
    largest = [part.amax() for part in (scales[:3], scales[3:9], scales[9:])]
    assert torch.equal(transposed.scales[[0, 2, 3]], torch.stack(largest))
    for expert, column, first, end in ((0, 0, 0, 3), (2, 128, 3, 9), (3, 256, 9, 10)):
        found = transposed.data[:, column : column + 128].double() * transposed.scales[expert].double()
        exact = dequantised(rows.scaled)[first:end].T
        # Exact but for numbers below the expert's normal range, whose spacing is 2^-9 of its scale.
        spacing = transposed.scales[expert].item() * 2**-9
        assert (found[:, : end - first] - exact).abs().max() <= spacing / 2
        assert not found[:, end - first :].any()


def test_both_copies_of_a_weight_hold_the_same_numbers():
    weight = randn(2, 130, 36)
    rows, columns = quantise.quantise_weight(weight, weight.abs().amax((1, 2)))
    expected = (weight / rows.scales[:, None, None]).to(torch.float8_e4m3fn)
    assert torch.equal(rows.data.float(), expected.float())
    transposed = columns.data.view(36, 2, 256).permute(1, 2, 0)
    assert torch.equal(transposed[:, :130].float(), rows.data.float()) and not transposed[:, 130:].float().any()


@pytest.mark.parametrize("wide", [False, True])
def test_swiglu_and_its_backward_agree_with_autograd_to_a_rounding(wide):
    pre = randn(5, 2 * 72).requires_grad_()
    grad, weights = randn(5, 72, seed=1), randn(5, seed=2).requires_grad_()
    gate, up = pre.chunk(2, -1)
    act = F.silu(gate) * up
    weighted = act * weights[:, None]
    grad_pre, grad_weights = torch.autograd.grad(weighted, (pre, weights), grad)
    assert relative_error(dequantised(quantise.swiglu(pre.detach())), act) < 0.03
    overwritten = grad.clone()
    found = quantise.swiglu_backward(overwritten, pre.detach(), weights.detach(), wide=wide)
    assert relative_error(dequantised(found[0]), grad_pre) < 0.03
    torch.testing.assert_close(found[2], grad_weights)
    if wide:
        torch.testing.assert_close(found[3], grad_pre)
        torch.testing.assert_close(overwritten, weighted)
    else:
        assert relative_error(dequantised(found[1]), weighted) < 0.03


def test_product_in_the_block_scaling_is_the_recipe():
    rows, weight, ends = randn(7, 208), randn(3, 160, 208), ends_of(4, 0, 3)
    a, b = block_quantise(rows), block_quantise(weight, rows=128)
    a = Scaled(data=a.data, scales=a.scales.T.contiguous())
    launch = LaunchConfig(block_m=16, block_n=128, block_k=128, num_warps=4, num_stages=1, flatten=False)
    out = multiply_rows(a, b, group_rows(ends, 7), 160, scaling="block", launch=launch)
    exact = Exact(dtype=torch.float64, quantises=True).multiply_rows(rows, weight, ends)
    assert relative_error(out, exact) < 0.004  # of bf16


def mlp_results(counts: tuple[int, ...], imprecise: int) -> dict[str, list[torch.Tensor]]:
    """Results of the whole MLP by name, each as (ours, the recipe's, exact)."""
    ends, num_rows, hidden, ffn = ends_of(*counts), sum(counts), 128, 80
    rows, grad = randn(num_rows, hidden), randn(num_rows, hidden, seed=1)
    gate_up, down = randn(len(counts), 2 * ffn, hidden, seed=2) / 12, randn(len(counts), hidden, ffn, seed=3) / 9
    weights = fp8.Weights.of(gate_up, down, fp8.largest_elements(gate_up, down))
    settings = fp8.Settings(launches=dict.fromkeys(KERNELS, LAUNCH), imprecise=dict.fromkeys(KERNELS, imprecise))
    groups = group_rows(ends, num_rows)
    out, saved = fp8.forward(fp8.Rows(scaled=quantise.quantise_rows(rows)), weights, groups, settings)
    grad_rows = fp8.Rows(scaled=quantise.quantise_rows(grad))
    found = fp8.backward(grad_rows, saved, weights, groups, None, settings) | {"out": out}
    recipe, exact = (
        Exact(dtype=torch.float64, quantises=q).mlp(rows, gate_up, down, grad, ends) for q in (True, False)
    )
    return {name: [found[name], recipe[name], exact[name]] for name in exact}


@pytest.mark.slow
@pytest.mark.parametrize("imprecise", [0, 128])
@pytest.mark.parametrize("counts", [(5, 0, 1, 20), (0, 17, 0)])
def test_gradients_of_the_mlp_err_little_more_than_the_recipe(counts, imprecise):
    for name, (found, recipe, exact) in mlp_results(counts, imprecise).items():
        assert found.isfinite().all(), name
        assert relative_error(found, exact) < 1.25 * relative_error(recipe, exact), name
    # An expert without rows has a gradient: zero.
    assert not found[[e for e, count in enumerate(counts) if count == 0]].any()


@pytest.mark.slow
def test_products_compile_for_hopper_to_its_fp8_instructions():
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
    assert len(report) == 25
    for name, kernel in report.items():
        assert kernel["shared"] <= 227 * 1024, name
        assert ("e4m3.e4m3" in kernel["instructions"]) == ("tiles" in name), name
