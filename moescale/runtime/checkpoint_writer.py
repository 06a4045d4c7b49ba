"""Writing a checkpoint from all ranks: atomically, and beside the training where host memory allows.

A checkpoint is begun and committed by collectives, and in between written by every rank for itself: its own parts, of
those that several ranks hold only the first copy. Training stands still while they are copied to the host; a thread
writes them, and the checkpoint gets its final name at the first commit after all ranks have written. What is killed
before leaves a ``.writing-*`` folder, which nothing reads and the next write removes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moescale.errors import CheckpointError, ConfigError
from moescale.runtime.checkpoint import (
    FORMAT_VERSION,
    STATE_FILE,
    Checkpoint,
    CheckpointStore,
    document_digest,
    file_digest,
)
from moescale.runtime.device import available_host_bytes
from moescale.runtime.layout import Part, whole
from moescale.runtime.ranks import ONE_RANK, Ranks

MAX_FILE_BYTES = 2**30
"""A file's sync shows no progress before it is done, so files are small enough for a slow disk."""
HOST_MEMORY_SHARE = 0.8
"""How much of the available host memory a host's copies may take; beyond it, training waits for the files."""
WAIT_SECONDS = 1.0
"""How often waiting ranks ask each other whether the writing goes on."""


class CheckpointWriter:
    """Writes the checkpoints of ``store`` from all of ``ranks``, one at a time."""

    def __init__(
        self,
        store: CheckpointStore,
        ranks: Ranks = ONE_RANK,
        *,
        in_background: bool = True,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_progress`` hears, on every rank that waits, that some rank's files have grown or changed."""
        self.store = store
        self.ranks = ranks
        self.in_background = in_background
        self.on_progress = on_progress
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and not yet committed; the same on all ranks."""
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank's files of the pending checkpoint are on disk, or have failed to get there."""
        return self._pending is not None and not self._pending.thread.is_alive()

    def check_room(self, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part] | None = None) -> None:
        """Raise ConfigError, on all ranks, unless the disk takes a checkpoint of ``tensors`` now. A collective.

        What an interrupted write has left is removed first, as the next write does.
        """
        mine = _first_copies(tensors, parts or _whole_parts(tensors))
        (size,) = self.ranks.sum_on_host([sum(tensor.nbytes for tensor in mine.values())])
        problem = self.ranks.gather(self._problem_with_room(size) if self.ranks.is_first else None)[0]
        if problem is not None:
            raise ConfigError(problem)

    def begin(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        """Begin the checkpoint of ``step``; the tensors may change as soon as this returns. A collective.

        Args:
            state: JSON-able; comes back unchanged when loaded. The first rank's counts.
            tensors: any device; with ``parts``, of each only this rank's part.
        """
        assert self._pending is None, "commit the checkpoint before"
        folder = self.store.folder / f".writing-{self.store.path_of(step).name}"
        self._all_agree(step, self._make_folder(folder) if self.ranks.is_first else None)
        parts = parts or _whole_parts(tensors)
        mine = _first_copies(tensors, parts)
        document = {
            "format": FORMAT_VERSION,
            "step": step,
            "tensors": {name: list(part.shape) for name, part in parts.items()},
            "state": dict(state),
        }
        pending = _Pending(step, folder, json.dumps(document))
        if self._copies_fit(sum(tensor.nbytes for tensor in mine.values())):
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in mine.items()}
            pending.start(self.ranks.rank, copies, parts)
        else:
            pending.start(self.ranks.rank, mine, parts)
            self._wait(pending)
        self._pending = pending

    def commit(self) -> Checkpoint:
        """Wait until all ranks have written, and give the checkpoint its name. A collective.

        Raises CheckpointError, on all ranks, where one could not write; earlier checkpoints are untouched.
        """
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._wait(pending)
        reports = self.ranks.gather((pending.error, pending.files))
        problem = next((f"rank {rank}: {error}" for rank, (error, _) in enumerate(reports) if error), None)
        if problem is None and self.ranks.is_first:
            files = {name: entry for _, entries in reports for name, entry in entries.items()}
            problem = _text_of_error(lambda: self._name(pending, files))
        elif self.ranks.is_first:
            shutil.rmtree(pending.folder, ignore_errors=True)
        self._all_agree(pending.step, problem)
        return Checkpoint(path=self.store.path_of(pending.step), step=pending.step)

    def save(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], **options: Any
    ) -> Checkpoint:
        """:meth:`begin` and :meth:`commit` in one."""
        self.begin(step, state, tensors, **options)
        return self.commit()

    def _copies_fit(self, size: int) -> bool:
        """Whether all ranks write beside the training: one that does not keeps the others waiting anyway."""
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        fits = self.in_background and size * local_ranks < HOST_MEMORY_SHARE * available_host_bytes()
        return self.ranks.sum_on_host([fits]) == [self.ranks.size]

    def _wait(self, pending: _Pending) -> None:
        """Until all ranks have written. A collective.

        A slow disk is progress as long as any rank's files advance. When nothing advances no rank reports any, and
        those that have written stand in the collective: so a watchdog blames the one whose disk stands still.
        """
        while True:
            pending.thread.join(WAIT_SECONDS)
            num_writing, num_advanced = self.ranks.sum_on_host([pending.thread.is_alive(), pending.has_advanced()])
            if num_writing == 0:
                return
            if num_advanced:
                self.on_progress()

    def _problem_with_room(self, size: int) -> str | None:
        folder = self.store.folder
        trial = folder / ".writing-trial"
        problem = self._make_folder(trial)
        if problem is not None:
            return (
                f"{folder}: must be a folder that can be written to ({problem}); allow it, or choose another --output"
            )
        trial.rmdir()
        usage = shutil.disk_usage(folder)
        if 0 < usage.total and usage.free < size:  # a file system that does not know its size says 0
            return (
                f"{folder}: a checkpoint has {size:,} bytes, the disk {usage.free:,} left; free space, or choose "
                "another --output"
            )
        return None

    def _make_folder(self, folder: Path) -> str | None:
        def make() -> None:
            self.store.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.store.folder.glob(".writing-*"):
                shutil.rmtree(leftover)
            folder.mkdir()

        return _text_of_error(make)

    def _name(self, pending: _Pending, files: Mapping[str, Any]) -> None:
        document = json.loads(pending.document) | {"files": files}
        path = pending.folder / STATE_FILE
        path.write_text(json.dumps({"sha256": document_digest(document), "content": document}, indent=1))
        _sync(path)
        _sync(pending.folder)
        final = self.store.path_of(pending.step)
        if final.exists():  # the same step again, after resuming from an earlier one
            replaced = final.with_name(f".writing-replaced-{final.name}")
            final.rename(replaced)
            pending.folder.rename(final)
            shutil.rmtree(replaced)
        else:
            pending.folder.rename(final)
        _sync(self.store.folder)
        self.store.drop_oldest(pending.step)

    def _all_agree(self, step: int, problem: str | None) -> None:
        problem = next((text for text in self.ranks.gather(problem) if text), None)
        if problem is not None:
            raise CheckpointError(
                f"{self.store.path_of(step)}: could not be written ({problem}); earlier checkpoints are untouched. "
                "Free space or choose another --output"
            )


class _Pending:
    """A checkpoint under way on this rank."""

    def __init__(self, step: int, folder: Path, document: str) -> None:
        self.step = step
        self.folder = folder
        self.document = document
        self.files: dict[str, Any] = {}
        self.error: str | None = None
        self._stage = 0
        self._seen: tuple[int, int] | None = None

    def start(self, rank: int, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]) -> None:
        """Begin to write ``tensors`` in a thread."""

        def run() -> None:
            try:
                self._write(rank, tensors, parts)
            except (OSError, SafetensorError) as error:
                self.error = str(error)

        # Not a daemon: a process that ends in peace lets the write end first.
        self.thread = threading.Thread(target=run, name="moescale-checkpoint")
        self.thread.start()

    def has_advanced(self) -> bool:
        """Whether the checkpoint's files have grown, or one of this rank's got further, since the last call."""
        num_blocks = 0
        for path in self.folder.glob("*"):
            try:
                num_blocks += path.stat().st_blocks  # safetensors gives a file its whole size before it fills it
            except OSError:  # renamed meanwhile
                continue
        before, self._seen = self._seen, (self._stage, num_blocks)
        return self._seen != before

    def _write(self, rank: int, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]) -> None:
        files = {}
        for number, group in enumerate(_by_size(tensors)):
            path = self.folder / f"tensors-{rank:05d}-{number:04d}.safetensors"
            save_file({name: tensors[name].detach().cpu().contiguous() for name in group}, path)
            self._stage += 1
            _sync(path)
            self._stage += 1
            boxes = {name: [[bounds.start, bounds.stop] for bounds in parts[name].index] for name in group}
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path), "boxes": boxes}
            self._stage += 1
        self.files = files


def _whole_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    return {name: whole(tensor.shape) for name, tensor in tensors.items()}


def _first_copies(tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """What this rank writes: of what several ranks hold, the first does."""
    return {name: tensor for name, tensor in tensors.items() if parts[name].is_first_copy and tensor.numel()}


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


def _text_of_error(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
