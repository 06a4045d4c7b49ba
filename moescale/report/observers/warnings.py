"""Prints what a user should look at, with what to do about it, and keeps it in ``warnings.jsonl``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from moescale.errors import printable
from moescale.report.metrics import StepMetrics, to_json
from moescale.report.observers.json_lines import keep_records
from moescale.report.observers.observer import Observer, RunContext, writing
from moescale.report.watch import Expectation, Watcher

WARNINGS_FILE = "warnings.jsonl"


class Warnings(Observer):
    """Watches a run by the rules of :mod:`moescale.report.watch`."""

    def on_start(self, run: RunContext) -> None:
        prediction = (run.document.get("plan") or {}).get("prediction") or {}
        self._watcher = Watcher(
            Expectation(
                top_k=run.experts_per_token,
                memory_bytes=run.device_bytes,
                planned_bytes=prediction.get("allocated_bytes"),
                # Predictions are for GPUs.
                step_seconds=prediction.get("step_seconds") if run.device_bytes else None,
            )
        )
        self._path = run.folder / WARNINGS_FILE
        self._console = run.console
        self._first_step = 0
        self._is_new = True

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step

    def on_step(self, metrics: StepMetrics) -> None:
        if self._is_new:
            self._is_new = False
            with writing(self._path):
                keep_records(self._path, lambda record: record["step"] <= self._first_step)
        for warning in self._watcher.on_step(metrics):
            line = f"step {warning.step}: warning: {warning.kind}: {warning.message}; {warning.advice}"
            self._console.print(printable(line), style="yellow", highlight=False, soft_wrap=True)
            with writing(self._path), self._path.open("a") as file:
                file.write(to_json(asdict(warning)) + "\n")
