"""Where documents come from: files found by extension, and cut into chunks that worker processes read by themselves.

A chunk names a part of the source (files, a range of bytes) wherever a worker can read that part alone, and carries
the text itself only where the reader is sequential (compressed files, tables, the hub). Chunk sizes steer speed and
memory; what is made of the documents does not depend on them.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from moescale.errors import DataError, nearest

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KINDS = {".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet", ".arrow": "arrow"}
_MAX_FILES_PER_CHUNK = 512
_LONG_DOCUMENT_BYTES = 4 << 20
_SNIFFED_BYTES = 8192
_VALIDATED_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class WholeFiles:
    """Files of which each is one document."""

    paths: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class LineRange:
    """The JSON lines of a file that start at a byte in ``range(start, end)``."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Lines:
    """JSON lines of a compressed file."""

    path: str
    lines: Sequence[bytes]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Values of the text column; None where a row has none."""

    path: str
    texts: Sequence[str | None]


@dataclass(frozen=True, kw_only=True)
class LongFile:
    """A file that is one document, too long for one chunk: becomes several :class:`TextRange`."""

    path: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TextRange:
    """The bytes ``start .. end - 1`` of a long file."""

    path: str
    start: int
    end: int
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class NotText:
    """A long file that is not valid UTF-8."""

    path: str


ReadableChunk = WholeFiles | LineRange | Lines | Rows | TextRange | NotText
Chunk = ReadableChunk | LongFile


class Source(Protocol):
    """Documents in a fixed order."""

    kind: str
    name: str
    skipped: dict[str, int]
    """Number of files passed over, by reason."""

    @property
    def num_bytes(self) -> int | None:
        """Size of the text, None where it is known only when all is read."""
        ...

    def identity(self) -> list[list[str | int]]:
        """What must be equal for two runs to have read the same: a line per file, its name first."""
        ...

    def chunks(self, chunk_bytes: int) -> Iterator[Chunk]: ...


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source, and how it is read: "document", "lines", "parquet" or "arrow"."""

    path: Path
    name: str
    """Relative to the source folder."""
    kind: str
    num_bytes: int
    modified_ns: int


@dataclass(kw_only=True)
class LocalSource:
    """A file, a folder of files, or a folder written by ``datasets.save_to_disk``."""

    kind: str
    name: str
    text_column: str
    files: list[SourceFile]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int | None:
        if any(file.kind in ("parquet", "arrow") or _compression(file.path) for file in self.files):
            return None
        return sum(file.num_bytes for file in self.files)

    def identity(self) -> list[list[str | int]]:
        return [[file.name, file.num_bytes, file.modified_ns] for file in self.files]

    def chunks(self, chunk_bytes: int) -> Iterator[Chunk]:
        pending: list[str] = []
        pending_bytes = 0
        for file in self.files:
            is_long = file.num_bytes > _LONG_DOCUMENT_BYTES and _compression(file.path) is None
            if file.kind == "document" and not is_long:
                pending.append(str(file.path))
                pending_bytes += file.num_bytes
                if pending_bytes < chunk_bytes and len(pending) < _MAX_FILES_PER_CHUNK:
                    continue
            if pending:
                yield WholeFiles(paths=pending)
                pending, pending_bytes = [], 0
            if file.kind == "document" and is_long:
                yield _long_document(file)
            elif file.kind == "lines":
                yield from _line_chunks(file, chunk_bytes)
            elif file.kind in ("parquet", "arrow"):
                yield from row_chunks(str(file.path), _table_texts(file, self.text_column), chunk_bytes)
        if pending:
            yield WholeFiles(paths=pending)


def open_source(source: str, *, text_column: str, split: str, output: Path) -> Source:
    """Find what ``source`` names: a local path, else a dataset on the hub. ``output`` is left out of a folder.

    Raises:
        DataError: there is no such path or dataset, or nothing in it can be read as text.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _saved_dataset(path, text_column, split) or _folder(path, text_column, output)
    elif path.is_file():
        found = LocalSource(kind="file", name=str(path), text_column=text_column, files=[_file(path, path.name)])
    else:
        from moescale.data.hub import open_hub_dataset

        return open_hub_dataset(source, text_column=text_column, split=split)
    if not found.files:
        skipped = ", ".join(f"{count} {kind}" for kind, count in found.skipped.items()) or "it is empty"
        raise DataError(f"{path} holds no file to read ({skipped})")
    return found


def _folder(root: Path, text_column: str, output: Path) -> LocalSource:
    files: list[SourceFile] = []
    hidden = 0
    for folder, subfolders, names in os.walk(root):
        ours = {output.resolve(), staging_folder(output).resolve()}
        subfolders[:] = sorted(name for name in subfolders if (Path(folder) / name).resolve() not in ours)
        hidden += sum(name.startswith(".") for name in subfolders + names)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                files.append(_file(path, path.relative_to(root).as_posix()))
    files.sort(key=lambda file: file.name)
    return LocalSource(
        kind="folder",
        name=str(root),
        text_column=text_column,
        files=files,
        skipped={"hidden": hidden} if hidden else {},
    )


def staging_folder(output: Path) -> Path:
    """The hidden folder beside ``output`` in which it is made."""
    return output.parent / f".{output.name}.incomplete"


def _saved_dataset(root: Path, text_column: str, split: str) -> LocalSource | None:
    """Return the files of a folder that ``datasets.save_to_disk`` wrote, or None for any other folder."""
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
        if split not in splits:
            raise DataError(f"{root} has no split '{split}'{nearest(split, splits)} (it has {', '.join(splits)})")
        return _saved_dataset(root / split, text_column, split)
    if not (root / "state.json").is_file():
        return None
    names = [entry["filename"] for entry in json.loads((root / "state.json").read_bytes())["_data_files"]]
    for name in names:
        if not (root / name).is_file():
            raise DataError(f"{root / name} is missing, though {root / 'state.json'} lists it")
    return LocalSource(
        kind="saved dataset",
        name=str(root),
        text_column=text_column,
        files=[_file(root / name, name) for name in names],
    )


def _file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path=path, name=name, kind=_kind(path), num_bytes=status.st_size, modified_ns=status.st_mtime_ns)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".json":
        # The same extension names JSON Lines and single JSON documents of a source tree: the first line tells.
        return "lines" if _starts_with_a_record(path) else "document"
    return _KINDS.get(suffix, "document")


def _starts_with_a_record(path: Path) -> bool:
    with open_bytes(path) as stream:
        first = stream.readline(1 << 26).strip()
    if first in (b"{", b"[", b""):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _compression(path: Path) -> str | None:
    return _COMPRESSIONS.get(path.suffix.lower())


def open_bytes(path: Path | str) -> BinaryIO:
    """Open a file for reading, decompressed by its extension (.gz, .zst); reading a damaged one raises OSError."""
    compression = _compression(Path(path))
    if compression is None:
        return open(path, "rb", buffering=1 << 20)
    # Arrow's readers take files of several frames and notice a missing end; zstandard's stop there without a word.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20)


def _line_chunks(file: SourceFile, chunk_bytes: int) -> Iterator[Chunk]:
    path = str(file.path)
    if _compression(file.path) is None:
        for start in range(0, file.num_bytes, chunk_bytes):
            yield LineRange(path=path, start=start, end=min(start + chunk_bytes, file.num_bytes))
        return
    try:
        with open_bytes(path) as stream:
            while lines := stream.readlines(chunk_bytes):
                yield Lines(path=path, lines=lines)
    except OSError as error:
        raise DataError(f"{path} cannot be decompressed: {error}; it is damaged or not what its name says") from error


def looks_binary(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is no text: text has no zero bytes."""
    return b"\0" in head[:_SNIFFED_BYTES]


def _long_document(file: SourceFile) -> Chunk:
    """Read a long file once to make sure that all of it is text: its parts are used before its end is seen again."""
    path = str(file.path)
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
    return LongFile(path=path, num_bytes=file.num_bytes)


def row_chunks(path: str, texts: Iterable[str | None], chunk_bytes: int) -> Iterator[Chunk]:
    """Group the texts of a table, in order, into chunks of about ``chunk_bytes``."""
    pending: list[str | None] = []
    size = 0
    for text in texts:
        pending.append(text)
        size += 64 + len(text or "")
        if size >= chunk_bytes:
            yield Rows(path=path, texts=pending)
            pending, size = [], 0
    if pending:
        yield Rows(path=path, texts=pending)


def _table_texts(file: SourceFile, column: str) -> Iterator[str | None]:
    """Yield the text column of a Parquet or Arrow file, a record batch at a time."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if file.kind == "parquet":
            table = parquet.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False)
            _check_column(table.schema_arrow, column, file.path)
            batches: Iterable[pyarrow.RecordBatch] = table.iter_batches(batch_size=256, columns=[column])
        else:
            mapped = pyarrow.memory_map(str(file.path))
            is_file_format = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            if is_file_format:
                reader = ipc.open_file(mapped)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                reader = ipc.open_stream(mapped)
                batches = reader
            _check_column(reader.schema, column, file.path)
        for batch in batches:
            texts = batch.column(column)
            for start in range(0, len(texts), 256):
                yield from texts.slice(start, 256).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path} cannot be read as {file.kind}: {error}") from error


def _check_column(schema: Any, column: str, path: Path) -> None:
    import pyarrow.types

    if column not in schema.names:
        raise DataError(
            f"{path} has no column '{column}'{nearest(column, schema.names)} (it has {', '.join(schema.names)}); "
            "name the one with the text in text_column"
        )
    kind = schema.field(column).type
    text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(is_text(kind) for is_text in text):
        raise DataError(f"{path}: column '{column}' is of type {kind}; text_column must name a column of strings")
