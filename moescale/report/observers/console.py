"""Prints resumes, validations, samples and the summary of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moescale.errors import printable
from moescale.report.metrics import Sample, TrainSummary
from moescale.report.observer import Observer, RunContext, perplexity


class ConsoleLines(Observer):
    """Prints a line on standard error for each event other than a step."""

    is_default = True

    def on_start(self, run: RunContext) -> None:
        self._console = run.console

    def on_resume(self, step: int, path: Path) -> None:
        self._print(f"resumed from {path} at step {step}")

    def on_validation(self, step: int, loss: float) -> None:
        self._print(f"step {step}: validation loss {loss:.4f} nats per token, perplexity {perplexity(loss):.2f}")

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._print(f"step {step}: sample, sequence {sample.sequence}")
            for name in ("prompt", "answer", "wanted"):
                self._print(f"  {name}: {getattr(sample, name)}")

    def on_finish(self, summary: TrainSummary) -> None:
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
        self._console.print(printable(line), highlight=False, soft_wrap=True, markup=False, emoji=False)
