"""Protocols for the batches of training and validation, which the data layer's loader implements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class Batch(Protocol):
    """One micro-batch from the data layer."""

    tokens: torch.Tensor
    """[B, S] int64"""
    targets: torch.Tensor
    """[B, S] int64, -100 where there is no target."""
    sequence_ids: torch.Tensor
    """[B] int64: indices of the sequences in the corpus."""
    document_starts: torch.Tensor | None
    """[B, S] bool: True at the start of each document, if attention must not cross documents; else None."""
    padding: torch.Tensor | None
    """[B, S] bool: True for padding; None if there is none."""


class StepSource(Protocol):
    """A resumable stream of steps, each a list of micro-batches."""

    def __iter__(self) -> Iterator[Sequence[Batch]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
