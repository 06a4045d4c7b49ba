"""Sharded optimizer updates of weights that every rank of a group holds whole (ZeRO stage 1, arXiv:1910.02054).

Ranks accumulate gradients of whole parameters locally. Once per step, each rank reduces the gradients of its rows of
every parameter over all ranks, updates these rows, and gathers the other ranks' rows. Rows are sharded along the first
dim as by ``torch.chunk``: the last ranks may have fewer, or none.

Parameters are communicated in buckets, in which the rows of one rank are contiguous. Gradients are summed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moescale.runtime.layout import Sharing

BUCKET_ELEMENTS = 64 * 2**20
"""Elements of a bucket over all ranks: 256 MiB in fp32, of which each rank has its share."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows [start, stop) within every rank's share of a tensor."""

    tensor: torch.Tensor
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements of one rank."""
        return (self.stop - self.start) * math.prod(self.tensor.shape[1:])

    def rows(self, sharing: Sharing, shard: int) -> torch.Tensor:
        """Return the existing rows of ``shard``."""
        share = sharing.rows(self.tensor.shape[0], shard)
        return self.tensor[min(share.start + self.start, share.stop) : min(share.start + self.stop, share.stop)]


def _buckets(tensors: Sequence[torch.Tensor], sharing: Sharing) -> Iterator[list[_Piece]]:
    """Pack tensors into buckets of at most BUCKET_ELEMENTS, or of one row of every rank if that is larger."""
    most = max(1, BUCKET_ELEMENTS // sharing.num_shards)
    bucket: list[_Piece] = []
    filled = 0
    for tensor in tensors:
        chunk, width = -(-tensor.shape[0] // sharing.num_shards), math.prod(tensor.shape[1:])
        start = 0
        while start < chunk:
            room = max(0, most - filled) // max(1, width)
            if room == 0 and bucket:
                yield bucket
                bucket, filled = [], 0
                continue
            stop = min(chunk, start + max(1, room))
            piece = _Piece(tensor=tensor, start=start, stop=stop)
            bucket.append(piece)
            filled += piece.elements
            start = stop
    if bucket:
        yield bucket


def _place(flat: torch.Tensor, pieces: Sequence[_Piece], sharing: Sharing, shard: int) -> Iterator[tuple]:
    """Return pairs of equal shape: a slice of one rank's share of a bucket, and rows of ``shard``."""
    offset = 0
    for piece in pieces:
        rows = piece.rows(sharing, shard)
        yield flat[offset : offset + rows.numel()].view(rows.shape), rows
        offset += piece.elements


def sum_gradients(gradients: Sequence[torch.Tensor], sharing: Sharing, on_progress: Callable[[], None]) -> None:
    """Sum this rank's rows of every gradient over all ranks, leaving other rows unchanged. A collective."""
    device = gradients[0].device if gradients else torch.device("cpu")
    for bucket in _buckets(gradients, sharing):
        on_progress()
        size = sum(piece.elements for piece in bucket)
        share = torch.zeros(size, dtype=torch.float32, device=device)
        if sharing.shards is None:
            _copy(_place(share, bucket, sharing, 0))
        else:
            whole = torch.zeros((sharing.num_shards, size), dtype=torch.float32, device=device)
            for shard in range(sharing.num_shards):
                _copy(_place(whole[shard], bucket, sharing, shard))
            dist.reduce_scatter_tensor(share, whole.flatten(), group=sharing.shards)
            del whole
        if sharing.replicas is not None:
            dist.all_reduce(share, group=sharing.replicas)
        _copy((rows, place) for place, rows in _place(share, bucket, sharing, sharing.shard))


def share_weights(weights: Sequence[torch.Tensor], sharing: Sharing, on_progress: Callable[[], None]) -> None:
    """Gather every rank's rows of the weights on all ranks. A collective."""
    if sharing.shards is None:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for weight in weights:
        by_dtype.setdefault(weight.dtype, []).append(weight)
    for dtype, tensors in by_dtype.items():
        for bucket in _buckets(tensors, sharing):
            on_progress()
            size = sum(piece.elements for piece in bucket)
            share = torch.zeros(size, dtype=dtype, device=tensors[0].device)
            _copy(_place(share, bucket, sharing, sharing.shard))
            whole = share.new_empty((sharing.num_shards, size))
            dist.all_gather_into_tensor(whole.flatten(), share, group=sharing.shards)
            for shard in range(sharing.num_shards):
                if shard != sharing.shard:
                    _copy((rows, place) for place, rows in _place(whole[shard], bucket, sharing, shard))


def _copy(pairs: Iterator[tuple]) -> None:
    """Copy the second of every pair to the first, in few launches."""
    targets, sources = [], []
    for target, source in pairs:
        if target.numel():
            targets.append(target)
            sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
