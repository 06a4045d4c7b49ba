"""Sources and settings for the tests of the data package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moescale.data.prepare.settings import PrepareSettings

DOCUMENTS = [
    f"def function_{number}(x):\n    return x * {number}  # é 漢字\n" * (1 + number % 3) for number in range(60)
]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return DOCUMENTS


@pytest.fixture
def lines_file(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(DOCUMENTS)))
    return path


@pytest.fixture
def settings(tmp_path: Path, model_folder: Path):
    """Make settings with short sequences and one process; keywords override."""

    def make(source: Path | str | tuple[str, ...], **changes) -> PrepareSettings:
        defaults = {
            "tokenizer": str(model_folder),
            "sequence_length": 16,
            "output": tmp_path / "output",
            "num_workers": 1,
        }
        return PrepareSettings(source=source if isinstance(source, tuple) else str(source), **(defaults | changes))

    return make


@pytest.fixture
def plain_tokens(model_folder: Path):
    """Tokenise documents one by one, each closed with the end token (id 0), into one flat list."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))

    def tokens(texts: list[str]) -> list[int]:
        return [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False).ids, 0]]

    return tokens
