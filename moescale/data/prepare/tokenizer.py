"""Finds and reads the tokenizer of a corpus, without options that lose text, and the token that ends a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moescale.data.prepare.added_tokens import ADDED_TOKENS, add_missing_tokens
from moescale.data.prepare.tokenizer_file import read_tokenizer
from moescale.errors import DataError, nearest
from moescale.hub import fetch_repository, looks_like_path, nearest_here
from moescale.records import FileKind, read_json_object

_SIDE_FILE = FileKind(
    noun="a tokenizer's configuration", error=DataError, remedy="repair it, or name the end token with end_token"
)
_TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


@dataclass(frozen=True, kw_only=True)
class CorpusTokenizer:
    """A tokenizer without truncation, padding or special tokens of its own, and the token that closes documents."""

    tokenizer: tokenizers.Tokenizer
    sha256: str
    """Digest of tokenizer.json and of the tokens that the files next to it add."""
    end_token: str
    end_token_id: int
    vocabulary_size: int
    """All ids are below this."""
    files: dict[str, Path]
    """tokenizer.json and the files next to it, by name."""


def load_tokenizer(name: str, end_token: str | None = None) -> CorpusTokenizer:
    """Read the tokenizer ``name``: a folder with tokenizer.json, such a file, or a model's name on the hub.

    Raises:
        DataError: it cannot be found or read, or has no token ``end_token``, or none is given and none is configured.
    """
    files = _find(name)
    path = files["tokenizer.json"]
    tokenizer, content = read_tokenizer(path)
    # A tokenizer.json may carry the truncation and padding of the last training run: both would change the text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = add_missing_tokens(tokenizer, files)
    end_token, end_token_id = _end_token(tokenizer, files, end_token)
    return CorpusTokenizer(
        tokenizer=tokenizer,
        sha256=hashlib.sha256(content + (json.dumps(added).encode() if added else b"")).hexdigest(),
        end_token=end_token,
        end_token_id=end_token_id,
        vocabulary_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        files=files,
    )


def load_recorded_tokenizer(name: str, made_from: Mapping[str, Any], corpus: Path) -> CorpusTokenizer:
    """Read the tokenizer ``name`` as ``corpus`` was prepared with it; ``made_from`` is its ``recorded_origin``.

    Raises:
        DataError: it cannot be read, or is another one.
    """
    sha256, end_token = made_from.get("tokenizer_sha256"), made_from.get("end_token")
    found = load_tokenizer(name, end_token if isinstance(end_token, str) else None)
    if sha256 is not None and found.sha256 != sha256:
        raise DataError(
            f"tokenizer '{name}' is not the one that {corpus} was prepared with: its SHA-256 is {found.sha256}, the "
            f"manifest says {sha256}; give that one as --tokenizer"
        )
    return found


def _find(name: str) -> dict[str, Path]:
    """Return the paths of tokenizer.json and of the files next to it that name other tokens."""
    path = Path(name).expanduser()
    if path.is_file():
        folder, found = path.parent, {"tokenizer.json": path}
    elif path.is_dir():
        folder, found = path, {"tokenizer.json": path / "tokenizer.json"}
        if not found["tokenizer.json"].is_file():
            raise DataError(f"{path} holds no tokenizer.json; save the tokenizer in its fast form there")
    elif looks_like_path(name):
        raise DataError(f"tokenizer '{name}' does not exist{nearest_here(path)}; give a folder with tokenizer.json")
    else:
        files = ("tokenizer.json", *_SIDE_FILES, ADDED_TOKENS, *_TEMPLATE_FILES)
        folder = fetch_repository(name, files, what="tokenizer", error=DataError)
        found = {"tokenizer.json": folder / "tokenizer.json"}
        if not found["tokenizer.json"].is_file():
            raise DataError(f"tokenizer '{name}' has no tokenizer.json on the hub; give a folder with one")
    return found | {
        file: folder / file for file in (*_SIDE_FILES, ADDED_TOKENS, "chat_template.jinja") if (folder / file).is_file()
    }


def _end_token(tokenizer: tokenizers.Tokenizer, files: dict[str, Path], wanted: str | None) -> tuple[str, int]:
    if wanted is not None:
        token_id = tokenizer.token_to_id(wanted)
        if token_id is None:
            vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            raise DataError(
                f"prepare.end_token ('{wanted}') is not a token of {files['tokenizer.json']}"
                f"{nearest(wanted, vocabulary)}"
            )
        return wanted, token_id
    for value in _configured_end_tokens(files):
        if isinstance(value, int):
            token = tokenizer.id_to_token(value)
            if token is not None:
                return token, value
        else:
            token_id = tokenizer.token_to_id(value)
            if token_id is not None:
                return value, token_id
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    candidates = ", ".join(f"'{token}'" for token in special[:10]) or "none is marked special"
    raise DataError(
        f"no end token is configured next to {files['tokenizer.json']}; name one with end_token "
        f"(candidates: {candidates})"
    )


def _configured_end_tokens(files: dict[str, Path]) -> Iterator[str | int]:
    """Yield the end tokens named in the files next to the tokenizer, the most specific first."""
    for name in _SIDE_FILES:
        if name not in files:
            continue
        config = read_json_object(files[name], _SIDE_FILE)
        token = config.get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            yield token
        token_id = config.get("eos_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0] if token_id else None
        if type(token_id) is int and 0 <= token_id < 1 << 32:  # what the library takes for an id
            yield token_id
