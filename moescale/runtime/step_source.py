"""The batches that training and validation read: a protocol, which the data layer's loader implements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class Batch(Protocol):
    """One micro-batch as the data layer hands it out."""

    tokens: torch.Tensor
    """[B, S] int64"""
    targets: torch.Tensor
    """[B, S] int64, -100 where there is no target."""
    sequence_ids: torch.Tensor
    """[B] int64: which sequences of the corpus these are."""
    document_starts: torch.Tensor | None
    """[B, S] bool where attention must not cross documents."""
    padding: torch.Tensor | None
    """[B, S] bool: tokens that only fill a sequence."""


class StepSource(Protocol):
    """A resumable stream of steps, each a list of micro-batches."""

    def __iter__(self) -> Iterator[Sequence[Batch]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
