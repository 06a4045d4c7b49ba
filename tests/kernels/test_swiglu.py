"""SwiGLU: kernel against plain torch, and under torch.compile."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_accurate, randn

from moescale.kernels.backends import KernelInputError
from moescale.kernels.swiglu import swiglu


def gated(gate_up: torch.Tensor, *, backend: str) -> tuple[torch.Tensor, ...]:
    return (swiglu(gate_up, backend=backend),)


def test_the_first_half_is_the_gate() -> None:
    gate_up = torch.tensor([[0.0, 100.0, 3.0, 5.0]])
    torch.testing.assert_close(swiglu(gate_up), torch.tensor([[0.0, 500.0]]))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", [(1, 2), (2, 3, 22), (3, 2050), (0, 8)])
def test_kernel_agrees_on_odd_sizes(shape: tuple[int, ...]) -> None:
    assert_accurate(gated, [randn(*shape)])


@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_reads_strided_rows() -> None:
    assert_accurate(gated, [randn(4, 40, grad=False)[:, 3:33].requires_grad_()])
    assert_accurate(gated, [randn(8, 6, grad=False).t().requires_grad_()])


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(KernelInputError, match=r"gate_up has shape \(2, 5\)"):
        swiglu(torch.zeros(2, 5))


def test_the_operator_compiles_without_a_graph_break() -> None:
    gate_up = randn(4, 12)
    compiled = torch.compile(lambda x: swiglu(x * 2, backend="triton") + 1, fullgraph=True, backend="aot_eager")
    result = compiled(gate_up)
    torch.testing.assert_close(result, swiglu(gate_up * 2, backend="torch") + 1)
    (gradient,) = torch.autograd.grad(result.sum(), gate_up)
    (expected,) = torch.autograd.grad(swiglu(gate_up * 2, backend="torch").sum(), gate_up)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", [(8192, 2 * 2816), (777, 2 * 1409)])
def test_bf16_error_is_at_most_twice_plain_torch(shape: tuple[int, ...]) -> None:
    assert_accurate(gated, [randn(*shape, dtype=torch.bfloat16)])
