"""The processes of a run, as one of them sees them: who it is, and what all of them must agree on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank ``rank`` of ``size``; every method is a collective, and free where there is one rank only."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that logs and writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_on_host(self, numbers: Sequence[int]) -> list[int]:
        """Sum integers over all ranks between hosts: no accelerator waits for it."""
        if self.size == 1:
            return list(numbers)
        return self.sum(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def gather(self, value: Any) -> list[Any]:
        """The small ``value`` of every rank, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ONE_RANK = Ranks()


def current_ranks() -> Ranks:
    """The ranks of the default process group, or the single one where there is no group."""
    if not dist.is_initialized():
        return ONE_RANK
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size())


def place_on_host() -> tuple[int, int]:
    """Number of this process among those of this host, and how many there are: what they share is files and memory."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
