"""A corpus and a model that do not speak of the same tokens: refused where ids have no embedding, else said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moescale.api import vocabulary
from moescale.api.compile import compile, corpus_notice
from moescale.api.compile_settings import CompileSettings
from moescale.api.vocabulary import check_vocabulary, vocabulary_notice
from moescale.cli import main
from moescale.convert.hf_config import read_model_config
from moescale.data.corpus.manifest import read_manifest
from moescale.data.prepare.tokenizer import load_tokenizer
from moescale.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def with_vocabulary(folder: Path, size: int) -> Path:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"vocab_size": size}))
    return folder


def with_another_tokenizer(folder: Path) -> Path:
    """Two of its tokens change places."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(document))
    return folder


def test_the_models_own_tokenizer_is_no_news_however_much_the_model_pads(folder, stdlib_corpus):
    used = read_manifest(stdlib_corpus).vocabulary_size
    for size in (used, used + 20, 4 * used):
        config = read_model_config(with_vocabulary(folder, size))
        check_vocabulary(used, config)
        assert vocabulary_notice(stdlib_corpus, config, folder) is None


def test_another_tokenizer_than_the_models_is_named_with_both(folder, stdlib_corpus):
    with_another_tokenizer(folder)
    notice = vocabulary_notice(stdlib_corpus, read_model_config(folder), folder)
    assert f"{stdlib_corpus} was prepared with another tokenizer" in notice
    assert f"prepare it with --tokenizer {folder}, unless this is meant" in notice


def test_the_same_tokenizer_saved_again_is_no_news_while_the_corpuss_own_is_there(folder, stdlib_corpus, tmp_path):
    path, config = folder / "tokenizer.json", read_model_config(folder)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert vocabulary_notice(stdlib_corpus, config, folder) is None
    corpus = Path(shutil.copytree(stdlib_corpus, tmp_path / "corpus"))
    document = json.loads((corpus / "manifest.json").read_text())
    document["made_from"]["tokenizer"] = str(tmp_path / "gone")
    (corpus / "manifest.json").write_text(json.dumps(document))
    assert "or with the same one saved again" in vocabulary_notice(corpus, config, folder)


def test_a_tokenizer_of_the_hub_is_not_fetched_to_be_compared(folder, stdlib_corpus, tmp_path, monkeypatch):
    corpus = Path(shutil.copytree(stdlib_corpus, tmp_path / "corpus"))
    document = json.loads((corpus / "manifest.json").read_text())
    document["made_from"]["tokenizer"] = "owner/name"
    (corpus / "manifest.json").write_text(json.dumps(document))
    loaded = []
    monkeypatch.setattr(
        vocabulary, "load_tokenizer", lambda name, end_token: loaded.append(name) or load_tokenizer(name, end_token)
    )
    config = read_model_config(with_another_tokenizer(folder))
    assert "another tokenizer (owner/name" in vocabulary_notice(corpus, config, folder)
    assert loaded == [str(folder)]


@pytest.mark.parametrize(("padding", "is_said"), [(1.0, False), (1.1, False), (1.2, True), (100, True)])
def test_without_a_tokenizer_a_vocabulary_that_is_more_than_padded_is_said(folder, stdlib_corpus, padding, is_said):
    used = read_manifest(stdlib_corpus).vocabulary_size
    (folder / "tokenizer.json").unlink()
    config = replace(read_model_config(folder), vocab_size=int(used * padding))
    notice = vocabulary_notice(stdlib_corpus, config, folder)
    assert (notice is not None) == is_said
    assert not is_said or f"token ids below {used:,}" in notice


def test_ids_without_an_embedding_are_refused_when_a_plan_is_made_and_when_it_is_run(
    folder, stdlib_corpus, tmp_path, capsys
):
    used = read_manifest(stdlib_corpus).vocabulary_size
    with_vocabulary(folder, used - 1)
    message = f"the corpus has token ids up to {used - 1}, model.vocab_size is {used - 1}; prepare the corpus"
    with pytest.raises(ConfigError, match=message):
        compile(CompileSettings(model=str(folder), data=stdlib_corpus, tokens_per_step=64))
    with pytest.raises(SystemExit) as caught:
        main(["run", "--model", str(folder), "--data", str(stdlib_corpus), "--output", str(tmp_path / "run")])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_plan_for_a_corpus_has_its_sequences_and_says_what_a_run_says(folder, stdlib_corpus, tmp_path, capsys):
    settings = CompileSettings(model=str(folder), data=stdlib_corpus, tokens_per_step=128)
    assert corpus_notice(settings) is None
    assert compile(settings).plan().sequence_length == read_manifest(stdlib_corpus).sequence_length == 64
    with pytest.raises(ConfigError, match=r"compile.sequence_length \(128\) must be that of compile.data .* 64; leave"):
        compile(replace(settings, sequence_length=128))
    with_another_tokenizer(folder)
    arguments = ["--model", str(folder), "--data", str(stdlib_corpus), "--tokens-per-step", "128"]
    for command in (["compile"], ["run", "--output", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]):
        with pytest.raises(SystemExit):
            main([*command, *arguments])
        assert f"warning: {corpus_notice(settings)}" in capsys.readouterr().err


def test_a_plan_for_a_saved_dataset_asks_for_the_length(folder, tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="is a saved dataset, which does not record its sequence length; leave it out"
    ):
        compile(CompileSettings(model=str(folder), data=tmp_path, tokens_per_step=32))


def test_a_plan_for_a_corpus_that_is_not_there_names_the_folder_spelt_like_it(folder, stdlib_corpus, tmp_path):
    (tmp_path / "corpus").symlink_to(stdlib_corpus)
    settings = CompileSettings(model=str(folder), data=tmp_path / "corpsu", tokens_per_step=128)
    with pytest.raises(DataError, match=r"corpsu is not a folder; did you mean '.*/corpus'\?; make one with"):
        compile(settings)
