"""Micro-batches: sequences of a corpus with the targets that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moescale.data.corpus import Corpus

NO_TARGET = -100


@dataclass(kw_only=True)
class Batch:
    """One micro-batch."""

    tokens: torch.Tensor
    """[B, S] int64"""
    targets: torch.Tensor
    """[B, S] int64: the next token; -100 at a sequence's end and where the next token begins another document."""
    sequence_ids: torch.Tensor
    """[B] int64: indices of the sequences in the corpus; -1 for one that only keeps ranks in step."""
    document_starts: torch.Tensor | None
    """[B, S] bool, or None where the corpus does not tell."""


def read_batch(corpus: Corpus, sequence_ids: np.ndarray) -> Batch:
    """Read the sequences ``sequence_ids`` int64 [B] and derive their targets."""
    tokens = np.empty((len(sequence_ids), corpus.sequence_length), dtype=np.int64)
    starts = np.empty(tokens.shape, dtype=bool) if corpus.document_boundaries else None
    for row, index in enumerate(sequence_ids):
        tokens[row], row_starts = corpus.sequence(int(index))
        if starts is not None:
            starts[row] = row_starts
    targets = np.full_like(tokens, NO_TARGET)
    targets[:, :-1] = tokens[:, 1:]
    if starts is not None:
        targets[:, :-1][starts[:, 1:]] = NO_TARGET
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        sequence_ids=torch.from_numpy(np.array(sequence_ids, dtype=np.int64)),
        document_starts=None if starts is None else torch.from_numpy(starts),
    )
