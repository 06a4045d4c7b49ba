"""Opening corpora: of `prepare`, undamaged or not, and of ``datasets.save_to_disk``."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moescale.data.corpus import open_corpus, verify
from moescale.data.loader import Loader
from moescale.data.prepare import prepare
from moescale.errors import DataError

datasets = pytest.importorskip("datasets", reason="of the extra `hub`")


@pytest.fixture
def prepared(settings, lines_file):
    return prepare(settings(lines_file, document_boundaries=True), progress=False).output


def test_a_corpus_knows_its_measures(prepared):
    corpus = open_corpus(prepared)
    assert (corpus.sequence_length, corpus.vocabulary_size, corpus.document_boundaries) == (16, 512, True)
    tokens, starts, labels, padding = corpus.sequence(corpus.num_sequences - 1)
    assert tokens.shape == starts.shape == (16,) and labels is None and padding is None
    assert np.issubdtype(tokens.dtype, np.integer) and starts.dtype == bool
    with pytest.raises(IndexError, match=f"sequence {corpus.num_sequences} of {corpus.num_sequences}"):
        corpus.sequence(corpus.num_sequences)


def test_sequences_are_found_across_shards(settings, lines_file, tmp_path, monkeypatch):
    one = open_corpus(prepare(settings(lines_file, document_boundaries=True), progress=False).output)
    monkeypatch.setattr("moescale.data.prepare.shard_writer._SHARD_TOKENS", 16 * 50)
    monkeypatch.setattr("moescale.data.prepare.shard_writer._WRITE_TOKENS", 1000)
    made = settings(lines_file, document_boundaries=True, output=tmp_path / "sharded")
    many = open_corpus(prepare(made, progress=False).output)
    assert len(list((tmp_path / "sharded").glob("*.bin"))) > 3
    verify(many)
    assert one.num_sequences == many.num_sequences
    for index in range(one.num_sequences):
        for left, right in zip(one.sequence(index)[:2], many.sequence(index)[:2], strict=True):
            assert np.array_equal(left, right)


def test_a_split_that_is_absent_is_an_error_or_none(prepared):
    assert open_corpus(prepared, "validation", missing_ok=True) is None
    with pytest.raises(DataError, match=r"has no split 'validation' \(it has train\)"):
        open_corpus(prepared, "validation")


def test_the_fingerprint_tells_contents_apart_and_survives_a_move(prepared, settings, lines_file, tmp_path):
    same = prepare(settings(lines_file, document_boundaries=True, output=tmp_path / "same"), progress=False).output
    longer = prepare(settings(lines_file, sequence_length=32, output=tmp_path / "longer"), progress=False).output
    assert open_corpus(prepared).fingerprint == open_corpus(same).fingerprint != open_corpus(longer).fingerprint


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.starts"])
def test_a_truncated_or_missing_file_is_named(prepared, name):
    path = prepared / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, the manifest says \d+: it is damaged"):
        open_corpus(prepared)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing, though the manifest lists it"):
        open_corpus(prepared)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.starts"])
def test_verify_names_a_changed_file(prepared, name):
    verify(open_corpus(prepared))
    content = bytearray((prepared / name).read_bytes())
    content[10] ^= 1
    (prepared / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} has changed: its SHA-256"):
        verify(open_corpus(prepared))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "corpus"}, r"format \('corpus'\) must be 'moescale corpus'"),
        ({"version": 99}, r"version \(99\) must be 1 or 2 or 3, .*; remove .* and prepare the corpus again"),
        ({"dtype": "|O"}, r"dtype \('\|O'\) must be one of <u2, <u4"),
        ({"dtype": "<f2"}, r"dtype \('<f2'\) must be one of <u2, <u4"),
        ({"dtype": ["<u2"]}, r"dtype \(a list\) must be one of"),
        ({"sequence_length": 0}, r"sequence_length \(0\) must be at least 1"),
        ({"sequence_length": True}, r"sequence_length \(True\) must be of type int"),
        ({"sequence_length": 10**400}, r"sequence_length \(a number of 401 digits\) must be a finite number"),
        ({"sequence_length": 11}, r"shards\.train\[0\]\.tokens\.num_bytes .* of 11 tokens"),
        ({"vocabulary_size": 2**40}, r"vocabulary_size \(\d+\) must be at most 2147483648"),
        ({"sequence_lenght": 12}, r"sequence_lenght is not a field of a manifest; did you mean 'sequence_length'"),
        ({"shards": {}}, r"counts \(train\) and shards \(\) must be of the same splits"),
        ({"shards": {"train": []}}, r"shards\.train \(a list\) must not be empty"),
        ({"shards": {"train": [{}]}}, r"shards\.train\[0\]\.num_sequences is missing"),
        ({"shards": {"../train": []}}, r"shards: the name \('../train'\) must be a plain file name"),
        ({"bad": {"empty": {"count": -1, "first": []}}}, r"bad\.empty\.count \(-1\) must be at least 0"),
        ({"document_boundaries": False}, r"shards\.train\[0\]\.starts must be given where document_boundaries is true"),
        ({"made_from": [float("nan")]}, r"made_from\[0\] \(nan\) must be a finite number"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_by_file_field_and_rule(prepared, change, message):
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=f"manifest.json: {message}"):
        open_corpus(prepared)


@pytest.mark.parametrize("name", ["/etc/passwd", "../train-00000.bin", "..", "", "a/b", "a\\b", "a\0b", "\x1b[31m"])
def test_a_manifest_reads_no_file_outside_its_folder(prepared, name):
    document = json.loads((prepared / "manifest.json").read_text())
    document["shards"]["train"][0]["tokens"]["name"] = name
    (prepared / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"shards\.train\[0\]\.tokens\.name \(.*\) must be a plain file name"):
        open_corpus(prepared)


def test_folders_that_are_no_corpus_are_refused(tmp_path):
    with pytest.raises(DataError, match="absent is not a folder; make one with `moescale prepare`"):
        open_corpus(tmp_path / "absent")
    with pytest.raises(DataError, match="manifest.json: missing: .* is not a prepared corpus"):
        open_corpus(tmp_path)


ROWS = np.random.default_rng(0).integers(0, 300, (50, 12)).tolist()


def saved(path, rows=ROWS, features=None, **options):
    dataset = datasets.Dataset.from_dict({"input_ids": rows}, features=features)
    dataset.save_to_disk(path, **options)
    return path


@pytest.mark.parametrize(
    "feature",
    [
        None,
        datasets.Sequence(datasets.Value("int32")),
        datasets.Sequence(datasets.Value("int32"), length=12),
        datasets.LargeList(datasets.Value("uint16")),
    ],
    ids=["int64", "int32", "fixed size", "large uint16"],
)
def test_a_saved_dataset_opens_as_a_corpus(tmp_path, feature):
    features = datasets.Features({"input_ids": feature}) if feature is not None else None
    corpus = open_corpus(saved(tmp_path / "saved", features=features, num_shards=3))
    assert (corpus.num_sequences, corpus.sequence_length, corpus.document_boundaries) == (50, 12, False)
    assert [corpus.sequence(index)[0].tolist() for index in range(50)] == ROWS
    assert corpus.vocabulary_size == max(map(max, ROWS)) + 1
    step = next(iter(Loader(corpus, sequences_per_step=4, micro_batch_sequences=2, seed=0, shuffle=False)))
    assert step[1].tokens.tolist() == ROWS[2:4]


def test_a_selection_of_a_dataset_opens_in_its_own_order(tmp_path):
    dataset = datasets.Dataset.from_dict({"input_ids": ROWS}).select([7, 3, 30, 4])
    dataset.save_to_disk(tmp_path / "saved")
    corpus = open_corpus(tmp_path / "saved")
    assert [corpus.sequence(index)[0].tolist() for index in range(4)] == [ROWS[7], ROWS[3], ROWS[30], ROWS[4]]


def test_a_saved_dictionary_has_splits(tmp_path):
    splits = {"train": ROWS[:40], "validation": ROWS[40:]}
    made = {name: datasets.Dataset.from_dict({"input_ids": rows}) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    train, validation = (open_corpus(tmp_path / "saved", split) for split in splits)
    assert (train.num_sequences, validation.num_sequences) == (40, 10)
    assert validation.sequence(9)[0].tolist() == ROWS[49]
    assert train.fingerprint != validation.fingerprint
    assert open_corpus(tmp_path / "saved", "test", missing_ok=True) is None
    with pytest.raises(DataError, match=r"has no split 'test' \(it has train, validation\)"):
        open_corpus(tmp_path / "saved", "test")


def test_lists_of_unequal_lengths_are_refused(tmp_path):
    with pytest.raises(DataError, match="lists of lengths 11 to 12; sequences need one length"):
        open_corpus(saved(tmp_path / "saved", [*ROWS, ROWS[0][:-1]]))


def test_a_saved_dataset_without_tokens_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match=r"has no column 'input_ids' \(it has text\)"):
        open_corpus(tmp_path / "text")
    datasets.Dataset.from_dict({"input_ids": [["a"]]}).save_to_disk(tmp_path / "strings")
    with pytest.raises(DataError, match="of type list<item: string>; it must hold lists of integers"):
        open_corpus(tmp_path / "strings")


def test_a_damaged_saved_dataset_is_named(tmp_path):
    folder = saved(tmp_path / "saved")
    name = json.loads((folder / "state.json").read_text())["_data_files"][0]["filename"]
    (folder / name).write_bytes((folder / name).read_bytes()[:-600])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        open_corpus(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_corpus(folder)


@pytest.mark.parametrize("content", ['{"counter": 5}', "[]", "[" * 100_000, '{"_data_files": [5]}'])
def test_a_folder_with_another_state_file_is_refused(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(
        DataError,
        match=r"state.json(: has more| has no list '_data_files'|: (_data_files: )?must be|: is not)",
    ):
        open_corpus(tmp_path)
