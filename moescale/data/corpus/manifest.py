"""``manifest.json``: what a prepared corpus was made from, what is in it, and the checksums of its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moescale.config import fingerprint
from moescale.errors import DataError

MANIFEST = "manifest.json"
SOURCE_FILES = "source.jsonl"
"""One JSON line per file read: its name, size in bytes and time of change."""
FIRST_POSITIONS = 10
"""Of items of one kind, how many positions are kept."""
_FORMAT = "moescale corpus"
_VERSION = 2
_READABLE_VERSIONS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some sequences of a split: a file of tokens, and the file of document starts beside it."""

    num_sequences: int
    tokens: WrittenFile
    starts: WrittenFile | None

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Shard:
        return Shard(
            num_sequences=value["num_sequences"],
            tokens=WrittenFile(**value["tokens"]),
            starts=WrittenFile(**value["starts"]) if value["starts"] else None,
        )


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """What went into a split: ``tokens_in == tokens_packed + tokens_dropped``, end tokens included."""

    documents: int
    tokens_in: int
    tokens_packed: int
    tokens_dropped: int
    num_sequences: int


@dataclass(frozen=True, kw_only=True)
class BadItems:
    """Lines, rows, files or characters that have something in common, such as a fault."""

    count: int
    first: list[str]
    """Positions of the first ones, as ``path:line`` (counted from 1) or ``path``."""

    @staticmethod
    def from_value(value: Any) -> BadItems:
        return BadItems(count=value, first=[]) if isinstance(value, int) else BadItems(**value)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a corpus but its tokens."""

    made_from: dict[str, Any]
    """The input: source, tokenizer and the settings that shape the result. Equal input gives equal bytes."""
    sequence_length: int
    vocabulary_size: int
    dtype: str
    document_boundaries: bool
    bad: dict[str, BadItems]
    """What was left out of the documents, by the kind of fault."""
    skipped: dict[str, BadItems]
    """Files passed over, by reason."""
    read: dict[str, BadItems]
    """Files that were read, by the way in which they were."""
    counts: dict[str, SplitCounts]
    shards: dict[str, list[Shard]]

    def corpus_fingerprint(self, split: str) -> str:
        """Identify a split by its content: equal wherever and whenever it was prepared."""
        content = [[shard.tokens.sha256, shard.starts and shard.starts.sha256] for shard in self.shards[split]]
        return fingerprint([self.sequence_length, self.dtype, content])

    def write(self, folder: Path) -> None:
        value = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(value, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder``'s manifest.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a prepared corpus: it has no {MANIFEST}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; remove {folder} and prepare the corpus again") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise DataError(f"{path} is not the manifest of a moescale corpus")
    if value.get("version") not in _READABLE_VERSIONS:
        raise DataError(
            f"{path} has format version {value.get('version')}; this moescale reads version {_VERSION}: "
            f"remove {folder} and prepare the corpus again"
        )
    try:
        return Manifest(
            made_from=value["made_from"],
            sequence_length=value["sequence_length"],
            vocabulary_size=value["vocabulary_size"],
            dtype=value["dtype"],
            document_boundaries=value["document_boundaries"],
            bad={kind: BadItems(**items) for kind, items in value["bad"].items()},
            skipped={reason: BadItems.from_value(items) for reason, items in value["skipped"].items()},
            read={kind: BadItems(**items) for kind, items in value.get("read", {}).items()},
            counts={split: SplitCounts(**counts) for split, counts in value["counts"].items()},
            shards={split: [Shard.from_dict(shard) for shard in shards] for split, shards in value["shards"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove {folder} and prepare the corpus again") from error
