"""Lines, rows and files that hold no document: counted by kind with their first positions, or refused."""

from __future__ import annotations

import gzip
import json

import pytest

from moescale.data.prepare import prepare
from moescale.errors import DataError

GOOD = json.dumps({"text": "some good text " * 5}).encode()
BAD_LINES = {
    "malformed_json": b'{"text": "cut off',
    "invalid_utf8": b'{"text": "caf\xe9"}',
    "missing_column": b'{"body": "text"}',
    "empty_document": b'{"text": ""}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bad_lines_are_counted_with_their_positions(settings, tmp_path, kind, suffix):
    source = tmp_path / f"lines.{suffix}"
    content = b"\n".join([GOOD, BAD_LINES[kind], GOOD, GOOD, BAD_LINES[kind]])
    source.write_bytes(content if suffix == "jsonl" else gzip.compress(content))
    report = prepare(settings(source), progress=False)
    assert report.documents == 3
    assert {name: (items.count, items.first) for name, items in report.bad.items()} == {
        kind: (2, [f"{source}:2", f"{source}:5"])
    }
    assert f"{kind.replace('_', ' ')}: 2 ({source}:2, {source}:5)" in report.to_text()


@pytest.mark.parametrize("kind", BAD_LINES)
def test_strict_stops_at_the_first_bad_line_and_leaves_nothing(settings, tmp_path, kind):
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b"\n".join([GOOD, BAD_LINES[kind], GOOD]))
    with pytest.raises(DataError, match=rf"lines.jsonl:2: {kind.replace('_', ' ')} \(strict\)"):
        prepare(settings(source, strict=True), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


def test_strict_does_not_accept_an_output_prepared_without_it(settings, tmp_path):
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b"\n".join([GOOD, BAD_LINES["malformed_json"], GOOD]))
    prepare(settings(source), progress=False)
    with pytest.raises(DataError, match=r"lines.jsonl:2: malformed json \(strict\); .* prepared without it"):
        prepare(settings(source, strict=True), progress=False)


@pytest.mark.parametrize(
    "line, kind",
    [
        (b'["a", "list"]', "missing_column"),
        (b'{"text": null}', "missing_column"),
        (b'{"text": 5}', "missing_column"),
        (b"", "empty_document"),
        (b"  \r", "empty_document"),
        (b"[" * 100_000, "malformed_json"),
        (rb'{"text": "lone surrogate \ud800"}', "invalid_utf8"),
    ],
)
def test_unusual_lines_are_classified(settings, tmp_path, line, kind):
    source = tmp_path / "lines.jsonl"
    source.write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    report = prepare(settings(source), progress=False)
    assert report.documents == 2
    assert {name: items.count for name, items in report.bad.items()} == {kind: 1}


def test_escaped_surrogate_pairs_are_text(settings, tmp_path):
    source = tmp_path / "lines.jsonl"
    source.write_bytes(GOOD + rb'{"text": "\ud83d\ude00"}'.join([b"\n", b"\n"]))
    assert prepare(settings(source), progress=False).bad == {}


def test_positions_hold_across_chunks_and_files_and_stop_at_ten(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("moescale.data.prepare.memory_budget._MOST_CHUNK_BYTES", 200)
    monkeypatch.setattr("moescale.data.prepare.memory_budget._LEAST_CHUNK_BYTES", 200)
    for name in ("a", "b"):
        (tmp_path / "source").mkdir(exist_ok=True)
        lines = [GOOD if number % 10 else b"{" for number in range(1, 81)]
        (tmp_path / "source" / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    items = prepare(settings(tmp_path / "source"), progress=False).bad["malformed_json"]
    expected = [f"{tmp_path}/source/a.jsonl:{line}" for line in range(10, 81, 10)]
    expected += [f"{tmp_path}/source/b.jsonl:{line}" for line in (10, 20)]
    assert items.count == 16
    assert items.first == expected


def test_bad_rows_of_a_table_are_counted(settings, tmp_path):
    import pyarrow
    from pyarrow import parquet

    source = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"text": ["some text " * 9, None, "", "more text " * 9]}), source)
    report = prepare(settings(source), progress=False)
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "empty_document": [f"{source}:3"],
        "missing_column": [f"{source}:2"],
    }


def test_bad_files_of_a_source_tree_are_counted(settings, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "good.py").write_text("print('good')\n" * 10)
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes("# café\n".encode("latin-1"))
    report = prepare(settings(root), progress=False)
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "empty_document": [str(root / "empty.py")],
        "invalid_utf8": [str(root / "latin.py")],
    }
    with pytest.raises(DataError, match=r"empty.py: empty document \(strict\)"):
        prepare(settings(root, strict=True, output=tmp_path / "other"), progress=False)


@pytest.mark.parametrize(
    "suffix, kind",
    [
        *((suffix, kind) for suffix in ("parquet", "arrow") for kind in ("string", "large_string", "string_view")),
        ("arrow", "dictionary"),  # of Parquet's categories the library refuses such a file itself
    ],
)
def test_rows_that_are_not_utf8_are_counted(settings, tmp_path, kind, suffix):
    import pyarrow
    from pyarrow import ipc, parquet

    values = pyarrow.array([b"some text " * 9, b"caf\xe9", None, b"more text " * 9], pyarrow.binary())
    if kind == "dictionary":
        texts = pyarrow.DictionaryArray.from_arrays([0, 1, None, 2], values.drop_null().view(pyarrow.string()))
    elif kind == "string_view":
        texts = values.cast(pyarrow.binary_view()).view(pyarrow.string_view())
    elif kind == "large_string":
        texts = values.cast(pyarrow.large_binary()).view(pyarrow.large_string())
    else:
        texts = values.view(pyarrow.string())
    table = pyarrow.table({"text": texts})
    source = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, source)
    else:
        with ipc.new_file(source, table.schema) as writer:
            writer.write_table(table)
    report = prepare(settings(source), progress=False)
    assert report.documents == 2
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "invalid_utf8": [f"{source}:2"],
        "missing_column": [f"{source}:3"],
    }
