"""Deals documents to the splits of a corpus: each whole, and all parts of a conversation to the same split."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moescale.data import shuffle
from moescale.data.prepare.encode import EncodedChunk
from moescale.data.prepare.settings import PrepareSettings
from moescale.data.prepare.shard_writer import SplitWriter


class Dealer(Protocol):
    """Gives the documents of chunks, which come in order, to writers of splits."""

    def deal(self, chunk: EncodedChunk, first_origin: int) -> None:
        """Take a chunk whose first conversation or document is number ``first_origin`` of the source."""
        ...

    def finish(self) -> None:
        """Assign the documents still held, once all chunks have arrived."""
        ...


def dealer_for(settings: PrepareSettings, writers: Mapping[str, SplitWriter]) -> Dealer:
    """Return who deals as ``settings`` say."""
    if settings.validation_documents is not None:
        return ByNumber(writers["train"], writers["validation"], settings.seed, settings.validation_documents)
    return ByShare(writers, settings.seed, settings.validation_fraction)


@dataclass(frozen=True)
class ByShare:
    """Sets a share of the documents aside for validation; all go to train where there is no such split."""

    writers: Mapping[str, SplitWriter]
    seed: int
    share: float

    def deal(self, chunk: EncodedChunk, first_origin: int) -> None:
        if "validation" not in self.writers:
            self.writers["train"].add(chunk.tokens, chunk.lengths, chunk.continues, chunk.targets)
            return
        held_out = shuffle.chosen(self.seed, first_origin, chunk.num_origins, self.share)
        if chunk.origins is not None:
            held_out = held_out[chunk.origins]
        held_out_tokens = np.repeat(held_out, chunk.lengths)
        for split, ours, our_tokens in (
            ("validation", held_out, held_out_tokens),
            ("train", ~held_out, ~held_out_tokens),
        ):
            continues = chunk.continues and bool(ours[0])
            targets = None if chunk.targets is None else chunk.targets[our_tokens]
            self.writers[split].add(chunk.tokens[our_tokens], chunk.lengths[ours], continues, targets)

    def finish(self) -> None:
        pass


@dataclass
class _Documents:
    """Documents one after the other: the parts of a conversation, or some of a chunk."""

    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray | None

    def extend(self, rest: _Documents) -> None:
        """Append the rest of the last document, and the documents after it."""
        lengths = rest.lengths.copy()
        lengths[0] += self.lengths[-1]
        self.lengths = np.concatenate([self.lengths[:-1], lengths])
        self.tokens = np.concatenate([self.tokens, rest.tokens])
        if self.targets is not None and rest.targets is not None:
            self.targets = np.concatenate([self.targets, rest.targets])


class ByNumber:
    """Sets a number of documents aside for validation: those whose numbers have the smallest hashes under the seed.

    How many there are is known at the end, so the best ones so far are held in memory. One that is overtaken goes to
    train at that moment, and so stands there a little later than in the source.
    """

    def __init__(self, train: SplitWriter, validation: SplitWriter, seed: int, number: int) -> None:
        self._train = train
        self._validation = validation
        self._seed = seed
        self._number = number
        self._held: dict[int, _Documents] = {}
        self._worst: list[tuple[int, int]] = []
        """A heap of (minus the hash, number of the document) of those held."""

    def deal(self, chunk: EncodedChunk, first_origin: int) -> None:
        if not len(chunk.lengths):
            return
        hashes = shuffle.hashes(self._seed, first_origin, chunk.num_origins)
        is_candidate = hashes < np.uint64(self._limit) if self._is_full else np.ones(len(hashes), dtype=bool)
        if chunk.continues:
            is_candidate[0] = first_origin in self._held
        origins = np.arange(len(chunk.lengths)) if chunk.origins is None else chunk.origins
        token_ends = np.concatenate([[0], np.cumsum(chunk.lengths)])

        def documents(first: int, end: int) -> _Documents:
            """Return the documents of the chunk's origins ``first .. end - 1``."""
            start, stop = np.searchsorted(origins, [first, end])
            tokens = slice(token_ends[start], token_ends[stop])
            targets = None if chunk.targets is None else chunk.targets[tokens].copy()
            return _Documents(chunk.tokens[tokens].copy(), chunk.lengths[start:stop].copy(), targets)

        done = 0
        for candidate in np.flatnonzero(is_candidate).tolist():
            self._to_train(documents(done, candidate), continues=chunk.continues and done == 0)
            ours = documents(candidate, candidate + 1)
            if chunk.continues and candidate == 0:
                self._held[first_origin].extend(ours)
            else:
                self._offer(first_origin + candidate, int(hashes[candidate]), ours)
            done = candidate + 1
        self._to_train(documents(done, chunk.num_origins), continues=chunk.continues and done == 0)

    def finish(self) -> None:
        for _, held in sorted(self._held.items()):
            self._validation.add(held.tokens, held.lengths, False, held.targets)
        self._held.clear()

    @property
    def _is_full(self) -> bool:
        return len(self._worst) >= self._number

    @property
    def _limit(self) -> int:
        """The largest hash of the held documents."""
        return -self._worst[0][0]

    def _offer(self, origin: int, value: int, documents: _Documents) -> None:
        """Hold a document, or what it overtakes no longer."""
        if self._is_full and value >= self._limit:
            self._to_train(documents, continues=False)
            return
        self._held[origin] = documents
        heapq.heappush(self._worst, (-value, origin))
        if len(self._worst) > self._number:
            _, overtaken = heapq.heappop(self._worst)
            self._to_train(self._held.pop(overtaken), continues=False)

    def _to_train(self, documents: _Documents, *, continues: bool) -> None:
        if len(documents.lengths):
            self._train.add(documents.tokens, documents.lengths, continues, documents.targets)
