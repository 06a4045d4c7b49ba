"""Reads Parquet and Arrow files in a separate process, because the library ends its process on some damaged files.

Validating what was read (see ``tables``) is not enough for that: reading itself can abort or fault. So one child reads
all tables of a source and sends their texts, pickled, in the pieces that workers take. A child that dies is an error
that names the file. The child's memory is limited by the system, so a file that unpacks to more than is allowed is an
error, too.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, NamedTuple

from moescale.errors import DataError

_TEXTS, _ERROR, _END = b"T", b"E", b"."
_LENGTH_BYTES = 8
_START = "import sys; sys.path[:] = {path!r}; from moescale.data.prepare.table_process import serve; serve()"


class TableRequest(NamedTuple):
    path: str
    kind: str
    """One of ``file_kinds.TABLES``."""
    column: str | None
    """None: the columns of conversations, as JSON objects."""
    chunk_bytes: int
    memory_bytes: int
    """Memory limit of the reading process."""
    most_bytes: int
    """Limit of the bytes of one text."""


COLUMN_NAMES = "\n"
"""As a request's column: the names of the columns are wanted. No column of a table that can be read is named so."""


class TableReader:
    """The parent's end of the reading process, which starts with the first table; a context manager that ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TableReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._end()

    def _end(self) -> int:
        """Return the exit status of the process that has died; the next table starts another."""
        assert self._process is not None
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        return process.wait()

    def read(self, request: TableRequest) -> Iterator[bytes]:
        """Yield the texts of a table, in pickled lists.

        Raises:
            DataError: the file cannot be read, or ended the process that read it.
        """
        if self._process is None:
            command = [sys.executable, "-c", _START.format(path=sys.path)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            _send(stdin, _TEXTS, pickle.dumps(request))
            while True:
                kind, content = _receive(stdout)
                if kind == _END:
                    return
                if kind == _ERROR:
                    raise DataError(content.decode(errors="surrogatepass"))
                yield content
        except (BrokenPipeError, EOFError):
            status = self._end()
            raise DataError(
                f"{request.path} cannot be read as {request.kind}: it ended the "
                f"process that read it ({_ending(status)}); it is damaged, or takes more memory than "
                "there is"
            ) from None


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _send(stream: IO[bytes], kind: bytes, content: bytes) -> None:
    stream.write(kind + len(content).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[bytes, bytes]:
    head = stream.read(1 + _LENGTH_BYTES)
    if len(head) < 1 + _LENGTH_BYTES:
        raise EOFError
    length = int.from_bytes(head[1:], "little")
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return head[:1], content


def serve() -> None:
    """Answer requests from standard input until it ends: the main loop of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            request = TableRequest(*pickle.loads(_receive(requests)[1]))
        except EOFError:
            return
        try:
            _limit_memory(request.memory_bytes)
            _answer(request, answers)
        except DataError as error:
            _send(answers, _ERROR, str(error).encode(errors="surrogatepass"))
        except MemoryError:
            _send(answers, _ERROR, _too_large(request).encode(errors="surrogatepass"))
        except BrokenPipeError:
            return
        except Exception as error:  # of any type: the library raises unexpected ones, such as SystemError
            text = f"{request.path} cannot be read as {request.kind}: {error}; it is damaged"
            _send(answers, _ERROR, text.encode(errors="surrogatepass"))


def _too_large(request: TableRequest) -> str:
    return (
        f"{request.path}: a piece of it takes more than the {request.memory_bytes / 1e9:.2f} GB that "
        "prepare.memory_gigabytes leaves for reading it; raise that, or write the file in smaller row groups"
    )


def _limit_memory(num_bytes: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    bounded = num_bytes if limits[1] == resource.RLIM_INFINITY else min(num_bytes, limits[1])
    resource.setrlimit(resource.RLIMIT_DATA, (bounded, limits[1]))


def _answer(request: TableRequest, answers: IO[bytes]) -> None:
    from moescale.data.prepare.table_records import table_columns, table_records, table_texts

    texts: Iterable[str | bytes | None]
    if request.column == COLUMN_NAMES:
        texts = table_columns(request.path, request.kind)
    elif request.column is None:
        texts = table_records(request.path, request.kind, memory_bytes=request.memory_bytes // 4)
    else:
        texts = table_texts(request.path, request.kind, request.column, memory_bytes=request.memory_bytes // 4)
    pending: list[str | bytes | None] = []
    size = 0
    for text in _bounded(texts, request):
        pending.append(text)
        size += 64 + len(text or "")
        if size >= request.chunk_bytes:
            _send(answers, _TEXTS, pickle.dumps(pending))
            pending, size = [], 0
    _send(answers, _TEXTS, pickle.dumps(pending))
    _send(answers, _END, b"")


def _bounded(texts: Iterable[str | bytes | None], request: TableRequest) -> Iterator[str | bytes | None]:
    """Yield ``texts``. Raises DataError if one is too long, or if all exceed what such a file can hold."""
    from moescale.data.prepare.compression import check_expansion
    from moescale.data.prepare.memory_budget import check_document_bytes

    file_bytes, unpacked_bytes = os.path.getsize(request.path), 0
    for text in texts:
        check_document_bytes(request.path, len(text or ""), request.most_bytes)
        unpacked_bytes += len(text or "")
        try:
            check_expansion(file_bytes, unpacked_bytes)
        except OSError as error:
            raise DataError(f"{request.path}: {error}") from error
        yield text
