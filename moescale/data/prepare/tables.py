"""Text columns of Parquet and Arrow files, a few rows at a time, checked before a value is looked at.

Runs in a process of its own (see ``table_process``). Arrow's readers believe offsets and indices, and a wrong one reads
whatever memory is there, or none. So every array is validated in full before its values are taken. What the format has
no checksum for, a flipped bit in the text of an uncompressed file say, cannot be noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from moescale.data.prepare.parquet_pages import largest_page_bytes
from moescale.errors import DataError, nearest

_ROWS = 256
_BATCH_BYTES = 16 << 20


def parquet_texts(path: str, column: str, memory_bytes: int) -> Iterator[str | bytes | None]:
    """Yield the text column of a Parquet file; bytes where a text is not valid UTF-8.

    Raises:
        DataError: it cannot be read, has no such column, or a page of it is larger than ``memory_bytes``.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        names = _column_path(file.schema_arrow, column, path)
        leaf = ".".join(names)
        largest = largest_page_bytes(path, file.metadata, leaf)
        if largest > memory_bytes:
            raise DataError(
                f"{path}: a page of column '{column}' takes {largest:,} bytes, more than prepare.memory_gigabytes "
                "allows; raise it, or write the file with smaller pages"
            )
        # A value may be as large as its page, and through a dictionary every row may have it.
        rows = max(1, min(_ROWS, _BATCH_BYTES // max(1, largest)))
        for batch in file.iter_batches(batch_size=rows, columns=[leaf], use_threads=False):
            yield from _texts_of(_leaf(batch, names))
    except MemoryError:  # which is an ArrowException, too, when Arrow raises it
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def arrow_texts(path: str, column: str) -> Iterator[str | bytes | None]:
    """Yield the text column of an Arrow file or stream; bytes where a text is not valid UTF-8."""
    import pyarrow
    from pyarrow import ipc

    try:
        mapped = pyarrow.memory_map(path)
        is_file_format = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        opened = (ipc.open_file if is_file_format else ipc.open_stream)(mapped)
        names = _column_path(opened.schema, column, path)
        options = ipc.IpcReadOptions(included_fields=[opened.schema.get_field_index(names[0])], use_threads=False)
        mapped.seek(0)
        if is_file_format:
            reader = ipc.open_file(mapped, options=options)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = ipc.open_stream(mapped, options=options)
        for batch in batches:
            yield from _texts_of(_leaf(batch, names))
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Arrow: {error}") from error


def _leaf(batch: Any, names: list[str]) -> Any:
    """Return the array of a column, or of a field of a nested one, whose buffers are as long as they must be."""
    array = batch.column(names[0])
    array.validate()
    for name in names[1:]:
        fields = [array.type.field(number).name for number in range(array.type.num_fields)]
        array = array.flatten()[fields.index(name)]
    return array


def _texts_of(texts: Any) -> Iterator[str | bytes | None]:
    import pyarrow.types

    if pyarrow.types.is_null(texts.type):  # a column of a file without any text, whatever other files have
        yield from [None] * len(texts)
        return
    if pyarrow.types.is_dictionary(texts.type):  # such as the categories of pandas
        known = list(_texts_of(texts.dictionary))
        indices = texts.indices
        indices.validate(full=True)
        for start in range(0, len(indices), _ROWS):
            for index in indices.slice(start, _ROWS).to_pylist():
                if index is not None and not 0 <= index < len(known):
                    raise pyarrow.ArrowInvalid(f"index {index} of a dictionary of {len(known)}")
                yield None if index is None else known[index]
        return
    # Validated as bytes: that a text is not UTF-8 is a fault of one row, counted as such.
    content = texts.view(_binary_type(texts.type))
    content.validate(full=True)
    for start in range(0, len(texts), _ROWS):
        yield from _values_of(texts.slice(start, _ROWS), content.slice(start, _ROWS))


def _binary_type(kind: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_large_string(kind):
        return pyarrow.large_binary()
    return pyarrow.binary_view() if pyarrow.types.is_string_view(kind) else pyarrow.binary()


def _values_of(texts: Any, content: Any) -> list[str | bytes | None]:
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in content.to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _column_path(schema: Any, column: str, path: str) -> list[str]:
    """Return the names that lead to the column: itself, or those of a dotted name through nested columns."""
    import pyarrow.types

    names = [column] if column in schema.names else column.split(".")
    if names[0] not in schema.names:
        raise DataError(
            f"{path} has no column '{column}'{nearest(column, schema.names)} (it has {', '.join(schema.names)}); "
            "name the one with the text in text_column"
        )
    kind = schema.field(names[0]).type
    for number, name in enumerate(names[1:], start=1):
        fields = _fields_of(kind)
        if name not in fields:
            raise DataError(
                f"{path}: column '{'.'.join(names[:number])}' has no field '{name}'{nearest(name, fields)} (it is of "
                f"type {kind}); name the one with the text in text_column"
            )
        kind = kind.field(name).type
    value_type = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view, pyarrow.types.is_null)
    if not any(is_text(value_type) for is_text in text):
        raise DataError(f"{path}: column '{column}' is of type {kind}; text_column must name a column of strings")
    return names


def _fields_of(kind: Any) -> Iterable[str]:
    import pyarrow.types

    return [kind.field(number).name for number in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
