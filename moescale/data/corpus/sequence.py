"""One sequence of a corpus: tokens, labels, documents and padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NO_TARGET = -100
"""The label of a token that is not a target, by the usual convention."""


class PackedSequence(NamedTuple):
    """One sequence of a corpus."""

    tokens: np.ndarray
    """An integer type [S]."""
    document_starts: np.ndarray | None
    """bool [S]: True at the start of each document; None if the corpus does not record it."""
    labels: np.ndarray | None = None
    """int64 [S]: the label of each token, -100 if it is not a target; None if every token is its own label."""
    padding: np.ndarray | None = None
    """bool [S]: tokens that only fill it, no targets and no part of what is told of experts' load; None: there are
    none."""

    def documents(self) -> list[tuple[int, int]]:
        """First token and last + 1 of every document; all else where the corpus does not tell, padding left out."""
        padding = np.zeros(len(self.tokens), dtype=bool) if self.padding is None else self.padding
        begins = ~padding
        begins[1:] &= padding[:-1] if self.document_starts is None else padding[:-1] | self.document_starts[1:]
        ends = ~padding
        ends[:-1] &= padding[1:] | begins[1:]
        starts = np.flatnonzero(begins).tolist()
        return list(zip(starts, (np.flatnonzero(ends) + 1).tolist(), strict=True))
