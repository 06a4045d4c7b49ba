"""CSV, TSV, JSON arrays and nested fields give the documents that JSON Lines of the same records give."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare, record_files
from moescale.data.prepare.record_files import array_elements
from moescale.errors import DataError

HARD = [
    'plain text, with "quotes"',
    "line\nbreaks\r\nand\ttabs",
    '[brackets] {braces} \\ \\" ,',
    "é 漢字 \u2028 ;|",
] * 5


def table(delimiter: str, texts, *, extra: str = "") -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(["id", "text", "more"])
    writer.writerows([number, text, "x"] for number, text in enumerate(texts))
    return (stream.getvalue() + extra).encode()


FILES = {
    "x.csv": lambda texts: table(",", texts),
    "bom.csv": lambda texts: b"\xef\xbb\xbf" + table(",", texts),
    "semicolon.csv": lambda texts: table(";", texts),
    "x.tsv": lambda texts: table("\t", texts),
    "x.tsv.gz": lambda texts: gzip.compress(table("\t", texts)),
    "x.json": lambda texts: json.dumps([{"text": text, "n": [1, {"a": "]"}]} for text in texts]).encode(),
    "indented.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=2).encode(),
    "x.json.gz": lambda texts: gzip.compress(json.dumps([{"text": text} for text in texts]).encode()),
    "array.jsonl": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("piece_bytes", [1 << 20, 7])
def test_records_are_documents_however_they_are_written(
    settings, tmp_path, plain_tokens, monkeypatch, name, piece_bytes
):
    monkeypatch.setattr(record_files, "_PIECE_BYTES", piece_bytes)
    (tmp_path / name).write_bytes(FILES[name](HARD))
    report = prepare(settings(tmp_path / name), progress=False)
    assert (report.documents, report.bad) == (len(HARD), {})
    corpus = open_corpus(report.output)
    tokens = [int(token) for index in range(corpus.num_sequences) for token in corpus.sequence(index).tokens]
    assert tokens == plain_tokens(HARD)[: len(tokens)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(values=st.lists(json_values, max_size=8), indent=st.sampled_from([None, 1]), piece_bytes=st.integers(1, 40))
@hypothesis_settings(deadline=None, max_examples=150)
def test_elements_of_an_array_are_what_the_json_library_finds(tmp_path_factory, values, indent, piece_bytes):
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(json.dumps(values, indent=indent))
    before, record_files._PIECE_BYTES = record_files._PIECE_BYTES, piece_bytes
    try:
        assert [json.loads(element) for element in array_elements(str(path), 1 << 30)] == values
    finally:
        record_files._PIECE_BYTES = before


@pytest.mark.parametrize(
    "content, problem",
    [
        ('[{"text": "a"}, {"text": "b"}', "ends within its JSON array"),
        ('[{"text": "a"}, {"text": "b', "ends within its JSON array"),
        ('[{"text": "a"}] [{"text": "b"}]', "goes on after its JSON array"),
        ('[{"text": "a"}]\n{"text": "b"}', "goes on after its JSON array"),
        ('{\n"data": [1]\n}', "holds one JSON value over several lines"),
        ('["one", "two"]', "holds an array whose elements are not objects"),
    ],
)
def test_json_that_holds_no_records_to_the_end_is_refused(settings, tmp_path, content, problem):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=f"x.json {problem}"):
        prepare(settings(tmp_path / "x.json"), progress=False)


def test_bad_records_of_tables_and_arrays_are_counted(settings, tmp_path):
    good = "some good text " * 9
    rows = f'text,id\n"{good}",1\n,2\nshort\n"{good}",3,4\ncaf\xe9,5\n'.encode("latin-1")
    (tmp_path / "x.csv").write_bytes(rows)
    report = prepare(settings(tmp_path / "x.csv"), progress=False)
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "empty_document": [f"{tmp_path}/x.csv:2"],
        "invalid_utf8": [f"{tmp_path}/x.csv:5"],
        "missing_column": [f"{tmp_path}/x.csv:3", f"{tmp_path}/x.csv:4"],
    }
    (tmp_path / "x.json").write_text(json.dumps([{"text": good}, {"text": None}, 5]).replace("5", "{broken"))
    (tmp_path / "x.json").write_text(f'[{{"text": "{good}"}}, {{"text": null}}, 5, {{"text" "x"}}]')
    report = prepare(settings(tmp_path / "x.json", output=tmp_path / "b"), progress=False)
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "malformed_json": [f"{tmp_path}/x.json:4"],
        "missing_column": [f"{tmp_path}/x.json:2", f"{tmp_path}/x.json:3"],
    }


def test_a_table_without_the_column_names_those_it_has(settings, tmp_path):
    (tmp_path / "x.csv").write_text("id,content\n1,x\n")
    with pytest.raises(DataError, match=r"x.csv has no column 'text' \(it has id, content\)"):
        prepare(settings(tmp_path / "x.csv"), progress=False)


def test_a_quote_that_is_never_closed_is_an_error(settings, tmp_path):
    (tmp_path / "x.csv").write_text('text\n"never closed\n' + "more\n" * 50)
    with pytest.raises(DataError, match="x.csv cannot be read as a table of text: unexpected end of data"):
        prepare(settings(tmp_path / "x.csv"), progress=False)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_a_dotted_name_leads_through_nested_records(settings, tmp_path, plain_tokens, suffix):
    import pyarrow
    from pyarrow import ipc, parquet

    records = [{"doc": {"text": f"{number} some text " * 9, "id": number}} for number in range(20)]
    records += [{"doc": {"text": None, "id": 1}}, {"doc": None}]
    path = tmp_path / f"x.{suffix}"
    rows = pyarrow.Table.from_pylist(records)
    if suffix == "parquet":
        parquet.write_table(rows, path)
    elif suffix == "arrow":
        with ipc.new_file(path, rows.schema) as writer:
            writer.write_table(rows)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    report = prepare(settings(path, text_column="doc.text"), progress=False)
    assert (report.documents, report.bad["missing_column"].count) == (20, 2)
    if suffix in ("parquet", "arrow"):
        with pytest.raises(DataError, match="column 'doc' has no field 'txt'; did you mean 'text'"):
            prepare(settings(path, text_column="doc.txt", output=tmp_path / "b"), progress=False)


def test_a_name_with_a_dot_of_its_own_goes_before_a_nested_one(settings, tmp_path, plain_tokens):
    record = {"doc.text": "outer text " * 9, "doc": {"text": "inner"}}
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    report = prepare(settings(tmp_path / "x.jsonl", text_column="doc.text"), progress=False)
    assert report.tokens_in == len(plain_tokens(["outer text " * 9]))
