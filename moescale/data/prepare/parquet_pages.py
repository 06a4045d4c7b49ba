"""Reads the sizes of a Parquet column's pages from their headers: a reader holds one decompressed page at a time.

The file's footer has sums only. A page header is a Thrift struct in the compact protocol (parquet.thrift, PageHeader):
field 2 is the size of the page decompressed, field 3 as it is in the file.
"""

from __future__ import annotations

from typing import Any, BinaryIO

_STRUCT, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET = 12, 1, 2, 3, 7, 8, 9, 10
_HEADER_BYTES = 1 << 16


def largest_page_bytes(path: str, metadata: Any, column: str) -> int:
    """Return the size of the largest page of ``column``, decompressed.

    Raises:
        OSError: the page headers are damaged.
    """
    largest = 0
    with open(path, "rb", buffering=0) as file:
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for number in range(row_group.num_columns):
                chunk = row_group.column(number)
                if chunk.path_in_schema == column:
                    largest = max(largest, _largest_in_chunk(file, chunk))
    return largest


def _largest_in_chunk(file: BinaryIO, chunk: Any) -> int:
    starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
    place = min(start for start in starts if start is not None)
    end = place + chunk.total_compressed_size
    largest = 0
    while place < end:
        file.seek(place)
        header = _Header(file.read(min(_HEADER_BYTES, end - place)))
        try:
            fields, length = header.read()
            uncompressed, compressed = fields[2], fields[3]
        except (IndexError, KeyError, RecursionError) as error:
            raise OSError(f"the page header at byte {place} is damaged") from error
        if compressed < 0 or uncompressed < 0:
            raise OSError(f"the page header at byte {place} is damaged")
        largest = max(largest, uncompressed)
        place += length + compressed
    return largest


class _Header:
    """Reads the whole-number fields of one Thrift struct, and skips the others."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._place = 0

    def read(self) -> tuple[dict[int, int], int]:
        """Return the struct's whole numbers by field, and its length in bytes."""
        return self._struct(0), self._place

    def _byte(self) -> int:
        self._place += 1
        return self._content[self._place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _struct(self, depth: int) -> dict[int, int]:
        if depth > 8:
            raise RecursionError
        fields: dict[int, int] = {}
        field = 0
        while header := self._byte():
            field = field + (header >> 4) if header >> 4 else self._zigzag()
            value = self._value(header & 0xF, depth)
            if value is not None:
                fields[field] = value
        return fields

    def _value(self, kind: int, depth: int) -> int | None:
        if kind in (_TRUE, _FALSE):
            return None
        if kind == _STRUCT:
            self._struct(depth + 1)
        elif kind == _BINARY:
            length = self._varint()  # which moves on by itself
            self._place += length
        elif kind == _DOUBLE:
            self._place += 8
        elif kind == _BYTE:
            self._place += 1
        elif kind in (_LIST, _SET):
            header = self._byte()
            size = header >> 4 if header >> 4 < 15 else self._varint()
            for _ in range(size):
                self._value(header & 0xF, depth + 1)
        else:
            return self._zigzag()
        return None
