"""A damaged corpus is found before a run has used it twice, wherever the damage is."""

from __future__ import annotations

import hashlib
import json
import random
import time

import numpy as np
import pytest

from moescale.data.corpus import Verification, open_corpus, verification, verify
from moescale.data.loader import Loader
from moescale.data.prepare import prepare
from moescale.errors import DataError


@pytest.fixture
def prepared(settings, lines_file, monkeypatch):
    monkeypatch.setattr("moescale.data.prepare.shard_writer._SHARD_TOKENS", 16 * 50)
    monkeypatch.setattr("moescale.data.prepare.shard_writer._WRITE_TOKENS", 1000)
    return prepare(settings(lines_file, document_boundaries=True), progress=False).output


def flip_a_bit(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def test_one_flipped_bit_anywhere_is_found_and_its_file_named(prepared):
    random_places = random.Random(0)
    files = sorted(path for path in prepared.iterdir() if path.suffix in (".bin", ".starts"))
    assert len(files) > 4
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) - 1, random_places.randrange(len(whole))):
            flip_a_bit(path, place)
            with pytest.raises(DataError, match=f"{path.name} has changed: its SHA-256 .*; remove .* and prepare"):
                Verification([open_corpus(prepared)])
            path.write_bytes(whole)
    with Verification([open_corpus(prepared)]) as done:
        assert done.is_done and done.verified_bytes == done.num_bytes == sum(path.stat().st_size for path in files)


def rewrite(prepared, name: str, content: bytes) -> None:
    """Replace a file and its checksum, as another program that writes corpora might."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    for shard in manifest["shards"]["train"]:
        for file in (shard["tokens"], shard["starts"]):
            if file["name"] == name:
                file["sha256"] = hashlib.sha256(content).hexdigest()
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    (prepared / name).write_bytes(content)


def test_ids_outside_the_vocabulary_are_found_though_the_checksum_is_right(prepared):
    tokens = np.fromfile(prepared / "train-00001.bin", "<u2")
    tokens[7] = 600
    rewrite(prepared, "train-00001.bin", tokens.tobytes())
    with pytest.raises(DataError, match=r"train-00001.bin has token id 600, the manifest a vocabulary of 512"):
        verify(open_corpus(prepared))


@pytest.mark.parametrize(
    "bits, problem", [(0xFF, r"\d\d\d document starts, the manifest 60"), (0xFE, "none at its first")]
)
def test_document_starts_that_cannot_be_are_found_though_the_checksum_is_right(prepared, bits, problem):
    size = (prepared / "train-00000.starts").stat().st_size
    content = bytes([bits, *[bits if bits == 0xFF else 0] * (size - 1)])
    rewrite(prepared, "train-00000.starts", content)
    with pytest.raises(DataError, match=problem):
        verify(open_corpus(prepared))


def test_the_parts_of_several_processes_are_the_whole(prepared):
    corpus = open_corpus(prepared)
    parts = [sum(corpus.verifying(part, 3)) for part in range(3)]
    assert min(parts) > 0 and sum(parts) == corpus.num_bytes


class SlowCorpus:
    """Sound until its last piece is read, which takes until ``release`` is called."""

    name = fingerprint = "slow"
    num_sequences, sequence_length, vocabulary_size, num_bytes = 4, 4, 10, 1 << 40
    document_boundaries, has_padding, notices = False, False, ()
    released = False

    def sequence(self, index):
        from moescale.data.corpus import PackedSequence

        return PackedSequence(np.full(4, index), None)

    def verifying(self, part=0, num_parts=1):
        while not self.released:
            time.sleep(0.01)
            yield 1
        raise DataError("found late")


def test_a_large_corpus_is_verified_while_it_is_used_and_not_used_twice_before():
    corpus = SlowCorpus()
    with Verification([corpus], on_progress=lambda: setattr(corpus, "released", True)) as under_way:
        loader = Loader(corpus, sequences_per_step=2, micro_batch_sequences=1, seed=0, verification=under_way)
        steps = iter(loader)
        next(steps), next(steps)  # the first epoch, while nothing is known yet
        assert not under_way.is_done and not corpus.released
        with pytest.raises(DataError, match="found late"):
            next(steps)
        steps.close()


def test_damage_is_raised_in_the_step_after_it_was_found():
    corpus = SlowCorpus()
    with Verification([corpus]) as under_way:
        steps = iter(Loader(corpus, sequences_per_step=1, micro_batch_sequences=1, seed=0, verification=under_way))
        next(steps)
        corpus.released = True
        with pytest.raises(DataError, match="found late"):
            under_way.wait()
        with pytest.raises(DataError, match="found late"):
            next(steps)
        steps.close()


def test_a_verification_ends_with_its_block_though_it_is_not_done():
    with Verification([SlowCorpus()]) as under_way:
        pass
    assert not under_way._thread.is_alive()


def test_what_is_small_enough_is_verified_before_the_block_begins(prepared, monkeypatch):
    flip_a_bit(prepared / "train-00000.bin", 0)
    with pytest.raises(DataError, match="has changed"):
        Verification([open_corpus(prepared)])
    monkeypatch.setattr(verification, "_AT_ONCE_BYTES", 0)
    with Verification([open_corpus(prepared)]) as under_way, pytest.raises(DataError, match="has changed"):
        under_way.wait()
