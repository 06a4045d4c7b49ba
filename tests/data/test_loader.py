"""Order, sharing out, targets and exact resumption of the loader."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch

from moescale.coordinates import Coordinates, data_parallel
from moescale.data.batch import read_batch
from moescale.data.corpus import PackedSequence
from moescale.data.loader import Loader, validation_batches
from moescale.errors import ConfigError, DataError
from moescale.plan import MeshShape

LENGTH = 8


class MemoryCorpus:
    """Sequence ``i`` holds ``i * S .. i * S + S - 1``; a document starts at every fifth token of the corpus."""

    sequence_length = LENGTH
    name = fingerprint = "memory"

    def __init__(
        self, num_sequences: int, document_boundaries: bool = False, num_padding: Sequence[int] | None = None
    ) -> None:
        self.num_sequences = num_sequences
        self.vocabulary_size = num_sequences * LENGTH
        self.document_boundaries = document_boundaries
        self.num_padding = num_padding
        self.has_padding = num_padding is not None
        self.reads = 0
        self.fail_from = None

    def sequence(self, index):
        self.reads += 1
        if self.fail_from is not None and self.reads > self.fail_from:
            raise DataError("disk is gone")
        tokens = np.arange(index * LENGTH, (index + 1) * LENGTH, dtype=np.uint16)
        padding = np.arange(LENGTH) >= LENGTH - self.num_padding[index] if self.has_padding else None
        return PackedSequence(tokens, tokens % 5 == 0 if self.document_boundaries else None, padding=padding)

    notices = ()
    num_bytes = 1 << 40

    def verifying(self, part=0, num_parts=1):
        yield 1


def make_loader(corpus=None, **changes) -> Loader:
    options = {"sequences_per_step": 4, "micro_batch_sequences": 2, "seed": 1} | changes
    return Loader(corpus or MemoryCorpus(10), **options)


def ids_of(step) -> list[int]:
    return [int(number) for batch in step for number in batch.sequence_ids]


def take(loader, steps: int) -> list[list[int]]:
    iterator = iter(loader)
    taken = [ids_of(step) for step in islice(iterator, steps)]
    iterator.close()
    return taken


def test_targets_are_the_next_tokens():
    batch = read_batch(MemoryCorpus(3), np.array([2, 0]))
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens[0].tolist() == [16, 17, 18, 19, 20, 21, 22, 23]
    assert batch.targets[0].tolist() == [17, 18, 19, 20, 21, 22, 23, -100]
    assert batch.sequence_ids.tolist() == [2, 0]
    assert batch.document_starts is None


def test_targets_stop_at_document_boundaries():
    batch = read_batch(MemoryCorpus(3, document_boundaries=True), np.array([2]))
    assert batch.document_starts[0].tolist() == [False, False, False, False, True, False, False, False]
    assert batch.targets[0].tolist() == [17, 18, 19, -100, 21, 22, 23, -100]


def test_padding_is_told_of_every_sequence_of_a_corpus_that_has_any():
    batch = read_batch(MemoryCorpus(3, num_padding=[0, 3, 8]), np.array([1, 0]))
    assert batch.padding.tolist() == [[False] * 5 + [True] * 3, [False] * 8]
    assert read_batch(MemoryCorpus(3), np.array([1, 0])).padding is None


def test_steps_consist_of_micro_batches():
    step = next(iter(make_loader()))
    assert [tuple(batch.tokens.shape) for batch in step] == [(2, LENGTH), (2, LENGTH)]


def test_every_epoch_holds_every_sequence_once_in_its_own_order():
    order = sum(take(make_loader(), 15), [])  # 60 positions: six epochs, and every other one ends within a step
    epochs = [order[first : first + 10] for first in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_unshuffled_order_is_that_of_the_corpus():
    assert sum(take(make_loader(shuffle=False), 5), []) == [*range(10), *range(10)]


def test_seed_decides_the_order():
    assert take(make_loader(seed=1), 5) == take(make_loader(seed=1), 5) != take(make_loader(seed=2), 5)


def test_a_step_may_be_larger_than_the_corpus():
    step = take(make_loader(MemoryCorpus(3), sequences_per_step=8), 1)[0]
    assert sorted(step[:3]) == sorted(step[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("stop", range(8))
def test_resumes_after_the_last_step_handed_out(stop):
    straight = take(make_loader(), 8)
    loader = make_loader(prefetch_steps=3)
    assert take(loader, stop) == straight[:stop]
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 8 - stop) == straight[stop:]


def test_prefetched_steps_do_not_count_in_the_state():
    loader = make_loader(prefetch_steps=4)
    iterator = iter(loader)
    assert loader.state_dict()["position"] == 0
    next(iterator)
    time.sleep(0.05)
    assert loader.state_dict() == {"position": 4, "seed": 1, "corpus": "memory", "shuffle": True}
    next(iterator)
    assert loader.state_dict()["position"] == 8


def test_a_second_iteration_goes_on_where_the_first_stopped():
    straight, loader = take(make_loader(), 6), make_loader()
    assert take(loader, 2) + take(loader, 4) == straight


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_together_take_what_one_rank_takes(num_ranks):
    single = take(make_loader(sequences_per_step=8, micro_batch_sequences=2), 5)
    ranks = [
        take(make_loader(sequences_per_step=8, micro_batch_sequences=1, coordinates=data_parallel(num_ranks, rank)), 5)
        for rank in range(num_ranks)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == single


def test_ranks_of_other_axes_take_what_their_data_rank_takes():
    mesh = MeshShape(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2)
    single = take(make_loader(sequences_per_step=8, micro_batch_sequences=1), 2)
    taken: dict[int, list] = {}
    for rank in range(32):
        place = Coordinates(mesh=mesh, rank=rank)
        mine = take(make_loader(sequences_per_step=8, micro_batch_sequences=1, coordinates=place), 2)
        assert taken.setdefault(place.data_rank, mine) == mine
    assert [sum(parts, []) for parts in zip(*(taken[number] for number in range(4)), strict=True)] == single


def test_state_moves_to_another_number_of_ranks_and_step_size():
    straight = sum(take(make_loader(), 9), [])
    loader = make_loader(coordinates=data_parallel(2, 1))
    take(loader, 3)
    resumed = make_loader(sequences_per_step=6, micro_batch_sequences=3)
    resumed.load_state_dict(loader.state_dict())
    assert sum(take(resumed, 4), []) == straight[12:36]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 2}, "data.seed 1, this run has 2"),
        ({"shuffle": False}, "data.shuffle True, this run has False"),
    ],
)
def test_state_of_another_order_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make_loader(**changes).load_state_dict(make_loader().state_dict())


def test_state_of_another_corpus_is_refused_naming_both():
    other = MemoryCorpus(10)
    other.fingerprint = "other"
    with pytest.raises(DataError, match="data.corpus 'memory', this run has 'other'"):
        make_loader(other).load_state_dict(make_loader().state_dict())


@pytest.mark.parametrize(
    "changes", [{"sequences_per_step": 6, "coordinates": data_parallel(2, 0)}, {"sequences_per_step": 0}]
)
def test_steps_that_cannot_be_shared_out_are_refused(changes):
    with pytest.raises(ConfigError, match=r"sequences_per_step \(\d\) must be a multiple of num_data_ranks \(\d\)"):
        make_loader(**changes)


def test_a_read_error_comes_out_at_its_step():
    corpus = MemoryCorpus(10)
    corpus.fail_from = 9  # within the third step
    loader = make_loader(corpus)
    iterator = iter(loader)
    next(iterator), next(iterator)
    with pytest.raises(DataError, match="disk is gone"):
        next(iterator)
    assert loader.state_dict()["position"] == 8


def test_closing_the_iterator_ends_its_thread():
    before = threading.active_count()
    iterator = iter(make_loader())
    next(iterator)
    assert threading.active_count() == before + 1
    iterator.close()
    assert threading.active_count() == before


def validation_ids(num_sequences, **options) -> list[list[int]]:
    return [batch.sequence_ids.tolist() for batch in validation_batches(MemoryCorpus(num_sequences), **options)]


def test_validation_runs_through_the_corpus_in_order():
    assert validation_ids(5, micro_batch_sequences=2) == [[0, 1], [2, 3], [4]]
    assert validation_ids(5, micro_batch_sequences=2, limit=50) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_limited_validation_is_spread_over_the_whole_corpus(num_ranks):
    ranks = [
        validation_ids(614, micro_batch_sequences=16, limit=128, coordinates=data_parallel(num_ranks, rank))
        for rank in range(num_ranks)
    ]
    ids = [number for batches in ranks for batch in batches for number in batch if number >= 0]
    assert len(set(ids)) == 128
    assert {after - before for before, after in itertools.pairwise(ids)} == {4, 5}
    assert ids[0] == 0 and 614 - 5 <= ids[-1] < 614


@pytest.mark.parametrize("num_sequences", range(1, 14))
@pytest.mark.parametrize("micro_batch_sequences", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_validation_ranks_cover_everything_in_equally_many_batches(num_sequences, micro_batch_sequences, num_ranks):
    ranks = [
        validation_ids(
            num_sequences, micro_batch_sequences=micro_batch_sequences, coordinates=data_parallel(num_ranks, rank)
        )
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [number for batches in ranks for batch in batches for number in batch if number >= 0]
    assert ids == list(range(num_sequences))


def test_validation_filler_has_no_targets():
    *_, last = validation_batches(MemoryCorpus(3), micro_batch_sequences=1, coordinates=data_parallel(2, 0))
    assert last.sequence_ids.tolist() == [-1]
    assert (last.targets == -100).all()


@pytest.mark.parametrize("vocabulary_size", [20, 24])
def test_an_id_outside_the_vocabulary_is_found_before_it_reaches_a_device(vocabulary_size):
    corpus = MemoryCorpus(3)
    corpus.vocabulary_size = vocabulary_size
    if vocabulary_size == 24:
        read_batch(corpus, np.array([2]))
        return
    with pytest.raises(
        DataError, match="memory: sequence 2 has id 20 at token 4, outside the corpus's vocabulary of 20"
    ):
        read_batch(corpus, np.array([0, 2]))
