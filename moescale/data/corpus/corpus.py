"""Prepared sequences, memory-mapped: those of `prepare`, or of a folder that ``datasets.save_to_disk`` wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, Protocol, overload

import numpy as np

from moescale.data.corpus.manifest import Manifest, Shard, WrittenFile, read_manifest
from moescale.errors import DataError, nearest

_REMEDY = "remove {} and prepare the corpus again"


class Corpus(Protocol):
    """Sequences of one length, in a fixed order."""

    @property
    def num_sequences(self) -> int: ...

    @property
    def sequence_length(self) -> int: ...

    @property
    def vocabulary_size(self) -> int:
        """Every token id is below this."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the sequences and their order."""
        ...

    @property
    def document_boundaries(self) -> bool:
        """Whether sequences come with the places where documents start."""
        ...

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return tokens (an integer type) [S], and where documents start, bool [S], or None."""
        ...

    def verify(self) -> None:
        """Read everything and compare it with the checksums, where there are any; DataError names a damaged file."""
        ...


@overload
def open_corpus(path: Path, split: str = "train", missing_ok: Literal[False] = False) -> Corpus: ...


@overload
def open_corpus(path: Path, split: str = "train", *, missing_ok: bool) -> Corpus | None: ...


def open_corpus(path: Path, split: str = "train", missing_ok: bool = False) -> Corpus | None:
    """Open a split of the corpus at ``path``.

    Args:
        path: a folder written by `prepare`, or by ``datasets.save_to_disk`` with a column ``input_ids`` of lists of
            one length; of the latter a plain dataset is its own "train" split.
        missing_ok: return None when the corpus has no such split.

    Raises:
        DataError: it is no corpus, a file of it is missing or has not the size it was written with, or it has no such
            split.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"corpus {path} is not a folder; make one with `moescale prepare`")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        from moescale.data.corpus.saved_dataset import open_saved_dataset, splits_of

        splits = splits_of(path)
        if split in splits:
            return open_saved_dataset(splits[split])
    else:
        manifest = read_manifest(path)
        splits = dict.fromkeys(manifest.shards, path)
        if split in splits:
            return PreparedCorpus(path, manifest, split)
    if missing_ok:
        return None
    raise DataError(f"corpus {path} has no split '{split}'{nearest(split, splits)} (it has {', '.join(splits)})")


class PreparedCorpus:
    """A split of a corpus written by `prepare`."""

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.sequence_length = manifest.sequence_length
        self.vocabulary_size = manifest.vocabulary_size
        self.document_boundaries = manifest.document_boundaries
        self.fingerprint = manifest.corpus_fingerprint(split)
        self._folder = folder
        self._shards = manifest.shards[split]
        dtype = np.dtype(manifest.dtype)
        self._tokens = []
        self._starts = []
        for shard in self._shards:
            self._check_size(shard.tokens)
            num_tokens = shard.num_sequences * self.sequence_length
            if shard.tokens.num_bytes != num_tokens * dtype.itemsize:
                raise DataError(
                    f"{folder}: the manifest's counts of {shard.tokens.name} do not agree; {_REMEDY.format(folder)}"
                )
            tokens = np.memmap(folder / shard.tokens.name, dtype=dtype, mode="r")
            self._tokens.append(tokens.reshape(shard.num_sequences, self.sequence_length))
            if shard.starts is not None:
                self._check_size(shard.starts)
                self._starts.append(np.memmap(folder / shard.starts.name, dtype=np.uint8, mode="r"))
        self._ends = np.cumsum([shard.num_sequences for shard in self._shards])

    @property
    def num_sequences(self) -> int:
        return int(self._ends[-1])

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number - 1] if number else 0)
        tokens = self._tokens[number][row]
        if not self.document_boundaries:
            return tokens, None
        first = row * self.sequence_length
        first_byte, skip = divmod(first, 8)
        last_byte = -(-(first + self.sequence_length) // 8)
        bits = np.unpackbits(self._starts[number][first_byte:last_byte], bitorder="little")
        return tokens, bits[skip : skip + self.sequence_length].astype(bool)

    def verify(self) -> None:
        for shard in self._shards:
            for file in files_of(shard):
                self._check_size(file)
                with open(self._folder / file.name, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != file.sha256:
                    raise DataError(
                        f"{self._folder / file.name} has changed: its SHA-256 is {digest}, "
                        f"the manifest says {file.sha256}; {_REMEDY.format(self._folder)}"
                    )

    def _check_size(self, file: WrittenFile) -> None:
        path = self._folder / file.name
        if not path.is_file():
            raise DataError(f"{path} is missing, though the manifest lists it; {_REMEDY.format(self._folder)}")
        size = path.stat().st_size
        if size != file.num_bytes:
            raise DataError(
                f"{path} has {size} bytes, the manifest says {file.num_bytes}: it is damaged; "
                f"{_REMEDY.format(self._folder)}"
            )


def files_of(shard: Shard) -> list[WrittenFile]:
    return [shard.tokens] if shard.starts is None else [shard.tokens, shard.starts]
