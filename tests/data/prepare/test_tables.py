"""Damaged tables are refused or give what they say, never a crash; their memory is bounded."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.data.prepare.table_process import TableReader, TableRequest
from moescale.data.prepare.tables import arrow_texts, parquet_texts
from moescale.errors import DataError

pyarrow = pytest.importorskip("pyarrow")

TEXTS = [f"{number} some text " * (1 + number % 9) for number in range(200)]


def write(path: Path, kind: str, texts=TEXTS, **options) -> Path:
    from pyarrow import ipc, parquet

    table = pyarrow.table({"id": list(range(len(texts))), "text": texts, "doc": [{"text": "x"}] * len(texts)})
    if kind == "parquet":
        parquet.write_table(table, path, **options)
        return path
    compression = {"compression": "zstd"} if kind.endswith("compressed") else {}
    opened = ipc.new_stream if "stream" in kind else ipc.new_file
    with opened(path, table.schema, options=ipc.IpcWriteOptions(**compression)) as writer:
        writer.write_table(table, max_chunksize=50)
    return path


KINDS = ("parquet", "arrow file", "arrow stream", "arrow file compressed", "arrow categories")


def texts_of(path: Path, kind: str, memory_bytes: int = 1 << 28, column: str = "text") -> list:
    return list(parquet_texts(str(path), column, memory_bytes) if kind == "parquet" else arrow_texts(str(path), column))


def written(path: Path, kind: str) -> Path:
    texts = pyarrow.array(TEXTS[:5] * 40).dictionary_encode() if kind == "arrow categories" else TEXTS
    return write(path, kind, texts)


def read_in_process(reader: TableReader, path: Path, kind: str, column: str = "text", memory_bytes=1 << 30) -> list:
    request = TableRequest(str(path), kind.capitalize(), column, 1 << 16, memory_bytes, 1 << 30)
    return [text for content in reader.read(request) for text in pickle.loads(content)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_damage_of_a_table_ends_in_anything_but_texts_or_an_error_that_names_it(tmp_path, kind, count):
    whole, draw, num_refused = written(tmp_path / "table", kind).read_bytes(), random.Random(count), 0
    damaged = tmp_path / "damaged"
    with TableReader() as reader:
        for number in range(count):
            content = bytearray(whole)
            for _ in range(draw.choice((1, 1, 4))):
                place = draw.randrange(len(content))
                content[place] = draw.choice((0, 255, 127, content[place] ^ 1 << draw.randrange(8)))
            damaged.write_bytes(content[: draw.randrange(len(content))] if number % 7 == 0 else content)
            for column in ("text", "doc.text"):
                try:
                    texts = read_in_process(reader, damaged, kind, column)
                    assert all(text is None or isinstance(text, str | bytes) for text in texts)
                except DataError as error:
                    assert str(damaged) in str(error)
                    num_refused += 1
    assert num_refused > count / 10


def test_a_reader_that_dies_is_an_error_that_names_the_file_and_the_next_table_is_read(tmp_path):
    long_texts = ["x" * 20_000] * 200  # more than a pipe holds
    path = write(tmp_path / "x.parquet", "parquet", long_texts)
    with TableReader() as reader:
        texts = reader.read(TableRequest(str(path), "Parquet", "text", 100, 1 << 30, 1 << 30))
        next(texts)
        os.kill(reader._process.pid, signal.SIGSEGV)
        with pytest.raises(DataError, match=r"x.parquet cannot be read as Parquet: it ended the process .*SIGSEGV"):
            list(texts)
        assert read_in_process(reader, path, "parquet") == long_texts


def test_a_batch_that_unpacks_to_more_than_the_memory_is_an_error(tmp_path):
    path = write(tmp_path / "x.arrow", "arrow file compressed", pyarrow.array(["x" * 10_000_000] * 60))
    assert path.stat().st_size < 1_000_000
    with TableReader() as reader:
        with pytest.raises(DataError, match=r"x.arrow: a piece of it takes more than the 0.50 GB that prepare.memory"):
            read_in_process(reader, path, "arrow", memory_bytes=500_000_000)


def test_a_flipped_offset_is_noticed(tmp_path):
    path = write(tmp_path / "x.arrow", "arrow file")
    content = path.read_bytes()
    array = pyarrow.array(TEXTS[:50])
    offsets = array.buffers()[1].to_pybytes()[: 4 * 51]
    place = content.index(offsets)
    for value in (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"):
        path.write_bytes(content[: place + 80] + value + content[place + 84 :])
        with pytest.raises(DataError, match="x.arrow cannot be read as Arrow: .*offset"):
            texts_of(path, "arrow file")


def test_a_flipped_bit_of_a_page_is_noticed_where_the_file_has_checksums(tmp_path):
    path = write(tmp_path / "x.parquet", "parquet", write_page_checksum=True, compression="none", use_dictionary=False)
    content = path.read_bytes()
    place = content.index(b"7 some text")
    path.write_bytes(content[:place] + b"8" + content[place + 1 :])
    with pytest.raises(DataError, match="x.parquet cannot be read as Parquet: .*CRC"):
        texts_of(path, "parquet")


def test_a_page_larger_than_the_memory_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "x.parquet", "parquet", ["x" * 10_000_000] * 2, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"a page of column 'text' takes \d\d,\d+,\d+ bytes, more than prepare.memory"):
        texts_of(path, "parquet", memory_bytes=5_000_000)
    assert [len(text) for text in texts_of(path, "parquet", memory_bytes=50_000_000)] == [10_000_000] * 2


PEAK = """
import resource, sys
from moescale.data.prepare.table_process import TableReader, TableRequest
from moescale.data.prepare.tables import arrow_texts, parquet_texts
path, kind = sys.argv[1:3]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
texts = parquet_texts(path, "text", 1 << 28) if kind == "parquet" else arrow_texts(path, "text")
print(sum(len(text) for text in texts))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow file"])
def test_a_long_text_that_every_row_of_a_dictionary_has_is_held_a_few_times_at_most(tmp_path, kind):
    texts = pyarrow.array(["x" * 8_000_000, "y"]).take(pyarrow.array([0] * 64)) if kind == "parquet" else None
    if texts is None:
        texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), ["x" * 8_000_000])
    path = write(tmp_path / "x", kind, texts, **({"compression": "zstd"} if kind == "parquet" else {}))
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), kind], capture_output=True, text=True, check=True)
    length, peak_kibibytes = map(int, done.stdout.split())
    assert length == 64 * 8_000_000
    assert peak_kibibytes < 250_000  # half of what all rows take


def test_rows_of_the_type_null_are_rows_without_text(tmp_path):
    path = write(tmp_path / "x.parquet", "parquet", pyarrow.nulls(5))
    assert texts_of(path, "parquet") == [None] * 5
    assert texts_of(write(tmp_path / "x.arrow", "arrow file", pyarrow.nulls(5)), "arrow") == [None] * 5
