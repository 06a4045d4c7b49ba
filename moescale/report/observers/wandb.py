"""Sends a run's metrics to Weights & Biases, or stores them in the folder ``wandb`` of the run (offline mode)."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moescale.errors import ConfigError, MoescaleError
from moescale.files import write_atomically
from moescale.records import FileKind, read_bytes
from moescale.report.metrics import StepMetrics, TrainSummary
from moescale.report.observer import (
    Observer,
    RunContext,
    step_scalars,
    validation_scalars,
    writing,
)

PROJECT = "moescale"
"""Default project, unless WANDB_PROJECT names another."""
FOLDER = "wandb"
ID_FILE = "run-id"
_FILE = FileKind(
    noun="the identifier of a run of Weights & Biases",
    error=MoescaleError,
    max_bytes=1000,
    remedy="remove the file; later steps then appear as a new run",
)


class WandB(Observer):
    """Logs the scalars of TensorBoard, the contents of ``run.json`` as the configuration, and the summary.

    A resumed run continues the same W&B run, whose identifier is stored in ``wandb/run-id``. The server drops repeated
    steps, which it already has. wandb's environment variables (WANDB_PROJECT, WANDB_MODE, WANDB_ENTITY) apply.

    Raises:
        ConfigError: on construction, if the package is not installed.
        MoescaleError: from :meth:`on_start`, if the service refuses or the folder cannot be written. wandb's process
            retries later failures, such as those of the network, which do not end the training.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "run.observers ('wandb') needs the package wandb, which is not installed; pip install "
                "'moescale[wandb]', or leave it out"
            )
        self._wandb_run: Any = None

    def on_start(self, run: RunContext) -> None:
        import wandb

        self._run = run
        identifier = _identifier(run.folder / FOLDER / ID_FILE, is_resumed=run.is_resumed)
        try:
            self._wandb_run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
                id=identifier,
                resume="allow",
                dir=str(run.folder),
                config=dict(run.document),
                # The terminal is used by other observers, whose output must not be captured.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise MoescaleError(
                f"Weights & Biases cannot be used ({error}); `wandb login` once, or set WANDB_MODE=offline and "
                f"`wandb sync {run.folder / FOLDER}/offline-run-*` later, or leave 'wandb' out of --observers"
            ) from error

    def on_step(self, metrics: StepMetrics) -> None:
        self._wandb_run.log(step_scalars(metrics, self._run), step=metrics.step)

    def on_validation(self, step: int, loss: float) -> None:
        self._wandb_run.log(validation_scalars(loss), step=step)

    def on_finish(self, summary: TrainSummary) -> None:
        self._wandb_run.summary.update({f"run/{name}": value for name, value in asdict(summary).items()})
        self._finish(exit_code=0)

    def close(self) -> None:
        # Without on_finish the run was stopped or has failed, and is marked as such.
        self._finish(exit_code=1)

    def _finish(self, *, exit_code: int) -> None:
        if self._wandb_run is not None:
            self._wandb_run.finish(exit_code=exit_code)
            self._wandb_run = None


def _identifier(path: Path, *, is_resumed: bool) -> str:
    """Return the identifier in ``path`` if the run is resumed, else a new one, which is stored there."""
    with writing(path):
        if is_resumed and path.is_file():
            identifier = read_bytes(path, _FILE).decode(errors="replace").strip()
            if not re.fullmatch("[0-9a-zA-Z_-]{1,64}", identifier):
                raise MoescaleError(
                    f"{path}: ({identifier[:40]!r}) must be 1 to 64 letters, digits, '_' and '-': {_FILE.noun}; "
                    f"{_FILE.remedy}"
                )
            return identifier
        identifier = secrets.token_hex(8)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, identifier + "\n")
        return identifier
