"""``manifest.json`` of a prepared corpus: its origin, its contents, and the checksums of its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from moescale.config import fingerprint
from moescale.errors import DataError
from moescale.hub import nearest_here
from moescale.records import (
    Count,
    FileKind,
    FileName,
    Length,
    Positive,
    Range,
    Sha256,
    build,
    read_json_lines,
    read_json_object,
    show,
)

MANIFEST = "manifest.json"
SOURCE_FILES = "source.jsonl"
"""File with one JSON line per source file: its name, size in bytes and modification time."""
FIRST_POSITIONS = 10
"""Number of positions that are recorded per kind of fault."""
MAX_SEQUENCE_LENGTH = 2**30
MAX_VOCABULARY_SIZE = 2**31
"""Token ids are int32 on the device."""
TokenDtype = Literal["<u2", "<u4"]
_FORMAT = "moescale corpus"
_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    name: FileName
    num_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some sequences of a split: a file of tokens, and the files of a bit per token that go with it."""

    num_sequences: Positive
    tokens: WrittenFile
    starts: WrittenFile | None
    targets: WrittenFile | None = None
    """File that marks the target tokens; None if all tokens are targets."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Counts of a split: ``tokens_in == tokens_packed + tokens_dropped``, end tokens included.

    Sequences hold ``tokens_packed`` tokens and ``tokens_padding`` others.
    """

    documents: Count
    tokens_in: Count
    tokens_packed: Count
    tokens_dropped: Count
    num_sequences: Count
    tokens_padding: Count = 0
    """At the ends of sequences that hold whole conversations."""
    tokens_learned: Count | None = None
    """Number of packed tokens that are learned; None if all are."""


@dataclass(frozen=True, kw_only=True)
class BadItems:
    """Lines, rows, files or characters with the same property, such as a fault."""

    count: Count
    first: list[str]
    """Positions of the first ones, as ``path:line`` (counted from 1) or ``path``."""
    detail: str = ""
    """The fault of the first one, with a remedy if there is one."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a corpus without its tokens."""

    made_from: dict[str, Any]
    """The input: source, tokenizer and the settings that shape the result. Equal input gives equal bytes."""
    sequence_length: Annotated[int, Range(least=1, most=MAX_SEQUENCE_LENGTH)]
    vocabulary_size: Annotated[int, Range(least=1, most=MAX_VOCABULARY_SIZE)]
    dtype: TokenDtype
    """Dtype of token ids in the files; `prepare` writes no others."""
    document_boundaries: bool
    bad: dict[str, BadItems]
    """Items that were left out of the documents, by kind of fault."""
    skipped: dict[str, BadItems]
    """Files that were skipped, by reason."""
    read: dict[str, BadItems]
    """Files that were read, by how they were read."""
    counts: dict[FileName, SplitCounts]
    shards: dict[FileName, Annotated[list[Shard], Length(least=1)]]

    def __post_init__(self) -> None:
        # A split that came to less than one sequence has counts and no shards.
        filled = {split for split, counts in self.counts.items() if counts.num_sequences} | self.shards.keys()
        if filled != self.shards.keys() or not filled <= self.counts.keys():
            raise DataError(
                f"counts ({', '.join(self.counts)}) and shards ({', '.join(self.shards)}) must be of the same splits"
            )
        for split, shards in self.shards.items():
            self._check_split(split, shards)

    def _check_split(self, split: str, shards: list[Shard]) -> None:
        """Compare the counts of a split with one another."""
        bytes_per_token = int(self.dtype[-1])
        for index, shard in enumerate(shards):
            field, num_tokens = f"shards.{split}[{index}]", shard.num_sequences * self.sequence_length
            expected = [("tokens", shard.tokens, num_tokens * bytes_per_token)]
            if shard.starts is not None:
                expected.append(("starts", shard.starts, -(-num_tokens // 8)))
            if shard.targets is not None:
                expected.append(("targets", shard.targets, -(-num_tokens // 8)))
            if (shard.targets is not None) != (shards[0].targets is not None):
                raise DataError(f"{field}.targets must be given for every shard of a split, or for none")
            if shard.targets is not None and shard.starts is None:
                raise DataError(f"{field}.targets must come with starts: padding is told by both")
            if (shard.starts is not None) != self.document_boundaries:
                raise DataError(f"{field}.starts must be given where document_boundaries is true, and nowhere else")
            for name, file, num_bytes in expected:
                if file.num_bytes != num_bytes:
                    raise DataError(
                        f"{field}.{name}.num_bytes ({file.num_bytes}) must be {num_bytes}, for {shard.num_sequences} "
                        f"sequences of {self.sequence_length} tokens"
                    )
        counts, num_sequences = self.counts[split], sum(shard.num_sequences for shard in shards)
        if counts.num_sequences != num_sequences:
            raise DataError(
                f"counts.{split}.num_sequences ({counts.num_sequences}) must be {num_sequences}, as in shards"
            )
        if counts.tokens_packed + counts.tokens_padding != num_sequences * self.sequence_length:
            raise DataError(
                f"counts.{split}.tokens_packed ({counts.tokens_packed}) and tokens_padding must be those of "
                f"{num_sequences} sequences of "
                f"{self.sequence_length} tokens"
            )
        if counts.tokens_in != counts.tokens_packed + counts.tokens_dropped:
            raise DataError(f"counts.{split}.tokens_in ({counts.tokens_in}) must be tokens_packed + tokens_dropped")

    def corpus_fingerprint(self, split: str) -> str:
        """Identify a split by its content: equal wherever and whenever it was prepared."""
        content = [
            [
                shard.tokens.sha256,
                shard.starts and shard.starts.sha256,
                *([shard.targets.sha256] if shard.targets else []),
            ]
            for shard in self.shards[split]
        ]
        return fingerprint([self.sequence_length, self.dtype, content])

    def write(self, folder: Path) -> None:
        value = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        (folder / MANIFEST).write_text(json.dumps(value, indent=2) + "\n")


def recorded_origin(folder: Path) -> dict[str, Any]:
    """Return the origin of a corpus from its manifest; empty if it has none, as saved datasets."""
    return read_manifest(folder).made_from if (folder / MANIFEST).is_file() else {}


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder``'s manifest.

    Raises:
        DataError: the folder does not exist, or the manifest is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise DataError(f"corpus {folder} is not a folder{nearest_here(folder)}; make one with `moescale prepare`")
    path = folder / MANIFEST
    remedy = f"remove {folder} and prepare the corpus again"
    kind = FileKind(
        noun="a manifest",
        error=DataError,
        remedy=remedy,
        missing=f"missing: {folder} is not a prepared corpus; make one with `moescale prepare`",
    )
    document = read_json_object(path, kind)
    found, version = document.pop("format", None), document.pop("version", None)
    if found != _FORMAT:
        raise DataError(f"{path}: format ({show(found)}) must be '{_FORMAT}'; give a folder that `prepare` wrote")
    if version not in _READABLE_VERSIONS or not isinstance(version, int):
        versions = " or ".join(map(str, _READABLE_VERSIONS))
        raise DataError(f"{path}: version ({show(version)}) must be {versions}, which this moescale reads; {remedy}")
    if version == 1:
        _complete_version_1(document)
    return build(Manifest, document, str(path), kind)


def read_source_files(folder: Path) -> dict[str, list[Any]]:
    """Return the entries of the list of source files in ``folder``, by name. Raises DataError."""
    path = folder / SOURCE_FILES
    kind = FileKind(noun="a list of source files", error=DataError, max_bytes=2**30)
    found: dict[str, list[Any]] = {}
    for line in read_json_lines(path, kind):
        if not isinstance(line, list) or not line or not isinstance(line[0], str):
            raise DataError(f"{path}: a line ({show(line)}) must be a list that begins with a file's name")
        found[line[0]] = line[1:]
    return found


def _complete_version_1(document: dict[str, Any]) -> None:
    """Bring a manifest of version 1, which counted what was passed over without naming any of it, to today's form."""
    skipped = document.get("skipped")
    if isinstance(skipped, dict):
        document["skipped"] = {reason: {"count": count, "first": []} for reason, count in skipped.items()}
    document.setdefault("read", {})
