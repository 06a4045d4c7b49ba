"""Writes a run's metrics to ``metrics.jsonl``: one object per step, validation, set of samples and checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moescale.errors import MoescaleError
from moescale.files import write_atomically
from moescale.records import Count, FileKind, build, parse_json_object, read_bytes
from moescale.report.metrics import Sample, StepMetrics, to_json
from moescale.report.observer import Observer, RunContext, perplexity, step_record, writing

METRICS_FILE = "metrics.jsonl"
_FILE = FileKind(
    noun="a record of metrics",
    error=MoescaleError,
    ignores_unknown=True,
    max_bytes=2**31,
    remedy="move the file away; a run that continues starts a new one",
)
_MAX_LINE_BYTES = 2**20
"""Limit of a line. A record has a few hundred bytes, or about ten thousand with loads."""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The fields of a line of ``metrics.jsonl`` that are read again."""

    step: Count
    validation_loss: float | None = None


class JsonLines(Observer):
    """Writes ``metrics.jsonl``, with null for values that are not finite.

    After a resume, the records of repeated steps are dropped first, so that each step appears once. The same holds for
    validations, which a finished run repeats when it is started again.

    Raises:
        MoescaleError: from any method, if the file cannot be written. No state of the training is lost.
    """

    is_default = True

    def on_start(self, run: RunContext) -> None:
        self._run = run
        self._path = run.folder / METRICS_FILE
        self._first_step = 0
        self._file: Any = None
        self._old_validations: dict[int, float | None] = {}

    def on_resume(self, step: int, path: Path) -> None:
        self._first_step = step

    def on_step(self, metrics: StepMetrics) -> None:
        self._write(step_record(metrics, self._run))

    def on_validation(self, step: int, loss: float) -> None:
        self._drop_validation(step)
        self._write({"step": step, "validation_loss": loss, "validation_perplexity": perplexity(loss)})

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._write({"step": step, "samples": [asdict(sample) for sample in samples]})

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        self._write({"step": step, "checkpoint": str(path), "checkpoint_seconds": seconds})

    def close(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        with writing(self._path):
            self._open()
            self._file.write(to_json(record) + "\n")
            self._file.flush()

    def _open(self) -> None:
        if self._file is None:
            kept = keep_records(self._path, lambda record: record["step"] <= self._first_step)
            self._old_validations = validation_losses(kept)
            self._file = self._path.open("a")

    def _drop_validation(self, step: int) -> None:
        """Drop the record of an earlier validation after ``step``."""
        with writing(self._path):
            self._open()
            if step in self._old_validations:
                del self._old_validations[step]
                self._file.close()
                keep_records(self._path, lambda record: record["step"] != step or "validation_loss" not in record)
                self._file = self._path.open("a")


def validation_losses(records: Iterable[dict[str, Any]]) -> dict[int, float | None]:
    """Return the loss of each validation in ``records`` by its step; None if it was not finite."""
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the valid records of the metrics file ``path``; empty if there is no file."""
    return [record for _, record in _parse(path)[0]]


def keep_records(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop all other records from a file, atomically, and return those kept.

    A truncated last line is dropped, too. Any other line that is not a record is moved to ``metrics.damaged.jsonl``.
    """
    if not path.is_file():
        return []
    whole, damaged = _parse(path)
    kept = [(line, record) for line, record in whole if is_kept(record)]
    if damaged:
        with path.with_name("metrics.damaged.jsonl").open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
    write_atomically(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept]


def _parse(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """Return the file's records with their lines, and its damaged lines; a truncated last line is in neither."""
    records: list[tuple[bytes, dict[str, Any]]] = []
    damaged: list[bytes] = []
    lines = read_bytes(path, _FILE).split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            if len(line) > _MAX_LINE_BYTES:
                raise MoescaleError(f"{path}:{number}: has {len(line):,} bytes")
            record = parse_json_object(line, f"{path}:{number}", _FILE)
            build(_Record, record, f"{path}:{number}", _FILE)
        except MoescaleError:
            if line.strip() and number < len(lines):
                damaged.append(line)
        else:
            records.append((line, record))
    return records, damaged
