"""Draws a progress bar with the loss and the rate of the last step."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moescale.report.metrics import StepMetrics
from moescale.report.observers.observer import Observer, RunContext


class ProgressBar(Observer):
    """A bar over the steps of the run, on standard error."""

    def on_start(self, run: RunContext) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=run.console,
        )
        self._task = self._progress.add_task("train", total=run.total_steps, status="starting")
        self._progress.start()

    def on_resume(self, step: int, path: Path) -> None:
        self._progress.update(self._task, completed=step)

    def on_step(self, metrics: StepMetrics) -> None:
        status = f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tokens/s"
        if metrics.skipped:
            status += "  (skipped: not finite)"
        self._progress.update(self._task, completed=metrics.step, status=status)

    def close(self) -> None:
        self._progress.stop()
