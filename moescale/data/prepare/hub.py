"""Streams a dataset on the Hugging Face hub through the optional ``datasets`` library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescale.data.corpus.manifest import BadItems
from moescale.data.prepare.chat.conversations import COLUMNS, documents_line, form_of
from moescale.data.prepare.readers import row_chunks
from moescale.data.prepare.record_files import value_at
from moescale.data.prepare.work_items import Chunk
from moescale.errors import DataError, nearest
from moescale.hub import looks_like_path, nearest_here

_TIMEOUT_SECONDS = 20
_CONVERTED = "refs/convert/parquet"


@dataclass(kw_only=True)
class HubSource:
    """One split of a dataset on the hub, at a fixed revision."""

    name: str
    text_column: str | None
    """None: rows are conversations."""
    split: str
    revision: str
    dataset: Any
    kind: str = "hub dataset"
    num_bytes: int | None = None
    window_bytes: int = 0
    has_tables: bool = False
    skipped: dict[str, BadItems] = field(default_factory=dict)
    read: dict[str, BadItems] = field(default_factory=dict)

    @property
    def notices(self) -> list[str]:
        return [documents_line(self.text_column)]

    @property
    def holds_conversations(self) -> bool:
        return self.text_column is None

    def identity(self) -> list[list[str | int]]:
        return [[self.name, self.split, self.revision]]

    def chunks(self, chunk_bytes: int, most_bytes: int) -> Iterator[Chunk]:
        yield from row_chunks(self.name, self._texts(), chunk_bytes, most_bytes)

    def _texts(self) -> Iterator[str | None]:
        try:
            for row in self.dataset:
                if self.text_column is None:
                    yield json.dumps({name: row[name] for name in row if name in COLUMNS}, default=str)
                    continue
                text = value_at(row, self.text_column)
                yield text if isinstance(text, str) else None
        except Exception as error:  # as when opening
            raise DataError(f"dataset '{self.name}' broke off while it was read ({_first_line(error)})") from error


def open_hub_dataset(name: str, *, text_column: str, split: str, format: str | None = None) -> HubSource:
    """Open a split of dataset ``name`` for streaming, pinned to the revision that its branch has now.

    Raises:
        DataError: ``name`` is a path that does not exist, `datasets` is not installed, the hub cannot be reached, or
            the dataset has no such split or column.
    """
    near = nearest_here(Path(name))
    if looks_like_path(name):
        raise DataError(f"source '{name}' does not exist{near}; give a file, a folder or a pattern")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"source '{name}' is not a local path{near}; check its spelling. If it is a dataset on the hub, reading it "
            "needs the `datasets` library: `pip install 'moescale[hub]'`"
        ) from error
    try:
        revision, dataset = _load(datasets.load_dataset, name, split)
    except Exception as error:  # the clients raise their own, the HTTP library's, OSError and ValueError
        raise DataError(
            f"source '{name}' is neither a local path nor a dataset whose split '{split}' can be had from the "
            f"Hugging Face hub ({_first_line(error)}){near}"
        ) from error
    columns = dataset.column_names
    is_text = columns is None or text_column in columns or text_column.split(".")[0] in columns
    if format == "chat" or (format is None and not is_text and form_of(dict.fromkeys(columns)) is not None):
        return HubSource(name=name, text_column=None, split=split, revision=revision, dataset=dataset)
    if columns is not None and text_column not in columns and text_column.split(".")[0] not in columns:
        raise DataError(
            f"dataset '{name}' has no column '{text_column}'{nearest(text_column, columns)} "
            f"(it has {', '.join(columns)}); name the one with the text in text_column"
        )
    return HubSource(name=name, text_column=text_column, split=split, revision=revision, dataset=dataset)


def _load(load_dataset: Callable[..., Any], name: str, split: str) -> tuple[str, Any]:
    """Return the present revision of the dataset, and its split as a stream pinned to that revision."""
    from huggingface_hub import HfApi

    revision = str(HfApi().dataset_info(name, timeout=_TIMEOUT_SECONDS).sha)
    try:
        return revision, load_dataset(name, split=split, revision=revision, streaming=True)
    except RuntimeError as error:
        # Older datasets, bookcorpus among them, are programs, which `datasets` 4 does not run any more; the hub keeps
        # a converted copy of most.
        if "scripts are no longer supported" not in str(error):
            raise
    revision = str(HfApi().dataset_info(name, revision=_CONVERTED, timeout=_TIMEOUT_SECONDS).sha)
    return revision, load_dataset(name, split=split, revision=revision, streaming=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
