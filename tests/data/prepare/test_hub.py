"""Datasets by name: what is asked of the hub's clients, and what is said when they fail."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare
from moescale.errors import DataError

datasets = pytest.importorskip("datasets", reason="of the extra `hub`")


@pytest.fixture
def hub(monkeypatch, documents):
    """A hub with one dataset, whose calls are recorded; ``revisions`` maps a branch to its commit."""
    state = SimpleNamespace(revisions={None: "commit-1"}, loads=[], scripts=set(), fails_after=None)

    def dataset_info(self, name, revision=None, timeout=None):
        if name != "someone/stories":
            raise OSError(f"404 for {name}\nmore")
        return SimpleNamespace(sha=state.revisions[revision])

    def load_dataset(name, *, split, revision, streaming):
        state.loads.append((name, split, revision, streaming))
        if revision in state.scripts:
            raise RuntimeError("Dataset scripts are no longer supported, but found stories.py")

        def rows():
            for number, text in enumerate(documents):
                if number == state.fails_after:
                    raise ConnectionError("reset by peer")
                yield {"text": text, "id": number}

        return datasets.IterableDataset.from_generator(rows, features=FEATURES)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


FEATURES = datasets.Features({"text": datasets.Value("string"), "id": datasets.Value("int64")})


def test_a_dataset_is_streamed_at_its_present_revision(hub, settings, documents, plain_tokens):
    report = prepare(settings("someone/stories", split="train[:60]"), progress=False)
    assert hub.loads == [("someone/stories", "train[:60]", "commit-1", True)]
    assert report.documents == len(documents)
    corpus = open_corpus(report.output)
    tokens = [int(token) for index in range(corpus.num_sequences) for token in corpus.sequence(index)[0]]
    assert tokens == plain_tokens(documents)[: len(tokens)]


def test_a_new_revision_is_other_input(hub, settings):
    assert not prepare(settings("someone/stories"), progress=False).unchanged
    assert prepare(settings("someone/stories"), progress=False).unchanged
    hub.revisions[None] = "commit-2"
    with pytest.raises(DataError, match="prepared from other input: 'someone/stories' has changed"):
        prepare(settings("someone/stories"), progress=False)


def test_a_dataset_that_is_a_script_is_read_from_its_converted_copy(hub, settings, documents):
    hub.scripts.add("commit-1")
    hub.revisions["refs/convert/parquet"] = "converted-1"
    assert prepare(settings("someone/stories"), progress=False).documents == len(documents)
    assert [load[2] for load in hub.loads] == ["commit-1", "converted-1"]


def test_an_unreachable_dataset_is_an_error_with_the_reason(hub, settings):
    message = r"'someone/else' is neither a local path nor a dataset whose split 'train' .* \(404 for someone/else\)"
    with pytest.raises(DataError, match=message):
        prepare(settings("someone/else"), progress=False)


def test_a_connection_that_breaks_leaves_nothing(hub, settings, tmp_path):
    hub.fails_after = 30
    with pytest.raises(DataError, match=r"'someone/stories' broke off while it was read \(reset by peer\)"):
        prepare(settings("someone/stories"), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_column_is_named(hub, settings):
    with pytest.raises(DataError, match=r"has no column 'txt'; did you mean 'text'\? \(it has text, id\)"):
        prepare(settings("someone/stories", text_column="txt"), progress=False)


def test_without_the_library_the_spelling_and_the_extra_are_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"check its spelling.*pip install 'moescale\[hub\]'"):
        prepare(settings("someone/stories"), progress=False)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c", "../absent"])
def test_what_looks_like_a_path_is_not_looked_up(hub, settings, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"'{name}' does not exist"):
        prepare(settings(name), progress=False)
    assert hub.loads == []
