"""Records of a checkpoint's ``state.json``: its tensors, its files, and the state of the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moescale.errors import CheckpointError
from moescale.records import Count, FileKind, FileName, Length, Matches, Sha256, build, read_json_object

_Hexadecimal = Annotated[str, Matches("(?:[0-9a-f]{2})*", "hexadecimal digits")]


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was written. Its message has no remedy: the caller knows of other checkpoints."""


_FILE = FileKind(
    noun="a checkpoint's state",
    error=DamagedCheckpointError,
    missing="missing; the checkpoint is damaged",
    max_bytes=2**30,
    ignores_unknown=True,
)


@dataclass(frozen=True, kw_only=True)
class _TensorFile:
    bytes: Count
    sha256: Sha256
    boxes: dict[str, list[tuple[Count, Count]]]
    """A start and a stop per dim, for every tensor in the file."""


@dataclass(frozen=True, kw_only=True)
class _Content:
    format: int
    step: Count
    tensors: dict[str, list[Count]]
    """The shape of each."""
    files: dict[FileName, _TensorFile]
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    sha256: Sha256
    content: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The fields that a trainer reads from the state it saved."""

    step: Count
    skipped_steps: Count
    num_updates: Count
    source: dict[str, Any]
    """The loader's state; the loader validates it."""
    identity: dict[str, str]
    plan: dict[str, Any] | None
    cpu_random_state: Annotated[str, Length(least=2), Matches("(?:[0-9a-f]{2})*", "hexadecimal digits")]
    cuda_random_state: _Hexadecimal | None


def read_stored(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the digest and the document in a ``state.json``. Raises DamagedCheckpointError."""
    stored = build(_Stored, read_json_object(path, _FILE), str(path), _FILE)
    return stored.sha256, stored.content


def check_document(document: dict[str, Any], path: Path) -> None:
    """Raise DamagedCheckpointError for a document that lacks a field or has one of the wrong type."""
    build(_Content, document, str(path), _FILE)
    for file_name, entry in document["files"].items():
        for name, box in entry["boxes"].items():
            if any(start > stop for start, stop in box):
                raise DamagedCheckpointError(f"{path}: files.{file_name}.boxes.{name} ({box}) must have start <= stop")


def check_training_state(state: dict[str, Any], path: Path) -> None:
    """Raise DamagedCheckpointError for a state from which training cannot continue."""
    build(TrainingState, state, str(path), _FILE)
