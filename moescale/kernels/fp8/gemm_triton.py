"""Grouped GEMMs in e4m3 for Hopper: rows of an expert times its weight, and the gradient of that weight.

The loops are those of :mod:`moescale.kernels.experts.grouped_gemm_triton`: persistent programs, operands through tensor
descriptors. Both operands lie contiguous along the contraction, as Hopper multiplies 8-bit numbers. Scales are applied
once, when a tile is stored, so the sum never leaves the tensor cores: decision 21 has what other scalings cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moescale.kernels.experts.grouped_gemm_triton import (
    accumulation,
    count_steps,
    num_programs,
    split_tile,
    store_gradient,
)
from moescale.kernels.experts.launch_config import LaunchConfig
from moescale.kernels.experts.ragged_triton import describe_rows, load_rows, store_rows
from moescale.kernels.experts.row_tiles_triton import RowGroups, split_whole_tiles, whole_tile
from moescale.kernels.fp8.launch_config import find_launch
from moescale.kernels.fp8.scaled import Scaled


@triton.jit
def _rows_kernel(
    rows, weight, out, row_scales, weight_scales, tiles, N, K, expert_rows, expert_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, STORE_SPLITS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[r, n] = row_scales[r] * weight_scales[e] * sum_k rows[r, k] * weight[e][n, k].

    ``weight`` is a matrix in which expert e begins at (e * expert_rows, e * expert_columns).
    """
    num_columns = tl.cdiv(N, BLOCK_N)
    num_whole, _, _ = split_whole_tiles(tiles, num_columns, NUM_PROGRAMS, False)
    for position in tl.range(tl.program_id(0), num_whole * num_columns, NUM_PROGRAMS, flatten=FLATTEN):
        expert, first, size, row, column = whole_tile(tiles, position, num_whole, num_columns, GROUP_M)
        column = column * BLOCK_N
        index = row + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            a = load_rows(rows, first, size, row, k * BLOCK_K)
            b = weight.load([expert * expert_rows + column, expert * expert_columns + k * BLOCK_K])
            acc = tl.dot(a, b.T, acc)
        scale = tl.load(row_scales + first + index, mask=index < size, other=0.0)
        acc *= (scale * tl.load(weight_scales + expert))[:, None]
        parts = split_tile(acc, STORE_SPLITS)
        for i in tl.static_range(STORE_SPLITS):
            store_rows(out, first, size, row, column + i * (BLOCK_N // STORE_SPLITS), parts[i])


@triton.jit
def _weight_gradient_kernel(
    left, right, out, left_scales, right_scales, ends, num_experts, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, STORE_SPLITS: tl.constexpr, EXPERTS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out[e][m, n] (+)= scales[e] * sum over the columns p of expert e of left[m, p] * right[n, p].

    Columns of expert e end at ``ends[e]``, a multiple of BLOCK_K: those that are no row's are zero.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) - NUM_PROGRAMS
    step, num_steps = 0, 1
    expert, first, m, n = 0, 0, 0, 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over all steps of all tiles, as in bf16: an expert without rows has one step, over a neighbour's columns.
    for _ in tl.range(0, count_steps(ends, num_experts, num_m * num_n, NUM_PROGRAMS, BLOCK_K, EXPERTS)):
        if step == 0:
            tile += NUM_PROGRAMS
            expert = tile // (num_m * num_n)
            within = tile % (num_m * num_n)
            group = within // (GROUP_M * num_n)
            group_rows = tl.minimum(num_m - group * GROUP_M, GROUP_M)
            within = within % (GROUP_M * num_n)
            m = (group * GROUP_M + within % group_rows) * BLOCK_M
            n = (within // group_rows) * BLOCK_N
            first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
            num_steps = tl.maximum((tl.load(ends + expert) - first) // BLOCK_K, 1)
        a = left.load([m, first + step * BLOCK_K])
        b = right.load([n, first + step * BLOCK_K])
        acc = tl.dot(a, b.T, acc)
        step += 1
        if step == num_steps:
            step = 0
            scale = tl.load(left_scales + expert) * tl.load(right_scales + expert)
            has_rows = tl.load(ends + expert) > first
            parts = split_tile(acc, STORE_SPLITS)
            for i in tl.static_range(STORE_SPLITS):
                part = tl.where(has_rows, parts[i] * scale, 0.0)
                store_gradient(out, expert, m, n + i * (BLOCK_N // STORE_SPLITS), part, ACCUMULATE)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


def multiply_rows(
    rows: Scaled,
    weight: Scaled,
    groups: RowGroups,
    num_columns: int,
    *,
    transposed: bool = False,
    out: torch.Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Return rows [R, K] times the weight of their expert as [R, N] bf16; rows of no expert are left unwritten.

    Weight: [E, N, K] with scales [E], or ``transposed``, [N, E * K'] with K' >= K, of which what is behind K is zero.
    """
    num_rows, k = rows.data.shape
    if out is None:
        out = torch.empty((num_rows, num_columns), dtype=torch.bfloat16, device=rows.data.device)
    if num_rows == 0:
        return out
    matrix = weight.data if transposed else weight.data.view(-1, k)
    launch = launch or find_launch(rows.data.device)
    grid = num_programs(launch, rows.data.device)
    _rows_kernel[(grid,)](
        describe_rows(rows.data, [launch.block_m, launch.block_k]),
        TensorDescriptor.from_tensor(matrix, [launch.block_n, launch.block_k]),
        describe_rows(out, [launch.block_m, launch.store_n]),
        rows.scales,
        weight.scales,
        groups.tiles(launch.block_m, False),
        num_columns,
        k,
        0 if transposed else num_columns,
        matrix.shape[1] // groups.num_experts if transposed else 0,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP_M=launch.group_m,
        NUM_PROGRAMS=grid,
        STORE_SPLITS=launch.store_splits,
        FLATTEN=launch.flatten,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


def weight_gradient(
    left: Scaled,
    right: Scaled,
    padded: torch.Tensor,
    *,
    buffer: torch.Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Return the sum over each expert's rows of left [M, P] times right [N, P], [E, M, N] bf16, or add to ``buffer``.

    Both as :func:`~moescale.kernels.fp8.quantize_triton.transpose_rows` makes them, with scales [E]; ``padded`` [E]:
    the ends of the experts' columns. A sum in bf16 is rounded again.
    """
    (m, _), n, num_experts = left.data.shape, right.data.shape[0], padded.numel()
    device = left.data.device
    out = torch.empty((num_experts, m, n), dtype=torch.bfloat16, device=device) if buffer is None else buffer
    launch = launch or find_launch(device, gradient=(m, n), wide=out.dtype == torch.float32)
    grid = num_programs(launch, device)
    _weight_gradient_kernel[(grid,)](
        TensorDescriptor.from_tensor(left.data, [launch.block_m, launch.block_k]),
        TensorDescriptor.from_tensor(right.data, [launch.block_n, launch.block_k]),
        TensorDescriptor.from_tensor(out, [1, launch.block_m, launch.store_n]),
        left.scales,
        right.scales,
        padded,
        num_experts,
        m,
        n,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        GROUP_M=launch.group_m,
        NUM_PROGRAMS=grid,
        STORE_SPLITS=launch.store_splits,
        EXPERTS=max(64, triton.next_power_of_2(num_experts)),
        ACCUMULATE=accumulation(buffer),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
