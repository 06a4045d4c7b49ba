"""Compares the tokenizer of a corpus, as the corpus records it, with that of the model."""

from __future__ import annotations

from pathlib import Path

from moescale.config import ModelConfig
from moescale.data.corpus.manifest import MANIFEST, read_manifest
from moescale.data.prepare.tokenizer import CorpusTokenizer, load_tokenizer
from moescale.errors import ConfigError, DataError
from moescale.files import file_digest

LEAST_VOCABULARY_SHARE = 0.9
"""Fraction of a model's vocabulary that its own tokenizer uses. Models pad theirs: DeepSeek-V2-Lite by 2.3%, Qwen3 by
0.2%."""


def check_vocabulary(vocabulary_size: int, config: ModelConfig) -> None:
    """Raise ConfigError if a corpus has ids, all below ``vocabulary_size``, for which the model has no embedding."""
    if vocabulary_size > config.vocab_size:
        raise ConfigError(
            f"the corpus has token ids up to {vocabulary_size - 1}, model.vocab_size is {config.vocab_size}; "
            "prepare the corpus with the model's own tokenizer"
        )


def vocabulary_notice(data: Path, config: ModelConfig, model: Path) -> str | None:
    """Return a notice if ``data`` was apparently prepared with another model's tokenizer, else None.

    The recorded tokenizer is compared with the one in ``model``, the model's folder. If the folder has none, a
    vocabulary much smaller than the model's is a hint. A saved dataset records neither.
    """
    if not (data / MANIFEST).is_file():
        return None
    manifest = read_manifest(data)
    name, recorded = manifest.made_from.get("tokenizer"), manifest.made_from.get("tokenizer_sha256")
    own = None
    if (path := model / "tokenizer.json").is_file():
        if recorded is not None and _digest(path) == recorded:  # without reading 100,000 tokens
            return None
        own = _load(str(model), manifest.made_from.get("end_token"))
    if own is not None and (own.sha256 == recorded or _has_tokens_of(own, name)):
        return None
    remedy = f"prepare it with --tokenizer {model}, unless this is meant"
    if own is not None and recorded is not None:
        return (
            f"{data} was prepared with another tokenizer ({name}, {manifest.vocabulary_size:,} tokens, SHA-256 "
            f"{recorded[:12]}) than the model's own ({model}, SHA-256 {own.sha256[:12]}), or with the same one saved "
            f"again: if it is another, the same id may stand for other text than the weights have learned; {remedy}"
        )
    if manifest.vocabulary_size < LEAST_VOCABULARY_SHARE * config.vocab_size:
        return (
            f"{data} has token ids below {manifest.vocabulary_size:,} ({name}), model.vocab_size is "
            f"{config.vocab_size:,}: more than padding leaves unused, so it may be another model's tokenizer; prepare "
            "it with the model's own, or set vocab_size in a config.json of your own"
        )
    return None


def _has_tokens_of(own: CorpusTokenizer, recorded: object) -> bool:
    """Whether the tokenizer that a corpus names is still on this machine, and gives every id the same text as ``own``.

    A tokenizer that is saved again has other bytes and the same tokens. Nothing is fetched to find out.
    """
    if not isinstance(recorded, str) or not Path(recorded).exists():
        return False
    theirs = _load(recorded)
    return theirs is not None and theirs.tokenizer.get_vocab() == own.tokenizer.get_vocab()


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except (DataError, OSError):
        return None


def _load(name: str, end_token: object = None) -> CorpusTokenizer | None:
    """The tokenizer in the folder ``name``; None if it cannot be read."""
    try:
        return load_tokenizer(name, end_token if isinstance(end_token, str) else None)
    except (DataError, ConfigError, OSError):
        return None
