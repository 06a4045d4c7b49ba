"""Parts of a source that worker processes read, check and tokenise independently.

A chunk names a part of the source (files, a range of bytes) wherever a worker can read that part alone, and carries
the text itself only where the reader is sequential (compressed files, tables, the hub).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    """Values of the text column; None if a row has none, bytes if they are not valid UTF-8."""

    path: str
    texts: Sequence[str | bytes | None]


@dataclass(frozen=True, kw_only=True)
class PickledRows:
    """The texts of :class:`Rows` as the process that read them has sent them; only the worker unpacks them."""

    path: str
    content: bytes


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


ReadableChunk = WholeFiles | LineRange | Lines | Rows | PickledRows | TextRange | NotText
Chunk = ReadableChunk | LongFile
