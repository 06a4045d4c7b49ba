"""Weights in fp8: their definition, the kernel against it, and operators against plain weights, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from agreement import DEVICE

from moescale.kernels import block_fp8
from moescale.kernels.backends import KernelInputError
from moescale.kernels.block_fp8 import CODE_DTYPE, BlockFp8, ExpertScales, plain, quantize, reference, scales_shape
from moescale.kernels.experts import experts
from moescale.kernels.experts.adapted import ExpertAdapters, adapted_experts
from moescale.kernels.linear import frozen_linear, linear

SHAPES = [(128, 128), (150, 300), (5, 7), (1, 129), (3, 130, 64), (2, 256, 384)]


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of blocks that differ in size, with zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-6, 3, shape[-1])
    weight[..., 0, :] = 0
    return weight.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_is_scaled_by_its_largest_magnitude_and_rounded_to_three_bits(shape, dtype) -> None:
    weight = weight_of(*shape, dtype=dtype)
    found = quantize(weight)
    assert found.codes.dtype == CODE_DTYPE and found.codes.shape == found.shape == weight.shape
    assert found.scales.shape == scales_shape(shape) and found.scales.dtype == torch.float32
    again = plain(found, torch.float32)
    rows, columns = shape[-2:]
    for row in range(0, rows, 128):
        for column in range(0, columns, 128):
            block = weight[..., row : row + 128, column : column + 128].float().flatten(-2)
            scale = found.scales[..., row // 128, column // 128].unsqueeze(-1)
            largest = block.abs().amax(-1, keepdim=True)
            torch.testing.assert_close(scale, largest / 448, rtol=1e-6, atol=2e-38)
            error = (again[..., row : row + 128, column : column + 128].flatten(-2) - block).abs()
            # Half a unit in the last place: of three bits, or of the smallest codes, multiples of 2^-9.
            bound = torch.maximum(block.abs() * 2.0**-4, scale * 2.0**-10)
            assert (error <= bound * (1 + 1e-5)).all()


def test_weights_of_nothing_but_zeros_and_of_the_smallest_numbers_are_kept() -> None:
    for weight in (torch.zeros(130, 3), torch.full((2, 2), 1e-44)):
        found = quantize(weight)
        assert plain(found, torch.float32).abs().max() <= 1e-44
        assert torch.isfinite(found.codes.float()).all()
    large = torch.full((4, 4), torch.finfo(torch.bfloat16).max)
    torch.testing.assert_close(plain(quantize(large), torch.float32), large)


def triton_dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from moescale.kernels.block_fp8 import triton

    return triton.dequantize(codes, scales, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_outputs")
def test_the_kernel_has_the_references_bits(shape) -> None:
    found = quantize(weight_of(*shape))
    # The interpreter cuts off what bf16 has no room for, a GPU rounds it.
    for dtype in (torch.float32, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32,):
        assert torch.equal(triton_dequantize(*found, dtype), reference.dequantize(*found, dtype))


def test_the_kernel_knows_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(CODE_DTYPE).view(2, 128)
    scales = torch.full((1, 1), 0.3, device=DEVICE)
    found = triton_dequantize(codes, scales, torch.float32)
    wanted = reference.dequantize(codes, scales, torch.float32)
    assert torch.equal(found[wanted.isfinite()], wanted[wanted.isfinite()])
    assert wanted.isfinite().sum() == 254, "all but the two of NaN"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_quantises_to_the_bits_of_a_cpu(dtype) -> None:
    weight = torch.randn(3, 700, 900, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0, :200] *= 1e-38
    on_gpu, on_cpu = quantize(weight.cuda()), quantize(weight)
    assert torch.equal(on_gpu.codes.cpu().view(torch.uint8), on_cpu.codes.view(torch.uint8))
    assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
    assert torch.equal(plain(on_gpu, dtype).cpu(), plain(on_cpu, dtype))


@pytest.mark.gpu
def test_a_plain_weight_is_given_back_before_the_next_is_made() -> None:
    there, back = (quantize(torch.randn(*shape, device="cuda")) for shape in ((2048, 4096), (4096, 2048)))
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(3):
            y = frozen_linear(frozen_linear(y, *there), *back)
        y.sum().backward()

    run()  # cuBLAS takes its workspaces, for good
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    one = 2 * 2048 * 4096
    assert one <= torch.cuda.max_memory_allocated() - before < 1.8 * one, "twelve of them were made"


def test_a_linear_layer_in_fp8_has_the_bits_of_a_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 130), (2, 3, 130), (0, 130)):
        x = torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
        found, bias = quantize(weight_of(140, 130)), weight_of(1, 140)[0]
        y, wanted = frozen_linear(x, *found, bias), linear(x, plain(found, x.dtype), bias)
        grad = torch.randn(y.shape, generator=generator).to(DEVICE)
        assert torch.equal(y, wanted)
        assert torch.equal(*(torch.autograd.grad(result, x, grad)[0] for result in (y, wanted)))


@pytest.mark.parametrize(
    ("adapted", "recompute_up", "backend"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[2] == "triton" and not (case[0] and case[1]) else ())
        for case in itertools.product((False, True), (False, True), ("torch", "grouped_mm", "triton"))
    ],
)
def test_experts_in_fp8_have_the_bits_of_plain_ones(adapted, recompute_up, backend) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DEVICE)

    num_experts, hidden, ffn, rank = 3, 144, 80, 8
    stored = [quantize(randn(num_experts, 2 * ffn, hidden)), quantize(randn(num_experts, hidden, ffn))]
    factors = [(rank, hidden), (2 * ffn, rank), (rank, ffn), (hidden, rank)]
    inputs = [randn(11, hidden), randn(11, 2).abs(), *(randn(num_experts, *s) for s in factors if adapted)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ids = torch.rand(11, num_experts, generator=generator).topk(2).indices.int().to(DEVICE)
    grad = randn(11, hidden)

    def run(gate_up, down, scales) -> list[torch.Tensor]:
        x, weights, *adapters = inputs
        options = dict(scales=scales, backend=backend, recompute_up=recompute_up)
        if adapted:
            y = adapted_experts(x, ids, weights, gate_up, down, ExpertAdapters(*adapters), scale=0.75, **options)
        else:
            y = experts(x, ids, weights, gate_up, down, **options)
        return [y, *torch.autograd.grad(y, inputs, grad)]

    found = run(*(weight.codes for weight in stored), ExpertScales(*(weight.scales for weight in stored)))
    wanted = run(*(plain(weight, torch.float32) for weight in stored), None)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_what_does_not_fit_is_refused() -> None:
    x, (codes, scales) = torch.randn(2, 130), quantize(torch.randn(140, 130))
    with pytest.raises(KernelInputError, match=r"weight has shape \(140, 130\); it must be \[N, K\] = \('any', 100\)"):
        frozen_linear(x[:, :100], codes, scales)
    with pytest.raises(KernelInputError, match=r"weight_scale has shape \(1, 2\); .* of 128 x 128 = \(2, 2\)"):
        frozen_linear(x, codes, scales[:1])
    with pytest.raises(KernelInputError, match="weight has dtype torch.float32; it must be float8_e4m3fn"):
        frozen_linear(x, codes.float(), scales)
    with pytest.raises(KernelInputError, match="weight is in fp8 and cannot be trained"):
        frozen_linear(x, codes, scales.requires_grad_())
    with pytest.raises(KernelInputError, match="weight has dtype torch.float8_e4m3fn; it must be float32"):
        block_fp8.check_stored("linear", "weight", codes, None, torch.float32)
    assert isinstance(block_fp8.stored(codes, scales), BlockFp8) and block_fp8.stored(x, None) is x
