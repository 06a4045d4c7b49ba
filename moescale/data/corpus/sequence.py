"""What a corpus gives for one of its sequences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NO_TARGET = -100
"""The label of a token that is not to be predicted, as everywhere in the field."""


class PackedSequence(NamedTuple):
    """One sequence of a corpus."""

    tokens: np.ndarray
    """An integer type [S]."""
    document_starts: np.ndarray | None
    """bool [S]: where documents start; None where the corpus does not tell."""
    labels: np.ndarray | None = None
    """int64 [S]: what each token counts as when it is to be predicted, -100 if it is not; None: every token itself."""
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
