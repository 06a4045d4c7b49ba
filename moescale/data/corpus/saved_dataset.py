"""Sequences of a folder written by ``datasets.save_to_disk``, read without that library.

Such a folder holds Arrow streams, listed in ``state.json``; that of a dataset dictionary has ``dataset_dict.json`` and
a folder per split. The files are mapped; a sequence is a view into them.

Columns have the meaning they have in transformers: ``labels`` and ``attention_mask`` decide which tokens are targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moescale.config import fingerprint
from moescale.data.corpus.columns import COLUMNS, TOKENS, Block
from moescale.data.corpus.sequence import PackedSequence
from moescale.errors import DataError
from moescale.records import FileKind, FileName, build, file_name_problem, read_json_object, show

_FILE = FileKind(
    noun="a saved dataset's state",
    error=DataError,
    missing="missing: the saved dataset is not whole",
    remedy="save the dataset again",
    ignores_unknown=True,
)


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """An entry of ``_data_files``."""

    filename: FileName


def splits_of(folder: Path) -> dict[str, Path]:
    """Return the folder of every split."""
    if (folder / "dataset_dict.json").is_file():
        names = _list_in(folder / "dataset_dict.json", "splits")
        for name in names:
            problem = file_name_problem(name) if isinstance(name, str) else "must be a name"
            if problem is not None:
                raise DataError(
                    f"{folder / 'dataset_dict.json'}: splits ({show(name)}) {problem}; save the dataset again"
                )
        return {split: folder / split for split in names}
    return {"train": folder}


def open_saved_dataset(folder: Path) -> SavedDataset:
    """Open one dataset.

    Raises:
        DataError: a file is missing or damaged, or there is no column ``input_ids`` of integer lists of one length, or
            another column says what training cannot follow.
    """
    state = _read_json(folder / "state.json")
    blocks: list[Block] = []
    sizes = []
    unused: dict[str, None] = {}
    for entry in _list_in(folder / "state.json", "_data_files"):
        path = folder / data_file_name(entry, folder)
        if not path.is_file():
            raise DataError(f"{path} is missing, though {folder / 'state.json'} lists it")
        sizes.append(path.stat().st_size)
        of_file, other_columns = _read_blocks(path)
        blocks.extend(of_file)
        unused |= dict.fromkeys(other_columns)
    if not blocks:
        raise DataError(f"{folder} holds no sequences")
    lengths = {block.sequence_length for block in blocks}
    if len(lengths) > 1:
        raise DataError(
            f"{folder}: column '{TOKENS}' has lists of lengths {sorted(lengths)}; sequences need one length"
        )
    columns = sorted({name for block in blocks for name in block.columns} - {TOKENS})
    identity = ["saved dataset", state.get("_fingerprint"), sizes, *([columns] if columns else [])]
    return SavedDataset(folder, blocks, fingerprint(identity), list(unused))


class SavedDataset:
    """A corpus of record batches; documents are known where ``position_ids`` or padding at the left tell of them."""

    def __init__(self, folder: Path, blocks: list[Block], fingerprint: str, unused_columns: list[str]) -> None:
        self.name = str(folder)
        self.fingerprint = fingerprint
        self.sequence_length = blocks[0].sequence_length
        self.document_boundaries = any(block.has_documents for block in blocks)
        self.has_padding = any(block.has_padding for block in blocks)
        self.unused_columns = unused_columns
        self._blocks = blocks
        self._ends = np.cumsum([len(block) for block in blocks])

    @property
    def num_sequences(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def vocabulary_size(self) -> int:
        """The largest id plus one. The folder does not record it, so the first use reads all tokens."""
        return max(block.largest_id() for block in self._blocks) + 1

    @property
    def notices(self) -> list[str]:
        if not self.unused_columns:
            return []
        return [f"{self.name}: columns that training does not use: {', '.join(self.unused_columns)}"]

    def sequence(self, index: int) -> PackedSequence:
        block, row = self._place(index)
        starts = block.document_starts(row) if self.document_boundaries else None
        return PackedSequence(block.tokens(row), starts, block.labels(row), block.padding(row))

    def _place(self, index: int) -> tuple[Block, int]:
        """Return the block of a sequence, and its row in the block."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._blocks[number], index - int(self._ends[number - 1] if number else 0)

    @property
    def num_bytes(self) -> int:
        return sum(block.num_bytes for block in self._blocks)

    def verifying(self, part: int = 0, num_parts: int = 1) -> Iterator[int]:
        """Read every id. The library writes no checksums, so another id of the vocabulary cannot be noticed."""
        for block in self._blocks[part::num_parts]:
            if block.largest_id() >= self.vocabulary_size:
                raise DataError(f"{self.name} has changed while it was read; save the dataset again")
            yield block.num_bytes


def data_file_name(entry: Any, folder: Path) -> str:
    """Return the file name in an entry of ``_data_files``. Raises DataError."""
    return build(DataFile, entry, f"{folder / 'state.json'}: _data_files", _FILE).filename


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, _FILE)


def _list_in(path: Path, key: str) -> list[Any]:
    value = _read_json(path).get(key)
    if not isinstance(value, list):
        raise DataError(f"{path} has no list '{key}': {path.parent} is not a saved dataset")
    return value


def _read_blocks(path: Path) -> tuple[list[Block], list[str]]:
    """Return the file's record batches, which share its mapped memory, and the columns that have no meaning here."""
    import pyarrow
    from pyarrow import ipc

    try:
        reader = ipc.open_stream(pyarrow.memory_map(str(path)))
        if TOKENS not in reader.schema.names:
            raise DataError(f"{path} has no column '{TOKENS}' (it has {', '.join(reader.schema.names)})")
        used = [name for name in reader.schema.names if name in COLUMNS]
        blocks = []
        for batch in reader:
            batch.validate(full=True)
            if batch.num_rows:
                blocks.append(Block(path, {name: batch.column(name) for name in used}))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise DataError(f"{path} is damaged: {error}") from error
    return blocks, [name for name in reader.schema.names if name not in COLUMNS]
