"""From sources to sequences: every token accounted for, the same bytes each time, whole or not at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare
from moescale.errors import ConfigError, DataError


def flat_tokens(corpus) -> list[int]:
    return [int(token) for index in range(corpus.num_sequences) for token in corpus.sequence(index)[0]]


def assert_holds(output: Path, expected: list[int]) -> None:
    corpus = open_corpus(output)
    whole = len(expected) // corpus.sequence_length * corpus.sequence_length
    assert flat_tokens(corpus) == expected[:whole]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_token_of_the_standard_library_is_accounted_for(settings, stdlib_sources, plain_tokens):
    report = prepare(settings(stdlib_sources, sequence_length=100), progress=False)
    texts = [path.read_text(encoding="utf-8") for path in sorted(stdlib_sources.iterdir())]
    texts = [text for text in texts if text]
    expected = plain_tokens(texts)
    assert report.documents == len(texts)
    assert report.tokens_in == len(expected)
    assert report.tokens_packed == len(expected) // 100 * 100
    assert report.tokens_dropped == len(expected) % 100
    assert_holds(report.output, expected)


def test_the_accounts_are_reported_and_kept(settings, lines_file):
    report = prepare(settings(lines_file), progress=False)
    value = json.loads(json.dumps(report.to_dict()))
    assert value["tokens_in"] == value["tokens_packed"] + value["tokens_dropped"]
    assert value["splits"]["train"]["documents"] == value["documents"] == 60
    assert f"{report.tokens_in:,} tokens in" in report.to_text()
    assert json.loads((report.output / "manifest.json").read_text())["counts"] == value["splits"]


@pytest.mark.parametrize("sequence_length", [2, 7, 16, 4000])
def test_sequences_of_any_length_hold_the_same_stream(settings, lines_file, documents, plain_tokens, sequence_length):
    report = prepare(settings(lines_file, sequence_length=sequence_length), progress=False)
    assert_holds(report.output, plain_tokens(documents))


@pytest.mark.parametrize("sequence_length", [7, 16])
def test_boundaries_mark_the_first_token_of_every_document(
    settings, lines_file, documents, plain_tokens, sequence_length
):
    made = settings(lines_file, sequence_length=sequence_length, document_boundaries=True)
    prepare(made, progress=False)
    corpus = open_corpus(made.output)
    starts = [bool(start) for index in range(corpus.num_sequences) for start in corpus.sequence(index)[1]]
    tokens = flat_tokens(corpus)
    assert starts == [True] + [token == 0 for token in tokens[:-1]]  # a document starts after each end token


def split_at_end_tokens(tokens: list[int]) -> list[list[int]]:
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents[-1].append(token)
        if token == 0:
            documents.append([])
    return documents[:-1]  # the last one is empty, or was cut with its sequence


def test_validation_takes_whole_documents_and_training_the_others(settings, tmp_path, plain_tokens):
    texts = [f"document number {number}" for number in range(200)]
    source = write_source(tmp_path / "numbered.jsonl", "jsonl", texts)
    report = prepare(settings(source, validation_fraction=0.3, sequence_length=2), progress=False)
    splits = {split: split_at_end_tokens(flat_tokens(open_corpus(report.output, split))) for split in report.splits}
    everything = [plain_tokens([text]) for text in texts]
    order = {split: [everything.index(document) for document in found] for split, found in splits.items()}
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert not set(order["train"]) & set(order["validation"])
    assert len(order["train"]) + len(order["validation"]) >= len(texts) - 2  # each split may drop its last token
    assert 40 <= report.splits["validation"].documents <= 80


def test_the_seed_chooses_the_validation_documents(settings, tmp_path, lines_file):
    made = [settings(lines_file, validation_fraction=0.3, seed=seed, output=tmp_path / f"{seed}") for seed in (0, 1)]
    first, second = (files_of(prepare(one, progress=False).output) for one in made)
    assert first["validation-00000.bin"] != second["validation-00000.bin"]


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "stream.arrow", "file.arrow", "saved", "saved_dict"]
)
def test_every_kind_of_source_gives_the_same_tokens(settings, tmp_path, documents, plain_tokens, kind):
    source = write_source(tmp_path / f"source.{kind}", kind, documents)
    report = prepare(settings(source), progress=False)
    assert report.documents == len(documents)
    assert_holds(report.output, plain_tokens(documents))


def write_source(path: Path, kind: str, documents: list[str], column: str = "text") -> Path:
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.table({"id": list(range(len(documents))), column: documents})
    lines = "".join(json.dumps({column: text}) + "\n" for text in table[column].to_pylist()).encode()
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines))
    elif kind == "parquet":
        parquet.write_table(table, path, row_group_size=7)
    elif kind == "stream.arrow":
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif kind == "file.arrow":
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        import datasets

        dataset = datasets.Dataset.from_dict({column: documents})
        saved = dataset if kind == "saved" else datasets.DatasetDict({"train": dataset, "other": dataset.select([0])})
        saved.save_to_disk(path)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(settings, tmp_path, plain_tokens, suffix):
    text = "first line\r\n\n  second — line\n" * 20
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    source = tmp_path / f"book.txt{suffix}"
    source.write_bytes(compress(text.encode()))
    report = prepare(settings(source), progress=False)
    assert report.documents == 1
    assert_holds(report.output, plain_tokens([text]))


def test_a_folder_is_read_in_sorted_order_and_by_extension(settings, tmp_path, plain_tokens):
    root = tmp_path / "tree"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("not read")
    (root / ".hidden").write_text("not read")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / "a.py").write_text("print('a')\n" * 10)
    (root / "b" / "package.json").write_text(json.dumps({"name": "b", "text": "x"}, indent=2))
    (root / "b" / "z.rs").write_text("fn main() {}\n" * 10)
    write_source(root / "c.jsonl.gz", "jsonl.gz", ["from jsonl"])
    write_source(root / "d.parquet", "parquet", ["from parquet"])
    write_source(root / "e.json", "jsonl", ["from json lines"])
    report = prepare(settings(root), progress=False)
    package = (root / "b" / "package.json").read_text()
    texts = ["print('a')\n" * 10, package, "fn main() {}\n" * 10, "from jsonl", "from parquet", "from json lines"]
    assert_holds(report.output, plain_tokens(texts))
    assert {reason: items.first for reason, items in report.skipped.items()} == {
        "hidden": [".git", ".hidden"],
        "binary": [str(root / "picture.png")],
    }
    assert {kind: items.first for kind, items in report.read.items()} == {
        "text": ["a.py", "b/package.json", "b/z.rs"],
        "JSON Lines": ["c.jsonl.gz", "e.json"],
        "Parquet": ["d.parquet"],
    }
    assert report.bad == {}


def test_an_output_inside_the_source_is_not_read(settings, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a.txt").write_text("some text " * 50)
    made = settings(root, output=root / "prepared")
    assert prepare(made, progress=False).skipped == {}
    assert prepare(made, progress=False).unchanged


def test_another_column_can_hold_the_text(settings, tmp_path, documents, plain_tokens):
    source = write_source(tmp_path / "content.parquet", "parquet", documents, column="content")
    with pytest.raises(DataError, match=r"no column 'text'.*it has id, content.*text_column"):
        prepare(settings(source), progress=False)
    assert_holds(prepare(settings(source, text_column="content"), progress=False).output, plain_tokens(documents))


def test_a_column_that_is_no_text_is_an_error(settings, tmp_path, documents):
    source = write_source(tmp_path / "typed.parquet", "parquet", documents)
    with pytest.raises(DataError, match="column 'id' is of type int64"):
        prepare(settings(source, text_column="id"), progress=False)


@pytest.mark.parametrize("validation_fraction", [0.0, 0.2])
def test_processes_and_chunks_do_not_change_a_byte(settings, tmp_path, monkeypatch, documents, validation_fraction):
    texts = [f"{number} {text}" for number, text in enumerate(documents * 40)]
    source = write_source(tmp_path / "many.jsonl", "jsonl", texts)
    options = {"validation_fraction": validation_fraction, "document_boundaries": True}
    variants = []
    for name, num_workers, chunk_bytes in (("one", 1, 1 << 20), ("two", 2, 1 << 16), ("odd", 1, 1001)):
        monkeypatch.setattr("moescale.data.prepare.memory_budget._MOST_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr("moescale.data.prepare.memory_budget._LEAST_CHUNK_BYTES", chunk_bytes)
        made = settings(source, num_workers=num_workers, output=tmp_path / name, **options)
        report = prepare(made, progress=False)
        assert report.num_workers == num_workers
        variants.append(files_of(made.output))
    assert variants[0] == variants[1] == variants[2]


def test_a_second_call_with_the_same_input_does_nothing_and_says_so(settings, lines_file):
    first = prepare(settings(lines_file), progress=False)
    before = {path: path.stat().st_mtime_ns for path in first.output.iterdir()}
    second = prepare(settings(lines_file), progress=False)
    assert not first.unchanged and second.unchanged
    assert "unchanged" in second.to_text()
    assert second.splits == first.splits
    assert {path: path.stat().st_mtime_ns for path in first.output.iterdir()} == before


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"sequence_length": 32}, "sequence_length was 16 and is now 32"),
        ({"document_boundaries": True}, "document_boundaries was False and is now True"),
        ({"validation_fraction": 0.5}, "validation_fraction was 0.0 and is now 0.5"),
    ],
)
def test_an_output_made_with_other_settings_is_never_overwritten(settings, lines_file, changes, difference):
    output = prepare(settings(lines_file), progress=False).output
    before = files_of(output)
    with pytest.raises(DataError, match=f"prepared from other input: {difference}; choose another output"):
        prepare(settings(lines_file, **changes), progress=False)
    assert files_of(output) == before


def test_a_changed_source_is_named(settings, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for name in ("a.txt", "b.txt"):
        (root / name).write_text("some text " * 50)
    prepare(settings(root), progress=False)
    (root / "b.txt").write_text("other text " * 50)
    with pytest.raises(DataError, match="'b.txt' has changed"):
        prepare(settings(root), progress=False)
    (root / "b.txt").unlink()
    with pytest.raises(DataError, match="'b.txt' is gone"):
        prepare(settings(root), progress=False)


@pytest.mark.parametrize("damage", ["missing", "shortened"])
@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.starts"])
def test_a_second_call_does_not_take_a_damaged_corpus_for_a_whole_one(settings, lines_file, damage, name):
    made = settings(lines_file, validation_fraction=0.3, document_boundaries=True)
    path = prepare(made, progress=False).output / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} (is missing|has .* bytes), .*; remove {made.output} and prepare"):
        prepare(made, progress=False)


def test_a_changed_source_is_an_error_also_without_the_list_of_its_files(settings, lines_file):
    output = prepare(settings(lines_file), progress=False).output
    (output / "source.jsonl").unlink()
    lines_file.write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match=r"other input: files of the source have changed \(.*source.jsonl.*; choose"):
        prepare(settings(lines_file), progress=False)


def test_a_folder_that_is_no_corpus_is_never_overwritten(settings, lines_file, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="output is not a prepared corpus"):
        prepare(settings(lines_file), progress=False)
    assert files_of(tmp_path / "output") == {"thesis.txt": b"precious"}


def test_a_source_shorter_than_a_sequence_is_an_error_and_leaves_nothing(settings, lines_file, tmp_path):
    with pytest.raises(
        DataError, match=r"the train split has \d+ tokens of 60 documents, .*sequence_length \(100000\)"
    ):
        prepare(settings(lines_file, sequence_length=100_000), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [lines_file.name]


def test_a_source_that_does_not_exist_is_an_error(settings, tmp_path):
    with pytest.raises(DataError, match="missing.jsonl' does not exist"):
        prepare(settings(tmp_path / "missing.jsonl"), progress=False)


def test_an_empty_folder_is_an_error(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no file to read \(it is empty\)"):
        prepare(settings(tmp_path / "empty"), progress=False)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_truncated_file_is_named(settings, tmp_path, documents, kind):
    source = write_source(tmp_path / f"source.{kind}", kind, documents)
    source.write_bytes(source.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"source.{kind} cannot be"):
        prepare(settings(source), progress=False)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequence_length": 1}, r"sequence_length \(1\) must be at least 2"),
        ({"validation_fraction": 1.0}, r"validation_fraction \(1.0\) must be in \[0, 1\)"),
        ({"num_workers": 0}, r"num_workers \(0\) must be at least 1"),
        ({"memory_gigabytes": 0.0}, r"memory_gigabytes \(0.0\) must be positive"),
        ({"memory_gigabytes": float("inf")}, r"memory_gigabytes \(inf\) must be positive and below 1e9"),
        ({"memory_gigabytes": float("nan")}, r"memory_gigabytes \(nan\) must be positive and below 1e9"),
    ],
)
def test_settings_out_of_range_are_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings("source", **changes)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_compressed_files_of_several_frames_are_read_to_the_end(settings, tmp_path, documents, plain_tokens, kind):
    parts = [write_source(tmp_path / f"{n}.{kind}", kind, documents[n::2]).read_bytes() for n in (0, 1)]
    source = tmp_path / f"joined.{kind}"
    source.write_bytes(b"".join(parts))
    assert_holds(prepare(settings(source), progress=False).output, plain_tokens(documents[0::2] + documents[1::2]))


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ['{\n"counter": 5\n}', "[1, 2, 3]", "{not json", "[" * 100_000])
def test_an_ordinary_file_with_the_name_of_a_saved_dataset_is_a_document(
    settings, tmp_path, plain_tokens, name, content
):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a.txt").write_text("some text " * 20)
    (root / name).write_text(content)
    report = prepare(settings(root), progress=False)
    assert report.bad == {}
    assert_holds(report.output, plain_tokens(["some text " * 20, content]))


def test_a_saved_dataset_that_lacks_its_lists_is_named(settings, tmp_path, documents):
    source = write_source(tmp_path / "saved", "saved_dict", documents)
    (source / "train" / "state.json").unlink()
    with pytest.raises(DataError, match=r"train/state.json is missing or damaged, .*; save it again"):
        prepare(settings(source), progress=False)
    (source / "train" / "state.json").write_text('{"_data_files": ["data.arrow"]}')
    with pytest.raises(DataError, match=r"train/state.json: _data_files: must be an object, not str; save"):
        prepare(settings(source), progress=False)


CUT_SHORT = gzip.compress(b'{"text": "cut"}' * 99, mtime=0)[
    :30
]  # a time in it would name the case anew in every process


@pytest.mark.parametrize("content", [b"no gzip at all", CUT_SHORT], ids=["no gzip", "cut short"])
def test_a_damaged_compressed_json_file_is_named(settings, tmp_path, content):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "a.txt").write_text("some text " * 20)
    (root / "x.json.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"x.json.gz cannot be read: "):
        prepare(settings(root), progress=False)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(settings, tmp_path, documents, plain_tokens, suffix):
    source = tmp_path / f"source.{suffix}"
    content = b"\xef\xbb\xbf" + "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    source.write_bytes(gzip.compress(content) if suffix == "jsonl.gz" else content)
    report = prepare(settings(source), progress=False)
    assert report.bad == {}
    assert_holds(report.output, plain_tokens(documents))


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_categories_of_strings_are_text(settings, tmp_path, documents, plain_tokens, kind):
    import pyarrow

    texts = pyarrow.array(documents[:5] * 8).dictionary_encode()
    source = write_source(tmp_path / f"source.{kind}", kind, texts)
    report = prepare(settings(source), progress=False)
    assert report.bad == {}
    assert_holds(report.output, plain_tokens(documents[:5] * 8))
