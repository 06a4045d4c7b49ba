"""Reading compressed files: every frame to its end, damage noticed, long windows allowed.

A reader raises OSError for whatever is wrong with a file. `zstandard` itself stops at a frame that is cut off as if it
were whole, so frames are checked first by their block headers, which also tell how much memory a window can take.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGIC = 0x184D2A50
_LARGEST_BLOCK = 128 << 10
LARGEST_WINDOW = 1 << 31
"""Bytes; `zstd --long=31`, and the most that the format's library decodes."""
PLAUSIBLE_EXPANSION = 1000
"""Times that a text unpacks to its compressed size: prose and programs 3 to 10, the most repetitive logs 100."""
_LEAST_IMPLAUSIBLE_BYTES = 1 << 26
_DAMAGED = "the file is damaged, or cut off"


def compression_of(path: Path | str) -> str | None:
    """Return the compression that the extension names, or None."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def open_bytes(path: Path | str) -> BinaryIO:
    """Open a file for reading, decompressed by its extension (.gz, .zst); reading a damaged one raises OSError."""
    compression = compression_of(path)
    if compression is None:
        return open(path, "rb", buffering=_BUFFER_BYTES)
    return io.BufferedReader(_Decompressed(path, compression), _BUFFER_BYTES)


def check_expansion(file_bytes: int, unpacked_bytes: int) -> None:
    """Raise OSError where ``unpacked_bytes`` are more than a file of ``file_bytes`` can hold of any text in use.

    A few bytes can unpack to as many as a disk takes. Until then nobody would hear why `prepare` goes on for hours.
    """
    if unpacked_bytes > max(_LEAST_IMPLAUSIBLE_BYTES, PLAUSIBLE_EXPANSION * file_bytes):
        raise OSError(
            f"its {file_bytes:,} bytes unpack to more than {unpacked_bytes:,}, over {PLAUSIBLE_EXPANSION:,} times as "
            "many, which no text in use does; if it is meant, unpack it first"
        )


class _Decompressed(io.RawIOBase):
    def __init__(self, path: Path | str, compression: str) -> None:
        self._file = open(path, "rb", buffering=0)
        self._file_bytes, self._unpacked_bytes = os.fstat(self._file.fileno()).st_size, 0
        try:
            if compression == "gzip":
                self._stream: Any = gzip.GzipFile(fileobj=io.BufferedReader(self._file, _BUFFER_BYTES))
                return
            import zstandard

            frames = list(_frames(self._file.fileno()))
            window = max((frame.window_bytes for frame in frames), default=0)
            if window > LARGEST_WINDOW:
                raise OSError(f"a window of {window:,} bytes is more than zstd decodes; compress it without --long")
            self._file.seek(0)
            decompressor = zstandard.ZstdDecompressor(max_window_size=max(window, _LARGEST_BLOCK))
            self._stream = decompressor.stream_reader(self._file, read_across_frames=True)
        except BaseException:
            self._file.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except (EOFError, zlib.error) as error:
            raise OSError(str(error)) from error
        except OSError:
            raise
        except Exception as error:  # ZstdError, which derives from nothing more telling
            raise OSError(str(error)) from error
        self._unpacked_bytes += len(content)
        check_expansion(self._file_bytes, self._unpacked_bytes)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def window_bytes_of(path: Path | str) -> int:
    """Return the memory that decompressing ``path`` takes for what it may refer back to; 0 where that is small.

    Raises:
        OSError: the file is damaged.
    """
    if compression_of(path) != "zstd":
        return 0
    with open(path, "rb", buffering=0) as file, _naming(path):
        first = next(_frames(file.fileno(), only_first=True), None)
        if first is None or first.window_bytes <= 8 << 20:  # what zstd writes without --long or --ultra
            return 0
        return max(frame.memory_bytes for frame in _frames(file.fileno()))


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@dataclass(frozen=True, kw_only=True)
class _Frame:
    window_bytes: int
    content_bytes: int
    """At most."""

    @property
    def memory_bytes(self) -> int:
        return min(self.window_bytes, self.content_bytes)


def _frames(descriptor: int, *, only_first: bool = False) -> Iterator[_Frame]:
    """Yield the frames of a Zstandard file (RFC 8878), by headers alone; with ``only_first`` from the first header."""
    place, size = 0, os.fstat(descriptor).st_size
    while place < size:
        magic = _number(descriptor, place, 4)
        if magic & ~0xF == _SKIPPABLE_MAGIC:
            place += 8 + _number(descriptor, place + 4, 4)
            continue
        if magic != _MAGIC:
            raise OSError(_DAMAGED)
        window, content, place, has_checksum = _frame_header(descriptor, place + 4)
        if only_first:
            yield _Frame(window_bytes=window, content_bytes=content if content is not None else window)
            return
        bound, is_last = 0, False
        while not is_last:
            header = _number(descriptor, place, 3)
            is_last, kind, block = bool(header & 1), header >> 1 & 3, header >> 3
            if kind == 3:
                raise OSError(_DAMAGED)
            bound += block if kind < 2 else _LARGEST_BLOCK
            place += 3 + (1 if kind == 1 else block)
        place += 4 if has_checksum else 0
        if place > size:
            raise OSError(_DAMAGED)
        yield _Frame(window_bytes=window, content_bytes=bound if content is None else min(bound, content))
    if place > size:
        raise OSError(_DAMAGED)


def _frame_header(descriptor: int, place: int) -> tuple[int, int | None, int, bool]:
    """Return window, content size if it is stated, the place of the first block, and whether a checksum follows."""
    description = _number(descriptor, place, 1)
    place += 1
    is_single = bool(description & 0x20)
    window = 0
    if not is_single:
        exponent, mantissa = divmod(_number(descriptor, place, 1), 8)
        window = (1 << (10 + exponent)) // 8 * (8 + mantissa)
        place += 1
    place += (0, 1, 2, 4)[description & 3]
    width = (1 if is_single else 0, 2, 4, 8)[description >> 6]
    content = None
    if width:
        content = _number(descriptor, place, width) + (256 if width == 2 else 0)
        place += width
    if is_single:
        window = content or 0
    return window, content, place, bool(description & 4)


def _number(descriptor: int, place: int, width: int) -> int:
    content = os.pread(descriptor, width, place)
    if len(content) < width:
        raise OSError(_DAMAGED)
    return int.from_bytes(content, "little")
