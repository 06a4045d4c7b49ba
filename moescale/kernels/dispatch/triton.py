"""Triton kernels of the exchange: who sends what where, and reading peers' rows into the order of the GEMMs.

A rank's rows are ordered by local expert, then by the rank they come from, then as that rank sorted its pairs. Every
rank works that out by itself from the counts that all publish, so a pair's row is known on both sides without a
message. Addresses of peers are read from tables on the device; which of them is this rank's own makes no difference.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from moescale.kernels.dispatch.buffers import ExchangeBuffers, PeerTensor
from moescale.kernels.fp8.scaled import Scaled

PAIRS_BLOCK = 256


@triton.jit
def _publish_kernel(
    ids,
    pair_rows,
    weights,
    ends,
    out_ids,
    out_pair_rows,
    out_weights,
    out_ends,
    num_pairs,
    max_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Copy a rank's pairs to where peers read them; pairs that it does not have go nowhere."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    exists = pair < max_pairs
    expert = tl.load(ids + pair, mask=inside, other=-1).to(tl.int32)
    row = tl.load(pair_rows + pair, mask=inside, other=-1)
    tl.store(out_ids + pair, tl.where(row >= 0, expert, -1), mask=exists)
    tl.store(out_pair_rows + pair, row, mask=exists)
    tl.store(out_weights + pair, tl.load(weights + pair, mask=inside, other=0.0), mask=exists)
    if tl.program_id(0) == 0:
        number = tl.arange(0, EXPERTS)
        tl.store(out_ends + number, tl.load(ends + number, mask=number < num_experts), mask=number < num_experts)


@triton.jit
def _shifts_kernel(
    ends_addresses,
    shifts,
    ends,
    kept_ends,
    further_ends,
    rank,
    kept_rows,
    num_experts,
    num_local,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """shifts[s, e]: a pair of rank s and expert e lies in the row (its row at s) + shifts[s, e] of e's owner.

    Also writes the cumulative rows of this rank's experts: all, those among the first ``kept_rows``, and the others.
    """
    expert = tl.arange(0, EXPERTS)
    inside = expert < num_experts
    total = tl.zeros((EXPERTS,), tl.int32)
    for source in tl.static_range(RANKS):
        start, end = _bounds(ends_addresses, source, expert, inside)
        total += end - start
    # Rows of the experts before e, of the same owner only.
    first_of_owner = (expert // num_local) * num_local
    earlier = (expert[None, :] >= first_of_owner[:, None]) & (expert[None, :] < expert[:, None])
    before = tl.sum(tl.where(earlier, total[None, :], 0), 1)

    place = before
    for source in tl.static_range(RANKS):
        start, end = _bounds(ends_addresses, source, expert, inside)
        tl.store(shifts + source * num_experts + expert, place - start, mask=inside)
        place += end - start

    local = expert - rank * num_local
    mine = (local >= 0) & (local < num_local)
    tl.store(ends + local, place, mask=mine)
    tl.store(kept_ends + local, tl.minimum(place, kept_rows), mask=mine)
    tl.store(further_ends + local, tl.maximum(place - kept_rows, 0), mask=mine)


@triton.jit
def _bounds(ends_addresses, source, expert, inside):
    """First and last sorted row, exclusive, of every expert at rank ``source``."""
    peer = _peer(ends_addresses, source, tl.int32)
    end = tl.load(peer + expert, mask=inside, other=0)
    start = tl.load(peer + expert - 1, mask=inside & (expert > 0), other=0)
    return start, end


@triton.jit
def _peer(addresses, rank, dtype: tl.constexpr):
    """A pointer to what rank ``rank`` has; its blocks are aligned, which loads of 16 bytes need to know."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _rows_kernel(
    ids_addresses,
    pair_rows_addresses,
    weights_addresses,
    shifts,
    pair_row,
    row_weights,
    slots,
    rank,
    num_pairs,
    num_experts,
    num_local,
    max_rows,
    BLOCK: tl.constexpr,
):
    """pair_row[s, p]: this rank's row of pair p of rank s, or -1. slots[p]: owner * max_rows + row of its own pairs."""
    source = tl.program_id(1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    expert = tl.load(_peer(ids_addresses, source, tl.int32) + pair, mask=inside, other=-1)
    valid = (expert >= 0) & (expert < num_experts)
    row = tl.load(_peer(pair_rows_addresses, source, tl.int32) + pair, mask=valid, other=0)
    row += tl.load(shifts + source * num_experts + expert, mask=valid, other=0)
    owner = expert // num_local
    mine = valid & (owner == rank)
    tl.store(pair_row + source * num_pairs + pair, tl.where(mine, row, -1), mask=inside)
    weight = tl.load(_peer(weights_addresses, source, tl.float32) + pair, mask=mine, other=0.0)
    tl.store(row_weights + row, weight, mask=mine)
    if source == rank:
        tl.store(slots + pair, tl.where(valid, owner * max_rows + row, -1), mask=inside)


@triton.jit
def _pull_kernel(
    addresses, scale_addresses, pair_row, rows, row_scales, num_tokens, H,
    RANKS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """rows[row of (t, k) of rank s] = tokens of s [t]: a token is read once over the link and written to its rows."""
    source = tl.program_id(0) % RANKS
    token = (tl.program_id(0) // RANKS).to(tl.int64)
    pairs = pair_row + (source * num_tokens + token) * TOP_K
    last = -1
    for k in tl.static_range(TOP_K):
        last = tl.maximum(last, tl.load(pairs + k))
    if last < 0:
        return
    tokens = _peer(addresses, source, rows.dtype.element_ty)
    for begin in tl.range(0, H, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        part = tl.load(tokens + token * H + column, mask=column < H)
        for k in tl.static_range(TOP_K):
            row = tl.load(pairs + k).to(tl.int64)
            tl.store(rows + row * H + column, part, mask=(column < H) & (row >= 0))
    if HAS_SCALES:
        scale = tl.load(_peer(scale_addresses, source, tl.float32) + token)
        for k in tl.static_range(TOP_K):
            row = tl.load(pairs + k).to(tl.int64)
            tl.store(row_scales + row, scale, mask=row >= 0)


@triton.jit
def _combine_kernel(
    addresses,
    slots,
    weights,
    out,
    H,
    max_rows,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * (row of pair (t, k) at its owner), in fp32 and in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    for begin in tl.range(0, H, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(TOP_K):
            slot = tl.load(slots + token * TOP_K + k)
            owner = tl.maximum(slot, 0) // max_rows
            row = (tl.maximum(slot, 0) % max_rows).to(tl.int64)
            results = _peer(addresses, owner, out.dtype.element_ty)
            part = tl.load(results + row * H + column, mask=(column < H) & (slot >= 0), other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                part *= tl.load(weights + token * TOP_K + k)
            total += part
        tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


@triton.jit
def _pull_values_kernel(addresses, slots, out, num_pairs, max_rows, BLOCK: tl.constexpr):
    """out[p] = the value of the row of pair p at its owner; 0 for a pair that went nowhere."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + pair, mask=pair < num_pairs, other=-1)
    owner = tl.maximum(slot, 0) // max_rows
    row = tl.maximum(slot, 0) % max_rows
    values = tl.load(addresses + owner).to(tl.pointer_type(tl.float32))
    tl.store(out + pair, tl.load(values + row, mask=slot >= 0, other=0.0), mask=pair < num_pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOrder:
    """Where the rows of one layer lie, seen from one rank with the sizes of its :class:`ExchangeShape`."""

    pair_row: torch.Tensor
    """[P, T * K] int32: this rank's row of every rank's pair, -1 for a pair of another rank's expert."""
    row_weights: torch.Tensor
    """[C] fp32: the routing weight of every row of this rank; not written where there is no row."""
    slots: torch.Tensor
    """[T * K] int32: owner * C + row at its owner of every own pair, -1 for a pair that goes nowhere."""
    ends: torch.Tensor
    """[E / P] int32: rows of this rank's experts, cumulative."""
    kept_ends: torch.Tensor
    """The same of the first rows only, whose pre-activations are kept for the backward."""
    further_ends: torch.Tensor
    """The same of the rows behind them, counted from the first of these."""


def publish_pairs(
    buffers: ExchangeBuffers,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    pair_rows: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    """Show peers the routing of this rank's tokens: ids and weights [T, K], the pairs' order and counts."""
    shape = buffers.shape
    _publish_kernel[(triton.cdiv(shape.num_pairs, PAIRS_BLOCK),)](
        topk_ids,
        pair_rows,
        topk_weights,
        ends,
        buffers.ids.local,
        buffers.pair_rows.local,
        buffers.weights.local,
        buffers.ends.local,
        topk_ids.numel(),
        shape.num_pairs,
        shape.num_experts,
        BLOCK=PAIRS_BLOCK,
        EXPERTS=triton.next_power_of_2(shape.num_experts),
    )


def order_rows(buffers: ExchangeBuffers, *, kept_rows: int) -> RowOrder:
    """Work out where every row goes, from what all ranks have published."""
    shape, device = buffers.shape, buffers.ids.local.device
    num_local = shape.num_local_experts

    def integers(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=device)

    shifts = integers(shape.num_ranks, shape.num_experts)
    order = RowOrder(
        pair_row=integers(shape.num_ranks, shape.num_pairs),
        row_weights=torch.empty(shape.max_rows, dtype=torch.float32, device=device),
        slots=integers(shape.num_pairs),
        ends=integers(num_local),
        kept_ends=integers(num_local),
        further_ends=integers(num_local),
    )
    _shifts_kernel[(1,)](
        buffers.ends.addresses,
        shifts,
        order.ends,
        order.kept_ends,
        order.further_ends,
        buffers.rank,
        kept_rows,
        shape.num_experts,
        num_local,
        RANKS=shape.num_ranks,
        EXPERTS=triton.next_power_of_2(shape.num_experts),
    )
    _rows_kernel[(triton.cdiv(shape.num_pairs, PAIRS_BLOCK), shape.num_ranks)](
        buffers.ids.addresses,
        buffers.pair_rows.addresses,
        buffers.weights.addresses,
        shifts,
        order.pair_row,
        order.row_weights,
        order.slots,
        buffers.rank,
        shape.num_pairs,
        shape.num_experts,
        num_local,
        shape.max_rows,
        BLOCK=PAIRS_BLOCK,
    )
    return order


def pull_rows(buffers: ExchangeBuffers, tokens: PeerTensor, order: RowOrder, rows: torch.Tensor) -> torch.Tensor:
    """Fill ``rows`` [C, H] with what all ranks have in ``tokens`` [T, H] for this rank's experts, and return it."""
    _pull(buffers, tokens, None, order, rows, None)
    return rows


def pull_scaled_rows(
    buffers: ExchangeBuffers, tokens: PeerTensor, scales: PeerTensor, order: RowOrder, rows: Scaled
) -> Scaled:
    """As :func:`pull_rows`, of tokens in e4m3 with their ``scales`` [T]."""
    of_bytes = Scaled(rows.data.view(torch.uint8), rows.scales)  # which are copied as they are
    _pull(buffers, tokens, scales, order, *of_bytes)
    return rows


def _pull(
    buffers: ExchangeBuffers,
    tokens: PeerTensor,
    scales: PeerTensor | None,
    order: RowOrder,
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
) -> None:
    shape = buffers.shape
    if shape.num_tokens:
        _pull_kernel[(shape.num_tokens * shape.num_ranks,)](
            tokens.addresses,
            None if scales is None else scales.addresses,
            order.pair_row,
            rows,
            row_scales,
            shape.num_tokens,
            shape.hidden_size,
            RANKS=shape.num_ranks,
            TOP_K=shape.top_k,
            BLOCK=min(2048, triton.next_power_of_2(shape.hidden_size)),
            HAS_SCALES=scales is not None,
        )


def pull_sums(
    buffers: ExchangeBuffers, order: RowOrder, num_tokens: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the (weighted) sum of the results of each of this rank's first ``num_tokens`` tokens, [T, H]."""
    shape = buffers.shape
    out = buffers.results.local.new_empty((num_tokens, shape.hidden_size))
    if num_tokens:
        _combine_kernel[(num_tokens,)](
            buffers.results.addresses,
            order.slots,
            order.row_weights if weights is None else weights,
            out,
            shape.hidden_size,
            shape.max_rows,
            TOP_K=shape.top_k,
            BLOCK=min(2048, triton.next_power_of_2(shape.hidden_size)),
            HAS_WEIGHTS=weights is not None,
        )
    return out


def pull_values(buffers: ExchangeBuffers, order: RowOrder, num_tokens: int) -> torch.Tensor:
    """Return the value [T, K] fp32 of the row of each pair of this rank's first ``num_tokens`` tokens."""
    top_k = buffers.shape.top_k
    out = torch.empty((num_tokens, top_k), dtype=torch.float32, device=order.slots.device)
    if num_tokens:
        _pull_values_kernel[(triton.cdiv(out.numel(), PAIRS_BLOCK),)](
            buffers.values.addresses, order.slots, out, out.numel(), buffers.shape.max_rows, BLOCK=PAIRS_BLOCK
        )
    return out
