"""Characters that a tokenizer has no tokens for, which it drops or replaces by its unknown token without a word.

Byte-level tokenizers and those that fall back to bytes spell everything. For others each distinct character is tried
once, alone; where the unknown token stands for words, the tokens themselves are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

UNKNOWN_CHARACTERS = "unknown_characters"
UNKNOWN_TOKENS = "unknown_tokens"
INVALID_UTF8 = "invalid_utf8"
_BYTES = 256


class UnknownText:
    """Counts what a tokenizer does not spell; ``is_possible`` says whether there can be any such thing."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, description: dict[str, Any]) -> None:
        """``description`` is the tokenizer's JSON."""
        self._tokenizer = tokenizer
        model = description["model"]
        unknown = model.get("unk_token")
        if unknown is None and isinstance(model.get("unk_id"), int):
            unknown = tokenizer.id_to_token(model["unk_id"])
        self._unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
        self.is_possible = not _spells_bytes(description, model)
        self._known: dict[str, bool] = {}

    def count(self, text: str, ids: Sequence[int]) -> tuple[int, str]:
        """Return how many characters of ``text`` have no token and the first of them, else how many ids are unknown."""
        unspelt = [character for character in set(text) if not self._is_spelt(character)]
        if unspelt:
            return sum(map(text.count, unspelt)), min(unspelt, key=text.index)
        if self._unknown_id is None:
            return 0, ""
        return sum(1 for token_id in ids if token_id == self._unknown_id), ""

    def faults(self, text: str, ids: Sequence[int] | np.ndarray) -> list[tuple[str, int, str]]:
        """Return at most one entry (kind, amount, detail) for the parts of ``text`` without tokens."""
        if not self.is_possible:
            return []
        count, first = self.count(text, ids if isinstance(ids, list) else np.asarray(ids).tolist())
        if not count:
            return []
        return [(UNKNOWN_CHARACTERS, count, f"such as {first!r}") if first else (UNKNOWN_TOKENS, count, "")]

    def _is_spelt(self, character: str) -> bool:
        known = self._known.get(character)
        if known is None:
            known = self._known[character] = self._spells(character)
        return known

    def _spells(self, character: str) -> bool:
        if character.isspace():
            return True  # which tokenizers separate words by, and give no tokens of its own
        normalizer, splitter, model = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer, self._tokenizer.model
        text = normalizer.normalize_str(character) if normalizer is not None else character
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter is not None else [text]
        if not any(pieces):
            return False
        for piece in pieces:
            tokens = model.tokenize(piece)
            if any(token.id == self._unknown_id for token in tokens):
                # Unknown alone, though not within a word perhaps; what a whole word's model lacks is counted by tokens.
                return _stands_for_words(model)
            if sum(len(token.value.encode()) for token in tokens) < len(piece.encode()):
                return False
        return True


def is_encodable(text: str) -> bool:
    """Return True if ``text`` has no lone surrogates, which JSON escapes can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stands_for_words(model: object) -> bool:
    return isinstance(model, tokenizers.models.WordLevel | tokenizers.models.WordPiece)


def _spells_bytes(description: dict, model: dict) -> bool:
    """Return True if every byte has a token, so that every text can be tokenised."""
    vocabulary = model["vocab"]
    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in tokens for byte in range(_BYTES))
    stages = description["pre_tokenizer"] or {}
    stages = stages.get("pretokenizers", [stages])
    normalizers = description["normalizer"] or {}
    normalizers = normalizers.get("normalizers", [normalizers])
    is_byte_level = any(stage.get("type") == "ByteLevel" for stage in [*stages, *normalizers])
    return is_byte_level and all(letter in tokens for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet())
