"""Reads Parquet and Arrow files: columns, texts, and conversations as JSON objects.

Runs in the process that ``table_process`` starts.

Arrow gives every struct of a column all fields that any of them has. So a field of a struct that is null counts as one
that is not there, as it was before it became a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moescale.data.prepare.chat.conversations import COLUMNS, form_of, known_forms
from moescale.data.prepare.file_kinds import ARROW, PARQUET
from moescale.data.prepare.parquet_pages import largest_page_bytes
from moescale.data.prepare.tables import arrow_texts, parquet_texts
from moescale.errors import DataError

_ROWS = 64


def table_columns(path: str, kind: str) -> list[str]:
    """Return the names of a table's columns."""
    import pyarrow

    try:
        return list(_FORMATS[kind].schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def table_records(path: str, kind: str, *, memory_bytes: int) -> Iterator[str]:
    """Yield a JSON object for every row.

    Raises:
        DataError: it cannot be read, or has no columns of a conversation, or a page larger than ``memory_bytes``.
    """
    import pyarrow

    try:
        names = list(_FORMATS[kind].schema(path).names)
        if form_of(dict.fromkeys(names)) is None:
            raise DataError(
                f"{path} has no columns of a conversation (it has {', '.join(names)}); it needs one of these: "
                f"{known_forms()}"
            )
        wanted = [name for name in names if name in COLUMNS]
        for batch in _FORMATS[kind].batches(path, wanted, memory_bytes):
            for start in range(0, batch.num_rows, _ROWS):
                rows = batch.slice(start, _ROWS)
                rows.validate(full=True)
                for row in rows.to_pylist():
                    yield json.dumps(_without_nulls(row), default=str)
    except MemoryError:  # which is an ArrowException, too, when Arrow raises it
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def table_texts(path: str, kind: str, column: str, *, memory_bytes: int) -> Iterator[str | bytes | None]:
    """Yield the texts of ``column``; bytes if a text is not valid UTF-8. Raises DataError, as ``tables`` does."""
    return _FORMATS[kind].texts(path, column, memory_bytes)


def _parquet_schema(path: str) -> Any:
    from pyarrow import parquet

    return parquet.read_schema(path)


def _arrow_schema(path: str) -> Any:
    return _opened(path).schema


def _opened(path: str) -> Any:
    import pyarrow
    from pyarrow import ipc

    mapped = pyarrow.memory_map(path)
    is_file_format = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return (ipc.open_file if is_file_format else ipc.open_stream)(mapped)


def _arrow_batches(path: str, columns: list[str], memory_bytes: int) -> Iterator[Any]:
    opened = _opened(path)
    is_file_format = hasattr(opened, "num_record_batches")
    batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file_format else opened
    yield from (batch.select(columns) for batch in batches)


def _parquet_batches(path: str, columns: list[str], memory_bytes: int) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    for leaf in leaves:
        if leaf.split(".")[0] in columns and largest_page_bytes(path, file.metadata, leaf) > memory_bytes:
            raise DataError(
                f"{path}: a page of column '{leaf}' takes more than prepare.memory_gigabytes allows; raise it, or "
                "write the file with smaller pages"
            )
    yield from file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)


def _arrow_texts(path: str, column: str, memory_bytes: int) -> Iterator[str | bytes | None]:
    return arrow_texts(path, column)


@dataclass(frozen=True, kw_only=True)
class _Format:
    """Reader of files of a kind; ``memory_bytes`` limits a piece that is read at once."""

    schema: Callable[[str], Any]
    """(path)"""
    batches: Callable[[str, list[str], int], Iterator[Any]]
    """(path, columns, memory_bytes)"""
    texts: Callable[[str, str, int], Iterator[str | bytes | None]]
    """(path, column, memory_bytes)"""


_FORMATS = {
    PARQUET: _Format(schema=_parquet_schema, batches=_parquet_batches, texts=parquet_texts),
    ARROW: _Format(schema=_arrow_schema, batches=_arrow_batches, texts=_arrow_texts),
}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
