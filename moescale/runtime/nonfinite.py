"""Handles losses, gradient norms and weights that are not finite: skips the step or ends the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moescale.coordinates import Coordinates
from moescale.errors import NonFiniteLossError
from moescale.runtime.optimizer import AdamW
from moescale.runtime.ranks import Ranks
from moescale.runtime.settings import TrainSettings
from moescale.runtime.step_source import Batch


class NonFiniteGuard:
    """Counts steps whose loss or gradient norm is not finite, and ends the run when ``settings`` say so."""

    def __init__(self, settings: TrainSettings, optimizer: AdamW, ranks: Ranks, coordinates: Coordinates) -> None:
        self.settings = settings
        self.optimizer = optimizer
        self.ranks = ranks
        self.coordinates = coordinates
        self.skipped_steps = 0
        """Skipped steps of the whole run, including those before a resume."""
        self._skipped_in_a_row = 0
        self._has_trained = False

    def note_update(self) -> None:
        """Note that a finite step has updated the weights."""
        self._skipped_in_a_row = 0
        self._has_trained = True

    def skip(self, step: int, batches: Sequence[Batch], loss: float, norm: float) -> None:
        """Count ``step`` as skipped, or raise NonFiniteLossError with its sequences if it must not be. A collective.

        Args:
            batches: this rank's batches of the step.
        """
        if self.settings.skip_nonfinite:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row < self.settings.max_skipped_steps:
                return
            raise NonFiniteLossError(
                f"step {step}: {self._skipped_in_a_row} steps in a row (run.max_skipped_steps) had a loss or gradient "
                f"norm that is not finite, and were skipped. {self._advice()}"
            )
        read_here = batches if self.coordinates.counts_batches else ()
        mine = [int(number) for batch in read_here for number in batch.sequence_ids]
        sequences = [number for part in self.ranks.gather(mine) for number in part]
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {norm}; the step's sequences are {_abridged(sequences)}. "
            f"{self._advice()}, or pass --skip-nonfinite"
        )

    def check_outcome(self, step: int, num_steps: int) -> None:
        """Raise NonFiniteLossError if all of this process's ``num_steps`` were skipped or a weight is not finite.

        A collective, called after the last ``step``.
        """
        if num_steps and not self._has_trained:
            raise NonFiniteLossError(
                f"step {step}: all {num_steps} steps were skipped, nothing was trained. {self._advice()}"
            )
        self.check_weights(step)

    def check_weights(self, step: int) -> None:
        """Raise NonFiniteLossError on all ranks if a weight is NaN or infinite. A collective."""
        weights = self.optimizer.weights
        finite = torch.stack([torch.isfinite(weight).all() for weight in weights.values()]).tolist()
        mine = [name for name, is_finite in zip(weights, finite, strict=True) if not is_finite]
        names = [name for of_rank in self.ranks.gather(mine[:1]) for name in of_rank]
        if names:
            raise NonFiniteLossError(
                f"step {step}: the weights are no longer finite, '{names[0]}' among them. {self._advice()}"
            )

    def _advice(self) -> str:
        saved = "Nothing was saved over the last good checkpoint."
        if self.optimizer.num_updates == 0:  # no learning rate has been applied yet
            return f"{saved} No update was made before: look at the weights the run started from, and at the sequences"
        return f"{saved} Look at the sequences, lower run.learning_rate ({self.settings.learning_rate})"


def _abridged(numbers: list[int], most: int = 16) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
