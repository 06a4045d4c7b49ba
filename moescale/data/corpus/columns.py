"""Columns of a tokenised dataset, as transformers understands them, and what follows for targets and documents.

- ``labels``: what each token counts as when it is to be predicted; -100: it is not a target.
- ``attention_mask``: 0 marks padding, which is no target and no part of experts' load. Padding at the left must not be
  attended to either: the first token after it starts a document.
- ``completion_mask``, ``assistant_masks``, ``loss_mask``: tokens with 0 are not targets.
- ``position_ids``: positions that begin again at 0 start a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moescale.data.corpus.sequence import NO_TARGET
from moescale.errors import DataError

TOKENS = "input_ids"
LABELS = "labels"
ATTENTION_MASK = "attention_mask"
POSITIONS = "position_ids"
_MASKS = (ATTENTION_MASK, "completion_mask", "assistant_masks", "loss_mask")
COLUMNS = (TOKENS, LABELS, POSITIONS, *_MASKS)
_ROWS_AT_A_TIME = 1024


class Block:
    """Rows of one record batch, checked against what training can follow.

    Raises:
        DataError: a column is not one of lists of integers of one length, or has values without a meaning here.
    """

    def __init__(self, path: Path, columns: dict[str, Any]) -> None:
        """``columns``: Arrow arrays of lists, by name; ``input_ids`` is among them."""
        self._path = path
        self._num_rows = len(columns[TOKENS])
        self.columns: dict[str, Any] = {}
        self.sequence_length = 0
        for name in sorted(columns, key=COLUMNS.index):
            values, length = _flat(columns[name], name, path)
            if name == TOKENS:
                self.sequence_length = length
            elif length != self.sequence_length:
                raise DataError(
                    f"{path}: column '{name}' has lists of length {length}, '{TOKENS}' of {self.sequence_length}; they "
                    "must have one length"
                )
            self.columns[name] = values
        self._masks = [name for name in _MASKS if name in self.columns]
        self.has_padding = False
        for name in self._masks:
            for values in self._parts(name):
                self.has_padding |= name == ATTENTION_MASK and not values.all()
                if ((values != 0) & (values != 1)).any():
                    raise self._error(name, "values other than 0 and 1; it must say which tokens count")
        self.has_documents = self._padded_left() | self._positions_start_again()

    def __len__(self) -> int:
        return self._num_rows

    @property
    def num_bytes(self) -> int:
        """Size of the columns, which the file's pages hold."""
        return sum(values.nbytes for values in self.columns.values())

    def tokens(self, row: int) -> np.ndarray:
        return self._rows(TOKENS, row, row + 1)[0]

    def labels(self, row: int) -> np.ndarray | None:
        """Return int64 [S], or None if every token is its own label."""
        if LABELS not in self.columns and not self._masks:
            return None
        labels = self._rows(LABELS if LABELS in self.columns else TOKENS, row, row + 1)[0].astype(np.int64)
        for name in self._masks:
            labels[self._rows(name, row, row + 1)[0] == 0] = NO_TARGET
        return labels

    def document_starts(self, row: int) -> np.ndarray:
        starts = np.zeros(self.sequence_length, dtype=bool)
        if ATTENTION_MASK in self.columns:
            mask = self._rows(ATTENTION_MASK, row, row + 1)[0].astype(np.int8)
            starts[1:] |= np.diff(mask) == 1
        if POSITIONS in self.columns:
            starts |= self._rows(POSITIONS, row, row + 1)[0] == 0
        return starts

    def padding(self, row: int) -> np.ndarray | None:
        """Return which tokens ``attention_mask`` leaves out, bool [S]; None without it."""
        if ATTENTION_MASK not in self.columns:
            return None
        return self._rows(ATTENTION_MASK, row, row + 1)[0] == 0

    def largest_id(self) -> int:
        """Read all token ids and labels, refuse negative ones, and return the largest."""
        largest = 0
        for tokens in self._parts(TOKENS):
            if tokens.min() < 0:
                raise self._error(TOKENS, "negative token ids; pad with a token and mark it in attention_mask")
            largest = max(largest, int(tokens.max()))
        for labels in self._parts(LABELS) if LABELS in self.columns else ():
            if ((labels < 0) & (labels != NO_TARGET)).any():
                raise self._error(LABELS, f"negative values other than {NO_TARGET}, which marks no target")
            largest = max(largest, int(labels.max()))
        return largest

    def _padded_left(self) -> bool:
        """Return True if a row has padding before its tokens. Raises DataError if it has some between them."""
        found = False
        for mask in self._parts(ATTENTION_MASK) if ATTENTION_MASK in self.columns else ():
            begins = np.diff(mask.astype(np.int8), axis=1) == 1
            if (begins.sum(axis=1) > (mask[:, 0] == 0)).any():
                raise self._error(
                    ATTENTION_MASK, "zeros between ones; only padding at the ends of a sequence can be left out"
                )
            found |= bool(begins.any())
        return found

    def _positions_start_again(self) -> bool:
        """Return True if positions mark documents. Raises DataError if they are not those of concatenated documents."""
        found = False
        for positions in self._parts(POSITIONS) if POSITIONS in self.columns else ():
            follows = np.diff(positions.astype(np.int64), axis=1) == 1
            if (positions[:, 0] != 0).any() or (~follows & (positions[:, 1:] != 0)).any():
                raise self._error(
                    POSITIONS, "positions that neither go on by one nor begin again at 0; leave the column out"
                )
            found |= not follows.all()
        return found

    def _rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Return rows [last - first, S]: a view of the file, but for booleans, which Arrow packs."""
        length = self.sequence_length
        values = self.columns[name].slice(first * length, (last - first) * length)
        return values.to_numpy(zero_copy_only=False).reshape(last - first, length)

    def _parts(self, name: str) -> Iterator[np.ndarray]:
        for first in range(0, len(self), _ROWS_AT_A_TIME):
            yield self._rows(name, first, min(len(self), first + _ROWS_AT_A_TIME))

    def _error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self._path}: column '{name}' has {problem}")


def _flat(column: Any, name: str, path: Path) -> tuple[Any, int]:
    """Return the values of an Arrow array of lists end to end, and the one length that all lists have."""
    import pyarrow

    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    is_list = is_list or pyarrow.types.is_fixed_size_list(kind)
    is_number = is_list and (
        pyarrow.types.is_integer(kind.value_type) or (name in _MASKS and pyarrow.types.is_boolean(kind.value_type))
    )
    if not is_number:
        raise DataError(f"{path}: column '{name}' is of type {kind}; it must hold lists of integers")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DataError(f"{path}: column '{name}' has missing values")
    length = len(values) // len(column)
    if not pyarrow.types.is_fixed_size_list(kind):
        lengths = np.diff(column.offsets.to_numpy())
        if (lengths != length).any():
            found = sorted({int(lengths.min()), int(lengths.max())})
            raise DataError(
                f"{path}: column '{name}' has lists of lengths {found[0]} to {found[-1]}; sequences need one length"
            )
    if length < 2:
        raise DataError(f"{path}: column '{name}' has lists of length {length}; sequences need at least 2 tokens")
    return values, length
