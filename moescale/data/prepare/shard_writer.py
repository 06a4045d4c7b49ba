"""Writing packed sequences: flat files of tokens, with a bit per token for document starts where asked.

``train-00000.bin`` holds whole sequences one after the other, little-endian uint16 or uint32; ``train-00000.starts``
holds one bit per token, first token in the lowest bit, set where a document begins.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moescale.data.corpus.manifest import Shard, SplitCounts, WrittenFile
from moescale.data.prepare.atomic_folder import writing

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
    ) -> None:
        self.folder = folder
        self.split = split
        self.sequence_length = sequence_length
        self.dtype = dtype
        self.document_boundaries = document_boundaries
        # A multiple of eight sequences, so that every shard's bits end on a byte.
        self.shard_sequences = max(8, _SHARD_TOKENS // sequence_length // 8 * 8)
        self.shards: list[Shard] = []
        self._open: tuple[_HashedFile, _HashedFile | None] | None = None
        self._open_sequences = 0
        self._tokens: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._pending = 0
        self._documents = 0
        self._tokens_in = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, continues: bool) -> None:
        """Append documents: ``tokens`` [sum(lengths)], ``lengths`` int64 [documents].

        With ``continues`` the first of them is the rest of the one added last.
        """
        self._documents += len(lengths) - continues
        self._tokens_in += len(tokens)
        self._tokens.append(tokens)
        if self.document_boundaries:
            starts = np.zeros(len(tokens), dtype=bool)
            starts[(np.cumsum(lengths) - lengths)[int(continues) :]] = True
            self._starts.append(starts)
        self._pending += len(tokens)
        if self._pending >= _WRITE_TOKENS:
            self._write_sequences()

    def _write_sequences(self) -> None:
        tokens = np.concatenate(self._tokens) if self._tokens else np.empty(0, self.dtype)
        starts = np.concatenate(self._starts) if self._starts else None
        # Bits are packed eight tokens to a byte, so only multiples of eight sequences can be written before the end.
        num_sequences = len(tokens) // self.sequence_length
        self._write(tokens, starts, num_sequences // 8 * 8)
        written = num_sequences // 8 * 8 * self.sequence_length
        self._tokens = [tokens[written:]]
        self._starts = [] if starts is None else [starts[written:]]
        self._pending = len(tokens) - written

    def _write(self, tokens: np.ndarray, starts: np.ndarray | None, num_sequences: int) -> None:
        first = 0
        while first < num_sequences:
            if self._open is None:
                name = f"{self.split}-{len(self.shards):05d}"
                bits = _HashedFile(self.folder / f"{name}.starts") if self.document_boundaries else None
                self._open = _HashedFile(self.folder / f"{name}.bin"), bits
            last = min(num_sequences, first + self.shard_sequences - self._open_sequences)
            part = slice(first * self.sequence_length, last * self.sequence_length)
            self._open[0].write(tokens[part].astype(self.dtype, copy=False))
            if self._open[1] is not None and starts is not None:
                self._open[1].write(np.packbits(starts[part], bitorder="little"))
            self._open_sequences += last - first
            first = last
            if self._open_sequences == self.shard_sequences:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._open is None:
            return
        tokens, starts = self._open
        self.shards.append(
            Shard(
                num_sequences=self._open_sequences,
                tokens=tokens.close(),
                starts=starts.close() if starts is not None else None,
            )
        )
        self._open, self._open_sequences = None, 0

    def abandon(self) -> None:
        """Close the open files; what they hold is not wanted any more."""
        for file in self._open or ():
            if file is not None:
                with suppress(OSError):  # of a full disk, once more
                    file.stream.close()

    def close(self) -> SplitCounts:
        """Write the last whole sequences, drop what is left over, sync every file, and return the accounts."""
        self._write_sequences()
        tokens = self._tokens[0]
        num_sequences = len(tokens) // self.sequence_length
        self._write(tokens, self._starts[0] if self._starts else None, num_sequences)
        self._close_shard()
        dropped = len(tokens) - num_sequences * self.sequence_length
        return SplitCounts(
            documents=self._documents,
            tokens_in=self._tokens_in,
            tokens_packed=self._tokens_in - dropped,
            tokens_dropped=dropped,
            num_sequences=sum(shard.num_sequences for shard in self.shards),
        )
