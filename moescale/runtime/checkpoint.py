"""Checkpoints of a run: safetensors files and JSON, never pickle; atomic, checksummed, newest ones kept.

A checkpoint is the folder ``checkpoints/step-00000090``: ``state.json`` (step, data position, settings, and for every
file its size and SHA-256) and ``tensors-*.safetensors``. It is written under a temporary name, synced and renamed, so a
folder with the final name is whole; ``last`` is simply the highest step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moescale.errors import CheckpointError
from moescale.kernels.adamw import join_master

FORMAT_VERSION = 1
STATE_FILE = "state.json"
MAX_FILE_BYTES = 4 * 2**30
WEIGHTS_PREFIX = "weights."
REMAINDER_PREFIX = "remainder."
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int


class CheckpointStore:
    """The checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def list(self) -> list[Checkpoint]:
        """Whole checkpoints, oldest first. Leftovers of an interrupted write do not count."""
        found = []
        for path in self.folder.glob(_PREFIX + "*"):
            digits = path.name.removeprefix(_PREFIX)
            if digits.isdigit() and (path / STATE_FILE).is_file():
                found.append(Checkpoint(path=path, step=int(digits)))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def last(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        checkpoints = self.list()
        return checkpoints[-1] if checkpoints else None

    def at(self, step: int) -> Checkpoint:
        """The whole checkpoint of ``step``; raises CheckpointError naming those there are."""
        checkpoints = self.list()
        for checkpoint in checkpoints:
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints) or "none"
        raise CheckpointError(f"{self.folder}: has no whole checkpoint of step {step}; there are: {steps}")

    def last_good(self) -> Checkpoint | None:
        """The newest checkpoint whose every file has its size and checksum, or None."""
        for checkpoint in reversed(self.list()):
            try:
                verify(checkpoint)
            except CheckpointError:
                continue
            return checkpoint
        return None

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
        """Write checkpoint ``step`` atomically, then drop the oldest beyond ``keep``.

        Args:
            state: JSON-able; comes back unchanged from :func:`load`.
            tensors: any device; each is copied to the host on its own file's turn.
        """
        final = self.folder / f"{_PREFIX}{step:08d}"
        temporary = self.folder / f".writing-{final.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        try:
            files = {}
            for number, group in enumerate(_by_size(tensors)):
                path = temporary / f"tensors-{number:04d}.safetensors"
                save_file({name: tensors[name].detach().cpu().contiguous() for name in group}, path)
                _sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path), "tensors": group}
            document = {"format": FORMAT_VERSION, "step": step, "files": files, "state": dict(state)}
            state_path = temporary / STATE_FILE
            state_path.write_text(json.dumps({"sha256": document_digest(document), "content": document}, indent=1))
            _sync(state_path)
            _sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{final}: could not be written ({error}); earlier checkpoints are untouched. "
                "Free space or choose another --output"
            ) from error
        for old in self.list()[: -self.keep]:
            shutil.rmtree(old.path)
        return Checkpoint(path=final, step=step)


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON state given to :meth:`CheckpointStore.save`. Raises CheckpointError where it is damaged."""
    return _read_document(checkpoint.path)["state"]


@torch.no_grad()
def load(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Copy a checkpoint into ``tensors`` (same names and shapes, any device) and return its state.

    Every file's size and checksum, and every name and shape, are checked before the first tensor is touched.
    """
    document = _read_document(checkpoint.path)
    stored = {name for entry in document["files"].values() for name in entry["tensors"]}
    for problem, names in (("lacks", tensors.keys() - stored), ("has an unknown", stored - tensors.keys())):
        if names:
            raise CheckpointError(f"{checkpoint.path}: {problem} tensor '{min(names)}' ({len(names)} in all)")
    for name, entry in document["files"].items():
        _verify(checkpoint.path / name, entry)
    for file_name in document["files"]:
        with safe_open(checkpoint.path / file_name, framework="pt") as file:
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(tensors[name].shape):
                    raise CheckpointError(
                        f"{checkpoint.path / file_name}: tensor '{name}' has shape {shape}, "
                        f"the model wants {tuple(tensors[name].shape)}"
                    )
    for name, tensor in read_tensors(checkpoint):
        tensors[name].copy_(tensor)
    return document["state"]


def read_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint with its name, one at a time, on the CPU."""
    for file_name in _read_document(checkpoint.path)["files"]:
        try:
            with safe_open(checkpoint.path / file_name, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{checkpoint.path / file_name}: cannot be read ({error})") from error


class CheckpointWeights:
    """The weights of a checkpoint, read tensor by tensor or slice by slice; a context manager.

    The source from which the weights are exported: ``names``, ``shape``, ``dtype`` and ``read``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        verify(checkpoint)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for file_name in _read_document(checkpoint.path)["files"]:
            file = self._stack.enter_context(safe_open(checkpoint.path / file_name, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return [key.removeprefix(WEIGHTS_PREFIX) for key in self._files if key.startswith(WEIGHTS_PREFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[WEIGHTS_PREFIX + name].get_slice(WEIGHTS_PREFIX + name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """What :meth:`read` returns: fp32 where the run kept fp32 weights in any form, else bf16."""
        if REMAINDER_PREFIX + name in self._files:
            return torch.float32
        stored = self._files[WEIGHTS_PREFIX + name].get_slice(WEIGHTS_PREFIX + name).get_dtype()
        return {"F32": torch.float32, "BF16": torch.bfloat16}[stored]

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The tensor, or with ``index`` its slice of dim 0."""
        weight = self._read(WEIGHTS_PREFIX + name, index)
        if REMAINDER_PREFIX + name not in self._files:
            return weight
        return join_master(weight, self._read(REMAINDER_PREFIX + name, index))

    def _read(self, key: str, index: int | None) -> torch.Tensor:
        stored = self._files[key].get_slice(key)
        return stored[:] if index is None else stored[index]


def verify(checkpoint: Checkpoint) -> None:
    """Check every file's size and checksum; raises CheckpointError naming the first bad one."""
    for name, entry in _read_document(checkpoint.path)["files"].items():
        _verify(checkpoint.path / name, entry)


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        stored = json.loads(path.read_text())
        document = stored["content"]
        intact = stored["sha256"] == document_digest(document)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; this folder is not a whole checkpoint") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another checkpoint") from error
    if not intact:
        raise CheckpointError(f"{path}: checksum differs, the file is damaged; resume from another checkpoint")
    if document.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format ({document.get('format')}) must be {FORMAT_VERSION}")
    return document


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; resume from another checkpoint")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(
            f"{path}: has {path.stat().st_size} bytes, {entry['bytes']} were written; resume from another checkpoint"
        )
    if _sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path}: checksum differs, the file is damaged; resume from another checkpoint")


def _by_size(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > MAX_FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    if group:
        yield group


def document_digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
