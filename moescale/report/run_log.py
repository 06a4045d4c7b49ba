"""Shows a run while it goes and keeps its numbers: progress bar, TensorBoard scalars, and ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moescale.report.metrics import StepMetrics, TrainSummary

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Observer of a training run; a context manager around it.

    ``metrics.jsonl`` holds one object per step and per validation. After a resume the records of steps that are done
    again are dropped first, in TensorBoard too, so each step appears once.
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
        self.console = console or Console(stderr=True)
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
        self._writer: Any = None

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step
        self._progress.update(self._task, completed=step)
        self.console.print(f"resumed from {path} at step {step}", highlight=False, soft_wrap=True)

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
        self._write({"step": step, "validation_loss": loss, "validation_perplexity": perplexity})
        self._scalars({"validation/loss": loss, "validation/perplexity": perplexity}, step)
        self.console.print(
            f"step {step}: validation loss {loss:.4f} nats per token, perplexity {perplexity:.2f}", highlight=False
        )

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
            self.console.print(line, highlight=False, soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            path = self.folder / METRICS_FILE
            _drop_later_records(path, self._first_step)
            self._file = path.open("a")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is None:
            # Imported late: TensorBoard takes seconds to import and needs torch.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._first_step + 1)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)


def _drop_later_records(path: Path, step: int) -> None:
    """Keep the records up to ``step``; a last line cut short by a kill is dropped too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))
