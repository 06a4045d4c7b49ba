"""Batches for training: shuffled by epoch, resumable at every step, the same sequences whatever the number of ranks.

The order is one endless line of sequences: position ``p`` is sequence ``permutation(seed, epoch)[p mod n]`` of epoch
``p div n``. A step takes the next ``sequences_per_step`` positions; each data rank takes its contiguous share of them.
So the state is one number, and neither the ranks nor the micro-batches nor the step's size have a part in it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch

from moescale.coordinates import ONE_DEVICE, Coordinates
from moescale.data import shuffle as shuffling
from moescale.data.batch import NO_TARGET, Batch, read_batch
from moescale.data.corpus import Corpus, Verification
from moescale.errors import ConfigError, DataError
from moescale.records import FileKind, Range, build

MAX_POSITION = 2**53
"""Sequences read since the start; more than any corpus and number of epochs come to."""
_STATE = FileKind(noun="a loader's state", error=DataError, remedy="start a new run")


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """The state of a :class:`Loader` in a checkpoint."""

    position: Annotated[int, Range(least=0, most=MAX_POSITION)]
    seed: int
    corpus: str
    shuffle: bool


class Loader:
    """An endless, resumable stream of steps, each a list of this rank's micro-batches.

    Args:
        sequences_per_step: of all ranks together; a multiple of ``num_data_ranks * micro_batch_sequences``.
        shuffle: take each epoch in its own pseudo-random order that follows from ``seed``; else in the corpus's.
        coordinates: this rank's; those with the same ``data_rank`` get the same batches.
        prefetch_steps: steps that a thread reads ahead.
        verification: of the corpus; its errors are raised with the next step, and no sequence is handed out a second
            time before it is done.

    Raises:
        ConfigError: ``sequences_per_step`` cannot be shared out.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequences_per_step: int,
        micro_batch_sequences: int,
        seed: int,
        shuffle: bool = True,
        coordinates: Coordinates = ONE_DEVICE,
        prefetch_steps: int = 2,
        verification: Verification | None = None,
    ) -> None:
        num_data_ranks = coordinates.num_data_ranks
        if sequences_per_step < 1 or sequences_per_step % (num_data_ranks * micro_batch_sequences):
            raise ConfigError(
                f"loader.sequences_per_step ({sequences_per_step}) must be a multiple of num_data_ranks "
                f"({num_data_ranks}) * micro_batch_sequences ({micro_batch_sequences})"
            )
        self.corpus = corpus
        self.sequences_per_step = sequences_per_step
        self.micro_batch_sequences = micro_batch_sequences
        self.seed = seed
        self.shuffle = shuffle
        self.coordinates = coordinates
        self.prefetch_steps = prefetch_steps
        self.verification = verification
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the step handed out last (steps read ahead do not count), and what it is a position in."""
        return {
            "position": self._position,
            "seed": self.seed,
            "corpus": self.corpus.fingerprint,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state saved by any number of ranks. Takes effect with the next ``iter()``.

        Raises:
            DataError: the state belongs to another corpus, seed or order.
        """
        state = vars(build(LoaderState, state, "the saved position", _STATE))
        for name, now in (("corpus", self.corpus.fingerprint), ("seed", self.seed), ("shuffle", self.shuffle)):
            if state[name] != now:
                raise DataError(
                    f"the saved position is one of data.{name} {state[name]!r}, this run has {now!r}; "
                    f"resume with the same {name}, or start a new run"
                )
        self._position = state["position"]

    def __iter__(self) -> Iterator[list[Batch]]:
        position = began = self._position
        ahead: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=max(1, self.prefetch_steps))
        stopped = threading.Event()

        def read_ahead() -> None:
            start = position
            try:
                while not stopped.is_set():
                    ahead.put(self._step(start))
                    start += self.sequences_per_step
            except BaseException as error:  # of any type: raised again when the step is requested
                ahead.put(error)

        thread = threading.Thread(target=read_ahead, name="moescale-loader", daemon=True)
        thread.start()
        try:
            while True:
                step = ahead.get()
                if isinstance(step, BaseException):
                    raise step
                position += self.sequences_per_step
                if self.verification is not None:
                    self.verification.check()
                    if position - began > self.corpus.num_sequences:
                        self.verification.wait()
                self._position = position
                yield step
        finally:
            stopped.set()
            while thread.is_alive():  # the thread may be waiting for room in the queue, once
                try:
                    ahead.get_nowait()
                except queue.Empty:
                    thread.join(0.01)

    def _step(self, position: int) -> list[Batch]:
        share = self.sequences_per_step // self.coordinates.num_data_ranks
        first = position + self.coordinates.data_rank * share
        ids = self._sequence_ids(np.arange(first, first + share, dtype=np.int64))
        return [read_batch(self.corpus, part) for part in ids.reshape(-1, self.micro_batch_sequences)]

    def _sequence_ids(self, positions: np.ndarray) -> np.ndarray:
        """Map positions in the endless line to sequences of the corpus."""
        epochs, offsets = np.divmod(positions, self.corpus.num_sequences)
        if not self.shuffle:
            return offsets
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = shuffling.permuted(offsets[here], self.corpus.num_sequences, seed=self.seed, epoch=int(epoch))
        return ids


def validation_batches(
    corpus: Corpus,
    *,
    micro_batch_sequences: int,
    coordinates: Coordinates = ONE_DEVICE,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yield this data rank's contiguous share of ``limit`` sequences, in order; the last batch may be smaller.

    They lie evenly spaced over the whole corpus, because neighbours come from the same documents: the first ones would
    tell of a few documents instead of all. They are the same for every number of ranks and in every call.

    All ranks get equally many batches, since they must meet in every collective: a rank whose share ends earlier gets
    a sequence without targets (id -1).
    """
    total = corpus.num_sequences if limit is None else min(limit, corpus.num_sequences)
    rank, num_ranks = coordinates.data_rank, coordinates.num_data_ranks
    first, last = (total * number // num_ranks for number in (rank, rank + 1))
    longest_share = -(-total // num_ranks)
    for start in range(first, first + longest_share, micro_batch_sequences):
        places = np.arange(start, min(start + micro_batch_sequences, last), dtype=np.int64)
        ids = places * corpus.num_sequences // total
        if ids.size:
            yield read_batch(corpus, ids)
        else:
            filler = read_batch(corpus, np.zeros(1, dtype=np.int64))
            yield replace(
                filler,
                targets=torch.full_like(filler.targets, NO_TARGET),
                sequence_ids=torch.full_like(filler.sequence_ids, -1),
            )
