"""Best-fit packing: every document once and whole, little padding, bounded memory, the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from moescale.data.prepare import best_fit
from moescale.data.prepare.best_fit import BestFitPacking

LENGTH = 4096
_RANDOM = np.random.default_rng(0)
DISTRIBUTIONS = {
    "short chats": _RANDOM.lognormal(5.0, 0.8, 20_000),
    "instructions with long tails": _RANDOM.lognormal(6.0, 1.2, 6_000),
    "dialogues of many turns": _RANDOM.gamma(2.0, 600.0, 3_000),
    "short and long ones": np.concatenate([_RANDOM.normal(3_300, 300, 1_000), _RANDOM.exponential(300, 6_000)]),
}


def packed(lengths: list[int], packing: BestFitPacking) -> list[list[int]]:
    """Return the numbers of the documents in every sequence."""
    sequences = []
    for number, length in enumerate(lengths):
        sequences += packing.add(np.full(length, number, dtype=np.uint32), np.ones(length, dtype=bool))
        if number % 500 == 0:
            assert sum(len(document.tokens) for document in packing._window) <= packing._window_tokens + LENGTH
    sequences += packing.rest()
    return [[int(document.tokens[0]) for document in documents] for documents in sequences]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_less_than_one_percent_is_padding_and_every_document_is_there_once(name):
    lengths = np.clip(_RANDOM.permutation(DISTRIBUTIONS[name]), 1, LENGTH).astype(int).tolist()
    sequences = packed(lengths, BestFitPacking(LENGTH, window_tokens=1 << 20))
    assert sorted(number for documents in sequences for number in documents) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in documents) <= LENGTH for documents in sequences)
    padding = 1 - sum(lengths) / (LENGTH * len(sequences))
    assert padding < 0.01, f"{padding:.2%}"
    assert sequences == packed(lengths, BestFitPacking(LENGTH, window_tokens=1 << 20))


def test_evenly_distributed_lengths_up_to_a_whole_sequence_are_packed_within_a_percent():
    lengths = np.random.default_rng(1).integers(1, LENGTH + 1, 15_000).tolist()
    assert 1 - sum(lengths) / (LENGTH * len(packed(lengths, BestFitPacking(LENGTH)))) < 0.01


def test_short_documents_fill_long_ones_that_came_thousands_of_sequences_before():
    lengths = [3_300] * 3_000 + [796] * 3_000
    assert len(packed(lengths, BestFitPacking(LENGTH))) == 3_000


def test_many_short_documents_do_not_gather_beyond_their_number(monkeypatch):
    monkeypatch.setattr(best_fit, "_WINDOW_DOCUMENTS", 256)
    packing, sizes = BestFitPacking(LENGTH), []
    pack = packing._packed
    monkeypatch.setattr(packing, "_packed", lambda: sizes.append(len(packing._window)) or pack())
    assert len(packed([100] * 2_000, packing)) == 50  # 96 tokens stay empty, more than a full sequence may have
    assert max(sizes) == 256
    assert len(sizes) < 2_000 / 256 / 0.2 + 2, "each packing hands out a fifth of the window"


def test_targets_come_back_as_they_were():
    targets = _RANDOM.random(77) < 0.5
    packing = BestFitPacking(LENGTH)
    packing.add(np.arange(77, dtype=np.uint16), targets)
    [[document]] = packing.rest()
    assert (document.targets == targets).all()


def test_documents_that_do_not_fit_together_are_handed_out_all_the_same():
    sequences = packed([2_500] * 2_000, BestFitPacking(LENGTH, window_tokens=1 << 18))
    assert len(sequences) == 2_000
