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
