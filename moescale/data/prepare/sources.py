"""Where documents come from: files and folders, sorted out by extension, and the order in which they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moescale.data.prepare.atomic_folder import staging_folder
from moescale.data.prepare.readers import (
    COMPRESSIONS,
    compression_of,
    line_chunks,
    long_document,
    open_bytes,
    row_chunks,
    table_texts,
)
from moescale.data.prepare.work_items import Chunk, WholeFiles
from moescale.errors import DataError, nearest

_KINDS = {".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet", ".arrow": "arrow"}
_MAX_FILES_PER_CHUNK = 512
_LONG_DOCUMENT_BYTES = 4 << 20


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

    def chunks(self, chunk_bytes: int) -> Iterator[Chunk]:
        """Yield the documents in order. Chunk sizes steer speed and memory, not what is made of the documents."""
        ...


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
        if any(file.kind in ("parquet", "arrow") or compression_of(file.path) for file in self.files):
            return None
        return sum(file.num_bytes for file in self.files)

    def identity(self) -> list[list[str | int]]:
        return [[file.name, file.num_bytes, file.modified_ns] for file in self.files]

    def chunks(self, chunk_bytes: int) -> Iterator[Chunk]:
        pending: list[str] = []
        pending_bytes = 0
        for file in self.files:
            is_long = file.num_bytes > _LONG_DOCUMENT_BYTES and compression_of(file.path) is None
            if file.kind == "document" and not is_long:
                pending.append(str(file.path))
                pending_bytes += file.num_bytes
                if pending_bytes < chunk_bytes and len(pending) < _MAX_FILES_PER_CHUNK:
                    continue
            if pending:
                yield WholeFiles(paths=pending)
                pending, pending_bytes = [], 0
            path = str(file.path)
            if file.kind == "lines":
                yield from line_chunks(path, file.num_bytes, chunk_bytes)
            elif file.kind in ("parquet", "arrow"):
                yield from row_chunks(path, table_texts(path, file.kind, self.text_column), chunk_bytes)
            elif is_long:
                yield long_document(path, file.num_bytes)
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
        from moescale.data.prepare.hub import open_hub_dataset

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


def _saved_dataset(root: Path, text_column: str, split: str) -> LocalSource | None:
    """Return the files of a folder that ``datasets.save_to_disk`` wrote, or None for any other folder."""
    splits = _list_in(root / "dataset_dict.json", "splits")
    if splits is not None and all(isinstance(name, str) for name in splits):
        if split not in splits:
            raise DataError(f"{root} has no split '{split}'{nearest(split, splits)} (it has {', '.join(splits)})")
        found = _saved_dataset(root / split, text_column, split)
        if found is None:
            raise DataError(
                f"{root / split / 'state.json'} is missing or damaged, though {root / 'dataset_dict.json'} lists "
                f"'{split}': the saved dataset is not whole; save it again"
            )
        return found
    entries = _list_in(root / "state.json", "_data_files")
    if entries is None:
        return None
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise DataError(
                f"{root / 'state.json'} is damaged: an entry of _data_files has no filename; save the dataset again"
            )
        names.append(entry["filename"])
    for name in names:
        if not (root / name).is_file():
            raise DataError(f"{root / name} is missing, though {root / 'state.json'} lists it")
    return LocalSource(
        kind="saved dataset",
        name=str(root),
        text_column=text_column,
        files=[_file(root / name, name) for name in names],
    )


def _list_in(path: Path, key: str) -> list[Any] | None:
    """Return the list under ``key`` of a JSON object; None where there is no such file, object or list.

    The names of these files are ordinary ones, which anything in a source tree may have.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else None


def _file(path: Path, name: str) -> SourceFile:
    status = path.stat()
    return SourceFile(path=path, name=name, kind=_kind(path), num_bytes=status.st_size, modified_ns=status.st_mtime_ns)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".json":
        # The same extension names JSON Lines and single JSON documents of a source tree: the first line tells.
        return "lines" if _starts_with_a_record(path) else "document"
    return _KINDS.get(suffix, "document")


def _starts_with_a_record(path: Path) -> bool:
    try:
        with open_bytes(path) as stream:
            first = stream.readline(1 << 26).strip()
        return first not in (b"{", b"[", b"") and isinstance(json.loads(first), dict)
    except (OSError, ValueError, RecursionError):  # a damaged file is named when it is read
        return False
