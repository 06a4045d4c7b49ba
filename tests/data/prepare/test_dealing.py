"""A number of documents set aside: exactly so many, the same however the source is cut into chunks, and none lost."""

from __future__ import annotations

import numpy as np
import pytest

from moescale.data import shuffle
from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare
from moescale.data.prepare.dealing import ByNumber
from moescale.data.prepare.encode import EncodedChunk
from moescale.errors import ConfigError, DataError

SEED = 5
LENGTHS = [3, 1, 7, 2, 2, 9, 4, 1, 1, 6, 5, 8, 2, 3]


class Writer:
    """Keeps documents as lists of (token, is target)."""

    def __init__(self) -> None:
        self.documents: list[list[tuple[int, bool]]] = []

    def add(self, tokens, lengths, continues, targets=None) -> None:
        values = list(
            zip(tokens.tolist(), targets.tolist() if targets is not None else [True] * len(tokens), strict=True)
        )
        for number, part in enumerate(np.split(np.arange(len(values)), np.cumsum(lengths)[:-1])):
            found = [values[index] for index in part]
            if number == 0 and continues:
                self.documents[-1] += found
            else:
                self.documents.append(found)


def chunk(tokens: np.ndarray, lengths: list[int], *, continues: bool = False, **fields) -> EncodedChunk:
    return EncodedChunk(
        path=None,
        num_items=len(lengths),
        num_bytes=0,
        tokens=tokens,
        lengths=np.array(lengths, dtype=np.int64),
        bad=[],
        continues=continues,
        targets=tokens % 2 == 0,
        **fields,
    )


def cut(places: list[int]) -> list[tuple[EncodedChunk, int]]:
    """The documents in chunks that end at these tokens, each with the number of its first document."""
    ends = np.cumsum(LENGTHS)
    tokens = np.arange(int(ends[-1]))
    found = []
    for start, end in zip([0, *places], [*places, len(tokens)], strict=True):
        inside = [int(place) for place in ends if start < place < end]
        borders = [start, *inside, end]
        first = int(np.searchsorted(ends, start, side="right"))
        continues = start not in (0, *ends.tolist())
        found.append((chunk(tokens[start:end], np.diff(borders).tolist(), continues=continues), first))
    return found


@pytest.mark.parametrize("number", [1, 4, len(LENGTHS) - 1, len(LENGTHS) + 3])
@pytest.mark.parametrize("places", [[], [3, 11], [5, 8, 20, 21, 40], list(range(1, 50, 3))], ids=len)
def test_those_with_the_smallest_hashes_are_held_out_however_the_source_is_cut(number, places):
    train, validation = Writer(), Writer()
    dealer = ByNumber(train, validation, SEED, number)
    for part, first in cut(places):
        dealer.deal(part, first)
    dealer.finish()
    hashes = shuffle.hashes(SEED, 0, len(LENGTHS))
    wanted = sorted(np.argsort(hashes)[:number].tolist())
    every = [
        [(int(token), token % 2 == 0) for token in part]
        for part in np.split(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])
    ]
    assert validation.documents == [every[index] for index in wanted]
    assert sorted(train.documents) == [document for index, document in enumerate(every) if index not in wanted]
    whole_train, whole_validation = Writer(), Writer()
    whole = ByNumber(whole_train, whole_validation, SEED, number)
    whole.deal(*cut([])[0])
    assert train.documents == whole_train.documents, "the order does not depend on the chunks"


def test_all_parts_of_a_conversation_are_held_out_together():
    origins = np.array([0, 0, 1, 2, 2, 2, 3], dtype=np.int64)
    tokens = np.repeat(np.arange(7), 2)
    train, validation = Writer(), Writer()
    dealer = ByNumber(train, validation, SEED, 2)
    dealer.deal(chunk(tokens, [2] * 7, origins=origins), 0)
    dealer.finish()
    wanted = np.sort(np.argsort(shuffle.hashes(SEED, 0, 4))[:2])
    parts = [document[0][0] for document in validation.documents]
    assert parts == [part for part in range(7) if origins[part] in wanted]
    assert len(train.documents) == 7 - len(parts)


def test_a_corpus_has_as_many_validation_documents_as_asked_for(settings, tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text("".join(f'{{"text": "document number {number}"}}\n' for number in range(50)))
    made = settings(source, validation_documents=7, sequence_length=4)
    report = prepare(made, progress=False)
    assert {split: counts.documents for split, counts in report.splits.items()} == {"train": 43, "validation": 7}
    assert open_corpus(made.output, split="validation").num_sequences > 0
    assert prepare(made, progress=False).unchanged
    with pytest.raises(DataError, match="validation_documents was 7 and is now 8"):
        prepare(settings(source, validation_documents=8, sequence_length=4), progress=False)
    with pytest.raises(
        ConfigError, match=r"validation_documents \(7\) and prepare.validation_fraction \(0.1\) exclude"
    ):
        settings(source, validation_documents=7, validation_fraction=0.1)
