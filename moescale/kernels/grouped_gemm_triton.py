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
from moescale.kernels.launch import LaunchConfig, find_launch, num_multiprocessors
from moescale.kernels.ragged_triton import describe_rows, load_rows, store_rows


@triton.jit
def _row_tiles_kernel(ends, tiles, num_experts, max_tiles, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """List the row tiles: tiles[0] = (count, ...), tiles[1 + i] = (expert, first row, rows, row of the tile)."""
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    start = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    num_tiles = tl.where(inside, tl.cdiv(end - start, BLOCK_M), 0)
    last = tl.cumsum(num_tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(tiles, tl.sum(num_tiles, 0))
    index = tl.program_id(0) * 32 + tl.arange(0, 32)
    owner = tl.sum((last[None, :] <= index[:, None]).to(tl.int32), 1)
    valid = (owner < num_experts) & (index < max_tiles)
    first = tl.load(ends + owner - 1, mask=valid & (owner > 0), other=0)
    rows = tl.load(ends + owner, mask=valid, other=0) - first
    previous = tl.sum(tl.where(expert[None, :] < owner[:, None], num_tiles[None, :], 0), 1)
    entry = tiles + 4 * (index + 1)
    tl.store(entry, owner, mask=valid)
    tl.store(entry + 1, first, mask=valid)
    tl.store(entry + 2, rows, mask=valid)
    tl.store(entry + 3, (index - previous) * BLOCK_M, mask=valid)


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


@triton.jit
def row_tile(tiles, tile, num_row_tiles, num_column_tiles, GROUP_M: tl.constexpr):
    """Return (expert, first row, rows, row of the tile, column tile) of a position in the tile order.

    GROUP_M row tiles are walked together, column by column, so that the programs at work share operands in L2.
    """
    group = tile // (GROUP_M * num_column_tiles)
    group_rows = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * num_column_tiles)
    entry = tiles + 4 * (1 + group * GROUP_M + within % group_rows)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), within // group_rows


@triton.jit
def _rows_kernel(
    rows,
    weight,
    out,
    tiles,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    STORE_SPLITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[r, n] = sum_k rows[r, k] * weight[e][n, k]; TRANSPOSED: weight[e][k, n]."""
    num_row_tiles = tl.load(tiles)
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    total = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), total, NUM_PROGRAMS, flatten=FLATTEN):
        expert, first, size, row, column = row_tile(tiles, tile, num_row_tiles, num_column_tiles, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            a = load_rows(rows, first, size, row, k * BLOCK_K)
            if TRANSPOSED:
                b = tl.reshape(weight.load([expert, k * BLOCK_K, column * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                b = tl.reshape(weight.load([expert, column * BLOCK_N, k * BLOCK_K]), (BLOCK_N, BLOCK_K)).T
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        parts = split_tile(acc, STORE_SPLITS)
        for i in tl.static_range(STORE_SPLITS):
            store_rows(out, first, size, row, column * BLOCK_N + i * (BLOCK_N // STORE_SPLITS), parts[i])


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
    for _ in tl.range(0, _count_steps(ends, num_experts, num_m * num_n, NUM_PROGRAMS, BLOCK_K, EXPERTS)):
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
                _store_gradient(out, expert, m, n + i * (BLOCK_N // STORE_SPLITS), parts[i], ACCUMULATE)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def _count_steps(
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
def _store_gradient(out, expert, m, n, tile, ACCUMULATE: tl.constexpr):
    block = tl.reshape(tile.to(out.dtype), (1, tile.shape[0], tile.shape[1]))
    if ACCUMULATE == "reduce":
        # The addition happens on the way to memory. One program owns the tile, so it is deterministic.
        out.atomic_add([expert, m, n], block)
    elif ACCUMULATE == "load":
        out.store([expert, m, n], (out.load([expert, m, n]).to(tl.float32) + block).to(out.dtype))
    else:
        out.store([expert, m, n], block)


@triton.jit(do_not_specialize=["num_rows"])
def _zero_tail_kernel(out, ends, num_experts, num_rows, columns, BLOCK: tl.constexpr):
    """Zero the rows of ``out`` that belong to no expert: those from ends[-1] on."""
    begin = tl.load(ends + num_experts - 1).to(tl.int64) * columns
    end = num_rows.to(tl.int64) * columns
    for offset in tl.range(begin + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(out + index, tl.zeros((BLOCK,), out.dtype.element_ty), mask=index < end)


def matrix_precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied exactly, not rounded to tf32; other dtypes have one precision only."""
    return "ieee" if dtype == torch.float32 else "tf32"


def row_tiles(ends: torch.Tensor, num_rows: int, block_m: int) -> torch.Tensor:
    """Return the table of row tiles [1 + tiles, 4] int32 that the row kernels walk; see ``_row_tiles_kernel``."""
    num_experts = ends.numel()
    max_tiles = num_rows // block_m + num_experts
    tiles = torch.empty((max_tiles + 1, 4), dtype=torch.int32, device=ends.device)
    _row_tiles_kernel[(triton.cdiv(max_tiles, 32),)](
        ends, tiles, num_experts, max_tiles, BLOCK_M=block_m, EXPERTS=max(64, triton.next_power_of_2(num_experts))
    )
    return tiles


def num_programs(launch: LaunchConfig, device: torch.device) -> int:
    """Return the grid size of a persistent kernel."""
    return launch.programs_per_sm * num_multiprocessors(device)


def multiply_rows(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    *,
    transposed: bool = False,
    kernel: str = "down",
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Return rows [R, K] times weight [E, N, K] of their expert (``transposed``: [E, K, N]) as [R, N].

    Rows from ``ends[-1]`` on are left unwritten. ``kernel`` names the entry of the launch table.
    """
    num_rows, k = rows.shape
    num_experts = weight.shape[0]
    n = weight.shape[2] if transposed else weight.shape[1]
    out = rows.new_empty((num_rows, n))
    if num_rows == 0:
        return out
    launch = launch or find_launch(kernel, rows.device, rows.dtype, num_rows, num_experts, n, k)
    block_m, block_n, block_k = launch.block_m, launch.block_n, launch.block_k
    grid = num_programs(launch, rows.device)
    _rows_kernel[(grid,)](
        describe_rows(rows, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight, [1, block_k, block_n] if transposed else [1, block_n, block_k]),
        describe_rows(out, [block_m, launch.store_n]),
        row_tiles(ends, num_rows, block_m),
        n,
        k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=launch.group_m,
        NUM_PROGRAMS=grid,
        STORE_SPLITS=launch.store_splits,
        TRANSPOSED=transposed,
        FLATTEN=launch.flatten,
        PRECISION=matrix_precision(rows.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    *,
    buffer: torch.Tensor | None = None,
    kernel: str = "down_wgrad",
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Return left[rows of e].T @ right[rows of e] for every expert, [E, M, N], or add it to ``buffer`` in place.

    Shapes: left [R, M], right [R, N]. The sum runs in fp32; the result is rounded once, also when it is added to a
    buffer in bf16.
    """
    num_rows, m = left.shape
    n = right.shape[1]
    num_experts = ends.numel()
    out = left.new_empty((num_experts, m, n)) if buffer is None else buffer
    if num_rows == 0:
        return out if buffer is not None else out.zero_()
    launch = launch or find_launch(kernel, left.device, left.dtype, num_rows, num_experts, m, n)
    if out.dtype.itemsize > left.dtype.itemsize:
        launch = dataclasses.replace(launch, store_splits=4)  # the same shared memory for wider elements
    block_m, block_n, block_k = launch.block_m, launch.block_n, launch.block_k
    grid = num_programs(launch, left.device)
    _weight_gradient_kernel[(grid,)](
        describe_rows(left, [block_k, block_m]),
        describe_rows(right, [block_k, block_n]),
        TensorDescriptor.from_tensor(out, [1, block_m, launch.store_n]),
        ends,
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
        ACCUMULATE=_accumulation(buffer),
        PRECISION=matrix_precision(left.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


def _accumulation(buffer: torch.Tensor | None) -> str:
    """How the kernel adds to ``buffer``; the interpreter knows no reducing store."""
    if buffer is None:
        return "none"
    return "load" if triton_interpreted() else "reduce"


def zero_tail(out: torch.Tensor, ends: torch.Tensor) -> None:
    """Zero the rows of ``out`` [R, N] that belong to no expert, in place."""
    num_rows, columns = out.shape
    if num_rows == 0:
        return
    grid = (2 * num_multiprocessors(out.device),)
    _zero_tail_kernel[grid](out, ends, ends.numel(), num_rows, columns, BLOCK=2048)
