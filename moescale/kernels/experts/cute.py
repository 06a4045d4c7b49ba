"""The products of the expert MLP in CuTe, from the package quack-kernels: the back end ``cute`` (Hopper, bf16).

The same functions as ``experts.triton``; all but the products are that module's. Thread block clusters share what they
load and warp groups take turns at the tensor cores, which Triton has neither of; an expert's last rows and the buffers
of the weight gradients are handled as there.

A row of pre-activations alternates between gate and up (g0, u0, g1, u1, ...), so that each pair meets in one thread.
The weights keep their layout, gate rows first: the products read and write them by pairs (``concat_layout``).

What follows a product is a function that the package compiles into it, of one pair or element at a time
(``up_epilogue``, ``down_dgrad_epilogue``). Biases and the clamp of gpt-oss are there.

The package finds tiles by trial at run time if it is asked to. It is not: ``TILES`` names them, so that nothing is
timed in a training step and the same inputs launch the same kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from quack.activation import dswiglu, dswiglu_oai, swiglu, swiglu_oai
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import pack, unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad
from quack.gemm import gemm

from moescale.kernels.experts import bias_triton
from moescale.kernels.experts.bias_triton import add_bias_products
from moescale.kernels.experts.launch_config import num_multiprocessors
from moescale.kernels.experts.row_tiles_triton import RowGroups
from moescale.kernels.experts.triton import combine_rows, gather_rows, order_by_pair, sort_weights
from moescale.kernels.swiglu.reference import SwigluClamp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Output tile of a thread block, blocks of a cluster along both dims, and whether two warp groups take turns."""

    m: int
    n: int
    cluster_m: int = 1
    cluster_n: int = 1
    pingpong: bool = False

    def arguments(self) -> dict[str, Any]:
        """The tile in the package's words."""
        return {
            "tile_M": self.m,
            "tile_N": self.n,
            "cluster_M": self.cluster_m,
            "cluster_N": self.cluster_n,
            "pingpong": self.pingpong,
        }


# Each within 2% of the best of 19 to 25 tiles from 768 rows an expert on, within 6% at 384 (one H200; decision 0012).
TILES = {
    "up": Tile(m=128, n=128, cluster_n=2, pingpong=True),
    "down": Tile(m=192, n=128, cluster_n=2, pingpong=True),
    "down_dgrad": Tile(m=128, n=128, cluster_m=2, pingpong=True),
    "up_dgrad": Tile(m=128, n=128, cluster_n=2, pingpong=True),
    "up_wgrad": Tile(m=128, n=192, cluster_m=2, pingpong=True),
    "down_wgrad": Tile(m=128, n=128, cluster_m=2, pingpong=True),
}
# Where another tile is at least 3% faster, by kernel and (n, k) as of the launch table: the experts of Qwen3-30B-A3B,
# GLM-4.7-Flash and gpt-oss-20b at 8,192 tokens (benchmarks/results/h200/expert_tiles.json and, for those with biases,
# NOTES.md).
TILES_BY_WEIGHT = {
    ("up", 1536, 2048): Tile(m=192, n=128, cluster_n=2, pingpong=True),
    ("up", 3072, 2048): Tile(m=192, n=128, cluster_n=2, pingpong=True),
    ("up_dgrad", 2048, 1536): Tile(m=192, n=128, cluster_n=2, pingpong=True),
    ("up_dgrad", 2048, 3072): Tile(m=192, n=128, cluster_n=2, pingpong=True),
    ("down_wgrad", 2048, 768): Tile(m=128, n=192, cluster_m=2, pingpong=True),
    ("down_wgrad", 2048, 1536): Tile(m=128, n=192, cluster_m=2, pingpong=True),
    ("up", 5760, 2880): Tile(m=128, n=192, cluster_n=2, pingpong=True),
    ("down", 2880, 2880): Tile(m=128, n=192, cluster_m=2, pingpong=True),
    ("up_dgrad", 2880, 5760): Tile(m=128, n=192, cluster_m=2, pingpong=True),
    ("down_wgrad", 2880, 2880): Tile(m=128, n=192, cluster_m=2, pingpong=True),
}


@functools.cache
def up_epilogue(clamp: SwigluClamp | None, has_bias: bool) -> Any:
    """What follows ``up``: the sum with the bias, where there is one, is the pre-activation ``D``; ``act`` is of it."""
    activate = swiglu
    if clamp is not None:
        alpha, limit = clamp

        def activate(gate, up):
            return swiglu_oai(gate, up, alpha, limit)

    def without_bias(acc):
        gate, up = unpack(acc)
        return {"D": pack(gate, up), "act": activate(gate, up)}

    def with_bias(acc, bias):
        gate, up = unpack(acc + bias)
        return {"D": pack(gate, up), "act": activate(gate, up)}

    follow, operands = (with_bias, {"bias": RowVecLoad("bias")}) if has_bias else (without_bias, {})
    return gemm_epilogue(outputs=("act",), ops=operands, mode="acc_pair")(follow)


@functools.cache
def down_dgrad_epilogue(clamp: SwigluClamp | None, has_weights: bool) -> Any:
    """What follows ``down_dgrad``: the gradient ``D`` of the pre-activation ``c``, and ``act``, both weighted.

    ``of_weight`` is the sum over columns, of a tile, of the activation times its gradient before that is weighted.
    """
    differentiate = dswiglu
    if clamp is not None:
        alpha, limit = clamp

        def differentiate(gate, up, grad):
            return dswiglu_oai(gate, up, grad, alpha, limit)

    def without_weights(acc, c):
        gate, up = unpack(c)
        grad_gate, grad_up, act = differentiate(gate, up, acc)
        return {"D": pack(grad_gate, grad_up), "act": act}

    def with_weights(acc, c, weight):
        gate, up = unpack(c)
        grad_gate, grad_up, act = differentiate(gate, up, acc * weight)
        return {"D": pack(grad_gate, grad_up), "act": act * weight, "of_weight": (act, acc)}

    if not has_weights:
        return gemm_epilogue(outputs=("act",), mode="packed_cd_b16x2")(without_weights)
    return gemm_epilogue(
        outputs=("act",),
        ops={"weight": ColVecLoad("weight")},
        reduces={"of_weight": ColVecReduce("of_weight", scaled=True)},
        mode="packed_cd_b16x2",
    )(with_weights)


def find_tile(kernel: str, n: int, k: int) -> Tile:
    """Return the tile of a product with a weight [n, k]; of weight gradients these are rows and columns."""
    return TILES_BY_WEIGHT.get((kernel, n, k), TILES[kernel])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffsetGroups(RowGroups):
    """Row groups that also know where each expert's rows begin: ``offsets`` [E + 1] int32, the last their end."""

    offsets: torch.Tensor


def group_rows(ends: torch.Tensor, num_rows: int, expected_rows: int | None = None) -> OffsetGroups:
    """Return the groups of ``num_rows`` rows sorted by expert, with cumulative counts ``ends`` [E] int32."""
    offsets = F.pad(ends, (1, 0))
    return OffsetGroups(ends=ends, num_rows=num_rows, expected_rows=expected_rows or num_rows, offsets=offsets)


@triton.jit(do_not_specialize=["num_rows"])
def _zero_tail_kernel(out, first_row, num_rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows of ``out`` [num_rows, COLUMNS] from the one on that ``first_row`` points to."""
    begin = tl.load(first_row).to(tl.int64) * COLUMNS
    end = num_rows.to(tl.int64) * COLUMNS
    for offset in tl.range(begin + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(out + index, tl.zeros((BLOCK,), out.dtype.element_ty), mask=index < end)


def multiply_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    groups: OffsetGroups,
    *,
    transposed: bool = False,
    zero_tail: bool = False,
    kernel: str = "down",
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Return rows [R, K] times weight [E, N, K] of their expert (``transposed``: [E, K, N]) as [R, N].

    Rows that belong to no expert are left unwritten, or zeroed with ``zero_tail``. ``kernel`` names the entry of
    ``TILES``; the columns of ``rows`` alternate between gate and up in ``up_dgrad``. ``out``: where to write it.
    ``bias`` [E, N]: that of the expert is added to each of its rows.
    """
    num_rows, n = rows.shape[0], weight.shape[2 if transposed else 1]
    tile = tile or find_tile(kernel, n, rows.shape[1])
    out = rows.new_empty((num_rows, n)) if out is None else out
    if num_rows == 0:
        return out
    weight = weight.mT if transposed else weight
    _multiply(rows, weight, out, groups, tile, bias, by_pairs=kernel == "up_dgrad")
    if zero_tail:
        grid = (num_multiprocessors(out.device),)
        _zero_tail_kernel[grid](out, groups.ends[-1:], num_rows, COLUMNS=n, BLOCK=1024)
    return out


def _multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    groups: OffsetGroups,
    tile: Tile,
    bias: torch.Tensor | None,
    *,
    by_pairs: bool,
) -> None:
    """out = rows [R, K] @ weight [E, N, K].T + bias [E, N]; ``by_pairs``: the weight's dim of 2F is taken by pairs."""
    gemm(
        rows,
        weight,
        out,
        None,
        None,
        rowvec_bias=bias,
        cu_seqlens_m=groups.offsets,
        concat_layout=("B",) if by_pairs else None,
        **tile.arguments(),
    )


def _by_pairs(bias: torch.Tensor) -> torch.Tensor:
    """A bias [E, 2F], gates first, by pairs."""
    return bias.unflatten(1, (2, -1)).mT.flatten(1)


def multiply_up(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    groups: OffsetGroups,
    *,
    write_pre: bool,
    write_act: bool,
    pre: torch.Tensor | None = None,
    act: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    clamp: SwigluClamp | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pre-activation [R, 2F], by pairs, and the activation [R, F]; one that is not written is empty.

    ``pre``, ``act``: where to write them. ``bias`` [E, 2F], gates first, is added to the pre-activation.
    """
    num_rows, ffn = rows.shape[0], gate_up.shape[1] // 2
    pre = rows.new_empty((num_rows, 2 * ffn) if write_pre else 0) if pre is None else pre
    act = rows.new_empty((num_rows, ffn) if write_act else 0) if act is None else act
    tile = tile or find_tile("up", gate_up.shape[1], gate_up.shape[2])
    bias = None if bias is None else _by_pairs(bias)
    if num_rows and not write_act:
        _multiply(rows, gate_up, pre, groups, tile, bias, by_pairs=True)
    elif num_rows:
        up_epilogue(clamp, bias is not None).gemm(
            rows,
            gate_up,
            pre if write_pre else None,
            epi_args={"act": act} if bias is None else {"act": act, "bias": bias},
            cu_seqlens_m=groups.offsets,
            concat_layout=("B",),
            **tile.arguments(),
        )
    return pre, act


def multiply_down_dgrad(
    grad_out: torch.Tensor,
    down: torch.Tensor,
    pre: torch.Tensor,
    groups: OffsetGroups,
    row_weights: torch.Tensor | None,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    clamp: SwigluClamp | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (grad_pre [R, 2F], by pairs; weighted activation [R, F]; gradient [R] of the row weights, if any).

    ``out``: where to write the three.
    """
    num_rows, ffn = pre.shape[0], pre.shape[1] // 2
    tile = tile or find_tile("down_dgrad", ffn, grad_out.shape[1])
    grad_pre, act = (torch.empty_like(pre), pre.new_empty((num_rows, ffn))) if out is None else out[:2]
    partial_sums = pre.new_empty((num_rows, -(-ffn // tile.n)), dtype=torch.float32)
    operands = {"act": act}
    if row_weights is not None:
        operands |= {"weight": row_weights, "of_weight": partial_sums}
    if num_rows:
        down_dgrad_epilogue(clamp, row_weights is not None).gemm(
            grad_out,
            down.mT,
            grad_pre,
            pre,
            epi_args=operands,
            cu_seqlens_m=groups.offsets,
            **tile.arguments(),
        )
    if row_weights is None:
        return grad_pre, act, partial_sums.new_empty(0)
    return grad_pre, act, torch.sum(partial_sums, 1, out=None if out is None else out[2])


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    groups: OffsetGroups,
    *,
    buffer: torch.Tensor | None = None,
    kernel: str = "down_wgrad",
    tile: Tile | None = None,
) -> torch.Tensor:
    """Return left[rows of e].T @ right[rows of e] for every expert, [E, M, N], or add it to ``buffer`` in place.

    Shapes: left [R, M], right [R, N]; the columns of ``left`` alternate between gate and up in ``up_wgrad``. The sum
    runs in fp32 and is rounded to the dtype of what it is stored in or added to; a sum in bf16 is rounded again.
    """
    out = left.new_empty((groups.num_experts, left.shape[1], right.shape[1])) if buffer is None else buffer
    if left.shape[0] == 0:
        return out if buffer is not None else out.zero_()
    gemm(
        left.mT,
        right.mT,
        out,
        None,
        None,
        cu_seqlens_k=groups.offsets,
        add_to_output=buffer is not None,
        concat_layout=("out",) if kernel == "up_wgrad" else None,
        **(tile or find_tile(kernel, left.shape[1], right.shape[1])).arguments(),
    )
    return out


bias_gradient = functools.partial(bias_triton.bias_gradient, by_pairs=True)


__all__ = [
    "add_bias_products",
    "bias_gradient",
    "combine_rows",
    "gather_rows",
    "group_rows",
    "multiply_down_dgrad",
    "multiply_rows",
    "multiply_up",
    "order_by_pair",
    "sort_weights",
    "weight_gradient",
]
