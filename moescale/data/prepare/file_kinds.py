"""Determines the kind of a file by its extension, or by its first bytes if the extension is ambiguous."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from moescale.data.prepare.chat.conversations import form_of, known_forms
from moescale.data.prepare.compression import COMPRESSIONS, open_bytes
from moescale.data.prepare.readers import BYTE_ORDER_MARK
from moescale.data.prepare.record_files import delimiter_of, first_element, has_column, header_of
from moescale.errors import DataError

DOCUMENT, LINES, ARRAY, CSV, TSV, PARQUET, ARROW = "text", "JSON Lines", "JSON array", "CSV", "TSV", "Parquet", "Arrow"
RECORDS = frozenset({LINES, ARRAY, CSV, TSV, PARQUET, ARROW})
"""Kinds of which a field or column holds the documents."""
TABLES = frozenset({PARQUET, ARROW})
"""Kinds that a separate process reads (``table_process``)."""
_KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,
    ".csv": CSV,
    ".tsv": TSV,
    ".tab": TSV,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
_ABOUT_DATA = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "authors")
_BOOKKEEPING = frozenset(
    {
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "croissant.json",
        "md5sums",
        "sha256sums",
        "checksums.txt",
    }
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_FIRST_LINE_BYTES = 1 << 26


def kind_of(path: Path, text_column: str | None, *, is_named: bool) -> str | None:
    """Return the kind of a file; None for records without ``text_column``, which are not documents either.

    Args:
        text_column: None where records are to be conversations; then a file that holds no records has the kind None.
        is_named: the file itself was asked for. Then records that cannot be read are an error, not a file of another
            kind among those of a folder.

    Raises:
        DataError: the file is a Git LFS pointer or UTF-16, or is named and holds no records that can be read.
    """
    kind = _KINDS.get(_suffix(path), DOCUMENT)
    if kind == DOCUMENT:
        return _document_kind(path, text_column, is_named)
    try:
        with open_bytes(path) as stream:
            head = stream.read(64)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    check_head(head, path)
    if kind in (CSV, TSV):
        return _table_kind(path, kind, text_column, is_named)
    if kind == LINES:
        json_kind = _json_kind(path, head, text_column, is_named)
        return _document_kind(path, text_column, is_named) if json_kind == DOCUMENT else json_kind
    return kind


def _document_kind(path: Path, text_column: str | None, is_named: bool) -> str | None:
    if text_column is not None:
        return DOCUMENT
    if is_named:
        raise DataError(
            f"{path} holds no records, so no conversations; give JSON Lines, a JSON array, CSV, Parquet or Arrow with "
            f"one of these: {known_forms()}"
        )
    return None


def columns_of(file: Path, kind: str) -> list[str]:
    """Return the field names of the first record of a JSON or CSV file; none if it cannot be read."""
    if kind in (CSV, TSV):
        return header_of(file, delimiter_of(file, None))
    if kind == ARRAY:
        record = first_element(file)
    else:
        try:
            with open_bytes(file) as stream:
                record = json.loads(stream.readline(_FIRST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK))
        except (OSError, ValueError, RecursionError):  # a damaged file is named when it is read
            return []
    return list(record) if isinstance(record, dict) else []


def check_head(head: bytes, path: Path | str) -> None:
    """Raise DataError for a file of records whose first bytes contradict its kind."""
    problem = problem_of(head)
    if problem == "git_lfs_pointer":
        raise DataError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if problem == "utf16_text":
        raise DataError(f"{path} is UTF-16; convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`")


def problem_of(head: bytes) -> str | None:
    """Return the reason why a file that begins with ``head`` is not text, if its content shows one."""
    if head.startswith(_LFS_POINTER):
        return "git_lfs_pointer"
    return "utf16_text" if head.startswith(_UTF16) else None


def is_about_data(name: str) -> bool:
    """Return True if the name of a file in a dataset's folder is that of a description, not of documents."""
    base = name.rsplit("/", 1)[-1].lower()
    return base in _BOOKKEEPING or base.split(".")[0].split("-")[0].split("_")[0] in _ABOUT_DATA


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _table_kind(path: Path, kind: str, text_column: str | None, is_named: bool) -> str | None:
    names = header_of(path, delimiter_of(path, text_column))
    if text_column in names or (text_column is None and form_of(dict.fromkeys(names)) is not None):
        return kind
    if is_named and text_column is None:
        raise DataError(
            f"{path} has no columns of a conversation (it has {', '.join(names) or 'none'}); it needs one of these: "
            f"{known_forms()}"
        )
    if is_named:
        raise DataError(
            f"{path} has no column '{text_column}' (it has {', '.join(names) or 'none'}); name the one with the text "
            "in text_column"
        )
    return None


def _json_kind(path: Path, head: bytes, text_column: str | None, is_named: bool) -> str | None:
    """Tell JSON Lines from an array of records and from one document: a line with a whole object begins the first."""
    is_json_lines = _suffix(path) != ".json"
    begins = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if begins == b"[":
        element = first_element(path)
        if isinstance(element, dict):
            is_wanted = form_of(element) is not None if text_column is None else has_column(element, text_column)
            return ARRAY if is_named or is_wanted else None
        if is_named and not is_json_lines:
            raise DataError(f"{path} holds an array whose elements are not objects with a field '{text_column}'")
    if is_json_lines or _first_line_is_an_object(path):
        return LINES
    if is_named:
        raise DataError(
            f"{path} holds one JSON value over several lines; write one record per line or an array of records, or "
            "give it the extension .txt if all of it is one document"
        )
    return DOCUMENT


def _first_line_is_an_object(path: Path) -> bool:
    try:
        with open_bytes(path) as stream:
            first = stream.readline(_FIRST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK).strip()
        return first not in (b"{", b"[", b"") and isinstance(json.loads(first), dict)
    except (OSError, ValueError, RecursionError):  # a damaged file is named when it is read
        return False
