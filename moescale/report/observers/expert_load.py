"""Writes every expert's load to ``expert_load.jsonl``, a few hundred times per run, for the report's heat map."""

from __future__ import annotations

from moescale.report.metrics import StepMetrics
from moescale.report.observer import RunContext
from moescale.report.step_file import StepFile

RECORDS = 200
"""Approximate number of records in a run. A record of 26 layers with 64 experts has 10 kB."""


class ExpertLoad(StepFile):
    """Writes the load of every expert of every MoE layer at regular intervals; 1 is an even share."""

    is_default = True
    FILE = "expert_load.jsonl"

    def on_start(self, run: RunContext) -> None:
        super().on_start(run)
        self._every = max(1, run.total_steps // RECORDS)

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        if metrics.expert_load and metrics.step % self._every == 0:
            load = [[round(value, 3) for value in layer] for layer in metrics.expert_load]
            self.append({"step": metrics.step, "load": load})
