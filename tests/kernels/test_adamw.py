import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moescale.kernels.adamw import (
    MASTERS,
    MOMENT_DTYPES,
    AdamWHyperparameters,
    adamw_update,
    init_adamw_state,
    master_weight,
    set_master_weight,
)
from moescale.kernels.adamw.rounding import random_bits
from moescale.kernels.backends import KernelInputError, triton_interpreted

ONE = torch.ones(())
MOMENTS = tuple(MOMENT_DTYPES)


def hyperparameters(num_updates: int = 1, **overrides) -> AdamWHyperparameters:
    fields = dict(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    return AdamWHyperparameters(**(fields | overrides), num_updates=num_updates)


def weight(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(parameter, moments, master, steps: int, **overrides) -> torch.Tensor:
    """Final fp32 weight after ``steps`` updates with gradients that have a mean and noise."""
    state = init_adamw_state(parameter, moments, master)
    direction = weight(*parameter.shape, seed=9)
    for step in range(1, steps + 1):
        gradient = direction + weight(*parameter.shape, seed=100 + step)
        adamw_update(parameter, gradient, state, hyperparameters(step, **overrides), gradient_scale=ONE, seed=step)
    return master_weight(parameter, state).clone()


@pytest.mark.parametrize("master", ["fp32", "bf16_remainder"])
@pytest.mark.parametrize("shape", [(5, 200), (130,), (2, 3, 7)])
def test_both_exact_masters_equal_torchs_adamw(shape, master):
    parameter = weight(*shape, dtype=torch.bfloat16)
    reference = torch.nn.Parameter(parameter.float())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    direction = weight(*shape, seed=9)
    for step in range(1, 21):
        reference.grad = direction + weight(*shape, seed=100 + step)
        optimizer.step()
    torch.testing.assert_close(run(parameter, "fp32", master, 20), reference.detach(), rtol=1e-5, atol=1e-6)
    assert (parameter.float() - reference).abs().max() <= reference.abs().max() / 256


def test_the_remainder_format_is_bit_for_bit_the_fp32_master():
    results = [run(weight(9, 150, dtype=torch.bfloat16), "bf16", master, 15) for master in ("fp32", "bf16_remainder")]
    assert torch.equal(*results)


def test_any_fp32_weight_survives_the_split_into_bf16_and_remainder():
    values = torch.cat([weight(1000), weight(1000) * 1e-30, torch.tensor([0.0, -0.0, 1 + 2**-8, 1 - 2**-9, 3e38])])
    parameter = torch.empty(values.shape, dtype=torch.bfloat16)
    state = init_adamw_state(parameter.zero_(), "fp32", "bf16_remainder")
    set_master_weight(parameter, state, values)
    assert torch.equal(master_weight(parameter, state).view(torch.int32), values.view(torch.int32))
    assert ((parameter.float() - values).abs() <= values.abs() * 2**-8).all()


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_smaller_moments_follow_the_fp32_path(moments):
    start = weight(32, 256)
    exact = run(start.clone(), "fp32", "fp32", 60)
    approximate = run(start.clone(), moments, "fp32", 60)
    moved = (exact - start).norm()
    assert (approximate - exact).norm() / moved < {"bf16": 0.01, "int8": 0.1}[moments]


def test_stochastic_rounding_is_unbiased():
    """Each update is a tenth of a bf16 step: rounding to nearest would move nothing."""
    parameter = torch.ones(4, 4096, dtype=torch.bfloat16)
    state = init_adamw_state(parameter, "fp32", "stochastic_bf16")
    settings = hyperparameters(learning_rate=2**-8 / 10, weight_decay=0.0)
    for step in range(1, 21):
        gradient = torch.ones(parameter.shape)
        adamw_update(parameter, gradient, state, replace(settings, num_updates=step), gradient_scale=ONE, seed=step)
    assert parameter.float().mean().item() == pytest.approx(1 - 20 * settings.learning_rate, abs=2e-4)


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_a_stored_second_moment_decays_where_gradients_vanish(moments):
    parameter = torch.zeros(8, 1280)
    state = init_adamw_state(parameter, moments, "fp32")
    gradients = [weight(8, 1280)] + [torch.zeros(8, 1280)] * 30
    for step, gradient in enumerate(gradients, start=1):
        # One entry per block stays large, so that the scale does not shrink with the rest.
        gradient = gradient.clone()
        gradient[:, ::128] = 4.0
        settings = hyperparameters(step, beta2=0.99)
        adamw_update(parameter, gradient, state, settings, gradient_scale=ONE, seed=step)
    if moments == "bf16":
        second = state.second_moment.float()
    else:
        codes = state.second_moment.float().unflatten(-1, (-1, 128)) / 255
        second = (codes**4 * state.second_scale.unsqueeze(-1)).flatten(-2)
    expected = gradients[0] ** 2 * 0.01 * 0.99**30
    others = torch.arange(1280) % 128 != 0
    assert second[:, others].sum().item() == pytest.approx(expected[:, others].sum().item(), rel=0.03)


def test_a_slice_updated_alone_equals_its_part_of_the_whole():
    whole, part = weight(6, 256, dtype=torch.bfloat16), weight(6, 256, dtype=torch.bfloat16)[2:5].clone()
    gradient = weight(6, 256, seed=4)
    states = [init_adamw_state(tensor, "int8", "stochastic_bf16") for tensor in (whole, part)]
    adamw_update(whole, gradient, states[0], hyperparameters(), gradient_scale=ONE, seed=5)
    adamw_update(part, gradient[2:5], states[1], hyperparameters(), gradient_scale=ONE, seed=5, first_index=2 * 256)
    assert torch.equal(whole[2:5], part)
    assert torch.equal(states[0].first_moment[2:5], states[1].first_moment)


def test_the_gradient_scale_scales_the_gradient():
    one, other = weight(3, 130), weight(3, 130)
    gradient = weight(3, 130, seed=4)
    for tensor, factor in ((one, 1.0), (other, 0.25)):
        state = init_adamw_state(tensor, "fp32", "fp32")
        scaled = gradient / factor
        adamw_update(tensor, scaled, state, hyperparameters(), gradient_scale=torch.tensor(factor), seed=1)
    torch.testing.assert_close(one, other)


def test_random_bits_are_uniform_and_differ_by_seed():
    bits = random_bits(1 << 16, seed=7, first_index=0, device=torch.device("cpu"))
    assert bits.min() >= 0 and bits.max() < 1 << 32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((bits >> shift) & 0xFF, minlength=256).float()
        assert ((counts - 256) ** 2 / 256).sum() < 360  # chi-square, 255 degrees of freedom, p < 1e-5
    assert (bits == random_bits(1 << 16, seed=8, first_index=0, device=torch.device("cpu"))).sum() < 5


def test_wrong_inputs_are_refused():
    parameter = weight(3, 4)
    state = init_adamw_state(parameter, "fp32", "fp32")
    with pytest.raises(KernelInputError, match=r"gradient has shape \(4, 3\); it must be \(3, 4\)"):
        adamw_update(parameter, weight(4, 3), state, hyperparameters(), gradient_scale=ONE, seed=0)
    with pytest.raises(KernelInputError, match="must be contiguous"):
        adamw_update(parameter, weight(4, 3).T, state, hyperparameters(), gradient_scale=ONE, seed=0)
    with pytest.raises(KernelInputError, match="dtype torch.float16"):
        init_adamw_state(parameter.half(), "fp32", "fp32")


def compare_backends(device: str, every: int = 1) -> None:
    """Three updates by the kernel and by plain torch, in every format: equal up to a rare code on a rounding edge.

    ``every``: of how many cases in a row one is compared; at 3 every format is, with one or two of the shapes.
    """
    number = 0
    for moments in MOMENTS:
        for master in MASTERS:
            for dtype in (torch.float32, torch.bfloat16):
                for shape in ((3, 300), (2, 3, 128), (16, 256), (77,)):
                    number += 1
                    if number % every:
                        continue
                    kernel, plain = (weight(*shape, dtype=dtype).to(device) for _ in range(2))
                    states = [init_adamw_state(tensor, moments, master) for tensor in (kernel, plain)]
                    for step in range(1, 4):
                        gradient = weight(*shape, seed=step).to(device)
                        for tensor, state, backend in ((kernel, states[0], "triton"), (plain, states[1], "torch")):
                            adamw_update(
                                tensor,
                                gradient,
                                state,
                                hyperparameters(step),
                                gradient_scale=torch.tensor(0.5, device=device),
                                seed=step,
                                backend=backend,
                            )
                    # A code one off moves one weight by a fraction of one update.
                    off = (master_weight(kernel, states[0]) - master_weight(plain, states[1])).abs()
                    exact = 1e-5 if moments == "fp32" and master != "stochastic_bf16" else 2e-2
                    assert off.max() < exact, (moments, master, dtype, shape, off.max())
                    assert (off > 1e-4).float().mean() < 0.02, (moments, master, dtype, shape)
                    for name, ours in states[0].tensors().items():
                        if ours.dtype in (torch.int8, torch.uint8):
                            differ = ours != getattr(states[1], name)
                            assert differ.float().mean() < 0.02, (name, master, dtype, shape)


def check_codes_are_right_on_average(device: str, backend: str, draws: int, rows: int = 16) -> None:
    """Decoded moments of one gradient over many seeds: unbiased, from the largest of a block to the smallest."""
    gradient = (weight(rows, 256) * 10.0 ** weight(rows, 256, seed=1)).to(device)
    gradient[3] = 0.0
    decoded, moments = [torch.zeros(rows, 256, device=device) for _ in range(2)], (0.1 * gradient, 0.05 * gradient**2)
    for seed in range(draws):
        parameter = torch.zeros(rows, 256, dtype=torch.bfloat16, device=device)
        state = init_adamw_state(parameter, "int8", "bf16_remainder")
        one = torch.ones((), device=device)
        adamw_update(parameter, gradient, state, hyperparameters(), gradient_scale=one, seed=seed, backend=backend)
        for total, codes, scale, power, levels in (
            (decoded[0], state.first_moment, state.first_scale, 3, 127),
            (decoded[1], state.second_moment, state.second_scale, 4, 255),
        ):
            total += ((codes.float() / levels).pow(power).unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2)
    for total, exact, power, levels in zip(decoded, moments, (3, 4), (127, 255), strict=True):
        scale = exact.abs().unflatten(-1, (-1, 128)).amax(-1, keepdim=True).expand(-1, -1, 128).flatten(-2) + 1e-30
        below = (exact.abs() / scale).pow(1 / power).mul(levels).floor().clamp(max=levels - 1)
        low, high = ((below + up).div(levels).pow(power) * scale for up in (0, 1))
        # Where the code is 0, the second moment's is 1 instead: too large, on purpose.
        fair = (below > 0) & (exact != 0) if power == 4 else exact != 0
        # Variance of a draw between two values; an exact one has none.
        deviation = ((exact.abs() - low) * (high - exact.abs())).clamp(min=1e-4 * (high - low) ** 2).div(draws).sqrt()
        score = ((total / draws - exact) * exact.sign() / deviation)[fair]
        assert score.mean().abs() < 5 / score.numel() ** 0.5, (power, score.mean())
        assert score.std() < 1.2, (power, score.std())
        assert power == 4 or not total[exact == 0].any()


def run_interpreted(call: Callable[..., None], *arguments: object) -> None:
    """Call ``call`` where kernels run in the interpreter: here, or in another process if a GPU is in use here."""
    if triton_interpreted():
        call(*arguments)
        return
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = f"import test_adamw; test_adamw.{call.__name__}(*{arguments})"
    folder = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", command], check=True, env=environment, cwd=folder)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_kernel_in_the_interpreter_equals_plain_torch(every):
    run_interpreted(compare_backends, "cpu", every)


def test_codes_of_8_bits_are_right_on_average():
    check_codes_are_right_on_average("cpu", "torch", draws=300)


@pytest.mark.slow
def test_codes_of_8_bits_are_right_on_average_in_the_interpreter():
    run_interpreted(check_codes_are_right_on_average, "cpu", "triton", 100, 8)


@pytest.mark.gpu
def test_the_kernel_on_the_gpu_equals_plain_torch():
    compare_backends("cuda")


@pytest.mark.gpu
def test_codes_of_8_bits_are_right_on_average_on_the_gpu():
    check_codes_are_right_on_average("cuda", "triton", draws=1000)
