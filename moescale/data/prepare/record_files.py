"""Files of records that are not one per line: CSV and TSV, and arrays of JSON objects; and fields of records."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from moescale.data.prepare.chat.conversations import form_of
from moescale.data.prepare.compression import open_bytes
from moescale.data.prepare.memory_budget import check_document_bytes
from moescale.data.prepare.readers import BYTE_ORDER_MARK
from moescale.errors import DataError

_DELIMITERS = (",", ";", "\t", "|")
_LONGEST_FIRST_BYTES = 1 << 26
"""Limit of a header, or of an element of an array, that is read to determine the kind of a file."""
_PIECE_BYTES = 1 << 20
_STRUCTURE = re.compile(rb'["\[\]{},]')
_STRING_END = re.compile(rb'["\\]')
_find_undecoded = re.compile("[\udc80-\udcff]").search
_SPACE = b" \t\r\n"


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """Return the field ``column`` of a record; a dotted name that is not a field leads through nested records."""
    if column in record or "." not in column:
        return record.get(column)
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def has_column(record: Mapping[str, Any], column: str) -> bool:
    return column in record or value_at(record, column) is not None


def delimiter_of(path: Path | str, column: str | None) -> str:
    """Return what separates the fields of a table of text: that which makes ``column`` one of the header's names.

    ``column`` is None where the header is to be that of a conversation.
    """
    if ".tsv" in Path(path).suffixes or ".tab" in Path(path).suffixes:
        return "\t"
    if column is None:
        headers = {mark: dict.fromkeys(header_of(path, mark)) for mark in _DELIMITERS}
        return next((mark for mark, header in headers.items() if form_of(header) is not None), ",")
    return next((mark for mark in _DELIMITERS if column in header_of(path, mark)), ",")


def header_of(path: Path | str, delimiter: str) -> list[str]:
    """Return the names in the first row of a table of text."""
    with closing(_rows(path, delimiter, _LONGEST_FIRST_BYTES)) as rows:
        return next(rows, [])


def csv_texts(path: str, column: str, most_bytes: int) -> Iterator[str | bytes | None]:
    """Yield a column of a CSV or TSV file: None where a row has no such field, bytes where it is not valid UTF-8.

    Raises:
        DataError: a field has more than ``most_bytes``, or the file is damaged.
    """
    with closing(_rows(path, delimiter_of(path, column), most_bytes)) as rows:
        names = next(rows, [])
        place = names.index(column)
        for row in rows:
            if len(row) != len(names):
                yield None
            else:
                text = row[place]
                yield text.encode(errors="surrogateescape") if _find_undecoded(text) else text


def csv_records(path: str, most_bytes: int) -> Iterator[str | bytes | None]:
    """Yield the rows of a CSV or TSV file as JSON objects: None and bytes as :func:`csv_texts`."""
    with closing(_rows(path, delimiter_of(path, None), most_bytes)) as rows:
        names = next(rows, [])
        for row in rows:
            if len(row) != len(names):
                yield None
            elif any(map(_find_undecoded, row)):
                yield "".join(row).encode(errors="surrogateescape")
            else:
                yield json.dumps(dict(zip(names, row, strict=True)))


def _rows(path: Path | str, delimiter: str, most_bytes: int) -> Generator[list[str], None, None]:
    csv.field_size_limit(most_bytes)  # of the whole process; the library's own limit is 128 KiB
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            lines = _bounded_lines(path, text, most_bytes)
            yield from (row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table of text: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _bounded_lines(path: Path | str, text: io.TextIOWrapper, most_bytes: int) -> Iterator[str]:
    while line := text.readline(most_bytes + 1):
        check_document_bytes(str(path), len(line), most_bytes)
        yield line


def first_element(path: Path | str) -> Any:
    """Return the first element of a file that holds a JSON array; None if it is not valid."""
    try:
        return json.loads(next(array_elements(str(path), _LONGEST_FIRST_BYTES), b"null"))
    except (DataError, ValueError, RecursionError):
        return None


def array_elements(path: str, most_bytes: int) -> Iterator[bytes]:
    """Yield the elements of a JSON array, unparsed, holding one at a time.

    Raises:
        DataError: the file ends within the array, or goes on after it; an element has more than ``most_bytes``.
    """
    try:
        with open_bytes(path) as stream:
            yield from _elements(path, iter(lambda: stream.read(_PIECE_BYTES), b""), most_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _elements(path: str, pieces: Iterable[bytes], most_bytes: int) -> Iterator[bytes]:
    element: list[bytes] = []
    size = 0
    depth, in_string, is_escaped, is_closed = 0, False, False, False
    for number, piece in enumerate(pieces):
        piece = piece.removeprefix(BYTE_ORDER_MARK) if number == 0 else piece
        begin = place = 0
        if is_closed and piece.strip(_SPACE):
            raise DataError(f"{path} goes on after its JSON array; write one record per line")
        while place < len(piece):
            if is_escaped:
                is_escaped, place = False, place + 1
                continue
            found = (_STRING_END if in_string else _STRUCTURE).search(piece, place)
            if found is None:
                break
            mark, place = found.group(), found.end()
            if in_string:
                in_string, is_escaped = mark != b'"', mark == b"\\"
            elif mark == b'"':
                in_string = True
            elif mark in b"[{":
                depth += 1
                begin = place if depth == 1 else begin
            elif mark == b"," and depth != 1:
                continue
            else:
                depth -= mark != b","
                if depth > 1 or (depth == 1 and mark != b","):
                    continue
                element.append(piece[begin : place - 1])
                whole, element, begin = b"".join(element).strip(_SPACE), [], place
                size = 0
                check_document_bytes(path, len(whole), most_bytes)
                if whole or mark == b",":
                    yield whole
                if depth == 0:
                    is_closed = True
                    if piece[place:].strip(_SPACE):
                        raise DataError(f"{path} goes on after its JSON array; write one record per line")
                    break
        if not is_closed:
            element.append(piece[begin:])
            size += len(piece) - begin
            check_document_bytes(path, size, most_bytes)
    if not is_closed:
        raise DataError(f"{path} ends within its JSON array: it is damaged or was not written to the end")
