"""Finds the files of a source: in folders and behind links, by patterns, of one split. What it passes over is counted.

Nothing that a user gives is lost without a word: a file is read, or refused by an error, or counted under a reason with
its name.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from moescale.data.corpus.manifest import FIRST_POSITIONS, BadItems
from moescale.data.prepare.file_kinds import ARROW, DOCUMENT, RECORDS, is_about_data, kind_of
from moescale.data.prepare.split_names import split_of
from moescale.errors import DataError, nearest
from moescale.files import staging_path
from moescale.records import FileKind, FileName, build, read_json_object

ALL_SPLITS = "all"
OTHER_SPLIT, EXCLUDED = "of another split", "excluded"
_TEXT_SUFFIXES = frozenset({"", ".txt", ".text", ".tokens", ".raw"})
"""Suffixes of plain text that may be divided into splits; train.py and test.py of a program are not splits."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source, with its kind (see ``file_kinds``)."""

    path: Path
    name: str
    """Relative to the source folder."""
    kind: str
    num_bytes: int
    modified_ns: int
    is_named: bool = False
    """The file itself was asked for, not a folder or pattern that it is in."""
    split_name: str | None = None
    """The part of its path whose words may tell of which split it is: below what was given as source."""


@dataclass(kw_only=True)
class FoundFiles:
    """Files to read, in order, and those passed over, by reason."""

    files: list[SourceFile] = field(default_factory=list)
    skipped: dict[str, BadItems] = field(default_factory=dict)
    kind: str = "folder"

    def skip(self, reason: str, name: str) -> None:
        known = self.skipped.get(reason, BadItems(count=0, first=[]))
        first = [*known.first, name] if len(known.first) < FIRST_POSITIONS else known.first
        self.skipped[reason] = BadItems(count=known.count + 1, first=first)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The request for a source: patterns, split and columns."""

    text_column: str | None
    """None: conversations are asked for."""
    split: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    output: Path
    """Left out, with the folder in which it is made, where it lies in the source."""


def find_files(sources: Sequence[str], wanted: Wanted) -> FoundFiles:
    """Find the files of local sources: files, folders, patterns.

    Raises:
        DataError: a source does not exist or cannot be listed, a pattern matches nothing, there is no such split, or
            nothing is left to read.
    """
    found = FoundFiles()
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            _add_folder(path, "" if len(sources) == 1 else f"{path}/", found, wanted)
        elif path.is_file():
            found.kind = "file"
            _add_file(path, path.name if len(sources) == 1 else str(path), path.name, found, wanted, is_named=True)
        else:
            found.kind = "files"
            _add_matches(source, found, wanted)
    if len(sources) > 1:
        found.kind = "files"
    _drop_files_about_data(found, wanted)
    _choose_split(", ".join(sources), found, wanted.split)
    if not found.files:
        passed_over = "; ".join(
            f"{items.count} {reason}: {', '.join(items.first)}" for reason, items in found.skipped.items()
        )
        raise DataError(f"{', '.join(sources)} holds no file to read ({passed_over or 'it is empty'})")
    return found


def is_pattern(source: str) -> bool:
    """Return True if ``source`` is a pattern; an existing file with a wildcard character in its name is not."""
    return glob.has_magic(source)


def _add_matches(pattern: str, found: FoundFiles, wanted: Wanted) -> None:
    expanded = str(Path(pattern).expanduser())
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), Path(expanded).parts))
    matches = sorted(glob.glob(expanded, recursive=True))
    for match in matches:
        path = Path(match)
        if path.is_dir():
            if not pattern.endswith("**"):  # whose files match by themselves
                _add_folder(path, f"{path}/", found, wanted)
        elif _is_regular(path, match, found):
            _add_file(path, match, path.relative_to(fixed).as_posix(), found, wanted)
    if not matches:
        raise DataError(f"source '{pattern}' matches no file")


def _add_folder(root: Path, prefix: str, found: FoundFiles, wanted: Wanted) -> None:
    if _add_saved_dataset(root, prefix, found, wanted):
        if wanted.split not in (None, "train", ALL_SPLITS) and not (root / "dataset_dict.json").is_file():
            raise DataError(f"{root} has no split '{wanted.split}': it is one saved dataset, without splits")
        found.kind = "saved dataset"
        return
    for path in sorted(_walk(root, prefix, found, wanted), key=lambda path: path.relative_to(root).as_posix()):
        if path.is_dir():
            name = path.relative_to(root).as_posix()
            _add_saved_dataset(path, f"{prefix}{name}/", found, wanted, split_name=name)
        else:
            name = path.relative_to(root).as_posix()
            _add_file(path, prefix + name, name, found, wanted)


def _walk(root: Path, prefix: str, found: FoundFiles, wanted: Wanted) -> Iterator[Path]:
    """Yield the files below ``root``, and the folders that are saved datasets; links are followed, each folder once."""
    ours = {wanted.output.resolve(), staging_path(wanted.output).resolve()}
    visited: set[Path] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # what is in the source itself goes before links to it
        name = f"{prefix}{folder.relative_to(root).as_posix()}"
        real = folder.resolve()
        if real in ours:
            continue
        if real in visited:
            found.skip("linked to twice", name)
            continue
        visited.add(real)
        if folder != root and _is_saved_dataset(folder):
            yield folder
            continue
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be listed: {error.strerror}; allow it, or leave it out") from error
        for entry in entries:
            path = folder / entry.name
            name = prefix + path.relative_to(root).as_posix()
            if _is_excluded(name, wanted):
                found.skip(EXCLUDED, name)
            elif entry.name.startswith(".") and path.resolve() not in ours:
                found.skip("hidden", name)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif not entry.name.startswith(".") and _is_regular(path, name, found):
                yield path


def _is_regular(path: Path, name: str, found: FoundFiles) -> bool:
    if path.is_file():
        return True
    found.skip("link that leads nowhere" if path.is_symlink() else "not a regular file", name)
    return False


def _is_excluded(name: str, wanted: Wanted) -> bool:
    return any(_matches(name, pattern) for pattern in wanted.exclude)


def _matches(name: str, pattern: str) -> bool:
    """Return True if a path or its last component matches a pattern, as in .gitignore."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], pattern)


def _add_file(
    path: Path, name: str, split_name: str, found: FoundFiles, wanted: Wanted, *, is_named: bool = False
) -> None:
    if _is_excluded(name, wanted) or (wanted.include and not any(_matches(name, known) for known in wanted.include)):
        found.skip(EXCLUDED, name)
        return
    kind = kind_of(path, wanted.text_column, is_named=is_named)
    if kind is None:
        column = wanted.text_column
        found.skip("without conversations" if column is None else f"without a column '{column}'", name)
    else:
        found.files.append(_source_file(path, name, kind, is_named=is_named, split_name=split_name))


def _source_file(
    path: Path, name: str, kind: str, *, is_named: bool = False, split_name: str | None = None
) -> SourceFile:
    status = path.stat()
    return SourceFile(
        path=path,
        name=name,
        kind=kind,
        num_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        is_named=is_named,
        split_name=split_name,
    )


def _drop_files_about_data(found: FoundFiles, wanted: Wanted) -> None:
    """Leave out what describes a dataset (its card, licence, bookkeeping) where there are records that it describes."""
    if not any(file.kind in RECORDS for file in found.files):
        return
    kept = []
    for file in found.files:
        is_asked_for = file.is_named or any(_matches(file.name, pattern) for pattern in wanted.include)
        if file.kind == DOCUMENT and not is_asked_for and is_about_data(file.name):
            found.skip("about the data", file.name)
        else:
            kept.append(file)
    found.files = kept


def _choose_split(source: str, found: FoundFiles, wanted: str | None) -> None:
    """Keep the files of the split ``wanted``, by default "train"; files whose names tell of none belong to that.

    Files whose split was chosen before, by a saved dataset that lists its splits, stay.
    """
    choosable = [file for file in found.files if file.split_name is not None]
    if wanted == ALL_SPLITS or not choosable:
        return
    splits = _splits_of(choosable)
    if len(found.files) == 1 and found.files[0].is_named:
        splits = {}
    named = {splits[file.name] for file in choosable if file.is_named and file.name in splits}
    remedy = f"; choose one with --split, or take all with --split {ALL_SPLITS}"
    if wanted is None and named - {"train"}:
        raise DataError(
            f"the files named as source are of the splits {', '.join(sorted(named))} by their names{remedy}"
        )
    known = {splits.get(file.name, "train") for file in choosable}
    split = wanted or "train"
    if split not in known and len(choosable) == len(found.files):
        raise DataError(
            f"{source} has no split '{split}'{nearest(split, known)} (by the names of its files and folders it has "
            f"{', '.join(sorted(known))}){remedy if splits else ''}"
        )
    dropped = [file for file in choosable if splits.get(file.name, "train") != split]
    for file in dropped:
        found.skip(OTHER_SPLIT, file.name)
    found.files = [file for file in found.files if file not in dropped]


def _splits_of(files: Iterable[SourceFile]) -> dict[str, str]:
    """Return the splits that names tell of, by file; of plain text only where a training split is at the same place."""
    told = [(file, split_of(file.split_name)) for file in files if file.split_name is not None]
    trained = {split.place for file, split in told if split is not None and split.split == "train"}
    splits = {}
    for file, split in told:
        if split is None:
            continue
        is_split_text = file.path.suffix.lower() in _TEXT_SUFFIXES and split.place in trained
        if file.kind in RECORDS or is_split_text:
            splits[file.name] = split.split
    return splits


_MAYBE_STATE = FileKind(
    noun="a saved dataset's state", error=DataError, remedy="save the dataset again", ignores_unknown=True
)


@dataclass(frozen=True, kw_only=True)
class _DataFile:
    """An entry of ``_data_files``."""

    filename: FileName


def _is_saved_dataset(folder: Path) -> bool:
    """Return True if ``datasets.save_to_disk`` wrote ``folder``, which the names of its files alone do not show."""
    splits = _list_in(folder / "dataset_dict.json", "splits")
    if splits is not None and all(isinstance(name, str) for name in splits):
        return True
    return _list_in(folder / "state.json", "_data_files") is not None


def _add_saved_dataset(
    root: Path, prefix: str, found: FoundFiles, wanted: Wanted, *, split_name: str | None = None
) -> bool:
    """Add the files of a folder that ``datasets.save_to_disk`` wrote; False for any other folder.

    ``split_name`` is what may tell of which split it is, where it does not list splits itself.
    """
    splits = _list_in(root / "dataset_dict.json", "splits")
    if splits is not None and all(isinstance(name, str) for name in splits):
        _add_saved_splits(root, splits, prefix, found, wanted)
        return True
    entries = _list_in(root / "state.json", "_data_files")
    if entries is None:
        return False
    for entry in entries:
        name = build(_DataFile, entry, f"{root / 'state.json'}: _data_files", _MAYBE_STATE).filename
        path = root / name
        if not path.is_file():
            raise DataError(f"{path} is missing, though {root / 'state.json'} lists it")
        found.files.append(_source_file(path, prefix + name, ARROW, split_name=split_name))
    return True


def _add_saved_splits(root: Path, splits: list[str], prefix: str, found: FoundFiles, wanted: Wanted) -> None:
    split = wanted.split or "train"
    if split != ALL_SPLITS and split not in splits:
        raise DataError(f"{root} has no split '{split}'{nearest(split, splits)} (it has {', '.join(splits)})")
    for name in splits:
        if split not in (name, ALL_SPLITS):
            found.skip(OTHER_SPLIT, f"{prefix}{name}")
        elif not _add_saved_dataset(root / name, prefix if split != ALL_SPLITS else f"{prefix}{name}/", found, wanted):
            raise DataError(
                f"{root / name / 'state.json'} is missing or damaged, though {root / 'dataset_dict.json'} lists "
                f"'{name}': the saved dataset is not whole; save it again"
            )


def _list_in(path: Path, key: str) -> list[Any] | None:
    """Return the list under ``key`` of a JSON object; None if there is no such file, object or list.

    Raises:
        DataError: it is one that `datasets` wrote, by the files next to it, and damaged.
    """
    if not path.is_file():
        return None
    if path.name == "dataset_dict.json":
        is_of_datasets = any(folder.joinpath("dataset_info.json").is_file() for folder in path.parent.iterdir())
    else:
        is_of_datasets = path.with_name("dataset_info.json").is_file()
    try:
        value = read_json_object(path, _MAYBE_STATE)
    except DataError:
        if is_of_datasets:
            raise
        return None
    found = value.get(key)
    if isinstance(found, list):
        return found
    if is_of_datasets:
        raise DataError(f"{path}: {key} must be a list; {_MAYBE_STATE.remedy}")
    return None
