"""No document, and no file that unpacks to very much, takes more memory or time than it is allowed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet

from moescale.data.prepare import compression, memory_budget, prepare
from moescale.errors import DataError

SHORT, LONG = "words of a short document, " * 20, "words of a long document, " * 20_000
MOST_BYTES = 300_000


def write(path: Path, texts: list[str]) -> Path:
    """Write documents in the way that the file's name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".parquet", ".arrow")):
        table = pyarrow.table({"text": texts})
        if name.endswith(".parquet"):
            parquet.write_table(table, path)
        else:
            with ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)
        return path
    content = {
        "a.txt": texts[-1],
        "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "a.json": json.dumps([{"text": text} for text in texts]),
        "a.csv": "text\n" + "".join(f'"{text}"\n' for text in texts),
    }[name].encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


FILES = ("a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.zst", "a.csv", "a.parquet", "a.arrow")


@pytest.mark.parametrize("name", FILES)
def test_a_document_that_takes_too_much_memory_is_refused_by_name(tmp_path, settings, monkeypatch, name):
    monkeypatch.setattr(memory_budget, "_BYTES_PER_DOCUMENT_BYTE", int(1.5e9) // MOST_BYTES)
    with pytest.raises(DataError, match=rf"{name}: a document has more than \d+,\d+ bytes, .*memory_gigabytes"):
        prepare(settings(write(tmp_path / name, [SHORT, LONG]), num_workers=1), progress=False)
    made = prepare(settings(write(tmp_path / name, [SHORT, SHORT]), num_workers=1), progress=False)
    assert made.tokens_packed > 0


def test_a_text_file_of_any_length_is_read_in_parts(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(memory_budget, "_BYTES_PER_DOCUMENT_BYTE", int(1.5e9) // MOST_BYTES)
    monkeypatch.setattr("moescale.data.prepare.sources._LONG_DOCUMENT_BYTES", 1000)
    assert prepare(settings(write(tmp_path / "a.txt", [LONG]), num_workers=1), progress=False).tokens_packed > 0


def test_every_worker_may_have_the_longest_document_at_once(settings):
    def most(**changes) -> int:
        wanted = settings("source", memory_gigabytes=4.0, **changes)
        return memory_budget.resources_for(wanted, vocabulary_size=1000, source_bytes=None).most_document_bytes

    assert most(num_workers=1) == 2 * most(num_workers=2) == 500_000_000


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_what_unpacks_to_more_than_any_text_is_refused_by_name(tmp_path, settings, monkeypatch, name):
    monkeypatch.setattr(compression, "_LEAST_IMPLAUSIBLE_BYTES", 1 << 18)
    monkeypatch.setattr(compression, "PLAUSIBLE_EXPANSION", 50)
    path = write(tmp_path / name, [LONG])
    with pytest.raises(DataError, match=rf"{name} cannot be .*: its \d[\d,]+ bytes unpack to more than .* unpack it"):
        prepare(settings(path, num_workers=1), progress=False)


@pytest.mark.slow
def test_a_table_of_a_few_bytes_and_gigabytes_of_text_is_refused_by_name(tmp_path, settings):
    path = tmp_path / "bomb.parquet"
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(200, np.int32)), ["some text " * 400_000])
    parquet.write_table(pyarrow.table({"text": same}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"bomb.parquet: its \d+ bytes unpack to more than \d\d,\d+,\d+, over 1,000"):
        prepare(settings(path, num_workers=1), progress=False)


def test_ordinary_texts_unpack_to_much_less(tmp_path):
    text = Path(memory_budget.__file__).read_bytes()
    assert len(text) < 20 * min(len(gzip.compress(text)), len(zstandard.compress(text, level=19)))
    compression.check_expansion(1_000, compression._LEAST_IMPLAUSIBLE_BYTES)
    compression.check_expansion(1_000_000, 1_000_000_000)
    with pytest.raises(OSError, match=r"its 1,000,000 bytes unpack to more than 1,000,000,001, over 1,000 times"):
        compression.check_expansion(1_000_000, 1_000_000_001)
