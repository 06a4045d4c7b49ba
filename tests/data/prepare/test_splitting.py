"""Long texts are encoded in parts without a change to their tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare, splitting
from moescale.data.prepare.encode import Encoder
from moescale.data.prepare.work_items import LongFile, WholeFiles


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return Tokenizer.from_file(str(model_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def long_text(stdlib_sources):
    return "".join(path.read_text(encoding="utf-8") for path in sorted(stdlib_sources.iterdir()))[:300_000]


@pytest.mark.parametrize("size", [5_000, 17_000, 299_999, 300_000, 400_000])
def test_parts_have_the_tokens_of_the_whole(encode, long_text, size):
    parts = list(splitting.parts_of(long_text, encode, size))
    assert "".join(parts) == long_text
    assert all(len(part) <= size for part in parts)
    assert len(parts) <= 1 + 2 * len(long_text) // size
    assert [token for part in parts for token in encode(part)] == encode(long_text)


@pytest.mark.parametrize(
    "text", ["漢字かな交じり文。" * 3000, "0123456789" * 3000, "\n    " * 6000, "word<|end_of_text|>" * 2000]
)
def test_texts_without_words_are_cut_where_tokens_allow(encode, text):
    parts = list(splitting.parts_of(text, encode, 8000))
    assert [token for part in parts for token in encode(part)] == encode(text)


@pytest.mark.parametrize("character", [" ", "\n", "a", "="])
@pytest.mark.parametrize("size", [8000, 8001, 8003])
def test_a_run_longer_than_any_part_has_the_tokens_of_the_whole(encode, long_text, character, size):
    text = long_text[:20_000] + "x" + character * 50_001 + "y" + long_text[20_000:40_000]
    parts = list(splitting.parts_of(text, encode, size))
    assert len(parts) > 2
    assert [token for part in parts for token in encode(part)] == encode(text)


def test_memory_does_not_decide_how_a_run_of_whitespace_is_tokenised(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("moescale.data.prepare.sources._LONG_DOCUMENT_BYTES", 20_000)
    source = tmp_path / "spaces.txt"
    source.write_text("x" + " " * 600_001 + "y")
    contents = []
    for number, chunk_bytes in enumerate((1 << 17, 150_001)):
        monkeypatch.setattr("moescale.data.prepare.memory_budget._LEAST_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr("moescale.data.prepare.memory_budget._MOST_CHUNK_BYTES", chunk_bytes)
        report = prepare(settings(source, output=tmp_path / str(number)), progress=False)
        contents.append((report.output / "train-00000.bin").read_bytes())
    assert contents[0] == contents[1]


def test_a_tokenizer_that_marks_the_beginning_of_its_input_gets_whole_texts(tokenizer, long_text):
    marking = Tokenizer.from_str(tokenizer.to_str())
    marking.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def encode(text):
        return marking.encode(text, add_special_tokens=False).ids

    parts = list(splitting.parts_of(long_text, encode, 50_000))
    assert [token for part in parts for token in encode(part)] == encode(long_text)


@pytest.mark.parametrize("size", [9_000, 100_000])
def test_parts_of_a_file_meet_at_cuts(encode, long_text, tmp_path, size):
    text = long_text + "漢字 — é " * 5000
    path = tmp_path / "book.txt"
    path.write_text(text)
    num_bytes = path.stat().st_size
    other = WholeFiles(paths=["other"])
    chunks = list(splitting.in_parts(iter([other, LongFile(path=str(path), num_bytes=num_bytes)]), encode, size))
    assert chunks[0] is other
    ranges = chunks[1:]
    assert [part.start for part in ranges] == [0, *(part.end for part in ranges[:-1])]
    assert [part.is_last for part in ranges] == [False] * (len(ranges) - 1) + [True]
    assert ranges[-1].end == num_bytes
    assert len(ranges) >= num_bytes // size
    texts = [path.read_bytes()[part.start : part.end].decode() for part in ranges]
    assert [token for part in texts for token in encode(part)] == encode(text)


def test_a_long_text_is_encoded_in_parts_to_the_same_tokens(tokenizer, encode, long_text, monkeypatch):
    monkeypatch.setattr("moescale.data.prepare.encode._PART_CHARACTERS", 20_000)
    encoder = Encoder(
        tokenizer_json=tokenizer.to_str(),
        end_token_id=0,
        vocabulary_size=512,
        text_column="text",
        most_document_bytes=1 << 30,
    )
    assert encoder.tokens_of(long_text).tolist() == encode(long_text)
    encoder._by_words = None
    assert encoder.tokens_of(long_text).tolist() == encode(long_text)


@pytest.mark.parametrize(
    ("validation_fraction", "num_workers"),
    [(0.0, 1), (0.5, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.0, 2), (0.5, 1)))],
)
def test_long_files_give_the_same_corpus_as_short_ones(
    settings, tmp_path, monkeypatch, long_text, num_workers, validation_fraction
):
    root = tmp_path / "books"
    root.mkdir()
    for number in range(6):
        text = long_text[number * 50_000 : (number + 1) * 50_000]
        (root / f"{number}.txt").write_text(text)
    (root / "3.dat").write_bytes(b"\0" * 50_000)
    (root / "4.txt").write_bytes(("é" * 20_000).encode() + b"\xe9" + b"tail" * 1000)
    options = {"validation_fraction": validation_fraction, "document_boundaries": True, "num_workers": num_workers}
    whole = prepare(settings(root, output=tmp_path / "whole", **options), progress=False)
    monkeypatch.setattr("moescale.data.prepare.sources._LONG_DOCUMENT_BYTES", 20_000)
    monkeypatch.setattr("moescale.data.prepare.workers._LONG_FILE_PART_BYTES", 8001)
    parts = prepare(settings(root, output=tmp_path / "parts", **options), progress=False)
    assert whole.documents == parts.documents == 5
    assert whole.splits == parts.splits
    assert whole.bad == parts.bad and whole.bad["invalid_utf8"].first == [str(root / "4.txt")]
    assert whole.skipped == parts.skipped and whole.skipped["binary"].first == [str(root / "3.dat")]
    for split in whole.splits:
        left, right = (open_corpus(report.output, split) for report in (whole, parts))
        assert left.fingerprint == right.fingerprint
        assert any(np.any(left.sequence(index)[1]) for index in range(left.num_sequences))
