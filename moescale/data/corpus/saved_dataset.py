"""Sequences of a folder written by ``datasets.save_to_disk``, read without that library.

Such a folder holds Arrow streams, listed in ``state.json``; that of a dataset dictionary has ``dataset_dict.json`` and
a folder per split. The files are mapped; a sequence is a view into them.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moescale.config import fingerprint
from moescale.errors import DataError

_COLUMN = "input_ids"


def splits_of(folder: Path) -> dict[str, Path]:
    """Return the folder of every split."""
    if (folder / "dataset_dict.json").is_file():
        names = _list_in(folder / "dataset_dict.json", "splits")
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{folder / 'dataset_dict.json'} is damaged: splits must be names; save the dataset again")
        return {split: folder / split for split in names}
    return {"train": folder}


def open_saved_dataset(folder: Path) -> SavedDataset:
    """Open one dataset.

    Raises:
        DataError: a file is missing or damaged, or there is no column ``input_ids`` of integer lists of one length.
    """
    state = _read_json(folder / "state.json")
    entries = _list_in(folder / "state.json", "_data_files")
    blocks: list[np.ndarray] = []
    sizes = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise DataError(
                f"{folder / 'state.json'} is damaged: an entry of _data_files has no filename; save the dataset again"
            )
        path = folder / entry["filename"]
        if not path.is_file():
            raise DataError(f"{path} is missing, though {folder / 'state.json'} lists it")
        sizes.append(path.stat().st_size)
        blocks.extend(_read_blocks(path))
    lengths = {block.shape[1] for block in blocks}
    if len(lengths) > 1:
        raise DataError(
            f"{folder}: column '{_COLUMN}' has lists of lengths {sorted(lengths)}; sequences need one length"
        )
    if not blocks:
        raise DataError(f"{folder} holds no sequences")
    return SavedDataset(blocks, fingerprint(["saved dataset", state.get("_fingerprint"), sizes]))


class SavedDataset:
    """A corpus of blocks of token ids, integer [sequences of the block, S]; it knows no document boundaries."""

    document_boundaries = False

    def __init__(self, blocks: list[np.ndarray], fingerprint: str) -> None:
        self._blocks = blocks
        self._ends = np.cumsum([len(block) for block in blocks])
        self.fingerprint = fingerprint
        self.sequence_length = int(blocks[0].shape[1])

    @property
    def num_sequences(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def vocabulary_size(self) -> int:
        """The largest id plus one: nothing in the folder says more, so the first use reads all of it."""
        if min(int(block.min()) for block in self._blocks) < 0:
            raise DataError(f"column '{_COLUMN}' has negative token ids")
        return max(int(block.max()) for block in self._blocks) + 1

    def sequence(self, index: int) -> tuple[np.ndarray, None]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._blocks[number][index - int(self._ends[number - 1] if number else 0)], None

    def verify(self) -> None:
        """Nothing to compare with: the library writes no checksums."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: the saved dataset is not whole") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object: {path.parent} is not a saved dataset")
    return value


def _list_in(path: Path, key: str) -> list[Any]:
    value = _read_json(path).get(key)
    if not isinstance(value, list):
        raise DataError(f"{path} has no list '{key}': {path.parent} is not a saved dataset")
    return value


def _read_blocks(path: Path) -> list[np.ndarray]:
    """Return the file's lists as arrays [rows, S] that share its mapped memory, one per record batch."""
    import pyarrow
    from pyarrow import ipc

    try:
        reader = ipc.open_stream(pyarrow.memory_map(str(path)))
        if _COLUMN not in reader.schema.names:
            raise DataError(f"{path} has no column '{_COLUMN}' (it has {', '.join(reader.schema.names)})")
        columns = [batch.column(_COLUMN) for batch in reader if batch.num_rows]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return [_as_rows(column, path) for column in columns]


def _as_rows(column: Any, path: Path) -> np.ndarray:
    import pyarrow

    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    is_list = is_list or pyarrow.types.is_fixed_size_list(kind)
    if not is_list or not pyarrow.types.is_integer(kind.value_type):
        raise DataError(f"{path}: column '{_COLUMN}' is of type {kind}; it must hold lists of integers")
    if column.null_count or column.values.null_count:
        raise DataError(f"{path}: column '{_COLUMN}' has missing values")
    values = column.flatten()
    length = len(values) // len(column)
    if not pyarrow.types.is_fixed_size_list(kind):
        lengths = np.diff(column.offsets.to_numpy())
        if (lengths != length).any():
            found = sorted({int(lengths.min()), int(lengths.max())})
            raise DataError(
                f"{path}: column '{_COLUMN}' has lists of lengths {found[0]} to {found[-1]}; sequences need one length"
            )
    return values.to_numpy(zero_copy_only=True).reshape(len(column), length)
