"""Shows progress, loss, tokens per second and expert balance, as a bar in a terminal or as lines in a log."""

from __future__ import annotations

import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moescale.report.metrics import StepMetrics
from moescale.report.observer import Observer, RunContext

LINE_SECONDS = 30.0
"""Interval between lines if standard error is not a terminal."""
OF_EVERY_STEP = ("waiting for data", "micro-batch", "gradient sums")
"""Prefixes of phases that every step has; they are shown only before the first step is done."""


class ProgressBar(Observer):
    """A progress bar on standard error; if that is a file or a pipe, a line at regular intervals."""

    is_default = True

    def on_start(self, run: RunContext) -> None:
        self._run = run
        self._is_live = run.console.is_terminal
        self._last_line = float("-inf")
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=run.console,
            disable=not self._is_live,
        )
        self._status = "starting"
        self._phase = ""
        self._has_step = False
        self._noted: set[str] = set()
        self._task = self._progress.add_task("train", total=run.total_steps, status=self._status)
        self._progress.start()

    def on_resume(self, step: int, path: Path) -> None:
        self._progress.update(self._task, completed=step)

    def on_phase(self, step: int, phase: str) -> None:
        _, _, note = phase.partition(": ")
        is_shown = note or not self._has_step or not phase.startswith(OF_EVERY_STEP)
        self._show(phase if is_shown else "")
        if note and not self._is_live and note not in self._noted:
            self._noted.add(note)
            line = f"step {step + 1}/{self._run.total_steps}  {note}: this step takes longer than those to come"
            self._run.console.print(line, highlight=False, soft_wrap=True)

    def on_step(self, metrics: StepMetrics) -> None:
        self._has_step = True
        status = f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tokens/s"
        if metrics.expert_load:
            status += f"  busiest expert {max(max(load) for load in metrics.expert_load):.1f} shares"
        if metrics.skipped:
            status += "  (skipped: not finite)"
        self._status = status
        self._progress.update(self._task, completed=metrics.step, status=status)
        now = time.monotonic()
        if not self._is_live and (now - self._last_line >= LINE_SECONDS or metrics.step == self._run.total_steps):
            self._last_line = now
            line = f"step {metrics.step}/{self._run.total_steps}  {status}"
            self._run.console.print(line, highlight=False, soft_wrap=True)

    def _show(self, phase: str) -> None:
        """Name what is going on behind the last step's numbers."""
        if phase != self._phase:
            self._phase = phase
            self._progress.update(self._task, status=f"{self._status}  {phase}" if phase else self._status)

    def close(self) -> None:
        self._progress.stop()
