"""What an observer of a run is told, and when."""

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
    """A console on standard error that prints text as it is: brackets and colons in it are the user's own."""
    return Console(stderr=True, markup=False, emoji=False)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What is known of a run when it starts."""

    folder: Path
    """The run's output folder; it exists."""
    total_steps: int
    flops_per_token: float
    """Model FLOPs of forward and backward per token; recomputation is not counted."""
    peak_flops: float | None
    """Dense bf16 FLOP/s of all devices together; None where it is not known."""
    experts_per_token: int = 0
    """Routed experts that a token chooses."""
    device_bytes: int | None = None
    """Memory of the device; None on the CPU."""
    is_resumed: bool = False
    """The run continues from a checkpoint: :meth:`Observer.on_resume` follows."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """What ``run.json`` holds: model, data, settings, plan and backends, as JSON values."""
    console: Console = field(default_factory=stderr_console)
    """Shared by all observers, so that a line printed by one appears above the progress bar of another."""


class Observer:
    """Is told what happens in a run. Subclass it and override what you need; every method does nothing here.

    The first rank alone has observers, and calls them between steps: a slow one holds up the training. What they raise
    ends the run. Values are Python numbers that the trainer has read anyway, so no method waits for the device.
    """

    is_default: ClassVar[bool] = False
    """Used by every run that does not say which observers it wants; read of moescale's own observers only."""

    def on_start(self, run: RunContext) -> None:
        """Before the first step, and before :meth:`on_resume`."""

    def on_resume(self, step: int, path: Path) -> None:
        """The run continues after ``step`` from the checkpoint ``path``; later steps are told of again."""

    def on_phase(self, step: int, phase: str) -> None:
        """After ``step`` steps something begins, such as ``validation`` or ``micro-batch 2``; many times a step.

        What takes long only this once follows after a colon: ``micro-batch 1: compiling and tuning kernels``.
        """

    def on_step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_validation(self, step: int, loss: float) -> None:
        """The mean loss over the validation split after ``step``, in nats per target token."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """How the model continues prompts of the validation split after ``step``."""

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """The checkpoint of ``step`` is whole on disk; the training waited ``seconds`` for it."""

    def on_finish(self, summary: TrainSummary) -> None:
        """The run has done all its steps."""

    def close(self) -> None:
        """The run ends, in whatever way; called once where :meth:`on_start` has returned."""


def step_record(metrics: StepMetrics, run: RunContext) -> dict[str, Any]:
    """Return a step's metrics as one flat record: numbers, booleans, and lists with a number per MoE layer.

    Every number of :class:`StepMetrics` is in it by its name. An extra metric of the same name is dropped.
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
    """A step's metrics as scalars under ``train/`` and ``experts/``, as services that draw curves take them."""
    record = step_record(metrics, run)
    scalars = {f"train/{key}": value for key, value in record.items() if isinstance(value, (int, float))}
    for layer, load in enumerate(metrics.expert_load):
        scalars[f"experts/max_load_layer_{layer}"] = max(load)
        scalars[f"experts/min_load_layer_{layer}"] = min(load)
    return scalars


def validation_scalars(loss: float) -> dict[str, float]:
    """A validation's mean loss, in nats per target token, as scalars under ``validation/``."""
    return {"validation/loss": loss, "validation/perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that exceeds the range of a float."""
    return math.exp(loss) if loss < 700 else math.inf


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into a MoescaleError with a remedy."""
    try:
        yield
    except OSError as error:
        raise MoescaleError(
            f"{path} cannot be written: {error.strerror or error}; make room or give the right to write there, then "
            "start the same command again: it resumes from the last checkpoint, which this did not touch"
        ) from error
