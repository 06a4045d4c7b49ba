"""The checkpoints of a run on disk: which there are, the newest whole one, and those to set aside or remove."""

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
        """All checkpoints, oldest first, damaged ones too. Leftovers of an interrupted write do not count."""
        found = []
        for path in self.folder.glob(_PREFIX + "*"):
            digits = path.name.removeprefix(_PREFIX)
            if digits.isdigit() and path.is_dir():
                found.append(Checkpoint(path=path, step=int(digits)))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, or None."""
        checkpoints = self.list()
        return checkpoints[-1] if checkpoints else None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``; raises CheckpointError naming those there are."""
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
        """The newest whole checkpoint (:func:`verify`), None where there is none at all. A collective.

        ``on_skip`` hears what is wrong with each newer one, ``on_progress`` of every file checked. Raises
        CheckpointError where all are damaged: a run that has something to lose never starts from scratch by itself.
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
        """Rename every checkpoint of a later step to ``aside-step-...``; where they are now. A collective.

        A run that resumes at ``step`` writes these steps again: under their old names they would count as newer than
        what it writes, and outlive it.
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
        """Rename ``checkpoint`` to an unused ``aside-step-...``, and return where it is now."""
        name = f"aside-{checkpoint.path.name}"
        path, number = self.folder / name, 1
        while path.exists():
            number += 1
            path = self.folder / f"{name}-{number}"
        checkpoint.path.rename(path)
        sync(self.folder)
        return path

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, or will be."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def drop_oldest(self, written: int) -> None:
        """Of the checkpoints up to step ``written``, which was just written, remove all but the newest ``keep``."""
        for old in [checkpoint for checkpoint in self.list() if checkpoint.step <= written][: -self.keep]:
            # Renamed first: killed half-way, it must not look like a checkpoint that has lost files.
            shutil.rmtree(old.path.rename(old.path.with_name(f".writing-dropped-{old.path.name}")))

    def remove_leftovers(self) -> None:
        """Remove what a killed run was writing or dropping."""
        for leftover in self.folder.glob(_LEFTOVERS):
            shutil.rmtree(leftover)
