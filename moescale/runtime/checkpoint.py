"""Reads and verifies one checkpoint: safetensors files and JSON, never pickle, with checksums.

A checkpoint is the folder ``checkpoints/step-00000090``. Its ``state.json`` holds step, data position and settings, the
shape of every tensor, and for every file its size, its SHA-256 and the boxes of tensors in it; the files
``tensors-RANK-NUMBER.safetensors`` hold those boxes. A rank reads the boxes that overlap its own, so the layout that
reads need not be the one that wrote.

A folder with the final name is complete: it was written under a temporary name, verified, synced and renamed
(:mod:`moescale.runtime.checkpoint_writer`). If it lacks a file, it was damaged later.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from moescale.boxes import Box, box_shape, overlap, relative_to
from moescale.errors import CheckpointError
from moescale.files import document_digest, file_digest
from moescale.runtime.checkpoint_state import DamagedCheckpointError, check_document, check_training_state, read_stored
from moescale.runtime.layout import Part, whole
from moescale.runtime.ranks import ONE_RANK, Ranks

FORMAT_VERSION = 2
STATE_FILE = "state.json"
MAX_MAPPED_BYTES = 2**26
_MAX_GRID_CELLS = 10**7


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, complete unless it was damaged after it was written."""

    path: Path
    step: int


def read_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the state that a trainer saved, with every field it needs. Raises CheckpointError."""
    state = read_state(checkpoint)
    check_training_state(state, checkpoint.path / STATE_FILE)
    return state


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the trainer saved as JSON. Raises CheckpointError where it is damaged."""
    return _read_document(checkpoint.path)["state"]


@torch.no_grad()
def load(
    checkpoint: Checkpoint,
    tensors: Mapping[str, torch.Tensor],
    parts: Mapping[str, Part] | None = None,
    ranks: Ranks = ONE_RANK,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Copy a checkpoint into ``tensors`` (same names, any device) and return its state. A collective.

    Args:
        tensors: all tensors of the checkpoint; with ``parts``, only this rank's part of each.
        on_progress: called after every file checked and every tensor read.

    Sizes and checksums of all files (each checked by one of the ranks), names and shapes are checked before any tensor
    is modified. Raises the same CheckpointError on every rank.
    """
    document = _read_document(checkpoint.path)
    parts = parts or {name: whole(tensor.shape) for name, tensor in tensors.items()}
    stored = document["tensors"].keys()
    for problem, names in (("lacks", tensors.keys() - stored), ("has an unknown", stored - tensors.keys())):
        if names:
            raise CheckpointError(f"{checkpoint.path}: {problem} tensor '{min(names)}' ({len(names)} in all)")
    verify(checkpoint, ranks, on_progress)
    for name, part in parts.items():
        shape = tuple(document["tensors"][name])
        if shape != part.shape:
            raise CheckpointError(f"{checkpoint.path}: tensor '{name}' has shape {shape}, the model wants {part.shape}")
    with StoredTensors(checkpoint) as source:
        for name, tensor in tensors.items():
            source.copy(name, parts[name].index, tensor)
            on_progress()
    return document["state"]


class StoredTensors:
    """A context manager that reads any box of a checkpoint's tensors, without verifying checksums."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        document = _read_document(checkpoint.path)
        self.shapes = {name: tuple(shape) for name, shape in document["tensors"].items()}
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._mapped_bytes = 0
        self._boxes: dict[str, list[tuple[str, Box]]] = {name: [] for name in self.shapes}
        for file_name, entry in document["files"].items():
            for name, box in entry["boxes"].items():
                self._boxes[name].append((file_name, tuple(slice(start, stop) for start, stop in box)))

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def dtype(self, name: str) -> torch.dtype:
        file_name, _ = self._boxes[name][0]
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16}
        return dtypes[self._open(file_name).get_slice(name).get_dtype()]

    def read(self, name: str, index: Box) -> torch.Tensor:
        """Return the box ``index`` (explicit bounds) of a tensor, on the CPU."""
        tensor = torch.empty(box_shape(index), dtype=self.dtype(name))
        self.copy(name, index, tensor)
        return tensor

    def copy(self, name: str, index: Box, target: torch.Tensor) -> None:
        """Copy the box ``index`` of a tensor into ``target`` of its shape, converted to its dtype and device."""
        for file_name, stored in self._boxes[name]:
            common = overlap(stored, index)
            if common is None:
                continue
            try:
                part = self._open(file_name).get_slice(name)[relative_to(common, stored)]
                target[relative_to(common, index)].copy_(part)
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpointError(f"{self.path / file_name}: cannot be read ({error})") from error
            self._release_after(part.nbytes)

    def _release_after(self, num_bytes: int) -> None:
        """Close the files now and then: until then, pages read through a mapping count as this process's memory."""
        self._mapped_bytes += num_bytes
        if self._mapped_bytes > MAX_MAPPED_BYTES:
            self._stack.close()
            self._files.clear()
            self._mapped_bytes = 0

    def _open(self, file_name: str) -> Any:
        if file_name not in self._files:
            path = self.path / file_name
            try:
                self._files[file_name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpointError(f"{path}: cannot be read ({error})") from error
        return self._files[file_name]


def verify(checkpoint: Checkpoint, ranks: Ranks = ONE_RANK, on_progress: Callable[[], None] = lambda: None) -> None:
    """Check that every element of every tensor is stored, and that no file has changed. A collective.

    One of the ranks checks each file's size, checksum and header. Raises DamagedCheckpointError naming the first bad
    file, or CheckpointError for another format version, on all ranks.
    """
    files: dict[str, Any] = {}
    problem: CheckpointError | None = None
    try:
        files = _read_document(checkpoint.path)["files"]
    except CheckpointError as error:
        problem = error
    for number, (name, entry) in enumerate(files.items()):
        if number % ranks.size == ranks.rank and problem is None:
            problem = _problem_of(checkpoint.path / name, entry)
            on_progress()
    problem = next((error for error in ranks.gather(problem) if error is not None), None)
    if problem is not None:
        raise problem


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    digest, document = read_stored(path)
    if digest != document_digest(document):
        raise DamagedCheckpointError(f"{path}: checksum differs, the file is damaged")
    if document.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format ({document.get('format')}) must be {FORMAT_VERSION}: another version of moescale wrote "
            "it; export it with that version, or start a new --output"
        )
    check_document(document, path)
    problem = find_missing_elements(document["tensors"], document["files"])
    if problem is not None:
        raise DamagedCheckpointError(f"{path}: {problem}")
    return document


def find_missing_elements(tensors: Mapping[str, Sequence[int]], files: Mapping[str, Any]) -> str | None:
    """Return a problem if ``files`` do not hold every element of every tensor exactly once, else None.

    Args:
        tensors: the shape of each tensor.
        files: entries whose "boxes" give the box of every tensor in the file: a start and a stop per dim.
    """
    boxes: dict[str, list[Any]] = {name: [] for name in tensors}
    for file_name, entry in files.items():
        for name, box in entry["boxes"].items():
            if name not in boxes:
                return f"'{file_name}' holds an unknown tensor '{name}'"
            boxes[name].append(box)
    for name, shape in tensors.items():
        if not _hold_each_element_once(shape, boxes[name]):
            stored = sum(math.prod(stop - start for start, stop in box) for box in boxes[name])
            total = math.prod(shape)
            return f"the files hold {stored:,} of the {total:,} elements of tensor '{name}', or some of them twice"
    return None


def _hold_each_element_once(shape: Sequence[int], boxes: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Return True if ``boxes`` tile a tensor: on the grid of all their edges, every cell lies in exactly one box."""
    if math.prod(shape) == 0:
        return not boxes
    for box in boxes:
        if len(box) != len(shape):
            return False
        if not all(0 <= start < stop <= size for (start, stop), size in zip(box, shape, strict=True)):
            return False
    edges = [sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)]
    num_cells = [len(of_dim) - 1 for of_dim in edges]
    if math.prod(num_cells) > _MAX_GRID_CELLS:
        return False
    cells = np.zeros(num_cells, dtype=np.int32)
    for box in boxes:
        inside = (
            slice(bisect_left(of_dim, start), bisect_left(of_dim, stop))
            for of_dim, (start, stop) in zip(edges, box, strict=True)
        )
        cells[tuple(inside)] += 1
    return bool((cells == 1).all())


def _problem_of(path: Path, entry: Mapping[str, Any]) -> DamagedCheckpointError | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return DamagedCheckpointError(f"{path}: has {size} bytes, {entry['bytes']} were written")
        if file_digest(path) != entry["sha256"]:
            return DamagedCheckpointError(f"{path}: checksum differs, the file is damaged")
        with safe_open(path, framework="pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
        if stored != {name: [stop - start for start, stop in box] for name, box in entry["boxes"].items()}:
            return DamagedCheckpointError(f"{path}: holds other tensors than {STATE_FILE} says")
    except FileNotFoundError:
        return DamagedCheckpointError(f"{path}: missing")
    except (SafetensorError, OSError) as error:
        return DamagedCheckpointError(f"{path}: cannot be read ({error})")
    return None
