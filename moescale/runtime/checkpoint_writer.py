"""Writes checkpoints from all ranks: atomically, and in the background if host memory allows.

Beginning and committing a checkpoint are collectives; in between every rank writes its own parts independently. Of a
part that several ranks hold, only the first copy is written. Training waits while the parts are copied to the host. A
thread writes them, reads them back and compares every byte. The commit checks that the files of all ranks hold every
element of every tensor. Only then does the checkpoint get its final name, and only then are older ones removed. The
commit reports any failure of the thread. A kill leaves a ``.writing-*`` folder, which nothing reads and the next run
removes.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moescale.errors import CheckpointError, ConfigError
from moescale.files import document_digest, file_digest, remedy, sync, write_atomically, written_by_library
from moescale.runtime.checkpoint import FORMAT_VERSION, STATE_FILE, Checkpoint, find_missing_elements
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.device import available_host_bytes
from moescale.runtime.layout import Part, whole
from moescale.runtime.ranks import ONE_RANK, Ranks, place_on_host

MAX_FILE_BYTES = 2**30
"""The sync of a file reports no progress until it is done, so files are kept small enough for a slow disk."""
HOST_MEMORY_SHARE = 0.8
"""Fraction of the available host memory that the copies of a host may use; beyond it, training waits for the files."""
WAIT_SECONDS = 1.0
"""Interval at which waiting ranks ask each other for progress."""


class CheckpointWriter:
    """Writes the checkpoints of ``store`` from all of ``ranks``, one at a time."""

    def __init__(
        self,
        store: CheckpointStore,
        ranks: Ranks = ONE_RANK,
        *,
        in_background: bool = True,
        on_progress: Callable[[], None] = lambda: None,
        on_notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Args:
        on_progress: called on every waiting rank when the files of some rank have grown.
        on_notice: called on the first rank with failures that harm no checkpoint.
        """
        self.store = store
        self.ranks = ranks
        self.in_background = in_background
        self.on_progress = on_progress
        self.on_notice = on_notice
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """True if a checkpoint was begun and not yet committed; the same on all ranks."""
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """True once this rank's files of the pending checkpoint are on disk or have failed."""
        return self._pending is not None and self._pending.done.is_set()

    def check_room(self, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part] | None = None) -> None:
        """Raise ConfigError on all ranks if the disk has no room for a checkpoint of ``tensors``. A collective.

        Leftovers of an interrupted write are removed first, as they are before a write.
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
            state: a JSON value, returned unchanged when loaded. Only the first rank's is stored.
            tensors: on any device; with ``parts``, only this rank's part of each.
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
        copies = self._copy_to_host(mine)
        # If one rank cannot write in the background, the others would wait for it anyway.
        if self.ranks.sum_on_host([copies is not None]) == [self.ranks.size] and copies is not None:
            pending.start(self.ranks.rank, copies, parts)
        else:
            del copies
            pending.start(self.ranks.rank, mine, parts)
            self._wait(pending)
        self._pending = pending

    def commit(self) -> Checkpoint:
        """Wait until all ranks have written, then give the checkpoint its final name. A collective.

        Raises CheckpointError on all ranks if one could not write; earlier checkpoints are untouched.
        """
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._wait(pending)
        reports = self.ranks.gather((pending.error, pending.files))
        problem = next((f"rank {rank}: {error}" for rank, (error, _) in enumerate(reports) if error), None)
        if self.ranks.is_first:
            if problem is None:
                files = {name: entry for _, entries in reports for name, entry in entries.items()}
                problem = _text_of_error(lambda: self._name(pending, files))
            if problem is not None:
                shutil.rmtree(pending.folder, ignore_errors=True)
        self._all_agree(pending.step, problem)
        if self.ranks.is_first:
            self._tell_of_error("older checkpoints could not be removed", lambda: self.store.drop_oldest(pending.step))
        return Checkpoint(path=self.store.path_of(pending.step), step=pending.step)

    def tidy(self, step: int) -> None:
        """Remove what a killed run left: unfinished checkpoints, and all but the newest ones up to ``step``.

        ``step`` is that of the checkpoint the run resumed from, which is known to be intact.
        """
        if self.ranks.is_first:
            self._tell_of_error("leftovers of a killed run could not be removed", self.store.remove_leftovers)
            self._tell_of_error("older checkpoints could not be removed", lambda: self.store.drop_oldest(step))

    def _tell_of_error(self, what: str, action: Callable[[], None]) -> None:
        problem = _text_of_error(action)
        if problem is not None:
            self.on_notice(f"{self.store.folder}: {what} ({problem})")

    def save(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], **options: Any
    ) -> Checkpoint:
        """Do :meth:`begin` and :meth:`commit` in one call."""
        self.begin(step, state, tensors, **options)
        return self.commit()

    def _copy_to_host(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Return copies that a thread can write while the originals change, or None if host memory is too small."""
        _, local_ranks = place_on_host()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if not self.in_background or size * local_ranks >= HOST_MEMORY_SHARE * available_host_bytes():
            return None
        try:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        except (RuntimeError, MemoryError):  # out of memory; any other cause fails again when the files are written
            return None

    def _wait(self, pending: _Pending) -> None:
        """Wait until all ranks have written. A collective.

        As long as the files of any rank grow, a slow disk counts as progress. Once nothing grows, no rank reports
        progress and those that are done wait in the collective, so the watchdog blames the rank whose disk is stuck.
        """
        while True:
            pending.done.wait(WAIT_SECONDS)
            num_writing, num_advanced = self.ranks.sum_on_host([not pending.done.is_set(), pending.has_advanced()])
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
            self.store.remove_leftovers()
            folder.mkdir()

        return _text_of_error(make)

    def _name(self, pending: _Pending, files: Mapping[str, Any]) -> None:
        document = json.loads(pending.document) | {"files": files}
        problem = find_missing_elements(document["tensors"], files)
        if problem is not None:
            raise CheckpointError(problem)
        for name, entry in files.items():  # as seen from this rank: on a shared disk, other ranks wrote them
            size = (pending.folder / name).stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{name} has {size} bytes here, {entry['bytes']} were written")
        text = json.dumps({"sha256": document_digest(document), "content": document}, indent=1)
        write_atomically(pending.folder / STATE_FILE, text)
        final = self.store.path_of(pending.step)
        # The step was saved before, by a run that resumed from an earlier one. If killed here, one of the two exists.
        replaced = self.store.set_aside(Checkpoint(path=final, step=pending.step)) if final.exists() else None
        pending.folder.rename(final)
        sync(self.store.folder)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _all_agree(self, step: int, problem: str | None) -> None:
        problem = next((text for text in self.ranks.gather(problem) if text), None)
        if problem is not None:
            raise CheckpointError(
                f"{self.store.path_of(step)}: could not be written ({problem}). Earlier checkpoints are untouched; the "
                "same command resumes from the newest of them"
            )


class _Pending:
    """A checkpoint that this rank is writing."""

    def __init__(self, step: int, folder: Path, document: str) -> None:
        self.step = step
        self.folder = folder
        self.document = document
        self.files: dict[str, Any] = {}
        self.error: str | None = None
        self.done = threading.Event()
        """Set when :attr:`files` lists everything that this rank writes, or :attr:`error` gives the failure."""
        self._stage = 0
        self._seen: tuple[int, int] | None = None

    def start(self, rank: int, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]) -> None:
        """Start writing ``tensors`` in a thread."""

        def run() -> None:
            try:
                self.files = self._write(rank, tensors, parts)
            except BaseException as error:  # of any type: an unreported failure would pass for a complete checkpoint
                self.error = _text_of(error)
            finally:
                self.done.set()

        try:
            # Not a daemon: a process that exits normally waits for the write.
            threading.Thread(target=run, name="moescale-checkpoint").start()
        except RuntimeError as error:  # no thread can be started
            self.error = _text_of(error)
            self.done.set()

    def has_advanced(self) -> bool:
        """Return True if the checkpoint's files have grown or this rank has advanced since the last call."""
        num_blocks = 0
        for path in self.folder.glob("*"):
            try:
                num_blocks += path.stat().st_blocks  # not the size, which safetensors sets before it writes
            except OSError:  # renamed meanwhile
                continue
        before, self._seen = self._seen, (self._stage, num_blocks)
        return self._seen != before

    def _write(
        self, rank: int, tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]
    ) -> dict[str, dict[str, Any]]:
        files = {}
        for number, names in enumerate(_by_size(tensors)):
            group = {name: tensors[name].detach().cpu().contiguous() for name in names}
            path = self.folder / f"tensors-{rank:05d}-{number:04d}.safetensors"
            with written_by_library(path):
                save_file(group, path)
                self._stage += 1
            self._stage += 1
            _check_written(path, group)
            boxes = {name: [[bounds.start, bounds.stop] for bounds in parts[name].index] for name in names}
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path), "boxes": boxes}
            self._stage += 1
        return files


def _check_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless the file holds exactly ``tensors``, bit for bit."""
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != tensors.keys():
            raise CheckpointError(f"{path.name} was read back with other tensors than were written")
        for name, tensor in tensors.items():
            stored = file.get_tensor(name)
            same = stored.shape == tensor.shape and stored.dtype == tensor.dtype
            # As bytes: NaN differs from itself.
            if not same or not torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (stored, tensor))):
                raise CheckpointError(f"{path.name}: tensor '{name}' was read back with other values than were written")


def _whole_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    return {name: whole(tensor.shape) for name, tensor in tensors.items()}


def _first_copies(tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """Return the tensors this rank writes: of a part that several ranks hold, the first rank writes it."""
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
    """Return why ``action`` failed, or None: an error raised on one rank only would leave the others waiting."""
    try:
        action()
    except Exception as error:
        return _text_of(error)
    return None


def _text_of(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    advice = remedy(error)
    kind = "" if isinstance(error, OSError) or advice else f"{type(error).__name__}: "
    return f"{kind}{error}{'' if advice is None else f'; {advice}'}"
