"""Every kind of file that holds records has a reader, and one without is an error that says so."""

from __future__ import annotations

import pytest

from moescale.data.prepare import sources, table_records
from moescale.data.prepare.discovery import SourceFile
from moescale.data.prepare.file_kinds import RECORDS, TABLES
from moescale.data.prepare.sources import LocalSource
from moescale.errors import DataError


def test_every_kind_of_records_has_a_reader():
    assert set(sources._RECORD_READERS) == RECORDS
    assert set(table_records._FORMATS) == TABLES < RECORDS


def test_a_kind_without_a_reader_is_refused_with_those_there_are(tmp_path):
    file = SourceFile(path=tmp_path / "a.xml", name="a.xml", kind="XML", num_bytes=3, modified_ns=0)
    source = LocalSource(kind="XML", name="a.xml", text_column="text", files=[file], memory_bytes=1 << 30)
    with pytest.raises(DataError, match=r"a\.xml: files of kind XML have no reader; known are JSON Lines, JSON array"):
        list(source.chunks(1 << 16, 1 << 20))
