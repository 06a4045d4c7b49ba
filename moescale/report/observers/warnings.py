"""Prints warnings about a run with advice, and writes them to ``warnings.jsonl``."""

from __future__ import annotations

from dataclasses import asdict

from moescale.errors import printable
from moescale.report.metrics import StepMetrics
from moescale.report.observer import RunContext
from moescale.report.step_file import StepFile
from moescale.report.watch import Expectation, Watcher


class Warnings(StepFile):
    """Applies the rules of :mod:`moescale.report.watch` to every step of a run."""

    is_default = True
    FILE = "warnings.jsonl"

    def on_start(self, run: RunContext) -> None:
        super().on_start(run)
        prediction = (run.document.get("plan") or {}).get("prediction") or {}
        self._watcher = Watcher(
            Expectation(
                top_k=run.experts_per_token,
                memory_bytes=run.device_bytes,
                planned_bytes=prediction.get("allocated_bytes"),
                # Predictions hold for GPUs only.
                step_seconds=prediction.get("step_seconds") if run.device_bytes else None,
            )
        )
        self._console = run.console

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        for warning in self._watcher.on_step(metrics):
            line = f"step {warning.step}: warning: {warning.kind}: {warning.message}; {warning.advice}"
            self._console.print(printable(line), style="yellow", highlight=False, soft_wrap=True)
            self.append(asdict(warning))
