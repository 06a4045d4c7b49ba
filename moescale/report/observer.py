"""The interface of observers of a run, and records of metrics for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from moescale.errors import MoescaleError
from moescale.report.metrics import Sample, StepMetrics, TrainSummary


def stderr_console() -> Console:
    """Return a console on standard error that prints text verbatim, without markup or emoji codes."""
    return Console(stderr=True, markup=False, emoji=False)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Description of a run at its start."""

    folder: Path
    """The run's output folder, which exists."""
    total_steps: int
    flops_per_token: float
    """Model FLOPs per token of forward and backward, without recomputation."""
    peak_flops: float | None
    """Dense bf16 FLOP/s of all devices together; None if unknown."""
    experts_per_token: int = 0
    """Routed experts per token."""
    device_bytes: int | None = None
    """Memory of the device; None on the CPU."""
    is_resumed: bool = False
    """True if the run continues from a checkpoint; :meth:`Observer.on_resume` is called next."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """Contents of ``run.json``: model, data, settings, plan and backends, as JSON values."""
    console: Console = field(default_factory=stderr_console)
    """Console shared by all observers, so that lines of one are printed above the progress bar of another."""


class Observer:
    """Base class of observers. Subclass it and override what you need; every method here does nothing.

    Only the first rank has observers. They are called between steps, so a slow one delays the training, and an error
    they raise ends the run. Values are Python numbers that the trainer has already read, so no method waits for the
    device.
    """

    is_default: ClassVar[bool] = False
    """True if a run uses the observer by default. Only relevant for observers in :mod:`moescale.report.observers`."""

    def on_start(self, run: RunContext) -> None:
        """Called before the first step, and before :meth:`on_resume`."""

    def on_resume(self, step: int, path: Path) -> None:
        """Called when the run continues after ``step`` from the checkpoint ``path``. Later steps are reported again."""

    def on_phase(self, step: int, phase: str) -> None:
        """After ``step`` steps something begins, such as ``validation`` or ``micro-batch 2``; many times a step.

        What takes long only this once follows after a colon: ``micro-batch 1: compiling and tuning kernels``.
        """

    def on_step(self, metrics: StepMetrics) -> None:
        """Called after each step."""

    def on_validation(self, step: int, loss: float) -> None:
        """Called with the mean loss over the validation split after ``step``, in nats per target token."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Called with the model's continuations of prompts of the validation split after ``step``."""

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Called when the checkpoint of ``step`` is complete on disk; the training waited ``seconds`` for it."""

    def on_finish(self, summary: TrainSummary) -> None:
        """Called when all steps of the run are done."""

    def close(self) -> None:
        """Called once when the run ends, successfully or not, if :meth:`on_start` has returned."""


def step_record(metrics: StepMetrics, run: RunContext) -> dict[str, Any]:
    """Return a step's metrics as one flat record: numbers, booleans, and lists with a number per MoE layer.

    It contains every number of :class:`StepMetrics` under its name. Extra metrics of the same name are dropped.
    """
    numbers = {name: value for name, value in vars(metrics).items() if isinstance(value, (int, float))}
    record: dict[str, Any] = {
        **metrics.extra,
        **numbers,
        "perplexity": perplexity(metrics.loss),
        "tokens_per_second": metrics.tokens_per_second,
    }
    if run.peak_flops:
        record["mfu"] = metrics.tokens_per_second * run.flops_per_token / run.peak_flops
    record["expert_load_max"] = [max(load) for load in metrics.expert_load]
    record["expert_load_min"] = [min(load) for load in metrics.expert_load]
    return record


def step_scalars(metrics: StepMetrics, run: RunContext) -> dict[str, float]:
    """Return a step's metrics as scalars under ``train/`` and ``experts/``, for services that draw curves."""
    record = step_record(metrics, run)
    scalars = {f"train/{key}": value for key, value in record.items() if isinstance(value, (int, float))}
    for layer, load in enumerate(metrics.expert_load):
        scalars[f"experts/max_load_layer_{layer}"] = max(load)
        scalars[f"experts/min_load_layer_{layer}"] = min(load)
    return scalars


def validation_scalars(loss: float) -> dict[str, float]:
    """Return a validation's mean loss (nats per target token) as scalars under ``validation/``."""
    return {"validation/loss": loss, "validation/perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity if that exceeds the range of a float."""
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError from writing ``path`` into a MoescaleError with a remedy."""
    try:
        yield
    except OSError as error:
        raise MoescaleError(
            f"{path} cannot be written: {error.strerror or error}; free disk space or fix permissions, then run the "
            "same command again: it resumes from the last checkpoint, which is unaffected"
        ) from error
