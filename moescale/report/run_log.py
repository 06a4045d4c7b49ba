"""Shows a run while it goes and keeps its numbers: progress bar, TensorBoard scalars, and ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moescale.errors import MoescaleError, printable
from moescale.files import write_atomically
from moescale.records import Count, FileKind, build, parse_json_object
from moescale.report.metrics import StepMetrics, TrainSummary, to_json

METRICS_FILE = "metrics.jsonl"
_FILE = FileKind(noun="a record of metrics", error=MoescaleError, ignores_unknown=True)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is read of a line of ``metrics.jsonl`` again."""

    step: Count
    validation_loss: float | None = None


class RunLog:
    """Observer of a training run; a context manager around it.

    ``metrics.jsonl`` holds one object per step and per validation, with null for what is not finite. After a resume the
    records of steps that are done again are dropped first, in TensorBoard too, so each step appears once; so does each
    validation, which a finished run that is started again repeats.

    Raises:
        MoescaleError: from any of its methods, where the folder cannot be written; it loses no state of the training.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        flops_per_token: float,
        peak_flops: float | None,
        show_progress: bool,
        console: Console | None = None,
    ) -> None:
        """``peak_flops`` is the device's dense bf16 rate in FLOP/s, or None where it is not known: then no MFU."""
        self.folder = folder
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.console = console or Console(stderr=True, markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not show_progress,
        )
        self._task = self._progress.add_task("train", total=total_steps, status="starting")
        self._first_step = 0
        self._file: Any = None
        self._old_validations: dict[int, float | None] = {}
        self._writer: Any = None

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        try:
            for log in (self._file, self._writer):
                if log is not None:
                    with _writing(self.folder):
                        log.close()
        except MoescaleError:
            if kind is None:  # else an error is on its way already, most often this one's cause
                raise

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step
        self._progress.update(self._task, completed=step)
        self._print(f"resumed from {path} at step {step}")

    def on_step(self, metrics: StepMetrics) -> None:
        record: dict[str, Any] = {
            "step": metrics.step,
            "loss": metrics.loss,
            "perplexity": math.exp(metrics.loss) if metrics.loss < 700 else math.inf,
            "aux_loss": metrics.aux_loss,
            "learning_rate": metrics.learning_rate,
            "gradient_norm": metrics.gradient_norm,
            "tokens_per_second": metrics.tokens_per_second,
            "step_seconds": metrics.step_seconds,
            "peak_bytes": metrics.peak_bytes,
            "skipped": metrics.skipped,
        }
        if self.peak_flops:
            record["mfu"] = metrics.tokens_per_second * self.flops_per_token / self.peak_flops
        record["expert_load_max"] = [max(load) for load in metrics.expert_load]
        record["expert_load_min"] = [min(load) for load in metrics.expert_load]
        self._write(record)
        scalars = {f"train/{key}": value for key, value in record.items() if isinstance(value, (int, float))}
        for layer, load in enumerate(metrics.expert_load):
            scalars[f"experts/max_load_layer_{layer}"] = max(load)
            scalars[f"experts/min_load_layer_{layer}"] = min(load)
        self._scalars(scalars, metrics.step)
        status = f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tokens/s"
        if metrics.skipped:
            status += "  (skipped: not finite)"
        self._progress.update(self._task, completed=metrics.step, status=status)

    def on_validation(self, step: int, loss: float) -> None:
        perplexity = math.exp(loss) if loss < 700 else math.inf
        if self._drop_validation(step) != loss:
            self._scalars({"validation/loss": loss, "validation/perplexity": perplexity}, step)
        self._write({"step": step, "validation_loss": loss, "validation_perplexity": perplexity})
        self._print(f"step {step}: validation loss {loss:.4f} nats per token, perplexity {perplexity:.2f}")

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        self._write({"step": step, "checkpoint": str(path), "checkpoint_seconds": seconds})

    def finish(self, summary: TrainSummary) -> None:
        """Print what a user wants to know last."""
        rate = summary.tokens / summary.seconds if summary.seconds else 0.0
        lines = [f"{summary.steps} steps, {summary.tokens:,} tokens in {summary.seconds:.1f} s ({rate:,.0f} tokens/s)"]
        if summary.final_loss is not None:
            lines.append(f"last training loss {summary.final_loss:.4f} nats per token")
        if summary.validation_loss is not None:
            lines.append(f"validation loss {summary.validation_loss:.4f}")
        if summary.skipped_steps:
            lines.append(f"{summary.skipped_steps} steps skipped: loss or gradient norm not finite")
        if summary.checkpoint:
            lines.append(f"checkpoint {summary.checkpoint}")
        for line in lines:
            self._print(line)

    def _print(self, line: str) -> None:
        """Print above the progress bar as it is: what stands in square brackets or colons is the user's own."""
        self.console.print(printable(line), highlight=False, soft_wrap=True, markup=False, emoji=False)

    def _write(self, record: dict[str, Any]) -> None:
        path = self.folder / METRICS_FILE
        with _writing(path):
            self._open_file()
            self._file.write(to_json(record) + "\n")
            self._file.flush()

    def _open_file(self) -> None:
        if self._file is None:
            path = self.folder / METRICS_FILE
            kept = _keep_records(path, lambda record: record["step"] <= self._first_step)
            self._old_validations = {
                record["step"]: record["validation_loss"] for record in kept if "validation_loss" in record
            }
            self._file = path.open("a")

    def _drop_validation(self, step: int) -> float | None:
        """Drop the record of a validation that was done before, and return its loss, or None if there is no such."""
        path = self.folder / METRICS_FILE
        with _writing(path):
            self._open_file()
            done_before = step in self._old_validations
            loss = self._old_validations.pop(step, None)
            if done_before:
                self._file.close()
                _keep_records(path, lambda record: record["step"] != step or "validation_loss" not in record)
                self._file = path.open("a")
        return loss

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        folder = self.folder / "tensorboard"
        with _writing(folder):
            if self._writer is None:
                # Imported late: TensorBoard takes seconds to import and needs torch.
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), purge_step=self._first_step + 1)
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise MoescaleError(
            f"{path} cannot be written: {error.strerror or error}; make room or give the right to write there, then "
            "start the same command again: it resumes from the last checkpoint, which this did not touch"
        ) from error


def _keep_records(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the other records from a file, whole or not at all, and return those kept.

    A last line cut short by a kill is dropped too. Any other line that is not a record is moved to
    ``metrics.damaged.jsonl``.
    """
    if not path.is_file():
        return []
    kept: list[bytes] = []
    damaged: list[bytes] = []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json_object(line, f"{path}:{number}", _FILE)
            build(_Record, record, f"{path}:{number}", _FILE)
        except MoescaleError:
            if line.strip() and number < len(lines):
                damaged.append(line)
            continue
        if is_kept(record):
            kept.append(line)
            records.append(record)
    if damaged:
        with path.with_name("metrics.damaged.jsonl").open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
    write_atomically(path, b"".join(line + b"\n" for line in kept))
    return records
