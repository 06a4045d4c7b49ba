"""Finding the tokenizer and the token that ends a document."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from tokenizers import Tokenizer

from moescale.data.prepare import prepare
from moescale.data.prepare.tokenizer import load_tokenizer
from moescale.errors import DataError

END_TOKEN = "<|end_of_text|>"


@pytest.fixture
def folder(tmp_path, model_folder):
    """A folder with tokenizer.json alone."""
    path = tmp_path / "tokenizer"
    path.mkdir()
    shutil.copy(model_folder / "tokenizer.json", path)
    return path


def test_a_folder_and_its_file_are_the_same_tokenizer(model_folder):
    from_folder = load_tokenizer(str(model_folder))
    from_file = load_tokenizer(str(model_folder / "tokenizer.json"))
    digest = hashlib.sha256((model_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert from_folder.sha256 == from_file.sha256 == digest
    assert (from_folder.end_token, from_folder.end_token_id, from_folder.vocabulary_size) == (END_TOKEN, 0, 512)


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", {"eos_token": END_TOKEN}),
        ("tokenizer_config.json", {"eos_token": {"content": END_TOKEN, "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": END_TOKEN}),
        ("generation_config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": [0, 5]}),
    ],
)
def test_the_end_token_is_taken_from_the_files_beside_the_tokenizer(folder, file, content):
    (folder / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.end_token, tokenizer.end_token_id) == (END_TOKEN, 0)


def test_the_end_token_of_the_settings_comes_first(model_folder):
    assert load_tokenizer(str(model_folder), "A").end_token == "A"


def test_without_an_end_token_the_candidates_are_named(folder):
    with pytest.raises(DataError, match=r"no end token is configured .*candidates: '<\|end_of_text\|>'"):
        load_tokenizer(str(folder))


def test_an_end_token_outside_the_vocabulary_is_refused(model_folder):
    with pytest.raises(DataError, match=r"'<\|end_of_txt\|>'\) is not a token .* did you mean '<\|end_of_text\|>'"):
        load_tokenizer(str(model_folder), "<|end_of_txt|>")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer.json: is not JSON .*; fetch it again"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["vocab"].update(b=5, a=5), r"model.vocab: '.*' and '[ab]' have the same id 5; fetch it"),
        (
            lambda model: model["vocab"].update(a=2**32 - 1),
            r"the id of 'a' \(4294967295\) must be a whole number below",
        ),
        (lambda model: model["vocab"].update(a=True), r"the id of 'a' \(True\) must be a whole number"),
        (
            lambda model: model.update(continuing_subword_prefix="##"),
            r"model.merges\[0\] \(.*\) must be two pieces, the second of which begins with .*prefix \('##'\)",
        ),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(folder, change, message):
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document["model"])
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=f"tokenizer.json: .*{message}"):
        load_tokenizer(str(folder))


def test_a_name_the_hub_does_not_answer_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="'no-one/nothing' does not exist: .* has no such folder, and fetching it from the hub"
    ):
        load_tokenizer("no-one/nothing")


def test_truncation_padding_and_added_tokens_of_the_file_lose_and_add_nothing(folder, settings, lines_file, tmp_path):
    from tokenizers.processors import TemplateProcessing

    reference = prepare(settings(lines_file), progress=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64, pad_token=END_TOKEN)
    tokenizer.post_processor = TemplateProcessing(single=f"{END_TOKEN} $A", special_tokens=[(END_TOKEN, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    made = settings(lines_file, tokenizer=str(folder), end_token=END_TOKEN, output=tmp_path / "other")
    assert prepare(made, progress=False).splits == reference.splits
    assert (made.output / "train-00000.bin").read_bytes() == (reference.output / "train-00000.bin").read_bytes()


def test_a_path_that_does_not_exist_is_not_looked_up(tmp_path):
    with pytest.raises(DataError, match="tokenizer '.*absent' does not exist"):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize("content", ["[]", '"<|end_of_text|>"', "[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(
        DataError,
        match=r"tokenizer_config.json: (must be a JSON object, .* fetch it again|is not JSON|has more)",
    ):
        load_tokenizer(str(folder))


def test_a_number_that_is_no_token_id_is_passed_over(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": -1}')
    with pytest.raises(DataError, match="no end token is configured"):
        load_tokenizer(str(folder))
