"""Compressed files are read to their end whatever wrote them, and a cut or flipped one is an error."""

from __future__ import annotations

import gzip
import io
import random

import pytest
import zstandard

from moescale.data.prepare import prepare
from moescale.data.prepare.compression import open_bytes, window_bytes_of
from moescale.errors import ConfigError

CONTENT = b"".join(b"line %d of some text\n" % number for number in range(20_000))


def long_window(content: bytes, window_log: int, *, states_size: bool = False) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    if states_size:
        return compressor.compress(content)
    stream = io.BytesIO()
    with compressor.stream_writer(stream, closefd=False) as writer:
        writer.write(content)
    return stream.getvalue()


KINDS = {
    "plain.gz": gzip.compress(CONTENT),
    "members.gz": gzip.compress(CONTENT[:5000]) + gzip.compress(CONTENT[5000:]),
    "padded.gz": gzip.compress(CONTENT) + bytes(512),
    "plain.zst": zstandard.compress(CONTENT),
    "frames.zst": zstandard.compress(CONTENT[:5000]) + zstandard.compress(CONTENT[5000:]),
    "checksum.zst": zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT),
    "skippable.zst": b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(CONTENT),
    "stream.zst": long_window(CONTENT, 20),
    "long27.zst": long_window(CONTENT, 27),
    "long30.zst": long_window(CONTENT, 30),
    "repeated.zst": zstandard.compress(b"x" * 1_000_000),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_form_is_read_to_its_end(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name])
    with open_bytes(tmp_path / name) as stream:
        assert stream.read() == (b"x" * 1_000_000 if name == "repeated.zst" else CONTENT)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "padded.gz"])
def test_a_file_that_is_cut_off_anywhere_is_an_error(tmp_path, name):
    whole = KINDS[name]
    path = tmp_path / name
    places = {1, 3, 5, len(whole) - 1, len(whole) - 4, *random.Random(0).sample(range(1, len(whole)), 20)}
    if name == "frames.zst":
        places.discard(len(zstandard.compress(CONTENT[:5000])))  # which leaves a whole frame
    if name == "members.gz":
        places.discard(len(gzip.compress(CONTENT[:5000])))
    if name == "skippable.zst":
        places -= set(range(12))
    for place in places:
        path.write_bytes(whole[:place])
        with pytest.raises(OSError), open_bytes(path) as stream:
            stream.read()


def test_the_window_of_a_file_counts_against_the_memory(tmp_path, settings):
    big = CONTENT * 100
    path = tmp_path / "x.txt.zst"
    path.write_bytes(long_window(big, 30))
    assert len(big) < window_bytes_of(path) < 2 * len(big)  # not the window: there is not that much to refer back to
    path.write_bytes(long_window(big, 25, states_size=True))
    assert window_bytes_of(path) == min(1 << 25, len(big))
    path.write_bytes(zstandard.compress(CONTENT))
    assert window_bytes_of(path) == 0
    path.write_bytes(long_window(big, 30))
    with pytest.raises(
        ConfigError, match=r"must be at least 0\.\d+: .* with a window of \d\d,\d+,\d+ bytes to decompress"
    ):
        prepare(settings(path, memory_gigabytes=0.16), progress=False)
