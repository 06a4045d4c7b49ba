"""Finds places where a long text can be split without changing its tokens.

A tokenizer looks only at the neighbourhood of a place to decide how it splits there. So a place is taken as a cut where
the text around it, encoded in one, gives the same tokens as both sides encoded apart. Most tokenizers pass that between
a word and the space after it; one that marks the beginning of its input passes nowhere, and its texts stay whole.

Inside a long run of one kind of character the segmentation depends on the run's start, which the neighbourhood may not
contain. So no place within whitespace is taken, and within a word only one that passes also where the neighbourhood
begins a character later, which moves the tokens within a run.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from moescale.data.prepare.work_items import Chunk, LongFile, ReadableChunk, TextRange

Encode = Callable[[str], Iterable[int]]

_CONTEXT = 1024
_SEARCHED = 4096
_CANDIDATES = 32
_WINDOW = 2 * _CONTEXT + _SEARCHED
"""Characters at the end of a text in which a cut is looked for."""
_WINDOW_BYTES = 4 * _WINDOW
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def last_cut(text: str, encode: Encode) -> int | None:
    """Return a place near the end of ``text`` where it can be cut, or None; what follows ``text`` has no part in it."""
    end = len(text) - _CONTEXT
    start = max(_CONTEXT, end - _SEARCHED)
    word_ends = [match.start() for match in _WORD_END.finditer(text, start, max(start, end))]
    anywhere = range(end - 1, max(start, end - _CANDIDATES) - 1, -1)
    for place in word_ends[: -_CANDIDATES - 1 : -1]:
        if _is_cut(text, place, _CONTEXT, encode):
            return place
    for place in anywhere:
        within_whitespace = text[place - 1].isspace() and text[place].isspace()
        if not within_whitespace and all(_is_cut(text, place, before, encode) for before in (_CONTEXT, _CONTEXT - 1)):
            return place
    return None


def _is_cut(text: str, place: int, before: int, encode: Encode) -> bool:
    """Return True if a split at ``place`` keeps the tokens of the ``before`` characters and the context after it."""
    left, right = text[place - before : place], text[place : place + _CONTEXT]
    return list(encode(left + right)) == [*encode(left), *encode(right)]


def parts_of(text: str, encode: Encode, size: int) -> Iterator[str]:
    """Cut ``text`` into parts of about ``size`` characters, as few as its tokens allow."""
    start, end = 0, size
    while end < len(text):
        window = max(start, end - _WINDOW)  # a long text without cuts is not copied again and again
        place = last_cut(text[window:end], encode)
        if place is None:
            end += size
        else:
            yield text[start : window + place]
            start = window + place
            end = start + size
    yield text[start:]


def in_parts(chunks: Iterator[Chunk], encode: Encode, size: int) -> Iterator[ReadableChunk]:
    """Pass chunks on, long files in parts of about ``size`` bytes, as few as their tokens allow."""
    for chunk in chunks:
        if isinstance(chunk, LongFile):
            yield from _ranges_of(chunk, encode, size)
        else:
            yield chunk


def _ranges_of(file: LongFile, encode: Encode, size: int) -> Iterator[TextRange]:
    start = 0
    with open(file.path, "rb") as stream:
        for border in range(size, file.num_bytes, size):
            place = _last_cut_before(border, stream, encode)
            if place is not None and place > start:
                yield TextRange(path=file.path, start=start, end=place, is_last=False)
                start = place
    yield TextRange(path=file.path, start=start, end=file.num_bytes, is_last=True)


def _last_cut_before(border: int, stream: BinaryIO, encode: Encode) -> int | None:
    """Return the byte where the UTF-8 text of ``stream`` can be cut, a little before ``border``, or None."""
    first = max(0, border - _WINDOW_BYTES)
    stream.seek(first)
    content = stream.read(border - first)
    inside = next(number for number, byte in enumerate(content) if byte & 0xC0 != 0x80)  # begin with a character
    text = codecs.getincrementaldecoder("utf-8")().decode(content[inside:])
    place = last_cut(text, encode)
    return None if place is None else first + inside + len(text[:place].encode())
