"""Tokens that the files next to tokenizer.json name and it lacks itself; transformers adds them, so a corpus must too.

``tokenizer_config.json`` lists them under ``added_tokens_decoder`` with their properties. Where it does not,
``added_tokens.json`` counts, which has names and ids alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from moescale.errors import DataError
from moescale.records import FileKind, read_json_object

ADDED_TOKENS = "added_tokens.json"
_CONFIG = "tokenizer_config.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_missing_tokens(tokenizer: tokenizers.Tokenizer, files: Mapping[str, Path]) -> list[list[Any]]:
    """Add what ``files`` name and the tokenizer lacks, in the order of the ids; return it as id and properties.

    Raises:
        DataError: a token cannot have the id that a file gives it, or a file is not of the form it must have.
    """
    known = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    added: list[list[Any]] = []
    for token_id, token, path in sorted(_named_tokens(files), key=lambda named: named[0]):
        if known.get(token_id) == token.content:
            continue
        tokenizer.add_tokens([token]) if not token.special else tokenizer.add_special_tokens([token])
        actual = tokenizer.token_to_id(token.content)
        if actual != token_id:
            raise DataError(
                f"{path}: token {token.content!r} has id {token_id}, but tokenizer.json leaves it only {actual}; the "
                "files are of different tokenizers: fetch or save all of them again"
            )
        known[token_id] = token.content
        added.append([token_id, token.content, *(getattr(token, flag) for flag in _FLAGS)])
    return added


def _named_tokens(files: Mapping[str, Path]) -> Iterator[tuple[int, tokenizers.AddedToken, Path]]:
    decoder = _object(files[_CONFIG]).get("added_tokens_decoder") if _CONFIG in files else None
    if decoder is not None:
        for name, value in _entries(decoder, files[_CONFIG], "added_tokens_decoder"):
            if not (name.isascii() and name.isdigit() and isinstance(value, dict) and _is_token(value.get("content"))):
                raise DataError(
                    f"{files[_CONFIG]}: added_tokens_decoder.{name} ({value!r}) must be an object with a 'content', "
                    "under an id"
                )
            flags = {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}
            yield int(name), tokenizers.AddedToken(value["content"], **flags), files[_CONFIG]
    elif ADDED_TOKENS in files:
        for name, value in _entries(_object(files[ADDED_TOKENS]), files[ADDED_TOKENS], "the file"):
            if not isinstance(value, int) or isinstance(value, bool) or not _is_token(name):
                raise DataError(f"{files[ADDED_TOKENS]}: {name!r} ({value!r}) must be a token and its id")
            yield value, tokenizers.AddedToken(name), files[ADDED_TOKENS]


def _entries(value: Any, path: Path, what: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: {what} ({type(value).__name__}) must be an object")
    yield from value.items()


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _object(path: Path) -> dict[str, Any]:
    kind = FileKind(noun="a tokenizer's configuration", error=DataError, remedy="repair it, or fetch it again")
    return read_json_object(path, kind)
