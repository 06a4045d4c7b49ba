"""The package quack-kernels played by plain torch: what the experts' back end ``cute`` asks of it."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F


def by_pairs(matrix):
    """The dim of a matrix that is not contiguous, from (gates, ups) to g0, u0, g1, u1, ... , copied."""
    dim = 0 if matrix.stride(-1) == 1 else 1
    order = torch.arange(matrix.shape[dim], device=matrix.device).view(2, -1).t().flatten()
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
            written = {*outputs, *(reduces or {})}
            assert set(found) == {"D", *written} and set(epi_args) == {*written, *operands}
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


def swiglu(gate, up):
    return F.silu(gate) * up


def dswiglu(gate, up, grad):
    """By formula, as there is no autograd within a custom operator."""
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu, silu * up


def swiglu_oai(gate, up, alpha, limit):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * (alpha * gate).sigmoid()


def dswiglu_oai(gate, up, grad, alpha, limit):
    of_gate, of_up = gate <= limit, up.abs() <= limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = (alpha * gate).sigmoid()
    slope = sigmoid + alpha * gate * sigmoid * (1 - sigmoid)
    return grad * (up + 1) * slope * of_gate, grad * gate * sigmoid * of_up, (up + 1) * gate * sigmoid


def played_package():
    """The package's modules, with what the back end asks of them."""
    contents = {
        "quack": {},
        "quack.gemm": {"gemm": gemm},
        "quack.activation": {
            "swiglu": swiglu,
            "swiglu_oai": swiglu_oai,
            "dswiglu": dswiglu,
            "dswiglu_oai": dswiglu_oai,
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
