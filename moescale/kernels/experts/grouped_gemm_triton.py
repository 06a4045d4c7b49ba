"""Triton kernels of the grouped GEMM: products of ragged rows with one weight per expert, and their weight gradients.

The kernels are persistent: about one program per multiprocessor walks the output tiles. Operands come through tensor
descriptors (the bulk copy engine from Hopper on, plain loads before). Rows of an expert are addressed through *ragged*
descriptors, which clip each access to the rows of one expert: loads beyond them give zeros and stores beyond them are
dropped, so the main loops carry no masks and an expert's rows need no padding.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moescale.kernels.backends import triton_interpreted
from moescale.kernels.experts.launch_config import (
    RANK_BLOCK,
    LaunchConfig,
    find_launch,
    num_multiprocessors,
    with_bias,
    with_low_rank,
)
from moescale.kernels.experts.ragged_triton import describe_rows, load_rows, store_rows
from moescale.kernels.experts.row_tiles_triton import (
    RowGroups,
    first_position,
    half_tile,
    split_whole_tiles,
    whole_tile,
    zero_rows_of_no_expert,
)


@triton.jit
def split_columns(tile):
    """Return the left and the right half of the columns of ``tile``."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def split_tile(tile, PARTS: tl.constexpr):
    """Return ``tile`` as a tuple of PARTS (1, 2 or 4) tiles of equal width, from left to right."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return split_columns(tile)
    else:
        left, right = split_columns(tile)
        return split_columns(left) + split_columns(right)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    rows,
    half_rows,
    weight,
    out,
    half_out,
    out_pointer,
    tiles,
    num_rows,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    STORE_SPLITS: tl.constexpr,
    HALF_TILES: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    projected,
    half_projected,
    factor,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    bias,
):
    """out[r, n] = sum_k rows[r, k] * weight[e][n, k]; TRANSPOSED: weight[e][k, n].

    With RANK, plus the same of ``projected`` [R, RANK] and ``factor``; with ``bias``, plus bias[e, n].
    ``half_rows``, ``half_out`` and ``half_projected`` describe the same tensors in blocks of half the height.
    """
    # A half tile stored in half the parts takes the same shared memory, and its parts stay within the warps.
    HALF_STORE_SPLITS: tl.constexpr = (STORE_SPLITS + 1) // 2
    num_columns = tl.cdiv(N, BLOCK_N)
    num_whole, num_cut, num_half = split_whole_tiles(tiles, num_columns, NUM_PROGRAMS, HALF_TILES)
    for position in tl.range(tl.program_id(0), num_whole * num_columns, NUM_PROGRAMS, flatten=FLATTEN):
        expert, first, size, row, column = whole_tile(tiles, position, num_whole, num_columns, GROUP_M)
        column = column * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            a = load_rows(rows, first, size, row, k * BLOCK_K)
            b = _load_weight(weight, expert, column, k * BLOCK_K, BLOCK_N, BLOCK_K, TRANSPOSED)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        for k in tl.static_range(0, RANK, RANK_BLOCK):
            a = load_rows(projected, first, size, row, k)
            b = _load_weight(factor, expert, column, k, BLOCK_N, RANK_BLOCK, TRANSPOSED)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if bias is not None:
            acc += load_bias(bias + expert * N, column, N, BLOCK_N)
        _store_product(out, first, size, row, column, acc, STORE_SPLITS)
    if HALF_TILES:
        begin = first_position(num_whole * num_columns, NUM_PROGRAMS)
        for position in tl.range(begin, num_half * num_columns, NUM_PROGRAMS, flatten=FLATTEN):
            expert, first, size, row, column = half_tile(tiles, position, num_whole, num_cut, num_columns, BLOCK_M // 2)
            column = column * BLOCK_N
            acc = tl.zeros((BLOCK_M // 2, BLOCK_N), tl.float32)
            for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
                a = load_rows(half_rows, first, size, row, k * BLOCK_K)
                b = _load_weight(weight, expert, column, k * BLOCK_K, BLOCK_N, BLOCK_K, TRANSPOSED)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            for k in tl.static_range(0, RANK, RANK_BLOCK):
                a = load_rows(half_projected, first, size, row, k)
                b = _load_weight(factor, expert, column, k, BLOCK_N, RANK_BLOCK, TRANSPOSED)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            if bias is not None:
                acc += load_bias(bias + expert * N, column, N, BLOCK_N)
            _store_product(half_out, first, size, row, column, acc, HALF_STORE_SPLITS)
    if ZERO_TAIL:
        zero_rows_of_no_expert(tiles, out_pointer, num_rows, N, NUM_PROGRAMS)


@triton.jit
def _load_weight(weight, expert, column, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Load the block [BLOCK_K, BLOCK_N] of an expert's weight, stored [K, N] if TRANSPOSED, else [N, K]."""
    if TRANSPOSED:
        return tl.reshape(weight.load([expert, k, column]), (BLOCK_K, BLOCK_N))
    else:
        return tl.reshape(weight.load([expert, column, k]), (BLOCK_N, BLOCK_K)).T


@triton.jit
def load_bias(bias, column, num_columns, BLOCK: tl.constexpr):
    """Load BLOCK values from ``column`` on in fp32, as a row to add to a tile; those from ``num_columns`` on are 0."""
    columns = column + tl.arange(0, BLOCK)
    return tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_product(out, first, size, row, column, acc, STORE_SPLITS: tl.constexpr):
    parts = split_tile(acc, STORE_SPLITS)
    for i in tl.static_range(STORE_SPLITS):
        store_rows(out, first, size, row, column + i * (acc.shape[1] // STORE_SPLITS), parts[i])


@triton.jit
def _weight_gradient_kernel(
    left,
    right,
    out,
    ends,
    num_experts,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    STORE_SPLITS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e][m, n] (+)= sum over the rows r of expert e of left[r, m] * right[r, n]."""
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) - NUM_PROGRAMS
    step, num_steps = 0, 1
    expert, first, size, m, n = 0, 0, 0, 0, 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over all steps of all tiles, so that the loads of the next tile are in flight while a tile is stored.
    # (Triton flattens nested loops itself only where the inner length does not depend on the outer iteration.)
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
            size = tl.load(ends + expert) - first
            num_steps = tl.maximum(tl.cdiv(size, BLOCK_K), 1)
        a = load_rows(left, first, size, step * BLOCK_K, m)
        b = load_rows(right, first, size, step * BLOCK_K, n)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        step += 1
        if step == num_steps:
            step = 0
            parts = split_tile(acc, STORE_SPLITS)
            for i in tl.static_range(STORE_SPLITS):
                store_gradient(out, expert, m, n + i * (BLOCK_N // STORE_SPLITS), parts[i], ACCUMULATE)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def count_steps(
    ends, num_experts, tiles_per_expert, NUM_PROGRAMS: tl.constexpr, BLOCK_K: tl.constexpr, EXPERTS: tl.constexpr
):
    """Return the pipeline steps of this program: over its tiles, the row blocks of the expert (at least one)."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    size = end - tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    # Tiles t of this program, t = program_id (mod NUM_PROGRAMS), below the first tile of expert e and of e + 1.
    below = expert * tiles_per_expert + NUM_PROGRAMS - 1 - tl.program_id(0)
    tiles = (below + tiles_per_expert) // NUM_PROGRAMS - below // NUM_PROGRAMS
    return tl.sum(tl.where(inside, tiles * tl.maximum(tl.cdiv(size, BLOCK_K), 1), 0), 0)


@triton.jit
def store_gradient(out, expert, m, n, tile, ACCUMULATE: tl.constexpr):
    block = tl.reshape(tile.to(out.dtype), (1, tile.shape[0], tile.shape[1]))
    if ACCUMULATE == "reduce":
        # The addition happens on the way to memory. One program owns the tile, so it is deterministic.
        out.atomic_add([expert, m, n], block)
    elif ACCUMULATE == "load":
        out.store([expert, m, n], (out.load([expert, m, n]).to(tl.float32) + block).to(out.dtype))
    else:
        out.store([expert, m, n], block)


def matrix_precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied exactly, not rounded to tf32; other dtypes have one precision only."""
    return "ieee" if dtype == torch.float32 else "tf32"


def num_programs(launch: LaunchConfig, device: torch.device) -> int:
    """Return the grid size of a persistent kernel."""
    return launch.programs_per_sm * num_multiprocessors(device)


def multiply_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    groups: RowGroups,
    *,
    transposed: bool = False,
    zero_tail: bool = False,
    kernel: str = "down",
    out: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Return rows [R, K] times weight [E, N, K] of their expert (``transposed``: [E, K, N]) as [R, N].

    Rows that belong to no expert are left unwritten, or zeroed with ``zero_tail``. ``kernel`` names the entry of the
    launch table. ``out``: where to write the result. ``low_rank``: further rows [R, r] and their factor [E, N, r]
    (``transposed``: [E, r, N]), whose GEMM is added before the sum is rounded. ``bias`` [E, N]: is added likewise.
    """
    num_rows, k = rows.shape
    num_experts = weight.shape[0]
    n = weight.shape[2] if transposed else weight.shape[1]
    out = rows.new_empty((num_rows, n)) if out is None else out
    if num_rows == 0:
        return out
    launch = launch or find_launch(kernel, rows.device, rows.dtype, groups.expected_rows, num_experts, n, k)
    rank, rank_block = 0, RANK_BLOCK
    if low_rank is not None:
        rank = low_rank[0].shape[1]
        launch, rank_block = with_low_rank(launch, rows.device, rank)
    if bias is not None:
        launch = with_bias(launch, rows.device)
    block_m, block_n, block_k = launch.block_m, launch.block_n, launch.block_k
    grid = num_programs(launch, rows.device)
    projected, factor = (rows, weight) if low_rank is None else low_rank
    _rows_kernel[(grid,)](
        describe_rows(rows, [block_m, block_k]),
        describe_rows(rows, [block_m // 2, block_k]),
        TensorDescriptor.from_tensor(weight, [1, block_k, block_n] if transposed else [1, block_n, block_k]),
        describe_rows(out, [block_m, launch.store_n]),
        describe_rows(out, [block_m // 2, block_n // ((launch.store_splits + 1) // 2)]),
        out,
        groups.tiles(block_m, launch.half_tiles),
        num_rows,
        n,
        k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=launch.group_m,
        NUM_PROGRAMS=grid,
        STORE_SPLITS=launch.store_splits,
        HALF_TILES=launch.half_tiles,
        ZERO_TAIL=zero_tail,
        TRANSPOSED=transposed,
        FLATTEN=launch.flatten,
        PRECISION=matrix_precision(rows.dtype),
        projected=describe_rows(projected, [block_m, rank_block]),
        half_projected=describe_rows(projected, [block_m // 2, rank_block]),
        factor=TensorDescriptor.from_tensor(
            factor, [1, rank_block, block_n] if transposed else [1, block_n, rank_block]
        ),
        RANK=rank,
        RANK_BLOCK=rank_block,
        bias=bias,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    groups: RowGroups,
    *,
    buffer: torch.Tensor | None = None,
    kernel: str = "down_wgrad",
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Return left[rows of e].T @ right[rows of e] for every expert, [E, M, N], or add it to ``buffer`` in place.

    Shapes: left [R, M], right [R, N]. The sum runs in fp32 and is rounded to the dtype of what it is stored in or
    added to; a sum in bf16 is rounded again.
    """
    num_rows, m = left.shape
    n = right.shape[1]
    num_experts = groups.num_experts
    out = left.new_empty((num_experts, m, n)) if buffer is None else buffer
    if num_rows == 0:
        return out if buffer is not None else out.zero_()
    launch = launch or find_launch(kernel, left.device, left.dtype, groups.expected_rows, num_experts, m, n)
    if out.dtype.itemsize > left.dtype.itemsize:
        launch = dataclasses.replace(launch, store_splits=4)  # the same shared memory for wider elements
    block_m, block_n, block_k = launch.block_m, launch.block_n, launch.block_k
    grid = num_programs(launch, left.device)
    _weight_gradient_kernel[(grid,)](
        describe_rows(left, [block_k, block_m]),
        describe_rows(right, [block_k, block_n]),
        TensorDescriptor.from_tensor(out, [1, block_m, launch.store_n]),
        groups.ends,
        num_experts,
        m,
        n,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=launch.group_m,
        NUM_PROGRAMS=grid,
        STORE_SPLITS=launch.store_splits,
        EXPERTS=max(64, triton.next_power_of_2(num_experts)),
        ACCUMULATE=accumulation(buffer),
        PRECISION=matrix_precision(left.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


def accumulation(buffer: torch.Tensor | None) -> str:
    """How the kernel adds to ``buffer``; the interpreter knows no reducing store."""
    if buffer is None:
        return "none"
    return "load" if triton_interpreted() else "reduce"
