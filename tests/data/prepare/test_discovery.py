"""What is given is read, refused by name, or counted with its name; with ``strict`` the last is an error."""

from __future__ import annotations

import json
import os

import pytest

from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare
from moescale.data.prepare.split_names import split_of
from moescale.errors import ConfigError, DataError

TEXT = "some good text " * 9


def write(path, *texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts or (TEXT,)))
    return path


def accounts(items) -> dict[str, list[str]]:
    return {reason: found.first for reason, found in items.items()}


def test_links_are_followed_once_each(settings, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root / "a" / "1.jsonl"), write(elsewhere / "2.jsonl", TEXT, TEXT)
    (root / "b").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "a")
    (elsewhere / "loop").symlink_to(root)
    (root / "file.jsonl").symlink_to(elsewhere / "2.jsonl")
    report = prepare(settings(root), progress=False)
    assert accounts(report.read) == {"JSON Lines": ["a/1.jsonl", "b/2.jsonl", "file.jsonl"]}
    assert accounts(report.skipped) == {"linked to twice": ["again", "b/loop"]}
    assert report.documents == 5


def every_kind_of_entry(root):
    """Make a folder with one entry of each kind that is not read; return the reasons to expect."""
    write(root / "good.jsonl")
    (root / ".hidden").write_text("x")
    (root / "gone.jsonl").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    (root / "README.md").write_text("about")
    (root / "other.csv").write_text("id,content\n1,x\n")
    (root / "picture.bin").write_bytes(b"\0\1")
    write(root / "test.jsonl")
    return {
        "hidden": [".hidden"],
        "link that leads nowhere": ["gone.jsonl"],
        "not a regular file": ["pipe"],
        "about the data": ["README.md"],
        "without a column 'text'": ["other.csv"],
        "binary": [str(root / "picture.bin")],
        "of another split": ["test.jsonl"],
    }


def test_every_entry_of_a_folder_is_read_or_counted(settings, tmp_path):
    root = tmp_path / "root"
    expected = every_kind_of_entry(root)
    report = prepare(settings(root), progress=False)
    assert accounts(report.skipped) == expected
    assert accounts(report.read) == {"JSON Lines": ["good.jsonl"], "text": []}
    num_entries = len(list(root.iterdir()))
    assert num_entries == sum(items.count for items in (*report.read.values(), *report.skipped.values()))
    for reason in expected:
        assert f"skipped, {reason}: 1" in report.to_text()


def test_strict_refuses_each_that_would_be_passed_over(settings, tmp_path):
    root = tmp_path / "root"
    excluded: list[str] = []
    for _ in every_kind_of_entry(root):
        with pytest.raises(DataError, match=r"not read: .* \(strict\)") as caught:
            prepare(settings(root, strict=True, exclude=tuple(excluded)), progress=False)
        excluded.append(os.path.basename(str(caught.value).split(": not read")[0]))
    assert prepare(settings(root, strict=True, exclude=tuple(excluded)), progress=False).documents == 1


def test_a_folder_that_cannot_be_listed_is_an_error(settings, tmp_path, monkeypatch):
    write(tmp_path / "root" / "a.jsonl"), write(tmp_path / "root" / "locked" / "b.jsonl")
    list_folder = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr("moescale.data.prepare.discovery.os.scandir", scandir)
    with pytest.raises(DataError, match="locked cannot be listed: Permission denied"):
        prepare(settings(tmp_path / "root"), progress=False)


def test_several_sources_and_patterns_are_read_in_their_order(settings, tmp_path, plain_tokens):
    paths = [write(tmp_path / name, name * 30) for name in ("z.jsonl", "a1.jsonl", "a2.jsonl")]
    write(tmp_path / "folder" / "x.jsonl", "in a folder " * 9)
    sources = (str(paths[0]), str(tmp_path / "a*.jsonl"), str(tmp_path / "folder"))
    report = prepare(settings(sources), progress=False)
    corpus = open_corpus(report.output)
    tokens = [int(token) for index in range(corpus.num_sequences) for token in corpus.sequence(index).tokens]
    assert tokens == plain_tokens([*(path.name * 30 for path in paths), "in a folder " * 9])[: len(tokens)]
    assert prepare(settings(sources), progress=False).unchanged


def test_a_pattern_without_a_match_is_an_error(settings, tmp_path):
    with pytest.raises(DataError, match=r"x\*.jsonl' matches no file"):
        prepare(settings(tmp_path / "x*.jsonl"), progress=False)


def test_a_name_with_a_bracket_is_a_name_where_there_is_such_a_file(settings, tmp_path):
    assert prepare(settings(write(tmp_path / "a[1].jsonl")), progress=False).documents == 1


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_sft-00000-of-00002.parquet", "train_sft"),
        ("my_dev.csv", "validation"),
        ("valid.txt", "validation"),
        ("Test/a.txt", "test"),
        ("en/validation/00.jsonl", "validation"),
        ("evaluation2.jsonl", "test"),
        ("wiki.test.tokens", "test"),
        ("training/test_cases.jsonl", "train"),
        ("trained.jsonl", None),
        ("contest.jsonl", None),
        ("c4-00000-of-01024.jsonl", None),
        ("data/00.jsonl", None),
    ],
)
def test_names_tell_splits(name, split):
    found = split_of(name)
    assert (found and found.split) == split


def splits_folder(root):
    for name in ("train.jsonl", "dev.jsonl", "test/x.csv", "more.jsonl"):
        path = write(root / name, f"{name} {TEXT}")
        if name.endswith("csv"):
            path.write_text(f"text,id\n{name} {TEXT},1\n")
    return root


@pytest.mark.parametrize(
    "split, read",
    [
        (None, ["more.jsonl", "train.jsonl"]),
        ("train", ["more.jsonl", "train.jsonl"]),
        ("validation", ["dev.jsonl"]),
        ("test", ["test/x.csv"]),
        ("all", ["dev.jsonl", "more.jsonl", "test/x.csv", "train.jsonl"]),
    ],
)
def test_the_split_that_is_asked_for_is_read_and_the_others_are_named(settings, tmp_path, split, read):
    report = prepare(settings(splits_folder(tmp_path / "root"), split=split), progress=False)
    assert sorted(name for items in report.read.values() for name in items.first) == read
    others = report.skipped.get("of another split")
    assert len(read) + (others.count if others else 0) == 4


def test_a_split_that_no_name_tells_is_an_error(settings, tmp_path):
    root = tmp_path / "root"
    write(root / "a.jsonl")
    with pytest.raises(
        DataError, match=r"has no split 'validation' \(by the names of its files and folders it has train"
    ):
        prepare(settings(root, split="validation"), progress=False)
    with pytest.raises(DataError, match="has no split 'validation'"):
        prepare(settings(root / "a.jsonl", split="validation"), progress=False)


def test_files_named_one_by_one_are_not_dropped_for_their_split(settings, tmp_path):
    one, two = write(tmp_path / "train.jsonl"), write(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="of the splits test, train by their names; choose one with --split"):
        prepare(settings((str(one), str(two))), progress=False)
    assert prepare(settings((str(one), str(two)), split="all"), progress=False).documents == 2
    assert prepare(settings(two, output=tmp_path / "other"), progress=False).documents == 1  # by itself: as asked


def test_a_program_has_no_splits(settings, tmp_path):
    for name in ("train.py", "test.py", "test/test_a.py"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text("print(1)\n" * 20)
    assert prepare(settings(tmp_path / "root"), progress=False).documents == 3


def test_plain_text_has_splits_where_a_training_split_is_there_too(settings, tmp_path):
    for name in ("wiki.train.tokens", "wiki.test.tokens", "chapter.test.txt"):
        (tmp_path / "root").mkdir(exist_ok=True)
        (tmp_path / "root" / name).write_text(TEXT)
    report = prepare(settings(tmp_path / "root"), progress=False)
    assert accounts(report.read) == {"text": ["chapter.test.txt", "wiki.train.tokens"]}
    assert accounts(report.skipped) == {"of another split": ["wiki.test.tokens"]}


def test_saved_datasets_below_a_folder_are_read_as_such(settings, tmp_path):
    datasets = pytest.importorskip("datasets", reason="of the extra `hub`")
    for name in ("one", "deep/two"):
        datasets.Dataset.from_dict({"text": [TEXT] * 3}).save_to_disk(tmp_path / "root" / name)
    report = prepare(settings(tmp_path / "root"), progress=False)
    assert (report.documents, set(report.read), report.skipped) == (6, {"Arrow"}, {})


def test_saved_datasets_have_the_splits_that_they_list_or_their_folders_name(settings, tmp_path):
    datasets = pytest.importorskip("datasets", reason="of the extra `hub`")
    one = datasets.Dataset.from_dict({"text": [TEXT] * 3})
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "listed")
    for name in ("train", "test"):
        one.select(range(2)).save_to_disk(tmp_path / "folders" / name)
    sources = (str(tmp_path / "listed"), str(tmp_path / "folders"))
    found = {
        split: prepare(settings(sources, split=split, output=tmp_path / f"{split}"), progress=False)
        for split in (None, "test", "all")
    }
    assert {split: report.documents for split, report in found.items()} == {None: 5, "test": 3, "all": 8}
    assert found["test"].skipped["of another split"].count == 2
    with pytest.raises(DataError, match="train has no split 'test': it is one saved dataset, without splits"):
        prepare(settings(tmp_path / "folders" / "train", split="test"), progress=False)


def test_what_describes_a_dataset_is_no_document_unless_asked_for(settings, tmp_path):
    root = tmp_path / "root"
    write(root / "data" / "train.jsonl")
    for name in ("README.md", "LICENSE", "LICENCE.txt", "dataset_infos.json", "data/state.json"):
        (root / name).write_text(TEXT)
    (root / "book.txt").write_text(TEXT)
    report = prepare(settings(root), progress=False)
    assert report.documents == 2 and report.skipped["about the data"].count == 5
    report = prepare(settings(root, include=("*.md",), output=tmp_path / "other"), progress=False)
    assert accounts(report.read) == {"text": ["README.md"]}


def test_a_readme_of_a_source_tree_is_a_document(settings, tmp_path):
    (tmp_path / "root").mkdir()
    for name in ("README.md", "a.py"):
        (tmp_path / "root" / name).write_text(TEXT)
    assert prepare(settings(tmp_path / "root"), progress=False).documents == 2


def test_a_text_column_for_plain_text_is_refused(settings, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"text_column \('body'\) means nothing for .*a.txt"):
        prepare(settings(tmp_path / "a.txt", text_column="body"), progress=False)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        ('{"text": "x"}\n'.encode("utf-16"), "UTF-16"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_pointers_and_other_encodings_are_named(settings, tmp_path, content, problem, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=f"x.{suffix} is .*{problem}"):
        prepare(settings(tmp_path / f"x.{suffix}"), progress=False)


def test_documents_that_are_pointers_or_of_another_encoding_are_counted(settings, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.txt").write_text(TEXT)
    (root / "b.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (root / "c.txt").write_bytes(TEXT.encode("utf-16"))
    report = prepare(settings(root), progress=False)
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "git_lfs_pointer": [str(root / "b.txt")],
        "utf16_text": [str(root / "c.txt")],
    }


def test_an_empty_corpus_says_what_was_left_out_and_why(settings, tmp_path):
    with pytest.raises(
        DataError, match=r"2 missing column \(.*x.jsonl:1, .*x.jsonl:2\): a record has the fields 'body'"
    ):
        prepare(settings(write(tmp_path / "x.jsonl", "a", "b", column="body")), progress=False)
    (tmp_path / "y.jsonl").write_text("not json\n" * 3)
    with pytest.raises(DataError, match=r"left out: 3 malformed json \(.*y.jsonl:1"):
        prepare(settings(tmp_path / "y.jsonl"), progress=False)
    (tmp_path / "z.txt").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"left out: 1 binary \(.*z.txt\)"):
        prepare(settings(tmp_path / "z.txt"), progress=False)


def test_a_validation_split_without_a_sequence_leaves_the_training_split(settings, tmp_path):
    source = write(tmp_path / "x.jsonl", *[f"{number} {TEXT}" for number in range(50)])
    made = settings(source, validation_fraction=0.001, sequence_length=64)
    report = prepare(made, progress=False)
    assert report.splits["train"].num_sequences > 0 and report.splits["validation"].num_sequences == 0
    assert "no validation split: prepare.validation_fraction 0." in report.to_text()
    assert prepare(made, progress=False).unchanged
    with pytest.raises(DataError, match=r"prepare.validation_fraction \(0.001\) sets 0 tokens of 0 documents aside"):
        prepare(settings(source, validation_fraction=0.001, strict=True, output=tmp_path / "strict"), progress=False)


def test_names_are_printed_without_what_a_terminal_acts_on(settings, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write(root / "good.jsonl")
    (root / "\x1b[31mred\n[bold]x[b].jsonl").write_text("bad")
    with open(os.fsencode(root) + b"/caf\xe9.jsonl", "wb") as stream:
        stream.write(b"bad")
    text = prepare(settings(root), progress=False).to_text()
    assert "\\x1b[31mred\\n[bold]x[b].jsonl" in text and "caf\\xe9.jsonl" in text
    assert text.encode() and "\x1b" not in text
