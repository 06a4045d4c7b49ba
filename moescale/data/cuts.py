"""Where a long text can be cut so that the tokens of its parts are those of the whole.

A tokenizer looks only at the neighbourhood of a place to decide how it splits there. So a place is taken as a cut where
the text around it, encoded in one, gives the same tokens as both sides encoded apart. Most tokenizers pass that between
a word and the space after it; one that marks the beginning of its input passes nowhere, and its texts stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from moescale.data.sources import Chunk, TextPart

Encode = Callable[[str], Iterable[int]]

_CONTEXT = 1024
_SEARCHED = 4096
_CANDIDATES = 32
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def last_cut(text: str, encode: Encode) -> int | None:
    """Return a place near the end of ``text`` where it can be cut, or None; what follows ``text`` has no part in it."""
    end = len(text) - _CONTEXT
    start = max(_CONTEXT, end - _SEARCHED)
    word_ends = [match.start() for match in _WORD_END.finditer(text, start, max(start, end))]
    anywhere = range(end - 1, max(start, end - _CANDIDATES) - 1, -1)
    for place in [*word_ends[: -_CANDIDATES - 1 : -1], *anywhere]:
        left, right = text[place - _CONTEXT : place], text[place : place + _CONTEXT]
        if list(encode(left + right)) == [*encode(left), *encode(right)]:
            return place
    return None


def parts_of(text: str, encode: Encode, size: int) -> Iterator[str]:
    """Cut ``text`` into parts of about ``size`` characters, as few as its tokens allow."""
    start, end = 0, size
    while end < len(text):
        place = last_cut(text[start:end], encode)
        if place is None:
            end += size
        else:
            yield text[start : start + place]
            start += place
            end = start + size
    yield text[start:]


def at_cuts(chunks: Iterator[Chunk], encode: Encode) -> Iterator[Chunk]:
    """Pass chunks on, with the parts of long texts moved to where their texts can be cut."""
    pending: TextPart | None = None
    for chunk in chunks:
        if not isinstance(chunk, TextPart):
            yield chunk
            continue
        if pending is not None:
            chunk = replace(chunk, text=pending.text + chunk.text, is_first=pending.is_first)
        pending = None
        place = None if chunk.is_last else last_cut(chunk.text, encode)
        if chunk.is_last:
            yield chunk
        elif place is None:
            pending = chunk
        else:
            yield replace(chunk, text=chunk.text[:place])
            pending = replace(chunk, text=chunk.text[place:], is_first=False)
