"""Keeps every expert's load in ``expert_load.jsonl``, a few hundred times a run: for the report's heat map."""

from __future__ import annotations

from pathlib import Path

from moescale.report.metrics import StepMetrics, to_json
from moescale.report.observers.json_lines import keep_records
from moescale.report.observers.observer import Observer, RunContext, writing

EXPERT_LOAD_FILE = "expert_load.jsonl"
RECORDS = 200
"""In a whole run, about: 26 layers of 64 experts are 10 kB each."""


class ExpertLoad(Observer):
    """Writes the load of every expert of every MoE layer, evenly over the run; 1 is an even share."""

    def on_start(self, run: RunContext) -> None:
        self._path = run.folder / EXPERT_LOAD_FILE
        self._every = max(1, run.total_steps // RECORDS)
        self._first_step = 0
        self._is_new = True

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step

    def on_step(self, metrics: StepMetrics) -> None:
        if self._is_new:
            self._is_new = False
            with writing(self._path):
                keep_records(self._path, lambda record: record["step"] <= self._first_step)
        if metrics.expert_load and metrics.step % self._every == 0:
            load = [[round(value, 3) for value in layer] for layer in metrics.expert_load]
            with writing(self._path), self._path.open("a") as file:
                file.write(to_json({"step": metrics.step, "load": load}) + "\n")
