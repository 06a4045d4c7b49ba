"""Reads tokenizer.json: checked first, because the library ends the process on some contents, and believes others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from moescale.errors import DataError
from moescale.records import FileKind, parse_json_object, read_bytes, show

_FILE = FileKind(
    noun="a tokenizer", error=DataError, remedy="fetch it again, or save the tokenizer anew", max_bytes=2**30
)
_MOST_IDS = 1 << 24
"""The library writes a vocabulary by counting up to its largest id."""


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, bytes]:
    """Return the tokenizer in a tokenizer.json, and the file's content.

    Raises:
        DataError: it is not JSON, its vocabulary contradicts itself, or the library cannot read it.
    """
    content = read_bytes(path, _FILE)
    document = parse_json_object(content, str(path), _FILE)
    problem = _problem_of(document)
    if problem is not None:
        raise DataError(f"{path}: {problem}; {_FILE.remedy}")
    try:
        return tokenizers.Tokenizer.from_buffer(content), content
    except BaseException as error:
        # The library raises plain Exception, and its panics derive from BaseException alone.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
        raise


def _problem_of(document: Mapping[str, Any]) -> str | None:
    """Return the rule that the model of a tokenizer breaks, or None. Malformed models are left to the library."""
    model = document.get("model")
    if not isinstance(model, dict):
        return "model must be an object"
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        return _problem_of_ids(vocabulary) or _problem_of_merges(model)
    return None


def _problem_of_ids(vocabulary: Mapping[str, Any]) -> str | None:
    ids = vocabulary.values()
    wrong = next((name for name, value in vocabulary.items() if not _is_id(value)), None)
    if wrong is not None:
        return (
            f"model.vocab: the id of {show(wrong)} ({show(vocabulary[wrong])}) must be a whole number below {_MOST_IDS}"
        )
    if len(set(ids)) < len(vocabulary):
        seen: dict[int, str] = {}
        for name, value in vocabulary.items():
            if value in seen:
                return f"model.vocab: {show(seen[value])} and {show(name)} have the same id {value}"
            seen[value] = name
    return None


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_IDS


def _problem_of_merges(model: Mapping[str, Any]) -> str | None:
    """A prefix of continuing pieces is cut off the second half of every merge, whether it is there or not."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return None
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not str(pair[1]).startswith(prefix):
            return (
                f"model.merges[{number}] ({show(merge)}) must be two pieces, the second of which begins with "
                f"model.continuing_subword_prefix ({show(prefix)})"
            )
    return None
