"""Columns next to ``input_ids`` count as transformers counts them, are refused by name, or are named as unused."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moescale.data.batch import read_batch
from moescale.data.corpus import open_corpus
from moescale.errors import DataError

datasets = pytest.importorskip("datasets", reason="of the extra `hub`")

ROWS = np.arange(1, 25).reshape(4, 6)


def opened(path, **columns):
    columns = {name: np.asarray(values).tolist() for name, values in columns.items()}
    datasets.Dataset.from_dict({"input_ids": ROWS.tolist(), **columns}).save_to_disk(path / "saved")
    return open_corpus(path / "saved")


def batch_of(corpus):
    return read_batch(corpus, np.arange(corpus.num_sequences))


def test_labels_are_the_targets_of_the_tokens_before_them(tmp_path):
    labels = np.where(ROWS % 3 == 0, ROWS, -100)
    labels[1, 4] = 7  # another token than is read
    batch = batch_of(opened(tmp_path, labels=labels))
    assert batch.targets[:, :-1].tolist() == labels[:, 1:].tolist()
    assert (batch.targets[:, -1] == -100).all() and batch.document_starts is None
    assert batch.tokens.tolist() == ROWS.tolist()


@pytest.mark.parametrize("name", ["attention_mask", "completion_mask", "assistant_masks", "loss_mask"])
@pytest.mark.parametrize("kind", [int, bool])
def test_tokens_that_a_mask_leaves_out_are_no_targets(tmp_path, name, kind):
    mask = np.ones_like(ROWS)
    mask[0, 3:] = mask[2, 5:] = 0
    batch = batch_of(opened(tmp_path, **{name: mask.astype(kind)}))
    assert batch.targets[:, :-1].tolist() == np.where(mask, ROWS, -100)[:, 1:].tolist()


def test_labels_and_masks_count_together(tmp_path):
    labels, mask = np.where(ROWS % 2 == 0, ROWS, -100), np.ones_like(ROWS)
    mask[:, 4:] = 0
    batch = batch_of(opened(tmp_path, labels=labels, attention_mask=mask))
    assert batch.targets[:, :-1].tolist() == np.where(mask, labels, -100)[:, 1:].tolist()


def test_padding_at_the_left_is_not_attended_to(tmp_path):
    mask = np.ones_like(ROWS)
    mask[1, :2] = 0
    batch = batch_of(opened(tmp_path, attention_mask=mask))
    starts = np.zeros_like(ROWS)
    starts[1, 2] = 1
    assert batch.document_starts.tolist() == starts.astype(bool).tolist()
    assert batch.targets[1].tolist() == [-100, -100, 10, 11, 12, -100]


def test_padding_is_what_the_attention_mask_leaves_out(tmp_path):
    mask = np.ones_like(ROWS)
    mask[1, :2] = mask[2, 3:] = 0
    assert batch_of(opened(tmp_path, attention_mask=mask)).padding.tolist() == (mask == 0).tolist()


@pytest.mark.parametrize("name", ["attention_mask", "loss_mask"])
def test_without_padding_batches_do_not_tell_of_any(tmp_path, name):
    mask = np.ones_like(ROWS)
    mask[2, 3:] = name == "attention_mask"  # what is not learned is text all the same
    corpus = opened(tmp_path, **{name: mask})
    assert not corpus.has_padding and batch_of(corpus).padding is None


def test_positions_that_begin_again_start_a_document(tmp_path):
    positions = [[0, 1, 2, 3, 4, 5]] * 3 + [[0, 1, 0, 1, 2, 0]]
    batch = batch_of(opened(tmp_path, position_ids=positions))
    assert batch.document_starts[3].tolist() == [True, False, True, False, False, True]
    assert batch.targets[3].tolist() == [20, -100, 22, 23, -100, -100]


def test_plain_positions_bring_no_document_boundaries(tmp_path):
    assert not opened(tmp_path, position_ids=[[0, 1, 2, 3, 4, 5]] * 4).document_boundaries


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"attention_mask": [[1, 0, 1, 1, 1, 1]] * 4}, "'attention_mask' has zeros between ones"),
        ({"attention_mask": [[1, 1, 2, 2, 3, 3]] * 4}, "'attention_mask' has values other than 0 and 1"),
        ({"loss_mask": [[0.5] * 6] * 4}, "'loss_mask' is of type list<item: double>; it must hold lists of integers"),
        ({"labels": [[1] * 5] * 4}, "'labels' has lists of length 5, 'input_ids' of 6"),
        ({"labels": [1] * 4}, "'labels' is of type int64; it must hold lists of integers"),
        ({"position_ids": [[5, 6, 7, 8, 9, 10]] * 4}, "'position_ids' has positions that neither go on by one"),
        ({"position_ids": [[0, 2, 4, 6, 8, 10]] * 4}, "'position_ids' has positions that neither go on by one"),
    ],
)
def test_what_training_cannot_follow_is_refused_by_name(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        opened(tmp_path, **columns)


@pytest.mark.parametrize("labels, message", [(-1, "'labels' has negative values other than -100"), (99, None)])
def test_labels_belong_to_the_vocabulary(tmp_path, labels, message):
    corpus = opened(tmp_path, labels=np.full_like(ROWS, labels))
    if message is None:
        assert corpus.vocabulary_size == 100
    else:
        with pytest.raises(DataError, match=message):
            _ = corpus.vocabulary_size


def test_columns_without_a_meaning_are_named(tmp_path):
    corpus = opened(tmp_path, labels=ROWS, weight=[1.0] * 4, special_tokens_mask=ROWS * 0)
    assert corpus.unused_columns == ["weight", "special_tokens_mask"]
    assert "columns that training does not use: weight, special_tokens_mask" in corpus.notices[0]


def test_another_meaning_of_the_same_tokens_is_another_corpus(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert opened(tmp_path / "a").fingerprint != opened(tmp_path / "b", labels=ROWS).fingerprint


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damage_of_a_saved_dataset_ends_in_anything_but_batches_or_an_error(tmp_path, count):
    opened(tmp_path, labels=ROWS, attention_mask=np.ones_like(ROWS))
    path = next((tmp_path / "saved").glob("*.arrow"))
    whole, draw, num_refused = path.read_bytes(), random.Random(count), 0
    for number in range(count):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            place = draw.randrange(len(content))
            content[place] = draw.choice((0, 255, 127, content[place] ^ 1 << draw.randrange(8)))
        path.write_bytes(content[: draw.randrange(len(content))] if number % 7 == 0 else content)
        try:
            batch_of(open_corpus(tmp_path / "saved"))
        except DataError as error:
            assert str(tmp_path) in str(error)
            num_refused += 1
    assert num_refused > count / 10
