"""How the rows of each expert are cut into tiles, and in which order the programs of a kernel walk them.

An expert's last tile is rarely full: with tiles of 128 rows and 384 rows an expert, a seventh of the work would be on
rows that do not exist. So a last tile with at most half the rows is listed as a *half* tile, which a second loop of the
kernels computes with half the height. The same loop evens out the end of a launch: where the whole tiles do not fill
the last round of programs, some of them are cut into two halves (``split_whole_tiles``).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from moescale.kernels.rows import num_programs

# Time of a half tile over that of a whole one, in fifths: it loads the same columns of the weight for half the rows.
WHOLE_COST = tl.constexpr(5)
HALF_COST = tl.constexpr(3)
MAX_SPLITS = tl.constexpr(32)


@triton.jit
def _row_tiles_kernel(
    ends, tiles, num_experts, max_tiles, BLOCK_M: tl.constexpr, HALF_TILES: tl.constexpr, EXPERTS: tl.constexpr
):
    """Write tiles[0] = (whole tiles, half tiles, first row of no expert) and tiles[1 + i], the whole tiles first.

    An entry is (expert, first row of the expert, rows of the expert, row of the tile).
    """
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    end = tl.load(ends + expert, mask=inside, other=0)
    size = end - tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    size = tl.where(inside, size, 0)
    rest = size % BLOCK_M
    ends_in_half = (HALF_TILES & (rest > 0) & (rest <= BLOCK_M // 2)).to(tl.int32)
    whole = tl.cdiv(size, BLOCK_M) - ends_in_half
    last_whole = tl.cumsum(whole, 0)
    last_half = tl.cumsum(ends_in_half, 0)
    num_whole = tl.sum(whole, 0)
    if tl.program_id(0) == 0:
        tl.store(tiles, num_whole)
        tl.store(tiles + 1, tl.sum(ends_in_half, 0))
        tl.store(tiles + 2, tl.load(ends + num_experts - 1))
    index = tl.program_id(0) * 32 + tl.arange(0, 32)
    is_half = index >= num_whole
    whole_owner = tl.sum((last_whole[None, :] <= index[:, None]).to(tl.int32), 1)
    half_owner = tl.sum((last_half[None, :] <= (index - num_whole)[:, None]).to(tl.int32), 1)
    owner = tl.where(is_half, half_owner, whole_owner)
    valid = (owner < num_experts) & (index < max_tiles)
    first = tl.load(ends + owner - 1, mask=valid & (owner > 0), other=0)
    rows = tl.load(ends + owner, mask=valid, other=0) - first
    previous = tl.sum(tl.where(expert[None, :] < owner[:, None], whole[None, :], 0), 1)
    row = tl.where(is_half, rows // BLOCK_M, index - previous) * BLOCK_M
    entry = tiles + 4 * (index + 1)
    tl.store(entry, owner, mask=valid)
    tl.store(entry + 1, first, mask=valid)
    tl.store(entry + 2, rows, mask=valid)
    tl.store(entry + 3, row, mask=valid)


@triton.jit
def split_whole_tiles(tiles, num_columns, NUM_PROGRAMS: tl.constexpr, HALF_TILES: tl.constexpr):
    """Return (whole tiles to walk, half tiles cut from the others, half tiles in all): rows, not yet times columns.

    Positions go to the programs in turn, the whole tiles first. Of the last whole tiles, as many are cut into halves
    as make the busiest program finish first.
    """
    num_whole = tl.load(tiles)
    if not HALF_TILES:
        return num_whole, 0, 0
    num_half = tl.load(tiles + 1)
    splits = tl.arange(0, MAX_SPLITS)
    whole = tl.maximum(num_whole - splits, 0) * num_columns
    half = (num_half + 2 * splits) * num_columns
    rounds, late = whole // NUM_PROGRAMS, whole % NUM_PROGRAMS
    half_rounds, rest = half // NUM_PROGRAMS, half % NUM_PROGRAMS
    # Programs below ``late`` walk one whole tile more; half tiles go first to those from ``late`` on.
    busier = (rounds + 1) * WHOLE_COST + (half_rounds + (rest > NUM_PROGRAMS - late).to(tl.int32)) * HALF_COST
    others = rounds * WHOLE_COST + (half_rounds + (rest > 0).to(tl.int32)) * HALF_COST
    finish = tl.maximum(others, tl.where(late > 0, busier, 0))
    finish = tl.where(splits <= num_whole, finish, 2**30)
    best = tl.argmin(finish, 0)
    return num_whole - best, 2 * best, num_half + 2 * best


@triton.jit
def first_position(num_whole_positions, NUM_PROGRAMS: tl.constexpr):
    """Return the first half-tile position of this program, where half tiles follow the whole ones in turn."""
    late = num_whole_positions % NUM_PROGRAMS
    return (tl.program_id(0) + NUM_PROGRAMS - late) % NUM_PROGRAMS


@triton.jit
def whole_tile(tiles, position, num_whole, num_columns, GROUP_M: tl.constexpr):
    """Return (expert, first row, rows, row of the tile, column tile) of a position among the whole tiles.

    GROUP_M row tiles are walked together, column by column, so that the programs at work share operands in L2.
    """
    group = position // (GROUP_M * num_columns)
    group_rows = tl.minimum(num_whole - group * GROUP_M, GROUP_M)
    within = position % (GROUP_M * num_columns)
    entry = tiles + 4 * (1 + group * GROUP_M + within % group_rows)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), within // group_rows


@triton.jit
def half_tile(tiles, position, num_whole, num_cut, num_columns, HALF_M: tl.constexpr):
    """The same for a position among the half tiles: the ``num_cut`` cut from whole tiles, then the experts' ends."""
    index = position // num_columns
    is_cut = index < num_cut
    entry = tiles + 4 * (1 + num_whole + tl.where(is_cut, index // 2, index - num_cut // 2))
    row = tl.load(entry + 3) + tl.where(is_cut, index % 2, 0) * HALF_M
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), row, position % num_columns


@triton.jit
def zero_rows_of_no_expert(tiles, out, num_rows, columns, NUM_PROGRAMS: tl.constexpr):
    """Zero the rows of ``out`` [R, columns] behind those of the last expert."""
    begin = tl.load(tiles + 2).to(tl.int64) * columns
    end = num_rows.to(tl.int64) * columns
    for offset in tl.range(begin + tl.program_id(0) * 1024, end, NUM_PROGRAMS * 1024):
        index = offset + tl.arange(0, 1024)
        tl.store(out + index, tl.zeros((1024,), out.dtype.element_ty), mask=index < end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowGroups:
    """The rows of each expert: ``ends`` [E] int32, cumulative, in ``num_rows`` rows; with tables of their tiles.

    The products of one pass share a table, so that it is made once.
    """

    ends: torch.Tensor
    num_rows: int
    expected_rows: int
    """Of ``num_rows``, how many to choose launch parameters for."""
    _tables: dict[tuple[int, bool], torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """Number of experts, empty ones included."""
        return self.ends.numel()

    def tiles(self, block_m: int, half_tiles: bool) -> torch.Tensor:
        """Return the table of row tiles [1 + tiles, 4] int32; see ``_row_tiles_kernel``."""
        key = (block_m, half_tiles)
        if key not in self._tables:
            max_tiles = self.num_rows // block_m + self.num_experts
            table = torch.empty((max_tiles + 1, 4), dtype=torch.int32, device=self.ends.device)
            _row_tiles_kernel[(triton.cdiv(max_tiles, 32),)](
                self.ends,
                table,
                self.num_experts,
                max_tiles,
                BLOCK_M=block_m,
                HALF_TILES=half_tiles,
                EXPERTS=max(64, triton.next_power_of_2(self.num_experts)),
            )
            self._tables[key] = table
        return self._tables[key]


def group_rows(ends: torch.Tensor, num_rows: int, expected_rows: int | None = None) -> RowGroups:
    """Return the groups of ``num_rows`` rows sorted by expert, with cumulative counts ``ends``.

    ``expected_rows``: of a buffer for the worst routing, the rows that launch parameters are chosen for.
    """
    return RowGroups(ends=ends, num_rows=num_rows, expected_rows=expected_rows or num_rows)


def programs_of_rows(groups: RowGroups) -> tuple[int, bool]:
    """Return how many programs a kernel has that takes a row at a time, and whether they walk the rows.

    One for each row; but none for the end of a buffer for the worst routing: an empty one takes half a nanosecond.
    """
    if groups.num_rows <= groups.expected_rows:
        return groups.num_rows, False
    return min(groups.num_rows, num_programs(groups.ends.device, per_multiprocessor=16)), True
