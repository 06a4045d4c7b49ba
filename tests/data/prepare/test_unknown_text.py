"""Characters that a tokenizer drops or does not know are counted; tokens of the files next to it are its own."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from moescale.data.prepare import prepare
from moescale.data.prepare.tokenizer import load_tokenizer
from moescale.data.prepare.unknown_text import UnknownText
from moescale.errors import DataError

WORDS = ["some plain english words and letters", "abcdefghijklmnopqrstuvwxyz ."] * 20


def trained(model, trainer, pre_tokenizer, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def incomplete_byte_level() -> Tokenizer:
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=300), pre_tokenizers.ByteLevel())


def characters() -> Tokenizer:
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=100), pre_tokenizers.Metaspace())


def word_pieces() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=["[UNK]"])
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), normalizers.Lowercase())


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>")
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


@pytest.mark.parametrize(
    "make, expected",
    [
        (byte_level, None),
        (incomplete_byte_level, ("漢é", 3)),
        (characters, ("漢é", 3)),
        (unigram, ("漢é", 3)),
        (word_pieces, ("", 2)),
    ],
    ids=["byte level", "byte level without all bytes", "BPE", "unigram", "word pieces"],
)
def test_what_a_tokenizer_cannot_spell_is_counted(make, expected):
    tokenizer = make()
    unknown = UnknownText(tokenizer, json.loads(tokenizer.to_str()))
    assert unknown.is_possible == (expected is not None)
    if expected is None:
        return
    text = "plain 漢字 words é"
    count, first = unknown.count(text, tokenizer.encode(text).ids)
    assert (count, first in expected[0]) == (expected[1], True)
    assert unknown.count("plain words", tokenizer.encode("plain words").ids) == (0, "")


def saved(folder, tokenizer: Tokenizer, **files):
    folder.mkdir()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": {"eos_token": "<end>"}} | files
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_dropped_characters_are_in_the_report_and_an_error_with_strict(settings, tmp_path):
    tokenizer = saved(tmp_path / "tokenizer", characters())
    source = tmp_path / "x.jsonl"
    texts = ["plain words " * 9, "漢字 plain", "more words " * 9]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = prepare(settings(source, tokenizer=str(tokenizer)), progress=False)
    assert report.documents == 3
    assert {kind: (items.count, items.first) for kind, items in report.bad.items()} == {
        "unknown_characters": (2, [f"{source}:2"])
    }
    assert "left out, unknown characters: 2" in report.to_text()
    with pytest.raises(DataError, match=r"x.jsonl:2: unknown characters \(strict\): such as '漢'"):
        prepare(settings(source, tokenizer=str(tokenizer), strict=True, output=tmp_path / "b"), progress=False)


USER = {
    "content": "<|user|>",
    "lstrip": False,
    "rstrip": True,
    "normalized": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize("is_described", [True, False])
def test_tokens_of_the_files_next_to_the_tokenizer_are_its_own_as_in_transformers(tmp_path, is_described):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_level()
    user = tokenizer.get_vocab_size() + 1
    decoder = {"added_tokens_decoder": {str(user): USER}} if is_described else {}
    files = {
        "tokenizer_config": {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"} | decoder,
        "added_tokens": {"<|user|>": user},
    }
    folder = saved(tmp_path / "tokenizer", tokenizer, **files)
    loaded = load_tokenizer(str(folder))
    text = "a <|user|>  talk <|tool|> b"
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded.vocabulary_size == user + 1 and ids.count(user) == 1
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    for name in files:
        (folder / f"{name}.json").write_text('{"eos_token": "<end>"}' if name == "tokenizer_config" else "{}")
    assert load_tokenizer(str(folder)).sha256 != loaded.sha256


def test_a_token_that_tokenizer_json_has_already_changes_nothing(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|user|>")])
    plain = load_tokenizer(str(saved(tmp_path / "plain", tokenizer)))
    user = str(tokenizer.token_to_id("<|user|>"))
    decoder = {"eos_token": "<end>", "added_tokens_decoder": {user: USER}}
    assert load_tokenizer(str(saved(tmp_path / "named", tokenizer, tokenizer_config=decoder))).sha256 == plain.sha256


@pytest.mark.parametrize(
    "files, message",
    [
        ({"added_tokens": {"<|user|>": 5000}}, "added_tokens.json: token '<|user|>' has id 5000, but .* only"),
        ({"added_tokens": {"<|user|>": "x"}}, "added_tokens.json: '<|user|>' .* must be a token and its id"),
        ({"added_tokens": [1]}, "added_tokens.json: must be a JSON object, not list"),
        ({"tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": {"x": USER}}}, "added_tokens_decoder.x"),
        ({"tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": {"9": "x"}}}, "added_tokens_decoder.9"),
        ({"tokenizer_config": {"eos_token": "<end>", "added_tokens_decoder": [USER]}}, "must be an object"),
    ],
)
def test_side_files_that_cannot_be_followed_are_refused_by_name(tmp_path, files, message):
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        load_tokenizer(str(saved(tmp_path / "tokenizer", byte_level(), **files)))
