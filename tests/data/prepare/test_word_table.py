"""The table of words gives the tokenizer's own tokens, or leaves the text to it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import NFC

from moescale.data.prepare import patterns, word_table
from moescale.data.prepare.word_table import word_encoder

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V2_LETTERS = (  # the published class lists more alphabets in the same way
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01c4-\u0293\u0391-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u1e00-\u1f15\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U0001e900-\U0001e943]+"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def isolated(*patterns: str) -> list:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def byte_level(use_regex: bool = False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


STAGES = {
    "gpt2": [byte_level(use_regex=True)],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)],
    "digit runs": [pre_tokenizers.Digits(individual_digits=False), byte_level(use_regex=True)],
    "llama3": [*isolated(LLAMA3), byte_level()],
    "gpt4o": [*isolated(GPT4O), byte_level()],
    "deepseek v2": [
        *isolated(r"[\r\n]", DEEPSEEK_V2_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True),
        byte_level(),
    ],
    "deepseek coder": [
        *isolated(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True),
        byte_level(),
    ],
    "deepseek v3": [*isolated(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3), byte_level()],
    "string": [pre_tokenizers.Split("--", "isolated"), byte_level(use_regex=True)],
}


def make_tokenizer(stages: list, sources: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = stages[0] if len(stages) == 1 else pre_tokenizers.Sequence(stages)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(sources.glob("json_*.py"))], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers_by_name(stdlib_sources):
    return {name: make_tokenizer(stages, stdlib_sources) for name, stages in STAGES.items()}


def encoder_of(tokenizer: Tokenizer):
    return word_encoder(tokenizer, np.dtype("<u2"))


@pytest.mark.parametrize("name", STAGES)
def test_tokens_of_sources_are_the_tokenizers_own(tokenizers_by_name, stdlib_sources, name):
    tokenizer = tokenizers_by_name[name]
    encoder = encoder_of(tokenizer)
    for path in sorted(stdlib_sources.iterdir()):
        text = path.read_text(encoding="utf-8")
        assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "name, merged, cuts",
    [("gpt2", 1, 1), ("starcoder", 2, 1), ("llama3", 1, 1), ("deepseek v2", 2, 1), ("deepseek v3", 3, 1)],
)
def test_stages_are_merged_and_taken_until_pieces_are_short(tokenizers_by_name, stdlib_sources, name, merged, cuts):
    tokenizer = tokenizers_by_name[name]
    encoder = encoder_of(tokenizer)
    assert len(encoder._cuts) == cuts
    assert patterns.merged(word_table._stages(json.loads(tokenizer.to_str()))).num_stages == merged
    for path in sorted(stdlib_sources.iterdir()):
        encoder(path.read_text(encoding="utf-8"))
    assert sum(map(len, encoder._table)) / len(encoder._table) < 12


FRAGMENTS = [
    *"aZsStTmMdDlrve09 '\"\\-_/.,;(){}[]<>=!?#*+&|^~`@$%\t\n\r\x0b\x0c\x1c\x1f\x00\x7f\x85\xa0",
    *"éÀßµΩωПяשא漢字かナ가힣ªº²½Ⅷ٣०—–‘’“”…‟　。！～€©™\u2028\u200b\u0301\u0e33ǅʰ",
    *("  ", "   ", "\r\n", "\n\n", "'s", "'LL", "--", "12345", "word", " Word", " \n", "\n ", "漢字"),
]


@pytest.mark.parametrize("name", STAGES)
def test_tokens_of_random_texts_are_the_tokenizers_own(tokenizers_by_name, name):
    tokenizer = tokenizers_by_name[name]
    encoder = encoder_of(tokenizer)
    generator = random.Random(0)
    compared = 0
    for _ in range(3000):
        text = "".join(generator.choices(FRAGMENTS, k=generator.randint(1, 30)))
        tokens = encoder(text)
        if tokens is not None:
            compared += 1
            assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)
    assert compared > 1000


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=40))
def test_tokens_of_any_characters_are_the_tokenizers_own(tokenizers_by_name, text):
    for tokenizer in tokenizers_by_name.values():
        tokens = encoder_of_cached(tokenizer)(text)
        assert tokens is None or tokens.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


ENCODERS: dict[int, word_table.WordEncoder] = {}


def encoder_of_cached(tokenizer):
    if id(tokenizer) not in ENCODERS:
        ENCODERS[id(tokenizer)] = encoder_of(tokenizer)
    return ENCODERS[id(tokenizer)]


@pytest.mark.parametrize(
    "element",
    [
        r"\p{L}",
        r"\p{N}",
        r"\p{P}",
        r"\p{S}",
        r"\p{M}",
        r"\p{Z}",
        r"\p{C}",
        r"\p{Lu}",
        r"\p{Ll}",
        r"\p{Lt}",
        r"\p{Lm}",
        r"\p{Lo}",
        r"\s",
        r"\S",
        r"\P{L}",
        r"(?i:s)",
        r"(?i:k)",
    ],
)
def test_every_stable_character_means_the_same_to_both_libraries(element):

    text = "".join(map(chr, sorted(patterns.stable_characters())))
    pieces = pre_tokenizers.Split(Regex(element), "removed").pre_tokenize_str(text)
    outside_for_tokenizers = "".join(piece for piece, _ in pieces)
    outside_for_python = re.sub(patterns.translated(element), "", text)
    assert outside_for_tokenizers == outside_for_python


def test_digits_are_the_characters_that_the_digits_stage_isolates():

    text = "".join(map(chr, sorted(patterns.stable_characters())))
    pieces = [piece for piece, _ in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(text)]
    assert pieces == word_table._cut_by(patterns.translated(r"\p{N}"), [text])(text)
    assert re.fullmatch(patterns.translated(r"\p{N}"), "5")


@pytest.mark.parametrize(
    "pattern",
    [
        "^a",
        "a$",
        ".",
        r"\w+",
        r"\d",
        r"\bx",
        r"(a)",
        "[a[bc]]",
        "[a&&b]",
        r"a{2}+",
        r"\x41",
        r"(?<=a)b",
        r"a*",
        r"[^\S]",
    ],
)
def test_patterns_outside_the_small_language_are_refused(pattern):
    with pytest.raises(patterns.UnsupportedPattern):
        patterns.translated(pattern)


def test_texts_with_added_tokens_or_rare_characters_are_left_to_the_tokenizer(tokenizers_by_name):
    encoder = encoder_of(tokenizers_by_name["gpt2"])
    assert encoder("text before <|end|> text after") is None
    assert encoder("an emoji 😀") is None
    assert encoder("a private \ue000 character") is None
    assert encoder("plain text") is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", NFC()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda tokenizer: setattr(tokenizer.model, "dropout", 0.1),
    ],
    ids=["normalizer", "metaspace", "prefix space", "dropout"],
)
def test_tokenizers_of_other_kinds_are_left_alone(stdlib_sources, change):
    tokenizer = make_tokenizer(STAGES["gpt2"], stdlib_sources)
    change(tokenizer)
    assert encoder_of(tokenizer) is None


def test_any_of_hundreds_of_added_tokens_is_found():
    find = word_table._any_of([f"<|place holder {number}|>" for number in range(800)] + ["<think>", "[X]"]).search
    assert find("a <|place holder 799|> b").group() == "<|place holder 799|>"
    assert find("a [X] b").group() == "[X]"
    assert find("<|place holder 800> <think [X <|") is None
    assert word_table._any_of([]).search("anything") is None


def test_a_disagreement_on_the_hard_cases_leaves_the_tokenizer_alone(tokenizers_by_name, monkeypatch):
    monkeypatch.setattr(word_table, "_GPT2_PATTERN", r"\s+|\S+")
    assert encoder_of(tokenizers_by_name["gpt2"]) is None


def test_a_full_table_starts_again(tokenizers_by_name, monkeypatch):
    monkeypatch.setattr(word_table, "_TABLE_WORDS", 10)
    tokenizer = tokenizers_by_name["gpt2"]
    encoder = encoder_of(tokenizer)
    text = " ".join(f"word{number}" for number in range(1000))
    assert encoder(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert len(encoder._table) <= 10


def test_the_description_of_the_test_tokenizers_is_the_published_kind(tokenizers_by_name):
    """The stages above are as tokenizer.json of those models spells them: sequences that end in the byte level."""
    for tokenizer in tokenizers_by_name.values():
        description = json.loads(tokenizer.to_str())["pre_tokenizer"]
        last = description["pretokenizers"][-1] if description["type"] == "Sequence" else description
        assert last["type"] == "ByteLevel"


def random_text(generator: random.Random) -> str:
    return "".join(generator.choices([*FRAGMENTS, *["ア・イ", "゛", "abcd", "c1d"] * 5], k=generator.randint(1, 30)))


@pytest.fixture(scope="module")
def model_across_pieces() -> models.BPE:
    """A model with tokens for whatever occurs side by side, so that a piece that is not cut gives other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    generator = random.Random(2)
    tokenizer.train_from_iterator([random_text(generator) for _ in range(3000)], trainer)
    return tokenizer.model


@pytest.mark.parametrize(
    "first",
    [r"\p{N}{1,3}", r"[\r\n]", "[一-龥ࠀ-一가-퟿]+", r"[a-c]+", r"\s", r"\s+", r"[\p{L}\p{N}]+"],
)
@pytest.mark.parametrize("second", [r"\p{N}", r"[b-d]+", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3])
@pytest.mark.parametrize("third", [DEEPSEEK_V3, LLAMA3, r"\s?\p{L}+", r"\s+(?!\S)|\p{P}"])
def test_stages_of_any_kind_give_the_tokenizers_own_tokens(model_across_pieces, first, second, third):
    """Runs of one stage may hold what a later one cuts by: punctuation within katakana, digits among letters."""
    tokenizer = Tokenizer(model_across_pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*isolated(first, second, third), byte_level()])
    encoder = encoder_of(tokenizer)
    assert encoder is not None
    generator = random.Random(1)
    for _ in range(300):
        text = random_text(generator)
        tokens = encoder(text)
        if tokens is not None:
            assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("expression", [r"[\p{N}a]+", r"5|\p{L}", r"[0-9]x", r"\p{N}"])
def test_a_pattern_that_names_characters_which_another_has_taken_is_not_merged(expression):
    digits = frozenset(map(ord, "0123456789"))
    if expression == r"[\p{N}a]+":
        assert re.fullmatch(patterns.translated(expression, digits), "a\u00bd")
        assert not re.search(patterns.translated(expression, digits), "0123456789")
    elif expression == r"\p{N}":
        assert not re.search(patterns.translated(expression, digits), "0123456789")
    else:
        with pytest.raises(patterns.UnsupportedPattern):
            patterns.translated(expression, digits)


def test_the_letters_of_bytes_are_the_librarys():
    text = "".join(map(chr, sorted(patterns.stable_characters())))
    stage = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert word_table._byte_letters(text) == "".join(piece for piece, _ in stage.pre_tokenize_str(text))
