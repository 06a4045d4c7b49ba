"""Settings of ``moescale prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from moescale.errors import ConfigError

DEFAULT_TEXT_COLUMN = "text"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Source, tokenizer, sequences and splits of a corpus."""

    source: tuple[str, ...]
    """Files, folders and patterns such as 'data/*.jsonl', read one after the other, or names of datasets on the Hugging
    Face hub. Files are JSON Lines, JSON arrays, CSV, TSV, Parquet, Arrow, or text; also .gz, .zst."""
    tokenizer: str
    """Folder with a tokenizer.json, the file itself, or a model's name on the Hugging Face hub."""
    sequence_length: int
    """Tokens per packed sequence."""
    output: Path
    """Folder to write; made whole or not at all."""
    text_column: str = DEFAULT_TEXT_COLUMN
    """Field of a record, or column of a table, that holds a document's text; 'doc.text' is the field text of doc."""
    format: Literal["text", "chat"] | None = None
    """Content of a record: a text, or a conversation rendered by the tokenizer's chat template; default: determined by
    the columns. A conversation is a record with messages, conversations (ShareGPT), prompt and completion, or
    instruction, input and output."""
    loss_on: Literal["answers", "last-answer", "all"] = "answers"
    """Tokens of a conversation that are learned: the assistant's answers, the last answer, or all tokens."""
    too_long: Literal["drop", "split", "error"] = "drop"
    """Treatment of a conversation longer than a sequence: drop and count it, split it into sequences, or raise an
    error."""
    chat_template: Path | None = None
    """File with a chat template to use instead of the tokenizer's own."""
    template_date: str | None = None
    """Date, such as 2026-11-30, that a chat template takes for today if it asks; default: today."""
    split: str | None = None
    """Split to read, of a dataset on the hub, of a saved dataset dictionary, or of files whose names tell (train,
    validation, test); default: train. 'all' reads every local file."""
    include: tuple[str, ...] = ()
    """Patterns of the files of a folder that are read, such as '*.py'; default: all that hold documents."""
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders that are not read."""
    validation_fraction: float = 0.0
    """Share of the documents set aside for validation, chosen by seed."""
    validation_documents: int | None = None
    """Number of documents set aside for validation, chosen by seed and held in memory; instead of a share."""
    document_boundaries: bool = False
    """Record where documents start, so that attention and targets do not cross them."""
    end_token: str | None = None
    """Token that closes every document; default: the end token of the tokenizer's own configuration."""
    strict: bool = False
    """Stop at the first bad line or document, and at a file that is passed over, instead of counting it."""
    num_workers: int | None = None
    """Processes that tokenise; default: one per available core."""
    memory_gigabytes: float = 2.0
    """Memory that all processes together may take: a number of 10^9 bytes, or a size such as 4GiB."""
    seed: int = 0
    """Seed of the choice of validation documents."""

    def __post_init__(self) -> None:
        for name in ("source", "include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):  # one, as a caller in Python may well give it
                object.__setattr__(self, name, (value,))
        if not self.source:
            raise ConfigError("prepare.source is empty; name a file, a folder or a dataset")
        if self.sequence_length < 2:
            raise ConfigError(
                f"prepare.sequence_length ({self.sequence_length}) must be at least 2; a run has hundreds to "
                "thousands, such as 2048"
            )
        if self.template_date is not None:
            try:
                datetime.fromisoformat(self.template_date)
            except ValueError as error:
                raise ConfigError(
                    f"prepare.template_date ({self.template_date!r}) must be a date such as 2026-11-30"
                ) from error
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"prepare.validation_fraction ({self.validation_fraction}) must be in [0, 1); 0.05 sets a "
                "twentieth aside, 0 nothing"
            )
        if self.validation_documents is not None and self.validation_documents < 1:
            raise ConfigError(
                f"prepare.validation_documents ({self.validation_documents}) must be at least 1; leave it out for no "
                "validation split"
            )
        if self.validation_documents is not None and self.validation_fraction:
            raise ConfigError(
                f"prepare.validation_documents ({self.validation_documents}) and prepare.validation_fraction "
                f"({self.validation_fraction}) exclude each other; drop one"
            )
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(
                f"prepare.num_workers ({self.num_workers}) must be at least 1; leave it out for all cores"
            )
        if not 0 < self.memory_gigabytes < 1e9:
            raise ConfigError(
                f"prepare.memory_gigabytes ({self.memory_gigabytes}) must be positive and below 1e9; leave it out for 2"
            )

    @property
    def has_validation(self) -> bool:
        """True if documents are set aside for validation."""
        return self.validation_fraction > 0 or self.validation_documents is not None
