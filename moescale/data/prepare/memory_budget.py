"""Chooses the number of `prepare`'s processes and the sizes of their work, to stay within the memory limit."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moescale.data.prepare.settings import PrepareSettings
from moescale.errors import ConfigError, DataError

# Measured as proportional set sizes on Linux, and rounded up (tests/data/test_memory.py holds the sum to the bound).
_PROCESS_BYTES = 140_000_000
"""Interpreter, libraries, a full table of words and one text part in the works."""
_VOCABULARY_ENTRY_BYTES = 800
"""Memory of a tokenizer per token of its vocabulary."""
_BYTES_PER_CHUNK_BYTE = 16
"""Memory of a chunk in flight, per byte: bytes, strings and tokens, in two processes and in the pipe between them."""
_TABLE_READER_BYTES = 150_000_000
"""Memory of the process that reads Parquet and Arrow files, with a batch of ordinary rows."""
_PACKING_BYTES = 140_000_000
"""Maximum memory of a split's packing window, for conversations of 128 tokens."""
_BYTES_PER_DOCUMENT_BYTE = 8
"""A document is bytes, text, and tokens in parts and in one piece; measured 4.5 times its size."""
_IN_FLIGHT_PER_WORKER = 3
_LEAST_CHUNK_BYTES = 1 << 17
_MOST_CHUNK_BYTES = 1 << 20
_SMALL_SOURCE_BYTES = 4 << 20
"""Below this a source is tokenised sooner than worker processes have started."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    num_workers: int
    """1: everything happens in the calling process."""
    memory_limited: bool
    """True if more memory would allow more workers."""
    chunk_bytes: int
    max_in_flight: int
    """Maximum number of chunks that are started and not yet written."""
    most_document_bytes: int
    """Limit of a document that is read in one piece; every worker may hold one."""


def resources_for(
    settings: PrepareSettings,
    *,
    vocabulary_size: int,
    source_bytes: int | None,
    window_bytes: int = 0,
    has_tables: bool = False,
    packed_splits: int = 0,
) -> Resources:
    """Share out ``settings.memory_gigabytes``: first to processes, then to the size of their chunks.

    ``window_bytes`` is what any of them may take besides, to decompress what it reads; with ``has_tables`` there is one
    more process, which reads these. ``packed_splits`` of conversations are packed by the calling process.

    Raises:
        ConfigError: it is less than one process needs.
    """
    reader_bytes = _TABLE_READER_BYTES if has_tables else 0
    packing_bytes = packed_splits * _PACKING_BYTES
    budget = int(settings.memory_gigabytes * 1e9) - reader_bytes - packing_bytes
    process_bytes = _PROCESS_BYTES + _VOCABULARY_ENTRY_BYTES * vocabulary_size + window_bytes
    worker_bytes = process_bytes + _IN_FLIGHT_PER_WORKER * _LEAST_CHUNK_BYTES * _BYTES_PER_CHUNK_BYTE
    if budget < worker_bytes:
        window = f", with a window of {window_bytes:,} bytes to decompress a .zst file" if window_bytes else ""
        raise ConfigError(
            f"prepare.memory_gigabytes ({settings.memory_gigabytes}) must be at least "
            f"{(worker_bytes + reader_bytes + packing_bytes) / 1e9:.2f}: one process with this tokenizer's "
            f"vocabulary of {vocabulary_size:,} needs that{window}"
        )
    cores = settings.num_workers or len(os.sched_getaffinity(0))
    if settings.num_workers is None and source_bytes is not None and source_bytes < _SMALL_SOURCE_BYTES:
        cores = 1
    affordable = max(1, (budget - process_bytes) // worker_bytes)  # the parent takes a process's share, too
    num_workers = min(cores, affordable)
    max_in_flight = _IN_FLIGHT_PER_WORKER * num_workers
    num_processes = 1 if num_workers == 1 else num_workers + 1
    chunk_bytes = (budget - process_bytes * num_processes) // max_in_flight // _BYTES_PER_CHUNK_BYTE
    return Resources(
        num_workers=num_workers,
        memory_limited=num_workers < cores,
        chunk_bytes=min(max(chunk_bytes, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES),
        max_in_flight=max_in_flight,
        most_document_bytes=budget // _BYTES_PER_DOCUMENT_BYTE // num_workers,
    )


def check_document_bytes(path: str, num_bytes: int, most_bytes: int) -> None:
    """Raise DataError if a document, or the part read so far, has more than ``most_bytes``."""
    if num_bytes > most_bytes:
        raise DataError(
            f"{path}: a document has more than {most_bytes:,} bytes, which takes more than prepare.memory_gigabytes "
            "allows; raise it, start fewer processes with --num-workers, or make the document a text file of its own, "
            "which is read in parts"
        )
