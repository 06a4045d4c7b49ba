"""Micro-batches: sequences of a corpus with the targets that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moescale.data.corpus import NO_TARGET, Corpus
from moescale.errors import DataError


@dataclass(kw_only=True)
class Batch:
    """One micro-batch."""

    tokens: torch.Tensor
    """[B, S] int64"""
    targets: torch.Tensor
    """[B, S] int64: the next token; -100 at a sequence's end, where the next token begins another document, and where a
    saved dataset's labels or masks leave the next token out."""
    sequence_ids: torch.Tensor
    """[B] int64: indices of the sequences in the corpus; -1 for one that only keeps ranks in step."""
    document_starts: torch.Tensor | None
    """[B, S] bool: True at the start of each document; None if the corpus does not record it."""
    padding: torch.Tensor | None
    """[B, S] bool: True for padding; None if no sequence of the corpus has any."""


def read_batch(corpus: Corpus, sequence_ids: np.ndarray) -> Batch:
    """Read the sequences ``sequence_ids`` int64 [B] and derive their targets.

    Raises:
        DataError: a token id or label is outside the corpus's vocabulary, which only damage can bring about.
    """
    tokens = np.empty((len(sequence_ids), corpus.sequence_length), dtype=np.int64)
    labels = np.empty_like(tokens)
    starts = np.empty(tokens.shape, dtype=bool) if corpus.document_boundaries else None
    padding = np.zeros(tokens.shape, dtype=bool) if corpus.has_padding else None
    for row, index in enumerate(sequence_ids):
        sequence = corpus.sequence(int(index))
        tokens[row] = sequence.tokens
        labels[row] = sequence.tokens if sequence.labels is None else sequence.labels
        if starts is not None:
            starts[row] = sequence.document_starts
        if padding is not None and sequence.padding is not None:
            padding[row] = sequence.padding
    _check_ids(corpus, sequence_ids, tokens, least=0)
    _check_ids(corpus, sequence_ids, labels, least=NO_TARGET)
    targets = np.full_like(tokens, NO_TARGET)
    targets[:, :-1] = labels[:, 1:]
    if starts is not None:
        targets[:, :-1][starts[:, 1:]] = NO_TARGET
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        sequence_ids=torch.from_numpy(np.array(sequence_ids, dtype=np.int64)),
        document_starts=None if starts is None else torch.from_numpy(starts),
        padding=None if padding is None else torch.from_numpy(padding),
    )


def _check_ids(corpus: Corpus, sequence_ids: np.ndarray, ids: np.ndarray, *, least: int) -> None:
    """Find ids that the model has no row for before a device does, whose answer would be an assertion or garbage."""
    if ids.size == 0 or (ids.min() >= least and ids.max() < corpus.vocabulary_size):
        return
    wrong = (ids < least) | (ids >= corpus.vocabulary_size)
    row, place = (int(number) for number in np.argwhere(wrong)[0])
    raise DataError(
        f"{corpus.name}: sequence {int(sequence_ids[row])} has id {int(ids[row, place])} at token {place}, outside the "
        f"corpus's vocabulary of {corpus.vocabulary_size:,}: it is damaged; prepare the corpus again"
    )
