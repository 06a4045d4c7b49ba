"""Prepared sequences, memory-mapped: those of `prepare`, or of a folder that ``datasets.save_to_disk`` wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, overload

import numpy as np

from moescale.data.corpus.manifest import Manifest, Shard, WrittenFile, read_manifest
from moescale.data.corpus.sequence import NO_TARGET, PackedSequence
from moescale.errors import DataError, nearest
from moescale.hub import nearest_here

_PIECE_BYTES = 1 << 22
_BITS_SET = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
_KINDS: tuple[Literal["tokens", "starts", "targets"], ...] = ("tokens", "starts", "targets")
_REMEDY = "remove {} and prepare the corpus again"


class Corpus(Protocol):
    """Sequences of one length, in a fixed order."""

    @property
    def name(self) -> str:
        """Its location, for messages."""
        ...

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
        """True if the starts of documents are recorded."""
        ...

    @property
    def has_padding(self) -> bool:
        """True if any sequence has padding."""
        ...

    @property
    def notices(self) -> list[str]:
        """Notices about parts of the corpus that are not used; empty if all are."""
        ...

    def sequence(self, index: int) -> PackedSequence: ...

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        ...

    def verifying(self, part: int = 0, num_parts: int = 1) -> Iterator[int]:
        """Read a part of the files piece by piece, compare them with what is known of them, and yield pieces' sizes.

        Raises:
            DataError: names a damaged file.
        """
        ...


def verify(corpus: Corpus) -> None:
    """Read everything and compare it with the checksums, where there are any; DataError names a damaged file."""
    for _ in corpus.verifying():
        pass


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
        raise DataError(f"corpus {path} is not a folder{nearest_here(path)}; make one with `moescale prepare`")
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
        self.has_padding = manifest.counts[split].tokens_padding > 0
        self.fingerprint = manifest.corpus_fingerprint(split)
        self.name = str(folder)
        self._folder = folder
        self._shards = manifest.shards[split]
        self._num_documents = manifest.counts[split].documents
        self._dtype = dtype = np.dtype(manifest.dtype)
        self._tokens = []
        self._starts = []
        self._targets = []
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
            if shard.targets is not None:
                self._check_size(shard.targets)
                self._targets.append(np.memmap(folder / shard.targets.name, dtype=np.uint8, mode="r"))
        self._ends = np.cumsum([shard.num_sequences for shard in self._shards])

    @property
    def num_sequences(self) -> int:
        return int(self._ends[-1])

    @property
    def notices(self) -> list[str]:
        return []

    def sequence(self, index: int) -> PackedSequence:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[number - 1] if number else 0)
        tokens = self._tokens[number][row]
        if not self.document_boundaries:
            return PackedSequence(tokens, None)
        starts = self._bits(self._starts[number], row)
        if not self._targets:
            return PackedSequence(tokens, starts)
        targets = self._bits(self._targets[number], row)
        # Padding follows the last conversation: it begins as one does, and alone has nothing to learn.
        last = int(np.flatnonzero(starts)[-1])
        padding = None
        if not targets[last:].any():
            padding = np.arange(self.sequence_length) >= last
        return PackedSequence(tokens, starts, np.where(targets, tokens.astype(np.int64), NO_TARGET), padding)

    def _bits(self, packed: np.ndarray, row: int) -> np.ndarray:
        """Return a sequence's bits, bool [S], of a file that has one for each token of a shard."""
        first_byte, skip = divmod(row * self.sequence_length, 8)
        last_byte = -(-((row + 1) * self.sequence_length) // 8)
        bits = np.unpackbits(packed[first_byte:last_byte], bitorder="little")
        return bits[skip : skip + self.sequence_length].astype(bool)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for shard in self._shards for file in files_of(shard))

    def verifying(self, part: int = 0, num_parts: int = 1) -> Iterator[int]:
        for number, shard in enumerate(self._shards):
            for kind, file in enumerate(files_of(shard)):
                if (number + kind) % num_parts == part:
                    yield from self._verifying_file(file, is_first=number == 0, kind=_KINDS[kind])

    def _verifying_file(
        self, file: WrittenFile, *, is_first: bool, kind: Literal["tokens", "starts", "targets"]
    ) -> Iterator[int]:
        """Compare a file with its checksum, and what it holds with the manifest, which might be of another corpus."""
        self._check_size(file)
        path = self._folder / file.name
        digest = hashlib.sha256()
        largest_id = num_starts = 0
        is_head = starts_at_once = True
        with open(path, "rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                if kind == "starts":
                    starts_at_once = bool(piece[0] & 1) if is_head else starts_at_once
                    is_head = False
                    num_starts += int(_BITS_SET[np.frombuffer(piece, np.uint8)].sum(dtype=np.int64))
                elif kind == "tokens" and len(piece) % self._dtype.itemsize == 0:
                    largest_id = max(largest_id, int(np.frombuffer(piece, self._dtype).max()))
                digest.update(piece)
                yield len(piece)
        if digest.hexdigest() != file.sha256:
            raise DataError(
                f"{path} has changed: its SHA-256 is {digest.hexdigest()}, the manifest says {file.sha256}; "
                f"{_REMEDY.format(self._folder)}"
            )
        if largest_id >= self.vocabulary_size:
            raise DataError(
                f"{path} has token id {largest_id}, the manifest a vocabulary of {self.vocabulary_size}; "
                f"{_REMEDY.format(self._folder)}"
            )
        # Padding at the end of a sequence starts as documents do.
        most_starts = self._num_documents + (self.num_sequences if self._targets else 0)
        if kind == "starts" and (num_starts > most_starts or (is_first and not starts_at_once)):
            raise DataError(
                f"{path} has {num_starts} document starts, {'' if starts_at_once else 'none at its first token, '}"
                f"the manifest {self._num_documents} documents; {_REMEDY.format(self._folder)}"
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
    """Return the files of a shard: tokens, then starts, then targets."""
    return [file for file in (shard.tokens, shard.starts, shard.targets) if file is not None]
