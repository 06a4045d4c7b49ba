"""The ranks of a run from the view of one of them: its index, and small collectives to agree on values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank ``rank`` of ``size``. Every method is a collective, which does nothing on a single rank."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that logs and writes the files of the run."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks in place, with bit-identical results on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_on_host(self, numbers: Sequence[int]) -> list[int]:
        """Sum integers over all ranks on the hosts, without a wait for the accelerators."""
        if self.size == 1:
            return list(numbers)
        return self.sum(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, in rank order; it must be small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ONE_RANK = Ranks()


def current_ranks() -> Ranks:
    """Return the ranks of the default process group, or the single rank if there is no group."""
    if not dist.is_initialized():
        return ONE_RANK
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size())


def place_on_host() -> tuple[int, int]:
    """Return the index of this process among those of its host, which share files and memory, and their number."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
