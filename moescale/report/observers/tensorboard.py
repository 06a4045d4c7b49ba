"""Writes a run's metrics as TensorBoard scalars to the folder ``tensorboard`` of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moescale.report.metrics import StepMetrics
from moescale.report.observer import Observer, RunContext, step_scalars, validation_scalars, writing
from moescale.report.observers.json_lines import METRICS_FILE, read_records, validation_losses

FOLDER = "tensorboard"


class TensorBoard(Observer):
    """Writes the scalars ``train/``, ``validation/`` and ``experts/``; after a resume, repeated steps replace old ones.

    Raises:
        MoescaleError: from any method, if the folder cannot be written. No state of the training is lost.
    """

    is_default = True

    def on_start(self, run: RunContext) -> None:
        self._run = run
        self._first_step = 0
        self._writer: Any = None
        self._old_validations: dict[int, float | None] = {}

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step
        # A finished run that is started again repeats its last validation, whose value would appear twice.
        self._old_validations = validation_losses(read_records(self._run.folder / METRICS_FILE))

    def on_step(self, metrics: StepMetrics) -> None:
        self._write(step_scalars(metrics, self._run), metrics.step)

    def on_validation(self, step: int, loss: float) -> None:
        if self._old_validations.pop(step, None) != loss:
            self._write(validation_scalars(loss), step)

    def close(self) -> None:
        if self._writer is not None:
            with writing(self._run.folder / FOLDER):
                self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        folder = self._run.folder / FOLDER
        with writing(folder):
            if self._writer is None:
                # Imported late: TensorBoard takes seconds to import and needs torch.
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), purge_step=self._first_step + 1)
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
