"""Best-fit packing: whole documents to sequences, with as little padding as their lengths allow, in bounded memory.

Documents gather in a window of many sequences. When it is full they are placed, the longest first, each into the
sequence where it leaves the least room (best-fit decreasing). Sequences that are as good as full are handed out; the
documents of the others go back into the window, where shorter ones to come may fill them. So what is handed out depends
on the documents and their order alone.

What padding there is comes from the order: long documents whose short ones come later than the window reaches. A wider
window helps there, and a finer search for what fits does not (docs/decisions/0020-packing-window.md).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_WINDOW_TOKENS = 1 << 24
_WINDOW_DOCUMENTS = 1 << 17
"""So short are documents then that they fit everywhere, and cost more memory than their tokens do."""
_LEAST_WINDOW_SEQUENCES = 128
_FULL_SHARE = 1 / 512
"""Fraction of padding up to which a sequence is emitted before the end."""
_MOST_KEPT_SHARE = 0.8
"""Fraction of the window, in sequences and in documents, that is kept; the rest is emitted, to guarantee progress."""


class Document(NamedTuple):
    """One document."""

    tokens: np.ndarray
    target_bits: np.ndarray
    """uint8: eight tokens to a byte, the first in its lowest bit."""

    @property
    def targets(self) -> np.ndarray:
        """bool, one per token."""
        return np.unpackbits(self.target_bits, count=len(self.tokens), bitorder="little").astype(bool)


class BestFitPacking:
    """Packs documents of at most ``sequence_length`` tokens."""

    def __init__(self, sequence_length: int, window_tokens: int | None = None) -> None:
        self._sequence_length = sequence_length
        self._window_tokens = window_tokens or max(_WINDOW_TOKENS, _LEAST_WINDOW_SEQUENCES * sequence_length)
        self._window: list[Document] = []
        self._num_tokens = 0

    def add(self, tokens: np.ndarray, targets: np.ndarray) -> list[list[Document]]:
        """Take one document, and return the sequences that are ready."""
        self._window.append(Document(tokens, np.packbits(targets, bitorder="little")))
        self._num_tokens += len(tokens)
        if self._num_tokens < self._window_tokens and len(self._window) < _WINDOW_DOCUMENTS:
            return []
        sequences = self._packed()
        is_ready = [padding <= _FULL_SHARE * self._sequence_length for padding, _ in sequences]
        ready = [documents for (_, documents), full in zip(sequences, is_ready, strict=True) if full]
        kept = [documents for (_, documents), full in zip(sequences, is_ready, strict=True) if not full]
        first = _first_kept(kept, int(_MOST_KEPT_SHARE * self._window_tokens / self._sequence_length))
        ready += kept[:first]  # the fullest of them come first
        kept = kept[first:]
        self._window = [document for documents in kept for document in documents]
        self._num_tokens = sum(len(document.tokens) for document in self._window)
        return ready

    def rest(self) -> Iterator[list[Document]]:
        """Yield the sequences that are left."""
        for _, documents in self._packed():
            yield documents
        self._window, self._num_tokens = [], 0

    def _packed(self) -> list[tuple[int, list[Document]]]:
        """Pack the window; return sequences with their padding, the fullest first."""
        order = sorted(range(len(self._window)), key=lambda number: (-len(self._window[number].tokens), number))
        packed: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # room and number of the sequences that are not full, sorted
        for number in order:
            length = len(self._window[number].tokens)
            place = bisect_left(rooms, (length, -1))
            if place == len(rooms):
                packed.append([])
                room, sequence = self._sequence_length, len(packed) - 1
            else:
                room, sequence = rooms.pop(place)
            packed[sequence].append(number)
            if room > length:
                insort(rooms, (room - length, sequence))
        padding = [0] * len(packed)
        for room, sequence in rooms:
            padding[sequence] = room
        numbered = sorted(range(len(packed)), key=lambda sequence: (padding[sequence], sequence))
        return [
            (padding[sequence], [self._window[number] for number in sorted(packed[sequence])]) for sequence in numbered
        ]


def _first_kept(sequences: list[list[Document]], most_sequences: int) -> int:
    """Return from which sequence on the last ones are few enough, and their documents, too."""
    num_documents = 0
    for number in range(len(sequences) - 1, -1, -1):
        num_documents += len(sequences[number])
        if len(sequences) - number > most_sequences or num_documents > _MOST_KEPT_SHARE * _WINDOW_DOCUMENTS:
            return number + 1
    return 0
