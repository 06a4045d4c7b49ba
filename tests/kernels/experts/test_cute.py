"""What the back end ``cute`` asks of quack-kernels, with that package played by plain torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moescale.kernels import experts as experts_module
from moescale.kernels.experts import SwigluClamp
from tests.kernels.experts.test_experts import make_inputs


def by_pairs(matrix):
    """The dim of a matrix that is not contiguous, from (gates, ups) to g0, u0, g1, u1, ... , copied."""
    dim = 0 if matrix.stride(-1) == 1 else 1
    order = torch.arange(matrix.shape[dim]).view(2, -1).t().flatten()
    return matrix.index_select(dim, order)


def products(rows, weight, offsets, concat_layout):
    """rows @ weight[e].T expert by expert; rows of no expert stay NaN, as memory that no kernel wrote."""
    out = rows.new_full((rows.shape[0], weight.shape[1]), float("nan"))
    for matrix, begin, end in zip(weight, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        matrix = by_pairs(matrix) if "B" in (concat_layout or ()) else matrix
        out[begin:end] = rows[begin:end] @ matrix.t()
    return out


def gemm(
    a, b, d, c, semaphore, *, cu_seqlens_m=None, cu_seqlens_k=None, add_to_output=False, concat_layout=None, **tile
):
    assert c is None and semaphore is None
    if cu_seqlens_m is not None:
        assert not add_to_output
        d.copy_(products(a, b, cu_seqlens_m, concat_layout))
        return
    for out, begin, end in zip(d, cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist(), strict=True):
        product = a[:, begin:end] @ b[:, begin:end].t()
        if concat_layout == ("out",):
            product = torch.cat((product[0::2], product[1::2]))
        out.copy_(out + product if add_to_output else product)


def linear_act_mod(activation, *, gated, has_c, has_rowvec, has_colvec):
    assert activation == "swiglu" and gated and not (has_c or has_rowvec or has_colvec)

    def product(a, b, d, *, epi_args, cu_seqlens_m, concat_layout, **tile):
        pairs = products(a, b, cu_seqlens_m, concat_layout)
        if d is not None:
            d.copy_(pairs)
        epi_args["mAuxOut"].copy_(F.silu(pairs[:, 0::2]) * pairs[:, 1::2])

    return SimpleNamespace(gemm=product)


def dgated_mod(activation, *, has_scale, has_reduce):
    assert activation == "swiglu"

    def product(a, b, d, c, *, epi_args, cu_seqlens_m, tile_N, **tile):
        grad = products(a, b, cu_seqlens_m, None)
        gate, up = c[:, 0::2].detach().requires_grad_(), c[:, 1::2].detach().requires_grad_()
        with torch.enable_grad():
            act = F.silu(gate) * up
        scale = epi_args["mColVecBroadcast"].unsqueeze(1) if has_scale else torch.ones(1)
        d[:, 0::2], d[:, 1::2] = torch.autograd.grad(act, (gate, up), grad * scale)
        epi_args["mAuxOut"].copy_(act.detach() * scale)
        if has_reduce:
            sums = [part.sum(1) for part in (act.detach() * grad).split(tile_N, dim=1)]
            epi_args["mColVecReduce"].copy_(torch.stack(sums, dim=1))

    return SimpleNamespace(gemm=product)


@pytest.fixture
def cute(monkeypatch):
    """The module of the back end, over the package's functions as this file plays them."""
    package = {name: ModuleType(name) for name in ("quack", "quack.gemm", "quack.epilogue", "quack.epilogue.library")}
    package["quack.gemm"].gemm = gemm
    package["quack.epilogue.library"].linear_act_mod = linear_act_mod
    package["quack.epilogue.library"].dgated_mod = dgated_mod
    for name, module in package.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moescale.kernels.experts.cute", raising=False)
    yield importlib.import_module("moescale.kernels.experts.cute")
    sys.modules.pop("moescale.kernels.experts.cute")


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("save_pre", [True, False])
@pytest.mark.parametrize("with_buffers", [True, False])
def test_forward_and_backward_match_plain_torch(cute, weighted, save_pre, with_buffers):
    num_rows, hidden, ffn = 14, 24, 16
    ends = torch.tensor([0, 5, 5, 11], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    rows, grad = (torch.randn(num_rows, hidden, generator=generator) for _ in range(2))
    gate_up = torch.randn(4, 2 * ffn, hidden, generator=generator) * 0.2
    down = torch.randn(4, hidden, ffn, generator=generator) * 0.2
    row_weights = torch.rand(num_rows, generator=generator) if weighted else None

    def run(ops):
        buffers = (torch.full_like(gate_up, 0.5), torch.full_like(down, 0.5)) if with_buffers else (None, None)
        out, pre = experts_module._mlp_forward(
            ops, rows, gate_up, down, ends, save_pre, (None, None), None, zero_tail=True
        )
        assert pre.numel() == (num_rows * 2 * ffn if save_pre else 0)
        grad_rows, grad_weights, *gradients = experts_module._mlp_backward(
            ops, grad, rows, pre, gate_up, down, ends, row_weights, biases=(None, None),
            buffers=(*buffers, None, None), clamp=None, is_frozen=False, zero_tail=True,
        )  # fmt: skip
        results = {"y": out, "rows": grad_rows, "weights": grad_weights[:11] if weighted else torch.empty(0)}
        return results | dict(zip(("gate_up", "down"), buffers if with_buffers else gradients[:2], strict=True))

    expected = run(experts_module.operators_of("torch"))
    for name, result in run(cute).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("cute")
@pytest.mark.parametrize("with_buffers", [True, False])
def test_biased_experts_with_the_gradients_products_in_cute_match_plain_torch(with_buffers):
    ids, (x, weights, gate_up, down) = make_inputs(14, 2, 4, 32, 16)
    ids[ids == 2] = 1  # an expert without rows
    inputs = [x, weights, gate_up, down, torch.randn(4, 32).requires_grad_(), torch.randn(4, 32).requires_grad_()]
    grad = torch.randn(14, 32)

    def run(backend):
        buffers = [torch.full_like(t, 0.5) if with_buffers else None for t in inputs[2:]]
        y = experts_module._experts(
            x, ids, *inputs[1:], None, None, *buffers, SwigluClamp(1.702, 1.0), backend, True
        )[0]  # fmt: skip
        found = torch.autograd.grad(y, inputs, grad, allow_unused=True)
        return [y.detach(), *(f if b is None else b for f, b in zip(found, [None, None, *buffers], strict=True))]

    for mixed, plain in zip(run("triton+cute"), run("torch"), strict=True):
        torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-5)


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
