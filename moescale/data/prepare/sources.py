"""The sources of documents, and the order in which documents are read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

from moescale.data.corpus.manifest import FIRST_POSITIONS, BadItems
from moescale.data.prepare.chat.conversations import documents_line, form_of, known_forms
from moescale.data.prepare.compression import compression_of, window_bytes_of
from moescale.data.prepare.discovery import (
    EXCLUDED,
    OTHER_SPLIT,
    FoundFiles,
    SourceFile,
    Wanted,
    find_files,
    is_pattern,
)
from moescale.data.prepare.file_kinds import (
    ARRAY,
    ARROW,
    CSV,
    DOCUMENT,
    LINES,
    PARQUET,
    RECORDS,
    TABLES,
    TSV,
    columns_of,
)
from moescale.data.prepare.readers import line_chunks, long_document, record_chunks, row_chunks
from moescale.data.prepare.record_files import array_elements, csv_records, csv_texts
from moescale.data.prepare.settings import DEFAULT_TEXT_COLUMN, PrepareSettings
from moescale.data.prepare.table_process import COLUMN_NAMES, TableReader, TableRequest
from moescale.data.prepare.work_items import Chunk, PickledRows, WholeFiles
from moescale.errors import ConfigError, DataError

_MAX_FILES_PER_CHUNK = 512
_LONG_DOCUMENT_BYTES = 4 << 20
_CHAT_SETTINGS = ("loss_on", "too_long", "chat_template", "template_date")


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def skipped(self) -> dict[str, BadItems]:
        """Files passed over, by reason."""
        ...

    @property
    def read(self) -> dict[str, BadItems]:
        """Files that are read, by the way in which they are."""
        ...

    @property
    def notices(self) -> list[str]:
        """The interpretation of the records, one line each."""
        ...

    @property
    def num_bytes(self) -> int | None:
        """Size of the text; None if it is known only after reading."""
        ...

    @property
    def window_bytes(self) -> int:
        """Memory that a process which reads it takes beyond its share, for decompressing."""
        ...

    @property
    def holds_conversations(self) -> bool:
        """True if records are conversations, not texts."""
        ...

    @property
    def has_tables(self) -> bool:
        """True if a separate process reads part of it."""
        ...

    def identity(self) -> list[list[str | int]]:
        """Lines that are equal for two runs with the same input: one per file, beginning with its name."""
        ...

    def chunks(self, chunk_bytes: int, most_bytes: int) -> Iterator[Chunk]:
        """Yield the documents in order. Chunk sizes steer speed and memory, not what is made of the documents.

        Raises:
            DataError: a document that is read in one piece has more than ``most_bytes``.
        """
        ...


@dataclass(kw_only=True)
class LocalSource:
    """Files of this machine."""

    kind: str
    name: str
    text_column: str | None
    """None: records are conversations."""
    files: list[SourceFile]
    memory_bytes: int
    """Memory of the process that reads tables."""
    skipped: dict[str, BadItems] = field(default_factory=dict)
    other_form: str | None = None
    """The form of conversation that records have in addition to the text column."""

    @property
    def holds_conversations(self) -> bool:
        return self.text_column is None

    @property
    def notices(self) -> list[str]:
        if not any(file.kind in RECORDS for file in self.files):
            return []
        return [documents_line(self.text_column, self.other_form)]

    @property
    def read(self) -> dict[str, BadItems]:
        counted = FoundFiles()
        for file in self.files:
            counted.skip(file.kind, file.name)
        return counted.skipped

    @property
    def num_bytes(self) -> int | None:
        if any(file.kind in TABLES or compression_of(file.path) for file in self.files):
            return None
        return sum(file.num_bytes for file in self.files)

    @property
    def has_tables(self) -> bool:
        return any(file.kind in TABLES for file in self.files)

    @property
    def window_bytes(self) -> int:
        try:
            return max(map(window_bytes_of, (file.path for file in self.files)), default=0)
        except OSError as error:
            raise DataError(f"{error.filename or self.name} cannot be decompressed: {error}") from error

    def identity(self) -> list[list[str | int]]:
        return [[file.name, file.num_bytes, file.modified_ns] for file in self.files]

    def chunks(self, chunk_bytes: int, most_bytes: int) -> Iterator[Chunk]:
        with TableReader() as tables:
            yield from self._chunks(chunk_bytes, most_bytes, tables)

    def _chunks(self, chunk_bytes: int, most_bytes: int, tables: TableReader) -> Iterator[Chunk]:
        pending: list[str] = []
        pending_bytes = 0
        for file in self.files:
            is_long = file.num_bytes > _LONG_DOCUMENT_BYTES and compression_of(file.path) is None
            if file.kind == DOCUMENT and not is_long:
                pending.append(str(file.path))
                pending_bytes += file.num_bytes
                if pending_bytes < chunk_bytes and len(pending) < _MAX_FILES_PER_CHUNK:
                    continue
            if pending:
                yield WholeFiles(paths=pending)
                pending, pending_bytes = [], 0
            if file.kind != DOCUMENT:
                yield from self._records(file, chunk_bytes, most_bytes, tables)
            elif is_long:
                yield long_document(str(file.path), file.num_bytes)
        if pending:
            yield WholeFiles(paths=pending)

    def _records(self, file: SourceFile, chunk_bytes: int, most_bytes: int, tables: TableReader) -> Iterator[Chunk]:
        reader = _RECORD_READERS.get(file.kind)
        if reader is None:
            raise DataError(
                f"{file.path}: files of kind {file.kind} have no reader; known are {', '.join(_RECORD_READERS)}"
            )
        limits = _Limits(chunk_bytes=chunk_bytes, most_bytes=most_bytes, memory_bytes=self.memory_bytes)
        yield from reader(file, self.text_column, limits, tables)


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """Limits of a chunk's texts, of one text, and of the memory for reading."""

    chunk_bytes: int
    most_bytes: int
    memory_bytes: int


def _line_records(file: SourceFile, column: str | None, limits: _Limits, tables: TableReader) -> Iterator[Chunk]:
    return line_chunks(str(file.path), file.num_bytes, limits.chunk_bytes, limits.most_bytes)


def _array_records(file: SourceFile, column: str | None, limits: _Limits, tables: TableReader) -> Iterator[Chunk]:
    path = str(file.path)
    return record_chunks(path, array_elements(path, limits.most_bytes), limits.chunk_bytes)


def _csv_records(file: SourceFile, column: str | None, limits: _Limits, tables: TableReader) -> Iterator[Chunk]:
    path = str(file.path)
    texts = csv_records(path, limits.most_bytes) if column is None else csv_texts(path, column, limits.most_bytes)
    return row_chunks(path, texts, limits.chunk_bytes, limits.most_bytes)


def _table_records(file: SourceFile, column: str | None, limits: _Limits, tables: TableReader) -> Iterator[Chunk]:
    path = str(file.path)
    request = TableRequest(
        path=path,
        kind=file.kind,
        column=column,
        chunk_bytes=limits.chunk_bytes,
        memory_bytes=limits.memory_bytes,
        most_bytes=limits.most_bytes,
    )
    for content in tables.read(request):
        yield PickledRows(path=path, content=content)


_RECORD_READERS: dict[str, Callable[[SourceFile, str | None, _Limits, TableReader], Iterator[Chunk]]] = {
    LINES: _line_records,
    ARRAY: _array_records,
    CSV: _csv_records,
    TSV: _csv_records,
    PARQUET: _table_records,
    ARROW: _table_records,
}
"""By kind of file: the text column's values, or whole records where there is none (conversations)."""


@dataclass(kw_only=True)
class JoinedSource:
    """Several sources one after the other."""

    sources: Sequence[Source]
    kind: str = "several"

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def skipped(self) -> dict[str, BadItems]:
        return _added_up([source.skipped for source in self.sources])

    @property
    def read(self) -> dict[str, BadItems]:
        return _added_up([source.read for source in self.sources])

    @property
    def notices(self) -> list[str]:
        return list(dict.fromkeys(notice for source in self.sources for notice in source.notices))

    @property
    def num_bytes(self) -> int | None:
        sizes = [source.num_bytes for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def holds_conversations(self) -> bool:
        return any(source.holds_conversations for source in self.sources)

    @property
    def has_tables(self) -> bool:
        return any(source.has_tables for source in self.sources)

    @property
    def window_bytes(self) -> int:
        return max(source.window_bytes for source in self.sources)

    def identity(self) -> list[list[str | int]]:
        return [line for source in self.sources for line in source.identity()]

    def chunks(self, chunk_bytes: int, most_bytes: int) -> Iterator[Chunk]:
        for source in self.sources:
            yield from source.chunks(chunk_bytes, most_bytes)


def open_source(settings: PrepareSettings) -> Source:
    """Find what ``settings.source`` names: local paths and patterns, else datasets on the hub.

    Raises:
        DataError: there is no such path or dataset, or nothing in it can be read as text; with ``strict``, something
            in it is not read.
        ConfigError: a setting means nothing for this source.
    """
    wanted = _wanted(settings, settings.text_column)
    local_names = [name for name in settings.source if _is_local(name)]
    held = _Held() if settings.format is not None else _held_in(local_names, settings)
    if settings.format == "chat" or (held.form is not None and not held.has_text):
        wanted = _wanted(settings, None)
    opened: list[Source] = []
    local: list[str] = []
    for number, name in enumerate(settings.source):
        if _is_local(name):
            local.append(name)
            if number + 1 < len(settings.source) and _is_local(settings.source[number + 1]):
                continue
            found = find_files(local, wanted)
            opened.append(
                LocalSource(
                    kind=found.kind,
                    name=", ".join(local),
                    text_column=wanted.text_column,
                    files=found.files,
                    memory_bytes=int(settings.memory_gigabytes * 1e9),
                    skipped=found.skipped,
                    other_form=held.form,
                )
            )
            local = []
        else:
            from moescale.data.prepare.hub import open_hub_dataset

            opened.append(
                open_hub_dataset(
                    name, text_column=settings.text_column, split=settings.split or "train", format=settings.format
                )
            )
    source = opened[0] if len(opened) == 1 else JoinedSource(sources=opened)
    _check_settings(settings, opened)
    if len({one.holds_conversations for one in opened}) > 1:
        raise ConfigError(
            f"prepare.source ({source.name}) names conversations and texts, which do not go into one corpus; prepare "
            "them apart, or choose with --format"
        )
    return source


def _wanted(settings: PrepareSettings, text_column: str | None) -> Wanted:
    return Wanted(
        text_column=text_column,
        split=settings.split,
        include=settings.include,
        exclude=settings.exclude,
        output=settings.output,
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Columns found in the first records of files."""

    has_text: bool = False
    form: str | None = None
    """Form of the conversations."""


def _held_in(names: Sequence[str], settings: PrepareSettings) -> _Held:
    """Look for the text column and a conversation's columns in files; an error is left to their reading."""
    if not names or settings.text_column != DEFAULT_TEXT_COLUMN:
        return _Held()
    has_text, form = False, None
    try:
        with TableReader() as tables:
            for file in find_files(names, _wanted(settings, None)).files:
                columns = _columns_of(file, tables, settings)
                has_text |= settings.text_column in columns
                form = form or form_of(dict.fromkeys(columns))
                if has_text and form:
                    break
    except DataError:
        return _Held(has_text=has_text)
    return _Held(has_text=has_text, form=form)


def _columns_of(file: SourceFile, tables: TableReader, settings: PrepareSettings) -> list[str]:
    if file.kind not in TABLES:
        return columns_of(file.path, file.kind)
    request = TableRequest(
        path=str(file.path),
        kind=file.kind,
        column=COLUMN_NAMES,
        chunk_bytes=1 << 16,
        memory_bytes=int(settings.memory_gigabytes * 1e9),
        most_bytes=1 << 20,
    )
    return [name for names in tables.read(request) for name in pickle.loads(names)]


def _is_local(name: str) -> bool:
    return Path(name).expanduser().exists() or is_pattern(name)


def _check_settings(settings: PrepareSettings, opened: list[Source]) -> None:
    """Refuse settings that these sources cannot follow, and what ``strict`` forbids to pass over."""
    local = [source for source in opened if isinstance(source, LocalSource)]
    has_records = len(local) < len(opened) or any(file.kind in RECORDS for source in local for file in source.files)
    if settings.text_column != DEFAULT_TEXT_COLUMN and not has_records:
        raise ConfigError(
            f"prepare.text_column ('{settings.text_column}') means nothing for {', '.join(settings.source)}, which "
            "holds no tables or records: each of its files is one document; leave it out"
        )
    _check_chat_settings(settings, opened)
    if not settings.strict:
        return
    for source in opened:
        for reason, items in source.skipped.items():
            if reason == EXCLUDED or (reason == OTHER_SPLIT and settings.split is not None):
                continue  # as asked for
            remedy = "choose with --split" if reason == OTHER_SPLIT else "leave it out with --exclude"
            raise DataError(f"{items.first[0]}: not read: {reason} (strict); {remedy}")


def _check_chat_settings(settings: PrepareSettings, opened: list[Source]) -> None:
    """Refuse settings of conversations where there are none, and a text column where there are conversations."""
    if all(source.holds_conversations for source in opened):
        if settings.text_column != DEFAULT_TEXT_COLUMN:
            raise ConfigError(
                f"prepare.text_column ('{settings.text_column}') means nothing for conversations; leave it out, or "
                "give --format text"
            )
        return
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in _CHAT_SETTINGS and value != item.default:
            has_both = any(isinstance(source, LocalSource) and source.other_form for source in opened)
            if settings.format == "text":
                remedy = f"; drop --format text or --{item.name.replace('_', '-')}"
            elif has_both:
                remedy = ", since the first records have the field 'text', too; give --format chat"
            else:
                remedy = (
                    f": the first records have none of these: {known_forms()}; give --format chat to see which rows"
                )
            raise ConfigError(
                f"prepare.{item.name} ({value}) is about conversations, and {', '.join(settings.source)} is read as "
                f"plain text{remedy}"
            )


def _added_up(accounts: Sequence[dict[str, BadItems]]) -> dict[str, BadItems]:
    total: dict[str, BadItems] = {}
    for account in accounts:
        for reason, items in account.items():
            known = total.get(reason, BadItems(count=0, first=[]))
            total[reason] = replace(
                known, count=known.count + items.count, first=[*known.first, *items.first][:FIRST_POSITIONS]
            )
    return total
