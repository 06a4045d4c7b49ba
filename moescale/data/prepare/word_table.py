"""Byte-level BPE by looking up whole words: the same tokens as the tokenizer's own, several times as fast.

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
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby

import numpy as np
import tokenizers

_TABLE_WORDS = 200_000
_LONGEST_WORD = 128
_SHORT_PIECE = 16
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the byte-level stage splits by (Radford et al. 2019) where its ``use_regex`` is set."""
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
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


class _Unsupported(Exception):
    """A construct whose meaning the two libraries might not share."""


class WordEncoder:
    """Tokenises texts through a table of words."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, dtype: np.dtype) -> None:
        """Raise _Unsupported for a tokenizer that is not understood; see :func:`word_encoder`."""
        description = json.loads(tokenizer.to_str())
        self._cuts, remaining = _cuts_and_remaining(_stages(description))
        self._table = _WordTable(tokenizer.model, tokenizers.pre_tokenizers.Sequence(remaining), dtype)
        self._dtype = dtype
        self._find_unstable = re.compile(f"[^{_ranges(_stable_characters())}]").search
        self._find_added = _any_of([token["content"] for token in description["added_tokens"]]).search

    def __call__(self, text: str) -> np.ndarray | None:
        """Return the tokens of ``text`` [tokens], or None where the tokenizer itself must be asked."""
        if self._find_unstable(text) or self._find_added(text):
            return None
        pieces = [text]
        for cut in self._cuts:
            pieces = [part for piece in pieces for part in cut(piece)]
        return np.frombuffer(b"".join(map(self._table.__getitem__, pieces)), self._dtype)


def word_encoder(tokenizer: tokenizers.Tokenizer, dtype: np.dtype) -> WordEncoder | None:
    """Return an encoder that gives the tokens of ``tokenizer`` as ``dtype``, or None if it is not of a known kind."""
    try:
        encoder = WordEncoder(tokenizer, dtype)
    except _Unsupported:
        return None
    by_words = encoder(_HARD_CASES)
    by_tokenizer = tokenizer.encode(_HARD_CASES, add_special_tokens=False).ids
    return encoder if by_words is not None and by_words.tolist() == by_tokenizer else None


class _WordTable(dict[str, bytes]):
    """Tokens of a piece, as the bytes of an array; made when first asked for, kept while there is room."""

    def __init__(
        self, model: tokenizers.models.Model, remaining: tokenizers.pre_tokenizers.PreTokenizer, dtype: np.dtype
    ) -> None:
        super().__init__()
        self._tokenize = model.tokenize
        self._split = remaining.pre_tokenize_str
        self._dtype = dtype

    def __missing__(self, piece: str) -> bytes:
        ids = [token.id for word, _ in self._split(piece) for token in self._tokenize(word)]
        content = np.array(ids, dtype=self._dtype).tobytes()
        if len(piece) <= _LONGEST_WORD:
            if len(self) >= _TABLE_WORDS:
                self.clear()
            self[piece] = content
        return content


def _stages(description: dict) -> list[str]:
    """Return the patterns by which a tokenizer splits before the byte level, in its own spelling."""
    normalizer = description["normalizer"]
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise _Unsupported("normalizer")
    model = description["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _Unsupported("model")
    stages = description["pre_tokenizer"] or {}
    stages = stages["pretokenizers"] if stages.get("type") == "Sequence" else [stages]
    if not stages or stages[-1].get("type") != "ByteLevel" or stages[-1]["add_prefix_space"]:
        raise _Unsupported("byte level")
    patterns = [_stage_pattern(stage) for stage in stages[:-1]]
    return [*patterns, _GPT2_PATTERN] if stages[-1].get("use_regex", True) else patterns


def _cuts_and_remaining(patterns: list[str]) -> tuple[list[Cut], list[tokenizers.pre_tokenizers.PreTokenizer]]:
    """Take leading stages until they leave short pieces, which repeat; the library keeps the others.

    How many are taken decides the speed alone: a piece is put through the remaining stages when it comes up first.
    """
    cuts: list[Cut] = []
    pieces = [_PLAIN_TEXT]
    for pattern in patterns:
        if sum(len(piece) for piece in pieces if len(piece) > _SHORT_PIECE) < len(_PLAIN_TEXT) / 4:
            break
        cuts.append(_cut_by(translated(pattern), pieces))
        pieces = [part for piece in pieces for part in cuts[-1](piece)]
    if not cuts:
        raise _Unsupported("no stage to cut by")
    remaining = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns[len(cuts) :]
    ]
    return cuts, [*remaining, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _stage_pattern(stage: dict) -> str:
    if stage.get("type") == "Digits":
        return r"\p{N}" if stage["individual_digits"] else r"\p{N}+"
    if stage.get("type") == "Split" and stage["behavior"] == "Isolated" and not stage["invert"]:
        pattern = stage["pattern"]
        if "Regex" in pattern:
            return pattern["Regex"]
        return re.sub(r"(\W)", r"\\\1", pattern["String"])
    raise _Unsupported("stage")


_ELEMENT = re.compile(
    r"""(?P<category>\\(?P<sign>[pP])\{(?P<name>[A-Z][a-z]?)\})
    | (?P<space>\\s) | (?P<no_space>\\S)
    | (?P<escape>\\(?:[rntfv]|[^0-9A-Za-z\s]))
    | (?P<group>\(\?(?:[:!=]|i:)) | (?P<close>\))
    | (?P<open>\[\^?(?!\])) | (?P<close_class>\])
    | (?P<count>\{[0-9]+(?:,[0-9]*)?\}(?!\+)) | (?P<operator>[|*+?])
    | (?P<literal>[^\\()\[\]{}|*+?^$.\s]|[ ])""",
    re.VERBOSE,
)
_CLASS_LITERAL = re.compile(r"[^\\\[\]&]|&(?!&)")


def translated(pattern: str) -> str:
    """Spell an Oniguruma pattern for Python's ``re``, so that both mean the same on stable characters.

    Raises:
        _Unsupported: the pattern has an element outside the small language that tokenizers' patterns are written in.
    """
    result: list[str] = []
    in_class = False
    position = 0
    while position < len(pattern):
        literal = _CLASS_LITERAL.match(pattern, position) if in_class else None
        element = literal or _ELEMENT.match(pattern, position)
        if element is None:
            raise _Unsupported(pattern[position:])
        position = element.end()
        kind = "literal" if literal else str(element.lastgroup)
        if kind in ("sign", "name", "category"):
            members, negated = _ranges(_category(element["name"])), element["sign"] == "P"
        elif kind in ("space", "no_space"):
            members, negated = _SPACES, kind == "no_space"
        else:
            allowed = literal or kind in ("escape", "close_class") if in_class else kind != "close_class"
            if not allowed:
                raise _Unsupported(element.group())
            in_class = kind == "open" or in_class and kind != "close_class"
            result.append(element.group())
            continue
        if in_class and negated:
            raise _Unsupported(element.group())
        result.append(members if in_class else f"[{'^' * negated}{members}]")
    try:
        matches_nothing = re.compile("".join(result)).match("")
    except re.error as error:
        raise _Unsupported(pattern) from error
    if matches_nothing:
        raise _Unsupported(pattern)
    return "".join(result)


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


@cache
def _stable_characters() -> frozenset[int]:
    """Code points of the basic plane whose category is the one they had in Unicode 3.2."""
    return frozenset(
        code
        for code in range(0x10000)
        if (category := unicodedata.category(chr(code))) == unicodedata.ucd_3_2_0.category(chr(code))
        and category not in ("Cn", "Co", "Cs")
    )


@cache
def _category(name: str) -> frozenset[int]:
    """Stable code points of a category ("Lu") or group of categories ("L")."""
    return frozenset(code for code in _stable_characters() if unicodedata.category(chr(code)).startswith(name))


def _ranges(codes: frozenset[int]) -> str:
    """Spell a set of code points as the inside of a character class."""
    runs: Iterator[list[int]] = (
        [code for _, code in run] for _, run in groupby(enumerate(sorted(codes)), lambda pair: pair[1] - pair[0])
    )
    return "".join(f"\\u{run[0]:04x}-\\u{run[-1]:04x}" for run in runs)
