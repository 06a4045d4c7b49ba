"""Triton kernels that sort (token, expert) pairs by expert: a stable counting sort in three small launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _count_kernel(ids, counts, num_pairs, num_experts, num_blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[e, b]: the pairs of block b that chose expert e; the last bin e = num_experts takes invalid ids."""
    block = tl.program_id(0)
    one_hot = _one_hot(ids, block, num_pairs, num_experts, BLOCK, EXPERTS)
    expert = tl.arange(0, EXPERTS)
    tl.store(counts + expert * num_blocks + block, tl.sum(one_hot, 0), mask=expert <= num_experts)


@triton.jit
def _scan_kernel(counts, totals, num_blocks, CHUNK: tl.constexpr):
    """Replace counts[e] by its exclusive prefix sum over blocks, for the expert of this program."""
    expert = tl.program_id(0)
    before = tl.zeros((), tl.int32)
    for begin in tl.range(0, num_blocks, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        inside = block < num_blocks
        count = tl.load(counts + expert * num_blocks + block, mask=inside, other=0)
        tl.store(counts + expert * num_blocks + block, before + tl.cumsum(count, 0) - count, mask=inside)
        before += tl.sum(count, 0)
    tl.store(totals + expert, before)


@triton.jit
def _place_kernel(
    ids,
    counts,
    totals,
    row_pair,
    pair_row,
    ends,
    num_pairs,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Write each pair's sorted row and each row's pair; the first program also writes the experts' ends."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    total = tl.load(totals + expert, mask=expert <= num_experts, other=0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends + expert, end, mask=expert < num_experts)
    before = tl.load(counts + expert * num_blocks + block, mask=expert <= num_experts, other=0)
    one_hot = _one_hot(ids, block, num_pairs, num_experts, BLOCK, EXPERTS)
    rank = tl.cumsum(one_hot, 0) - one_hot
    row = tl.sum(one_hot * (rank + (end - total + before)[None, :]), 1)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    chosen = tl.load(ids + pair, mask=inside, other=0)
    valid = (chosen >= 0) & (chosen < num_experts)
    tl.store(pair_row + pair, tl.where(valid, row, -1), mask=inside)
    tl.store(row_pair + row, pair, mask=inside)


@triton.jit
def _one_hot(ids, block, num_pairs, num_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    pair = block * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    chosen = tl.load(ids + pair, mask=inside, other=0)
    chosen = tl.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    return ((tl.arange(0, EXPERTS)[None, :] == chosen[:, None]) & inside[:, None]).to(tl.int32)


def sort_pairs(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row_pair [R], pair_row [R], ends [E]), all int32, as ``experts.sort.sort_pairs`` documents."""
    ids = topk_ids.contiguous().view(-1)
    num_pairs = ids.numel()
    experts_block = triton.next_power_of_2(num_experts + 1)
    block = max(16, min(256, 16384 // experts_block))
    num_blocks = triton.cdiv(num_pairs, block)
    counts = ids.new_empty((num_experts + 1, num_blocks), dtype=torch.int32)
    totals = ids.new_empty(num_experts + 1, dtype=torch.int32)
    row_pair = ids.new_empty(num_pairs, dtype=torch.int32)
    pair_row = ids.new_empty(num_pairs, dtype=torch.int32)
    ends = ids.new_zeros(num_experts, dtype=torch.int32)
    if num_pairs == 0:
        return row_pair, pair_row, ends
    shape = (num_pairs, num_experts, num_blocks)
    _count_kernel[(num_blocks,)](ids, counts, *shape, BLOCK=block, EXPERTS=experts_block)
    _scan_kernel[(num_experts + 1,)](counts, totals, num_blocks, CHUNK=1024)
    _place_kernel[(num_blocks,)](
        ids, counts, totals, row_pair, pair_row, ends, *shape, BLOCK=block, EXPERTS=experts_block
    )
    return row_pair, pair_row, ends
