"""Base class of observers that write records of some steps to their own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from moescale.report.metrics import StepMetrics, to_json
from moescale.report.observer import Observer, RunContext, writing
from moescale.report.observers.json_lines import keep_records


class StepFile(Observer):
    """Writes a file with one JSON object per line. A subclass names it in ``FILE`` and calls :meth:`append`.

    After a resume, the records of repeated steps are dropped when the first of them is done.
    """

    FILE: ClassVar[str]

    def on_start(self, run: RunContext) -> None:
        self._path = run.folder / self.FILE
        self._first_step = 0
        self._is_new = True

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step

    def on_step(self, metrics: StepMetrics) -> None:
        if self._is_new:
            self._is_new = False
            with writing(self._path):
                keep_records(self._path, lambda record: record["step"] <= self._first_step)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record, which must have a ``step``."""
        with writing(self._path), self._path.open("a") as file:
            file.write(to_json(record) + "\n")
