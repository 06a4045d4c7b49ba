"""Reading the files of a source: decompression, lines, tables, and long texts."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moescale.data.prepare.work_items import Chunk, LineRange, Lines, LongFile, NotText, Rows, WholeFiles
from moescale.errors import DataError, nearest

BYTE_ORDER_MARK = codecs.BOM_UTF8
"""Which some programs write at the beginning of a file; in JSON Lines it is no part of the first record."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SNIFFED_BYTES = 8192
_VALIDATED_BYTES = 1 << 16


def compression_of(path: Path | str) -> str | None:
    """Return the compression that the extension names, or None."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def open_bytes(path: Path | str) -> BinaryIO:
    """Open a file for reading, decompressed by its extension (.gz, .zst); reading a damaged one raises OSError."""
    compression = compression_of(path)
    if compression is None:
        return open(path, "rb", buffering=1 << 20)
    # Arrow's readers take files of several frames and notice a missing end; zstandard's stop there without a word.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20)


def line_chunks(path: str, num_bytes: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Cut a JSON Lines file of ``num_bytes`` into chunks of about ``chunk_bytes``."""
    if compression_of(path) is None:
        for start in range(0, num_bytes, chunk_bytes):
            yield LineRange(path=path, start=start, end=min(start + chunk_bytes, num_bytes))
        return
    try:
        with open_bytes(path) as stream:
            is_first = True
            while lines := stream.readlines(chunk_bytes):
                if is_first:
                    lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
                    is_first = False
                yield Lines(path=path, lines=lines)
    except OSError as error:
        raise DataError(f"{path} cannot be decompressed: {error}; it is damaged or not what its name says") from error


def looks_binary(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is no text: text has no zero bytes."""
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


def row_chunks(path: str, texts: Iterable[str | bytes | None], chunk_bytes: int) -> Iterator[Chunk]:
    """Group the texts of a table, in order, into chunks of about ``chunk_bytes``."""
    pending: list[str | bytes | None] = []
    size = 0
    for text in texts:
        pending.append(text)
        size += 64 + len(text or "")
        if size >= chunk_bytes:
            yield Rows(path=path, texts=pending)
            pending, size = [], 0
    if pending:
        yield Rows(path=path, texts=pending)


def table_texts(path: str, kind: str, column: str) -> Iterator[str | bytes | None]:
    """Yield the text column of a Parquet or Arrow file, a record batch at a time; bytes that are no UTF-8 as bytes."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if kind == "parquet":
            table = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            _check_column(table.schema_arrow, column, path)
            batches: Iterable[pyarrow.RecordBatch] = table.iter_batches(batch_size=256, columns=[column])
        else:
            mapped = pyarrow.memory_map(path)
            is_file_format = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            if is_file_format:
                reader = ipc.open_file(mapped)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                reader = ipc.open_stream(mapped)
                batches = reader
            _check_column(reader.schema, column, path)
        for batch in batches:
            texts = batch.column(column)
            for start in range(0, len(texts), 256):
                yield from _values_of(texts.slice(start, 256))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def _values_of(texts: Any) -> list[str | bytes | None]:
    """Return an Arrow array of strings as a list, with bytes where a string is not valid UTF-8, which Arrow allows."""
    import pyarrow.types

    if pyarrow.types.is_dictionary(texts.type):  # such as the categories of pandas
        texts = texts.dictionary_decode()
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in texts.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _check_column(schema: Any, column: str, path: str) -> None:
    import pyarrow.types

    if column not in schema.names:
        raise DataError(
            f"{path} has no column '{column}'{nearest(column, schema.names)} (it has {', '.join(schema.names)}); "
            "name the one with the text in text_column"
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(is_text(kind) for is_text in text):
        raise DataError(f"{path}: column '{column}' is of type {kind}; text_column must name a column of strings")
