"""The folder with the checkpoints of a run: listing them, finding the newest intact one, setting aside and removing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from moescale.errors import CheckpointError
from moescale.files import sync
from moescale.runtime.checkpoint import Checkpoint, verify
from moescale.runtime.ranks import ONE_RANK, Ranks

_PREFIX = "step-"
_LEFTOVERS = ".writing-*"


class CheckpointStore:
    """The checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def list(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first, damaged ones included; leftovers of interrupted writes are not."""
        found = []
        for path in self.folder.glob(_PREFIX + "*"):
            digits = path.name.removeprefix(_PREFIX)
            if digits.isdigit() and path.is_dir():
                found.append(Checkpoint(path=path, step=int(digits)))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def last(self) -> Checkpoint | None:
        """Return the newest checkpoint, which is the one of the highest step, or None."""
        checkpoints = self.list()
        return checkpoints[-1] if checkpoints else None

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of ``step``; raises CheckpointError listing the existing ones."""
        checkpoints = self.list()
        for checkpoint in checkpoints:
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints) or "none"
        raise CheckpointError(f"{self.folder}: has no checkpoint of step {step}; there are: {steps}")

    def last_good(
        self,
        ranks: Ranks = ONE_RANK,
        on_skip: Callable[[str], None] = lambda problem: None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> Checkpoint | None:
        """Return the newest checkpoint that passes :func:`verify`, or None if there are no checkpoints. A collective.

        Args:
            on_skip: called with the problem of each damaged checkpoint.
            on_progress: called after every file checked.

        Raises CheckpointError if all are damaged: a run with something to lose never silently starts from scratch.
        """
        problems = []
        for checkpoint in ranks.gather(self.list()[::-1] if ranks.is_first else None)[0]:
            try:
                verify(checkpoint, ranks, on_progress)
            except CheckpointError as error:
                problems.append(str(error))
                on_skip(problems[-1])
                continue
            return checkpoint
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints ({len(problems)}) is undamaged: {'; '.join(problems)}. "
                "Bring one back from a copy, or start anew with another --output"
            )
        return None

    def set_aside_after(self, step: int, ranks: Ranks = ONE_RANK) -> Sequence[Path]:
        """Rename every checkpoint after ``step`` to ``aside-step-...`` and return the new paths. A collective.

        A run that resumes at ``step`` writes these steps again. Under their old names, the stale checkpoints would
        count as newer than the ones it writes.
        """
        moved: list[Path] = []
        problem = None
        if ranks.is_first:
            try:
                for checkpoint in self.list():
                    if checkpoint.step > step:
                        moved.append(self.set_aside(checkpoint))
            except OSError as error:
                problem = str(error)
        moved, problem = ranks.gather((moved, problem))[0]
        if problem is not None:
            raise CheckpointError(
                f"{self.folder}: the checkpoints after step {step} could not be renamed ({problem}); move them away"
            )
        return moved

    def set_aside(self, checkpoint: Checkpoint) -> Path:
        """Rename ``checkpoint`` to an unused ``aside-step-...`` and return the new path."""
        name = f"aside-{checkpoint.path.name}"
        path, number = self.folder / name, 1
        while path.exists():
            number += 1
            path = self.folder / f"{name}-{number}"
        checkpoint.path.rename(path)
        sync(self.folder)
        return path

    def path_of(self, step: int) -> Path:
        """Return the path of the checkpoint of ``step``, whether or not it exists."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def drop_oldest(self, written: int) -> None:
        """Remove all but the newest ``keep`` checkpoints up to step ``written``, the one just written."""
        for old in [checkpoint for checkpoint in self.list() if checkpoint.step <= written][: -self.keep]:
            # Renamed first: if killed half-way, it must not look like a checkpoint with missing files.
            shutil.rmtree(old.path.rename(old.path.with_name(f".writing-dropped-{old.path.name}")))

    def remove_leftovers(self) -> None:
        """Remove what a killed run was writing or removing."""
        for leftover in self.folder.glob(_LEFTOVERS):
            shutil.rmtree(leftover)
