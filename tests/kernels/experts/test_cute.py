"""What the back end ``cute`` makes of quack-kernels, with that package played by plain torch."""

from __future__ import annotations

import pytest
import torch

from moescale.kernels import experts as experts_module
from moescale.kernels.experts.launch_config import KERNELS
from moescale.kernels.swiglu.reference import SwigluClamp
from moescale.tools.tune_experts import ExpertShape, make_call


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("save_pre", [True, False])
@pytest.mark.parametrize("with_buffers", [True, False])
@pytest.mark.parametrize(
    ("has_biases", "clamp"), [(False, None), (True, None), (False, (1.702, 1.0)), (True, (1.702, 1.0))]
)
def test_forward_and_backward_match_plain_torch(cute, weighted, save_pre, with_buffers, has_biases, clamp):
    num_rows, hidden, ffn = 14, 24, 16
    ends = torch.tensor([0, 5, 5, 11], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    rows, grad = (torch.randn(num_rows, hidden, generator=generator) for _ in range(2))
    gate_up = torch.randn(4, 2 * ffn, hidden, generator=generator) * 0.2
    down = torch.randn(4, hidden, ffn, generator=generator) * 0.2
    biases = [torch.randn(weight.shape[:2], generator=generator) if has_biases else None for weight in (gate_up, down)]
    row_weights = torch.rand(num_rows, generator=generator) if weighted else None

    def run(ops):
        parameters = (gate_up, down, *biases)
        buffers = [torch.full_like(t, 0.5) if with_buffers and t is not None else None for t in parameters]
        out, pre = experts_module._mlp_forward(ops, rows, gate_up, down, ends, save_pre, biases, clamp, zero_tail=True)
        assert pre.numel() == (num_rows * 2 * ffn if save_pre else 0)
        grad_rows, grad_weights, *gradients = experts_module._mlp_backward(
            ops, grad, rows, pre, gate_up, down, ends, row_weights, biases=biases, buffers=buffers, clamp=clamp,
            is_frozen=False, zero_tail=True,
        )  # fmt: skip
        found = [gradient if buffer is None else buffer for gradient, buffer in zip(gradients, buffers, strict=True)]
        names = ("y", "rows", "gate_up", "down", "gate_up_bias", "down_bias", "weights")
        return dict(zip(names, (out, grad_rows, *found, grad_weights[:11] if weighted else rows[:0]), strict=True))

    expected = run(experts_module.operators_of("torch"))
    for name, result in run(cute).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("cute")
def test_every_exception_of_the_tiles_is_of_a_products_own_and_differs_from_the_rule(cute):
    for (kernel, n, k), tile in cute.TILES_BY_WEIGHT.items():
        assert tile != cute.TILES[kernel] and cute.find_tile(kernel, n, k) == tile
        assert cute.find_tile(kernel, n + 8, k) == cute.TILES[kernel]


def test_no_rows_leave_buffers_alone_and_give_zero_gradients(cute):
    groups = cute.group_rows(torch.zeros(2, dtype=torch.int32), 0)
    left, right = torch.empty(0, 8), torch.empty(0, 16)
    assert torch.equal(cute.weight_gradient(left, right, groups), torch.zeros(2, 8, 16))
    buffer = torch.ones(2, 8, 16)
    assert cute.weight_gradient(left, right, groups, buffer=buffer) is buffer and (buffer == 1).all()
    assert cute.multiply_rows(right, torch.ones(2, 8, 16), groups, zero_tail=True).shape == (0, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_timed_is_the_same_product_in_triton(cute, kernel):
    """Operands are constant along all dims but the first, so a layout by pairs changes the order of results alone."""
    shape = ExpertShape(tokens=6, num_experts=3, top_k=2, hidden_size=32, intermediate_size=16)
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)

    def fill(*sizes):
        return torch.linspace(0.1, 0.4, sizes[0]).view(-1, *(1,) * (len(sizes) - 1)).expand(sizes).contiguous()

    def results(backend, **options):
        torch.manual_seed(0)  # of the row weights
        found = make_call(kernel, shape, ends, fill, backend=backend, **options)(None)
        return found if isinstance(found, tuple) else (found,)

    options = dict(clamp=SwigluClamp(1.702, 0.2), has_biases=True)
    found, plain = results("cute", **options), results("cute")
    for a, b in zip(found, results("triton", **options), strict=True):
        torch.testing.assert_close(a.sort().values, b.sort().values)
    changes = not all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert changes == (kernel in ("up", "down", "down_dgrad"))
