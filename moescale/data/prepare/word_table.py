"""Byte-level BPE by a lookup table of whole words: the same tokens as the tokenizer's, several times as fast.

`tokenizers` tracks where every character of a text comes from, which a corpus does not need and which takes most of
its time. A text's words repeat, though: here Python's regular expressions cut the text as the tokenizer's first
splitting stages would, and a table gives each piece's tokens, which the tokenizer's remaining stages and its model have
made when the piece came up first. Exactness is the condition for everything here:

- only tokenizers whose every stage is understood are taken (no normalizer; splitting by patterns, digits, byte level);
- only characters are taken whose Unicode category has never changed, so that both libraries agree on them;
- a text with another character, or with an added token in it, is left to the tokenizer itself;
- the two must agree on a text made of the hard cases, or the tokenizer is left alone.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from moescale.data.prepare.patterns import UnsupportedPattern, merged, ranges, stable_characters, translated

_TABLE_WORDS = 200_000
_LONGEST_WORD = 128
_SHORT_PIECE = 16
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Pattern by which the byte-level stage splits (Radford et al. 2019) if its ``use_regex`` is set."""
_HARD_CASES = (
    "def f(x):\n\treturn  x+1  # it's they'LL 12345 3.14e-7\r\n\r\n   \n \t \n'quoted' \"text\" [0]\u00a0\u3000é ñandú"
    " naïve Ωμέγα Привет שלום 漢字かな한글 “curly” — … €5 ½ x²\x1c\x85\n    if a>=b:  c[i]= {'k':v}  \n\n\n end   "
)
_PLAIN_TEXT = (
    "def read(path, mode):\n    # whatever is there, as it is\n"
    "    return [line.strip() for line in open(path, mode)]\n\n"
    "Nothing in this sentence but words, spaces and a few marks; most of what is written looks like that.\n"
)
"""A stage that leaves this in long pieces (one for digits alone, say) does not yet give pieces that repeat."""

Cut = Callable[[str], list[str]]


class WordEncoder:
    """Tokenises texts through a table of words."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, dtype: np.dtype, description: dict[str, Any]) -> None:
        """Raise UnsupportedPattern for a tokenizer that is not understood; see :func:`word_encoder`."""
        patterns = _stages(description)
        if not patterns:
            raise UnsupportedPattern("no stage to cut by")
        plan = _plan(patterns)
        self._cuts = plan.cuts
        self._table = _WordTable(tokenizer.model, patterns, plan, dtype)
        self._dtype = dtype
        self._find_unstable = re.compile(f"[^{ranges(stable_characters())}]").search
        self._find_added = _any_of([token["content"] for token in description["added_tokens"]]).search

    def __call__(self, text: str) -> np.ndarray | None:
        """Return the tokens of ``text`` [tokens], or None if the tokenizer itself must be used."""
        if self._find_unstable(text) or self._find_added(text):
            return None
        pieces = [text]
        for cut in self._cuts:
            pieces = cut(pieces[0]) if len(pieces) == 1 else [part for piece in pieces for part in cut(piece)]
        return np.frombuffer(b"".join(map(self._table.__getitem__, pieces)), self._dtype)


def word_encoder(
    tokenizer: tokenizers.Tokenizer, dtype: np.dtype, description: dict[str, Any] | None = None
) -> WordEncoder | None:
    """Return an encoder that gives the tokens of ``tokenizer`` as ``dtype``, or None if it is not of a known kind.

    ``description`` is the tokenizer's JSON, where it has been parsed already.
    """
    try:
        encoder = WordEncoder(tokenizer, dtype, description or json.loads(tokenizer.to_str()))
    except UnsupportedPattern:
        return None
    by_words = encoder(_HARD_CASES)
    by_tokenizer = tokenizer.encode(_HARD_CASES, add_special_tokens=False).ids
    return encoder if by_words is not None and by_words.tolist() == by_tokenizer else None


class _WordTable(dict[str, bytes]):
    """Tokens of a piece, as the bytes of an array; made when first asked for, kept while there is room."""

    def __init__(self, model: tokenizers.models.Model, patterns: list[str], plan: _Plan, dtype: np.dtype) -> None:
        super().__init__()
        self._tokenize = model.tokenize
        self._split = _splitter(plan.remaining)
        self._split_run = _splitter(patterns)
        self._run_characters = frozenset(map(chr, plan.run_characters))
        self._type_code = {2: "H", 4: "I"}[dtype.itemsize]

    def __missing__(self, piece: str) -> bytes:
        parts = (self._split_run if piece[0] in self._run_characters else self._split)(piece)
        ids = [token.id for part in parts for token in self._tokenize(_byte_letters(part))]
        content = array(self._type_code, ids).tobytes()
        if len(piece) <= _LONGEST_WORD:
            if len(self) >= _TABLE_WORDS:
                self.clear()
            self[piece] = content
        return content


def _splitter(patterns: list[str]) -> Cut:
    """Return a function that cuts a piece as the library cuts by the patterns in turn."""
    if not patterns:
        return lambda piece: [piece]
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    split = tokenizers.pre_tokenizers.Sequence(splits).pre_tokenize_str
    return lambda piece: [part for part, _ in split(piece)]


def _byte_letters(text: str) -> str:
    """Spell the bytes of a text with the byte level's letters, 40 times as fast as the library's stage of that name."""
    return text.encode().decode("latin-1").translate(_BYTE_LETTERS)


def _letters() -> dict[int, str]:
    """Return the letter of every byte: itself if visible, the others from U+0100 on (Radford et al. 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


_BYTE_LETTERS = _letters()


def _stages(description: dict) -> list[str]:
    """Return the patterns by which a tokenizer splits before the byte level, in its own spelling."""
    normalizer = description["normalizer"]
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise UnsupportedPattern("normalizer")
    model = description["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise UnsupportedPattern("model")
    stages = description["pre_tokenizer"] or {}
    stages = stages["pretokenizers"] if stages.get("type") == "Sequence" else [stages]
    if not stages or stages[-1].get("type") != "ByteLevel" or stages[-1]["add_prefix_space"]:
        raise UnsupportedPattern("byte level")
    patterns = [_stage_pattern(stage) for stage in stages[:-1]]
    return [*patterns, _GPT2_PATTERN] if stages[-1].get("use_regex", True) else patterns


class _Plan(NamedTuple):
    """The number of stages that Python applies, and the remaining work for a piece that is seen first."""

    cuts: list[Cut]
    remaining: list[str]
    run_characters: frozenset[int]
    """First characters of pieces to which all stages must still be applied."""


def _plan(patterns: list[str]) -> _Plan:
    """Take leading stages until they leave short pieces, which repeat; the library keeps the others.

    How many are taken decides the speed alone: a piece is put through the remaining stages when it comes up first.
    """
    stages = merged(patterns)
    cut = _cut_by(stages.expression, [_PLAIN_TEXT])
    if _are_short(cut(_PLAIN_TEXT)):
        return _Plan([cut], patterns[stages.num_stages :], stages.run_characters)
    cuts: list[Cut] = []
    pieces = [_PLAIN_TEXT]
    for pattern in patterns:
        if _are_short(pieces):
            break
        cuts.append(_cut_by(translated(pattern), pieces))
        pieces = [part for piece in pieces for part in cuts[-1](piece)]
    return _Plan(cuts, patterns[len(cuts) :], frozenset())


def _are_short(pieces: list[str]) -> bool:
    return sum(len(piece) for piece in pieces if len(piece) > _SHORT_PIECE) < len(_PLAIN_TEXT) / 4


def _stage_pattern(stage: dict) -> str:
    if stage.get("type") == "Digits":
        return r"\p{N}" if stage["individual_digits"] else r"\p{N}+"
    if stage.get("type") == "Split" and stage["behavior"] == "Isolated" and not stage["invert"]:
        pattern = stage["pattern"]
        if "Regex" in pattern:
            return pattern["Regex"]
        return re.sub(r"(\W)", r"\\\1", pattern["String"])
    raise UnsupportedPattern("stage")


def _cut_by(pattern: str, sample: list[str]) -> Cut:
    """Return a function that cuts a text into the matches of ``pattern`` and what lies between them."""
    find = re.compile(pattern).findall
    split = re.compile(f"({pattern})").split

    def cut_with_gaps(text: str) -> list[str]:
        return [part for part in split(text) if part]

    def cut(text: str) -> list[str]:
        matches = find(text)
        return matches if sum(map(len, matches)) == len(text) else cut_with_gaps(text)

    # Finding is a third faster than splitting where matches leave nothing between them, as most patterns' do.
    return cut if all(sum(map(len, find(text))) == len(text) for text in sample) else cut_with_gaps


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of ``texts``; hundreds that begin alike cost little more than one."""
    by_beginning: dict[str, list[str]] = {}
    for text in filter(None, texts):
        by_beginning.setdefault(text[:2], []).append(re.escape(text[2:]))
    branches = [f"{re.escape(beginning)}(?:{'|'.join(ends)})" for beginning, ends in by_beginning.items()]
    return re.compile("|".join(branches) or r"(?!)")
