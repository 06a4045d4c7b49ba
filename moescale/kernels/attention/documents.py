"""Documents packed into sequences, as attention needs them: which keys a query sees and which queries see a key."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

LEAST_OFFSETS = 64


class Documents(NamedTuple):
    """Where documents lie in the sequences of a micro-batch. Token i of a sequence sees the keys ``first[i]`` to i."""

    first: torch.Tensor
    """[B, S] int32: the position in its sequence at which the token's document begins."""
    last: torch.Tensor
    """[B, S] int32: the position at which it ends, that token included."""
    offsets: torch.Tensor
    """int32: where each document begins in the tokens [B * S], in order; then B * S, at least once."""

    @classmethod
    def from_starts(cls, starts: torch.Tensor, device: torch.device, least_offsets: int = LEAST_OFFSETS) -> Documents:
        """Return the documents that begin where ``starts`` [B, S] bool, on the CPU, says; and with each sequence.

        The length of ``offsets`` is a power of two of at least ``least_offsets``: what is compiled or recorded for one
        length serves all micro-batches of at most as many documents.
        """
        starts = starts.clone()
        starts[:, 0] = True
        positions = torch.arange(starts.shape[1], dtype=torch.int32).expand_as(starts)
        first = positions.where(starts, 0).cummax(-1).values
        ends = F.pad(starts[:, 1:], (0, 1), value=True)
        last = positions.where(ends, starts.shape[1]).flip(-1).cummin(-1).values.flip(-1)
        begins = starts.flatten().nonzero().flatten().to(torch.int32)
        length = max(least_offsets, 1 << len(begins).bit_length())
        offsets = F.pad(begins, (0, length - len(begins)), value=starts.numel())
        tensors = [first, last, offsets]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return cls(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def visible_keys(length: int, documents: Documents | None, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [B, S, S] bool, of one sequence without ``documents``: true where the row's token sees the column's."""
    queries = torch.arange(length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    visible = (keys <= queries)[None]
    if window is not None:
        visible = visible & (keys > queries - window)
    if documents is not None:
        visible = visible & (keys >= documents.first[:, :, None])
    return visible
