"""What the back end ``cute`` asks of quack-kernels, with that package played by plain torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moescale.kernels import experts as experts_module
from moescale.kernels.swiglu.reference import SwigluClamp, clamped_swiglu


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
    a, b, d, c, semaphore, *, rowvec_bias=None, cu_seqlens_m=None, cu_seqlens_k=None, add_to_output=False,
    concat_layout=None, **tile,
):  # fmt: skip
    assert c is None and semaphore is None
    if cu_seqlens_m is not None:
        assert not add_to_output
        d.copy_(products(a, b, cu_seqlens_m, concat_layout) + of_rows(rowvec_bias, d.shape[0], cu_seqlens_m))
        return
    assert rowvec_bias is None
    for out, begin, end in zip(d, cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist(), strict=True):
        product = a[:, begin:end] @ b[:, begin:end].t()
        if concat_layout == ("out",):
            product = torch.cat((product[0::2], product[1::2]))
        out.copy_(out + product if add_to_output else product)


def of_rows(bias, num_rows, offsets):
    """The row of ``bias`` [E, N] of each row's expert, zero for rows of none; 0 where there is no bias."""
    if bias is None:
        return 0
    assert bias.is_contiguous()  # copied by pairs of columns
    out = bias.new_zeros((num_rows, bias.shape[1]))
    for row, begin, end in zip(bias, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        out[begin:end] = row
    return out


class Pair(tuple):
    """Two lanes with sums lane by lane."""

    def __add__(self, other):
        return Pair(a + b for a, b in zip(self, other, strict=True))


def halves(matrix):
    """The pairs of adjacent columns."""
    return Pair((matrix[:, 0::2], matrix[:, 1::2]))


def gemm_epilogue(*, outputs, mode, ops=None, reduces=None):
    """The package's decorator: the function that follows a product, on whole matrices here."""
    assert outputs == ("act",) and mode in ("acc_pair", "packed_cd_b16x2")

    def decorate(follow):
        def product(a, b, d, c=None, *, epi_args, cu_seqlens_m, tile_N, concat_layout=None, **tile):
            acc = products(a, b, cu_seqlens_m, concat_layout)
            operands = {}
            for name, kind in (ops or {}).items():
                value = epi_args[name]
                if kind == ("row", name):
                    operands[name] = halves(of_rows(value, acc.shape[0], cu_seqlens_m))
                else:
                    assert kind == ("column", name)
                    operands[name] = value.unsqueeze(1)
            if mode == "acc_pair":
                assert c is None
                found = follow(halves(acc), **operands)
            else:
                found = follow(acc, c=halves(c), **operands)
            assert set(found) == {"D", *outputs, *(reduces or {})} and set(epi_args) == set(found) - {"D"} | set(
                operands
            )
            epi_args["act"].copy_(found["act"])
            if d is not None:
                d[:, 0::2], d[:, 1::2] = found["D"]
            for name, kind in (reduces or {}).items():
                assert kind == ("sum", name)
                value, scale = found[name]
                parts = [part.sum(1) for part in (value * scale).split(tile_N, dim=1)]
                epi_args[name].copy_(torch.stack(parts, dim=1))

        return SimpleNamespace(gemm=product)

    return decorate


def activation_gradients(activate, gate, up, grad):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad():
        act = activate(gate, up)
    return *torch.autograd.grad(act, (gate, up), grad), act.detach()


def swiglu(gate, up):
    return F.silu(gate) * up


def swiglu_oai(gate, up, alpha, limit):
    return clamped_swiglu(torch.cat((gate, up), dim=-1), SwigluClamp(alpha, limit))


def played_package():
    """The package's modules, with what the back end asks of them."""
    contents = {
        "quack": {},
        "quack.gemm": {"gemm": gemm},
        "quack.activation": {
            "swiglu": swiglu,
            "swiglu_oai": swiglu_oai,
            "dswiglu": lambda *operands: activation_gradients(swiglu, *operands),
            "dswiglu_oai": lambda gate, up, grad, *constants: activation_gradients(
                lambda gate, up: swiglu_oai(gate, up, *constants), gate, up, grad
            ),
        },
        "quack.epilogue": {},
        "quack.epilogue.frontend": {"gemm_epilogue": gemm_epilogue},
        "quack.epilogue.math": {"pack": lambda a, b: Pair((a, b)), "unpack": lambda pair: pair},
        "quack.epilogue.ops": {
            "RowVecLoad": lambda name: ("row", name),
            "ColVecLoad": lambda name: ("column", name),
            "ColVecReduce": lambda name, scaled: ("sum", name),
        },
    }
    modules = {}
    for name, functions in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(functions)
    return modules


@pytest.fixture
def cute(monkeypatch):
    """The module of the back end, over the package's functions as this file plays them."""
    for name, module in played_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moescale.kernels.experts.cute", raising=False)
    yield importlib.import_module("moescale.kernels.experts.cute")
    sys.modules.pop("moescale.kernels.experts.cute")


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
