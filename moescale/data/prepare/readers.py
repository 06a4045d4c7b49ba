"""The files of a source as work items: lines, records, rows, and long texts."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from moescale.data.prepare.compression import compression_of, open_bytes
from moescale.data.prepare.memory_budget import check_document_bytes
from moescale.data.prepare.work_items import Chunk, LineRange, Lines, LongFile, NotText, Rows, WholeFiles
from moescale.errors import DataError

BYTE_ORDER_MARK = codecs.BOM_UTF8
"""Byte order mark, which some programs write at the beginning of a file; in JSON Lines it is not part of a record."""
_SNIFFED_BYTES = 8192
_VALIDATED_BYTES = 1 << 16


def line_chunks(path: str, num_bytes: int, chunk_bytes: int, most_bytes: int) -> Iterator[Chunk]:
    """Cut a JSON Lines file of ``num_bytes`` into chunks of about ``chunk_bytes``.

    Raises:
        DataError: it is compressed and damaged, or has a line of more than ``most_bytes``.
    """
    if compression_of(path) is None:
        for start in range(0, num_bytes, chunk_bytes):
            yield LineRange(path=path, start=start, end=min(start + chunk_bytes, num_bytes))
        return
    try:
        with open_bytes(path) as stream:
            lines: list[bytes] = []
            size, is_first = 0, True
            while line := stream.readline(most_bytes + 1):
                check_document_bytes(path, len(line), most_bytes)
                lines.append(line.removeprefix(BYTE_ORDER_MARK) if is_first else line)
                size, is_first = size + len(line), False
                if size >= chunk_bytes:
                    yield Lines(path=path, lines=lines)
                    lines, size = [], 0
            if lines:
                yield Lines(path=path, lines=lines)
    except OSError as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from error


def record_chunks(path: str, records: Iterable[bytes], chunk_bytes: int) -> Iterator[Chunk]:
    """Group records, each the JSON text of one, into chunks of about ``chunk_bytes``."""
    pending: list[bytes] = []
    size = 0
    for record in records:
        pending.append(record)
        size += 64 + len(record)
        if size >= chunk_bytes:
            yield Lines(path=path, lines=pending)
            pending, size = [], 0
    if pending:
        yield Lines(path=path, lines=pending)


def looks_binary(head: bytes) -> bool:
    """Return True if a file that begins with ``head`` is not text: text has no zero bytes."""
    return b"\0" in head[:_SNIFFED_BYTES]


def long_document(path: str, num_bytes: int) -> Chunk:
    """Read a long file once to make sure that all of it is text: its parts are used before its end is seen again."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as stream:
            content = stream.read(_VALIDATED_BYTES)
            if looks_binary(content):
                return WholeFiles(paths=[path])  # counted there
            while content:
                decoder.decode(content)
                content = stream.read(_VALIDATED_BYTES)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return NotText(path=path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return LongFile(path=path, num_bytes=num_bytes)


def row_chunks(path: str, texts: Iterable[str | bytes | None], chunk_bytes: int, most_bytes: int) -> Iterator[Chunk]:
    """Group the texts of a table, in order, into chunks of about ``chunk_bytes``.

    Raises:
        DataError: a text has more than ``most_bytes``.
    """
    pending: list[str | bytes | None] = []
    size = 0
    for text in texts:
        check_document_bytes(path, len(text or ""), most_bytes)
        pending.append(text)
        size += 64 + len(text or "")
        if size >= chunk_bytes:
            yield Rows(path=path, texts=pending)
            pending, size = [], 0
    if pending:
        yield Rows(path=path, texts=pending)
