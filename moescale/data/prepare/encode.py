"""Encodes a chunk of a source: reads, checks and tokenises its documents.

Runs in spawned processes: imports neither torch nor anything that does.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tokenizers

from moescale.data.prepare.chat.conversations import form_of
from moescale.data.prepare.chat.encode import ChatEncoder, ChatOptions, EncodedConversation
from moescale.data.prepare.compression import open_bytes
from moescale.data.prepare.file_kinds import problem_of
from moescale.data.prepare.memory_budget import check_document_bytes
from moescale.data.prepare.readers import BYTE_ORDER_MARK, looks_binary
from moescale.data.prepare.record_files import value_at
from moescale.data.prepare.splitting import parts_of
from moescale.data.prepare.unknown_text import INVALID_UTF8, UnknownText, is_encodable
from moescale.data.prepare.word_table import word_encoder
from moescale.data.prepare.work_items import (
    LineRange,
    Lines,
    NotText,
    PickledRows,
    ReadableChunk,
    Rows,
    TextRange,
    WholeFiles,
)
from moescale.errors import DataError

MALFORMED_JSON = "malformed_json"
MISSING_COLUMN = "missing_column"
EMPTY_DOCUMENT = "empty_document"

_PART_CHARACTERS = 1 << 16
_HEAD_BYTES = 1 << 16


class Fault(NamedTuple):
    """Something that is not among a chunk's tokens."""

    kind: str
    where: int | str
    """The item's number within the chunk, or its path."""
    amount: int = 1
    detail: str = ""
    """Details that help to find the cause, such as the fields of a record."""


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents of a chunk as tokens, each followed by the end token, and the faults of bad items."""

    path: str | None
    """The file whose lines or rows these are; None if each item is a file."""
    num_items: int
    """Lines, rows or files in the chunk, good and bad."""
    num_bytes: int
    """Bytes of text, bad items included."""
    tokens: np.ndarray
    """uint16 or uint32 [tokens]"""
    lengths: np.ndarray
    """int64 [documents]: tokens per document, the end token included."""
    bad: list[Fault]
    binary: list[str] = field(default_factory=list)
    """Files skipped because they are not text."""
    continues: bool = False
    """True if the first document began in the previous chunk."""
    targets: np.ndarray | None = None
    """bool [tokens]: which tokens are learned; None: all of them."""
    origins: np.ndarray | None = None
    """int64 [documents]: the number within the chunk of the conversation that each is, or is a part of; None where no
    document is a part of another."""

    @property
    def num_origins(self) -> int:
        """Documents before those longer than a sequence were cut."""
        if self.origins is None:
            return len(self.lengths)
        return int(self.origins[-1]) + 1 if len(self.origins) else 0


@dataclass(kw_only=True)
class _Texts:
    """Good documents and faults of a chunk, as it is read."""

    texts: list[str] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)
    """Instead of texts, where they are conversations."""
    places: list[int | str] = field(default_factory=list)
    bad: list[Fault] = field(default_factory=list)
    num_items: int = 0
    num_bytes: int = 0
    binary: list[str] = field(default_factory=list)

    def add(self, text: str, where: int | str) -> None:
        if text:
            self.texts.append(text)
            self.places.append(where)
        else:
            self.bad.append(Fault(EMPTY_DOCUMENT, where, detail="it has no text"))

    def add_record(self, record: object, where: int) -> None:
        if isinstance(record, dict):
            self.records.append(record)
            self.places.append(where)
        else:
            self.bad.append(Fault(MISSING_COLUMN, where, detail=_without_text(record)))


class Encoder:
    """Reads chunks and tokenises their documents; one per process."""

    def __init__(
        self,
        *,
        tokenizer_json: str,
        end_token_id: int,
        vocabulary_size: int,
        text_column: str,
        most_document_bytes: int,
        chat: ChatOptions | None = None,
    ) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self.text_column = text_column
        self._most_bytes = most_document_bytes
        self.dtype = token_dtype(vocabulary_size)
        description = json.loads(tokenizer_json)
        self._unknown = UnknownText(self.tokenizer, description)
        self._by_words = word_encoder(self.tokenizer, self.dtype, description)
        self._end = np.array([end_token_id], dtype=self.dtype)
        self._chat = None if chat is None else ChatEncoder(self.tokenizer, self.dtype, chat, self._unknown)

    def __call__(self, chunk: ReadableChunk) -> EncodedChunk:
        if isinstance(chunk, TextRange):
            return self._encode_range(chunk)
        read = _Texts()
        if isinstance(chunk, NotText):
            read.num_items = 1
            read.bad.append(Fault(INVALID_UTF8, chunk.path))
        elif isinstance(chunk, WholeFiles):
            _read_files(chunk.paths, read, self._most_bytes)
        elif isinstance(chunk, Rows | PickledRows):
            texts = chunk.texts if isinstance(chunk, Rows) else pickle.loads(chunk.content)
            if self._chat is None:
                _read_rows(texts, read)
            else:
                for text in texts:
                    self._read_line(b"null" if text is None else text.encode() if isinstance(text, str) else text, read)
        else:
            for line in chunk.lines if isinstance(chunk, Lines) else _lines_of(chunk, self._most_bytes):
                self._read_line(line, read)
        path = None if isinstance(chunk, WholeFiles | NotText) else chunk.path
        targets = origins = None
        if self._chat is None:
            tokens, lengths = self._encode(read)
        else:
            tokens, lengths, targets, origins = self._encode_conversations(self._chat, read, path)
        return EncodedChunk(
            path=path,
            num_items=read.num_items,
            num_bytes=read.num_bytes,
            tokens=tokens,
            lengths=lengths,
            bad=read.bad,
            binary=read.binary,
            targets=targets,
            origins=origins,
        )

    def _read_line(self, line: bytes, read: _Texts) -> None:
        number = read.num_items
        read.num_items += 1
        read.num_bytes += len(line)
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            read.bad.append(Fault(INVALID_UTF8, number))
        except (ValueError, RecursionError):
            read.bad.append(Fault(MALFORMED_JSON if line.strip() else EMPTY_DOCUMENT, number))
        else:
            if self._chat is not None:
                read.add_record(record, number)
                return
            text = value_at(record, self.text_column) if isinstance(record, dict) else None
            if not isinstance(text, str):
                read.bad.append(Fault(MISSING_COLUMN, number, detail=_without_text(record)))
            elif b"\\u" in line and not is_encodable(text):
                read.bad.append(Fault(INVALID_UTF8, number))
            else:
                read.add(text, number)

    def _encode_range(self, part: TextRange) -> EncodedChunk:
        try:
            with open(part.path, "rb") as stream:
                stream.seek(part.start)
                text = stream.read(part.end - part.start).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{part.path} cannot be read any more; it changed meanwhile: {error}") from error
        tokens = [self.tokens_of(text), *([self._end] if part.is_last else [])]
        bad = [*self._unknown_in(text, tokens[0], part.path)]
        return EncodedChunk(
            path=None,
            num_items=1,
            num_bytes=part.end - part.start,
            tokens=np.concatenate(tokens),
            lengths=np.array([sum(map(len, tokens))], dtype=np.int64),
            bad=bad,
            continues=part.start > 0,
        )

    def _encode(self, read: _Texts) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of all texts one after the other, and the number of each."""
        parts: list[np.ndarray] = []
        lengths = np.empty(len(read.texts), dtype=np.int64)
        for number, text in enumerate(read.texts):
            tokens = self.tokens_of(text)
            read.bad.extend(self._unknown_in(text, tokens, read.places[number]))
            parts += tokens, self._end
            lengths[number] = len(tokens) + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype), lengths

    def _encode_conversations(
        self, encode: ChatEncoder, read: _Texts, path: str | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, lengths, targets and origins of all conversations, or the parts of those too long."""
        parts: list[EncodedConversation] = []
        counts: list[int] = []
        for record, place in zip(read.records, read.places, strict=True):
            conversations, faults = encode(record, f"record {int(place) + 1} of this part of {path}")
            parts += conversations
            counts += [len(conversations)] if conversations else []
            read.bad += [Fault(kind, place, amount, detail) for kind, amount, detail in faults]
        lengths = np.array([len(part.tokens) for part in parts], dtype=np.int64)
        origins = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        if not parts:
            return np.empty(0, self.dtype), lengths, np.empty(0, dtype=bool), origins
        tokens, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return tokens, lengths, targets, origins

    def _unknown_in(self, text: str, tokens: np.ndarray, where: int | str) -> Iterator[Fault]:
        for kind, count, detail in self._unknown.faults(text, tokens):
            yield Fault(kind, where, count, detail)

    def tokens_of(self, text: str) -> np.ndarray:
        """Return the tokens of one text; a long one goes in parts, because an Encoding takes 100 bytes a token."""
        if len(text) <= _PART_CHARACTERS:
            return self._tokens_of_part(text)
        return np.concatenate(
            [self._tokens_of_part(part) for part in parts_of(text, self._tokens_of_part, _PART_CHARACTERS)]
        )

    def _tokens_of_part(self, text: str) -> np.ndarray:
        tokens = self._by_words(text) if self._by_words is not None else None
        return np.array(self._ids(text), dtype=self.dtype) if tokens is None else tokens

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the narrower of a corpus's two little-endian dtypes that can hold all ids."""
    return np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")


def _without_text(record: object) -> str:
    """Describe a record without the text column, and what to do about it."""
    if not isinstance(record, dict):
        return f"a line is a {type(record).__name__}, not an object"
    names = [repr(str(name)[:40]) for name in list(record)[:12]]
    fields = f"a record has the fields {', '.join(names) or 'none'}"
    if form_of(record) is not None:
        return f"{fields}: a conversation; --format chat reads it as one"
    return f"{fields}; name the one with the text in text_column"


def _lines_of(chunk: LineRange, most_bytes: int) -> Iterator[bytes]:
    with open(chunk.path, "rb", buffering=1 << 20) as stream:
        position = chunk.start
        if position:
            stream.seek(position - 1)
            before = stream.readline(chunk.end - chunk.start)  # of a line that belongs to the chunk before
            if not before.endswith(b"\n"):
                return  # it fills this chunk: no line begins here, and where it ends need not be known
            position += len(before) - 1
        while position < chunk.end and (line := stream.readline(most_bytes + 1)):
            check_document_bytes(chunk.path, len(line), most_bytes)
            yield line if position else line.removeprefix(BYTE_ORDER_MARK)
            position += len(line)


def _read_rows(texts: Sequence[str | bytes | None], read: _Texts) -> None:
    for number, text in enumerate(texts):
        read.num_items += 1
        if isinstance(text, str):
            read.num_bytes += len(text)
            read.add(text, number)
        elif isinstance(text, bytes):
            read.num_bytes += len(text)
            read.bad.append(Fault(INVALID_UTF8, number))
        else:
            read.bad.append(Fault(MISSING_COLUMN, number, detail="its text is null, or of another type"))


def _read_files(paths: Sequence[str], read: _Texts, most_bytes: int) -> None:
    for path in paths:
        try:
            with open_bytes(path) as stream:
                content = stream.read(_HEAD_BYTES)
                problem = problem_of(content)
                is_binary = problem is None and looks_binary(content)
                content += b"" if is_binary or problem else stream.read(most_bytes + 1)
                check_document_bytes(path, len(content), most_bytes)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        read.num_items += 1
        read.num_bytes += len(content)
        if is_binary:
            read.binary.append(path)
            continue
        if problem is not None:
            read.bad.append(Fault(problem, path))
            continue
        try:
            read.add(content.decode(), path)
        except UnicodeDecodeError:
            read.bad.append(Fault(INVALID_UTF8, path))
