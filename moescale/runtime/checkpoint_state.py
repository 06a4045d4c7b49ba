"""Records of a checkpoint's ``state.json``: which tensors and files it has, and where the training stood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moescale.errors import CheckpointError
from moescale.records import Count, FileKind, FileName, Length, Matches, Sha256, build, read_json_object

_Hexadecimal = Annotated[str, Matches("(?:[0-9a-f]{2})*", "hexadecimal digits")]


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not as it was written. The message has no remedy: only who reads it knows of another one."""


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
    """Of every tensor in the file, a start and a stop per dim."""


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
    """What a trainer reads of the state that it saved."""

    step: Count
    skipped_steps: Count
    num_updates: Count
    source: dict[str, Any]
    """The loader's, which checks it."""
    identity: dict[str, str]
    plan: dict[str, Any] | None
    cpu_random_state: Annotated[str, Length(least=2), Matches("(?:[0-9a-f]{2})*", "hexadecimal digits")]
    cuda_random_state: _Hexadecimal | None


def read_stored(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the digest and the document in a ``state.json``. Raises DamagedCheckpointError."""
    stored = build(_Stored, read_json_object(path, _FILE), str(path), _FILE)
    return stored.sha256, stored.content


def check_document(document: dict[str, Any], path: Path) -> None:
    """Refuse a document of this format that lacks a field or holds one of another type. DamagedCheckpointError."""
    build(_Content, document, str(path), _FILE)
    for file_name, entry in document["files"].items():
        for name, box in entry["boxes"].items():
            if any(start > stop for start, stop in box):
                raise DamagedCheckpointError(f"{path}: files.{file_name}.boxes.{name} ({box}) must have start <= stop")


def check_training_state(state: dict[str, Any], path: Path) -> None:
    """Refuse a state from which no training can continue. Raises DamagedCheckpointError."""
    build(TrainingState, state, str(path), _FILE)
