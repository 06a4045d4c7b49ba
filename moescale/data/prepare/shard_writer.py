"""Writes packed sequences: flat files of tokens, optionally with a bit per token for document starts.

``train-00000.bin`` holds whole sequences one after the other, little-endian uint16 or uint32; ``train-00000.starts``
holds one bit per token, first token in the lowest bit, set where a document begins. ``train-00000.targets`` holds one
that is set where a token is learned; then sequences hold whole documents, with padding at their ends that begins as a
document does and has nothing to learn.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moescale.data.corpus.manifest import Shard, SplitCounts, WrittenFile
from moescale.data.prepare.atomic_folder import writing
from moescale.data.prepare.best_fit import BestFitPacking, Document

_SHARD_TOKENS = 1 << 27
_WRITE_TOKENS = 1 << 20


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self.stream: BinaryIO = open(path, "wb")
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, array: np.ndarray) -> None:
        content = np.ascontiguousarray(array).view(np.uint8).data
        with writing(self.path):
            self.stream.write(content)
        self.hash.update(content)
        self.num_bytes += len(content)

    def close(self) -> WrittenFile:
        with writing(self.path):
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
        return WrittenFile(name=self.path.name, num_bytes=self.num_bytes, sha256=self.hash.hexdigest())


class SplitWriter:
    """Packs one split's tokens into sequences and shards."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        sequence_length: int,
        dtype: np.dtype,
        document_boundaries: bool,
        padding_id: int | None = None,
    ) -> None:
        """With a ``padding_id`` documents are not cut, and have targets."""
        self.folder = folder
        self.split = split
        self.sequence_length = sequence_length
        self.dtype = dtype
        self.document_boundaries = document_boundaries
        # A multiple of eight sequences, so that every shard's bits end on a byte.
        self.shard_sequences = max(8, _SHARD_TOKENS // sequence_length // 8 * 8)
        self.shards: list[Shard] = []
        self._open: tuple[_HashedFile, _HashedFile | None, _HashedFile | None] | None = None
        self._open_sequences = 0
        self._tokens: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._pending = 0
        self._documents = 0
        self._tokens_in = 0
        self._padding = self._learned = 0
        self._targets: list[np.ndarray] = []
        self._packing = None
        if padding_id is not None:
            self._padding_id = padding_id
            self._packing = BestFitPacking(sequence_length)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, continues: bool, targets: np.ndarray | None = None) -> None:
        """Append documents: ``tokens`` [sum(lengths)], ``lengths`` int64 [documents].

        With ``continues`` the first of them is the rest of the one added last. ``targets`` bool [sum(lengths)] where
        documents have them.
        """
        self._documents += len(lengths) - continues
        self._tokens_in += len(tokens)
        if self._packing is not None:
            assert targets is not None
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                self._add_sequences(self._packing.add(tokens[start:end].copy(), targets[start:end].copy()))
            return
        self._tokens.append(tokens)
        if self.document_boundaries:
            starts = np.zeros(len(tokens), dtype=bool)
            starts[(np.cumsum(lengths) - lengths)[int(continues) :]] = True
            self._starts.append(starts)
        self._pending += len(tokens)
        if self._pending >= _WRITE_TOKENS:
            self._write_sequences()

    def _add_sequences(self, sequences: Iterable[list[Document]]) -> None:
        """Append sequences of whole documents, each filled up with padding."""
        for documents in sequences:
            tokens = np.full(self.sequence_length, self._padding_id, dtype=self.dtype)
            starts, targets = np.zeros((2, self.sequence_length), dtype=bool)
            place = 0
            for document in documents:
                starts[place] = True
                tokens[place : place + len(document.tokens)] = document.tokens
                targets[place : place + len(document.tokens)] = document.targets
                place += len(document.tokens)
            starts[place : place + 1] = True
            self._padding += self.sequence_length - place
            self._learned += int(targets.sum())
            self._tokens.append(tokens)
            self._starts.append(starts)
            self._targets.append(targets)
            self._pending += self.sequence_length
            if self._pending >= _WRITE_TOKENS:
                self._write_sequences()

    def _write_sequences(self) -> None:
        tokens = np.concatenate(self._tokens) if self._tokens else np.empty(0, self.dtype)
        starts = np.concatenate(self._starts) if self._starts else None
        targets = np.concatenate(self._targets) if self._targets else None
        # Bits are packed eight tokens to a byte, so only multiples of eight sequences can be written before the end.
        num_sequences = len(tokens) // self.sequence_length
        self._write(tokens, starts, targets, num_sequences // 8 * 8)
        written = num_sequences // 8 * 8 * self.sequence_length
        self._tokens = [tokens[written:]]
        self._starts = [] if starts is None else [starts[written:]]
        self._targets = [] if targets is None else [targets[written:]]
        self._pending = len(tokens) - written

    def _write(
        self, tokens: np.ndarray, starts: np.ndarray | None, targets: np.ndarray | None, num_sequences: int
    ) -> None:
        first = 0
        while first < num_sequences:
            if self._open is None:
                name = f"{self.split}-{len(self.shards):05d}"
                bits = _HashedFile(self.folder / f"{name}.starts") if self.document_boundaries else None
                learned = _HashedFile(self.folder / f"{name}.targets") if self._packing is not None else None
                self._open = _HashedFile(self.folder / f"{name}.bin"), bits, learned
            last = min(num_sequences, first + self.shard_sequences - self._open_sequences)
            part = slice(first * self.sequence_length, last * self.sequence_length)
            self._open[0].write(tokens[part].astype(self.dtype, copy=False))
            for file, bits_of_tokens in zip(self._open[1:], (starts, targets), strict=True):
                if file is not None and bits_of_tokens is not None:
                    file.write(np.packbits(bits_of_tokens[part], bitorder="little"))
            self._open_sequences += last - first
            first = last
            if self._open_sequences == self.shard_sequences:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._open is None:
            return
        tokens, starts, targets = self._open
        self.shards.append(
            Shard(
                num_sequences=self._open_sequences,
                tokens=tokens.close(),
                starts=starts.close() if starts is not None else None,
                targets=targets.close() if targets is not None else None,
            )
        )
        self._open, self._open_sequences = None, 0

    def abandon(self) -> None:
        """Close the open files, whose contents are discarded."""
        for file in self._open or ():
            if file is not None:
                with suppress(OSError):  # of a full disk, once more
                    file.stream.close()

    def close(self) -> SplitCounts:
        """Write the last whole sequences, drop the remaining tokens, sync every file, and return the counts."""
        if self._packing is not None:
            self._add_sequences(self._packing.rest())
        self._write_sequences()
        tokens = self._tokens[0]
        num_sequences = len(tokens) // self.sequence_length
        starts, targets = (bits[0] if bits else None for bits in (self._starts, self._targets))
        self._write(tokens, starts, targets, num_sequences)
        self._close_shard()
        dropped = len(tokens) - num_sequences * self.sequence_length
        return SplitCounts(
            documents=self._documents,
            tokens_in=self._tokens_in,
            tokens_packed=self._tokens_in - dropped,
            tokens_dropped=dropped,
            num_sequences=sum(shard.num_sequences for shard in self.shards),
            tokens_padding=self._padding,
            tokens_learned=None if self._packing is None else self._learned,
        )
