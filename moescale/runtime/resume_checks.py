"""Compares a run that resumes with its checkpoint: values that must be equal, and settings that may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moescale.errors import CheckpointError, ConfigError
from moescale.runtime.optimizer import OptimizerFormat
from moescale.runtime.settings import DECIDE_RESULT, TrainSettings, find_differences


def check_resumable(
    path: Path,
    stored: Mapping[str, Any],
    *,
    total_steps: int,
    identity: Mapping[str, str],
    optimizer_format: OptimizerFormat,
) -> None:
    """Raise an error for a checkpoint of another model or corpus, of other formats, or past the last step.

    Args:
        path: the checkpoint's folder.
        stored: the training state in it.
        identity: fingerprints of this run's model and corpus; those missing in the checkpoint are not compared.

    Raises:
        ConfigError: the checkpoint's step exceeds ``total_steps``.
        CheckpointError: it belongs to another run, or its optimizer state has another format.
    """
    if stored["step"] > total_steps:
        raise ConfigError(
            f"run.steps ({total_steps}) must be at least {stored['step']}, the step of the checkpoint to resume "
            f"({path}); give more, or choose another --output"
        )
    for key, value in identity.items():
        if stored["identity"].get(key, value) != value:
            raise CheckpointError(
                f"{path}: was written with {key} {stored['identity'][key]}, this run has {value}; use the same one, "
                "or another --output"
            )
    _check_formats(path, stored["plan"], optimizer_format)


def _check_formats(path: Path, written: Mapping[str, Any] | None, optimizer_format: OptimizerFormat) -> None:
    if written is None:
        return
    now = {"optimizer_state_dtype": optimizer_format.moments, "master_weight_format": optimizer_format.master}
    differing = {name: written.get(name) for name, value in now.items() if written.get(name) != value}
    if differing:
        raise CheckpointError(
            f"{path}: was written with {' and '.join(f'{name} {then}' for name, then in differing.items())}, this "
            f"run's plan says {' and '.join(now[name] for name in differing)}; compile the plan with "
            f"{' '.join(f'--pin {name}={then}' for name, then in differing.items())}, or choose another --output"
        )


def changes_since(
    stored: Mapping[str, Any], settings: TrainSettings, plan: Mapping[str, Any] | None, total_steps: int
) -> list[str]:
    """Return the result-relevant settings that differ from the checkpoint's, each as ``name then -> now``."""
    changes = find_differences(stored["settings"], asdict(settings), DECIDE_RESULT)
    of_plan = ("tokens_per_step", "compute_dtype", "expert_gemms", "dense_gemms")
    changes += find_differences(stored["plan"] or {}, plan or {}, of_plan)
    if stored["total_steps"] != total_steps:
        again = "" if settings.schedule == "constant" else " (the schedule is computed anew)"
        changes.append(f"steps {stored['total_steps']} -> {total_steps}{again}")
    return changes
