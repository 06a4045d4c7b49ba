"""The order of row tiles: every row of every expert in exactly one tile, and launches that end evenly."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.kernels.experts.row_tiles_triton import (
    first_position,
    group_rows,
    half_tile,
    split_whole_tiles,
    whole_tile,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_M, COLUMNS, PROGRAMS = 16, 3, 4


@triton.jit
def _record_kernel(tiles, out, BLOCK: tl.constexpr, NUM: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr):
    num_whole, num_cut, num_half = split_whole_tiles(tiles, COLS, NUM, HALF)
    entry = out + tl.program_id(0) * 5 * 256
    for position in tl.range(tl.program_id(0), num_whole * COLS, NUM):
        expert, first, size, row, column = whole_tile(tiles, position, num_whole, COLS, 2)
        tl.store(entry, expert)
        tl.store(entry + 1, first + row)
        tl.store(entry + 2, tl.minimum(size - row, BLOCK))
        tl.store(entry + 3, column)
        tl.store(entry + 4, 5)
        entry += 5
    for position in tl.range(first_position(num_whole * COLS, NUM), num_half * COLS, NUM):
        expert, first, size, row, column = half_tile(tiles, position, num_whole, num_cut, COLS, BLOCK // 2)
        tl.store(entry, expert)
        tl.store(entry + 1, first + row)
        tl.store(entry + 2, tl.minimum(size - row, BLOCK // 2))
        tl.store(entry + 3, column)
        tl.store(entry + 4, 3)
        entry += 5


def walk(counts: list[int], half_tiles: bool) -> tuple[list[tuple[int, int, int, int]], list[list[float]]]:
    """Return the walked (expert, row of all rows, rows, column), and the tile costs of every program in its order."""
    ends = torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)
    tiles = group_rows(ends, sum(counts)).tiles(BLOCK_M, half_tiles)
    out = torch.zeros((PROGRAMS, 256, 5), dtype=torch.int32, device=DEVICE)
    _record_kernel[(PROGRAMS,)](tiles, out, BLOCK=BLOCK_M, NUM=PROGRAMS, COLS=COLUMNS, HALF=half_tiles)
    walked = [[tuple(entry) for entry in program if entry[4]] for program in out.tolist()]
    return [entry[:4] for program in walked for entry in program], [[e[4] for e in program] for program in walked]


@pytest.mark.parametrize("half_tiles", [False, True])
@settings(max_examples=12, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=7))
def test_every_row_of_an_expert_is_in_one_tile_per_column(half_tiles, counts):
    walked, _ = walk(counts, half_tiles)
    begins = [sum(counts[:expert]) for expert in range(len(counts))]
    for column in range(COLUMNS):
        covered = sorted((row + i, expert) for expert, row, rows, c in walked if c == column for i in range(rows))
        expected = [(begins[e] + i, e) for e, count in enumerate(counts) for i in range(count)]
        assert covered == expected


def test_a_last_tile_of_few_rows_is_computed_at_half_the_height():
    _, whole_only = walk([2 * BLOCK_M + 1] * 8, half_tiles=False)
    _, with_halves = walk([2 * BLOCK_M + 1] * 8, half_tiles=True)
    assert sum(map(sum, whole_only)) == 5 * 24 * COLUMNS
    assert sum(map(sum, with_halves)) <= (5 * 16 + 3 * 8) * COLUMNS
    assert max(map(sum, with_halves)) < max(map(sum, whole_only))


def test_the_last_round_is_evened_out_by_halves():
    """Three row tiles in three columns are nine tiles for four programs: three rounds, or two and some halves."""
    _, whole_only = walk([3 * BLOCK_M], half_tiles=False)
    _, with_halves = walk([3 * BLOCK_M], half_tiles=True)
    assert max(map(sum, whole_only)) == 15
    assert max(map(sum, with_halves)) == 13
