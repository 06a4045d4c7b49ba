"""Reads what a run has left in its folder: settings, plan, metrics, warnings and the load of its experts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from moescale.errors import ConfigError, MoescaleError, printable
from moescale.files import is_locked
from moescale.plan import ParallelPlan
from moescale.records import Count, FileKind, Length, Range, build, parse_json, read_bytes, read_json_object
from moescale.report.metrics import Sample
from moescale.report.observers.expert_load import ExpertLoad
from moescale.report.observers.json_lines import METRICS_FILE, read_records
from moescale.report.observers.warnings import Warnings

MAX_LOAD = 1e5
"""The most that an expert's load can be: all rows go to one of so many experts."""
Value = Annotated[float, Range(-1e30, 1e30)]
"""A number of metrics: what lies beyond is damage, and sums of it are no numbers any more."""
State = Literal["finished", "running", "ended"]
_RUN = FileKind(
    noun="a run's description",
    error=ConfigError,
    missing="missing; give the folder that was --output of `moescale run`",
    ignores_unknown=True,
)
_EVENT = FileKind(noun="a record of metrics", error=MoescaleError, ignores_unknown=True)
_LOADS = FileKind(noun="a record of expert load", error=MoescaleError, ignores_unknown=True)
_WARNINGS = FileKind(noun="a record of a warning", error=MoescaleError, ignores_unknown=True)


@dataclass(frozen=True, kw_only=True)
class Event:
    """What the report reads of a line of ``metrics.jsonl``; null there is None here, and was not finite."""

    step: Count
    loss: Value | None = None
    learning_rate: Value | None = None
    gradient_norm: Value | None = None
    tokens_per_second: Value | None = None
    step_seconds: Value | None = None
    peak_bytes: Value | None = None
    mfu: Value | None = None
    skipped: bool = False
    validation_loss: Value | None = None
    checkpoint: str | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertLoads:
    """A line of ``expert_load.jsonl``."""

    step: Count
    load: Annotated[tuple[tuple[Annotated[float, Range(0, MAX_LOAD)], ...], ...], Length(least=1)]
    """Per MoE layer, each expert's load; 1 is an even share."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of MoE layers, and of experts in each."""
        return len(self.load), len(self.load[0])

    def __post_init__(self) -> None:
        sizes = {len(layer) for layer in self.load}
        if len(sizes) > 1 or 0 in sizes:
            raise MoescaleError(f"load: layers of {', '.join(map(str, sorted(sizes)))} experts must be of equally many")


@dataclass(frozen=True, kw_only=True)
class LoggedWarning:
    """A line of ``warnings.jsonl``."""

    step: Count
    kind: str
    message: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run as its folder tells it."""

    folder: Path
    state: State
    """``running`` while a process holds the folder; ``ended`` where it stopped before its last step."""
    settings: dict[str, Any]
    description: dict[str, Any]
    """``run.json`` without settings and plan: model, corpus, versions."""
    plan: ParallelPlan | None
    steps: list[Event]
    validations: list[Event]
    samples: list[Event]
    checkpoints: list[Event]
    num_damaged: int = 0
    """Lines of metrics that are no records."""
    loads: list[ExpertLoads] = field(default_factory=list)
    warnings: list[LoggedWarning] = field(default_factory=list)

    @property
    def name(self) -> str:
        return printable(self.folder.name or str(self.folder))

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was finite."""
        pairs = [(event.step, getattr(event, name)) for event in self.steps]
        pairs = [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_run(folder: Path) -> RunData:
    """Read the run in ``folder``. Raises ConfigError where it holds none, MoescaleError for damaged files."""
    path = folder / "run.json"
    document = read_json_object(path, _RUN)
    events, num_damaged = _events(folder / METRICS_FILE)
    plan = document.pop("plan", None)
    settings = document.pop("settings", None)
    settings = settings if isinstance(settings, dict) else {}
    steps = [event for kind, event in events if kind == "loss"]
    return RunData(
        folder=folder.absolute(),
        state=_state(folder, steps, settings.get("steps")),
        settings=settings,
        description=document,
        plan=None if plan is None else ParallelPlan.from_json(json.dumps(plan), f"{path}: plan"),
        steps=steps,
        validations=[event for kind, event in events if kind == "validation_loss"],
        samples=[event for kind, event in events if kind == "samples"],
        checkpoints=[event for kind, event in events if kind == "checkpoint"],
        num_damaged=num_damaged,
        loads=_loads(folder / ExpertLoad.FILE),
        warnings=_lines(folder / Warnings.FILE, LoggedWarning, _WARNINGS),
    )


def _events(path: Path) -> tuple[list[tuple[str, Event]], int]:
    """The records of metrics with the kind of each, and how many lines are none; a last one cut short is neither."""
    found: list[tuple[str, Event]] = []
    num_damaged = 0
    for document in read_records(path):
        try:
            event = build(Event, document, str(path), _EVENT)
        except MoescaleError:
            num_damaged += 1
            continue
        found += [(kind, event) for kind in ("loss", "validation_loss", "samples", "checkpoint") if kind in document][
            :1
        ]
    return found, num_damaged


def _state(folder: Path, steps: list[Event], total: object) -> State:
    if is_locked(folder / "run.lock"):
        return "running"
    is_done = isinstance(total, int) and bool(steps) and steps[-1].step >= total
    return "finished" if is_done or (folder / "summary.json").is_file() else "ended"


def _loads(path: Path) -> list[ExpertLoads]:
    """The records of expert load, all of one model. Raises MoescaleError."""
    loads = _lines(path, ExpertLoads, _LOADS)
    for record in loads:
        if record.shape != loads[0].shape:
            raise MoescaleError(
                f"{path}: the record of step {record.step} has the load of {record.shape} layers and experts, the "
                f"first one of {loads[0].shape}; they are of two models, so remove those of one"
            )
    return loads


def _lines(path: Path, record: type[Any], kind: FileKind) -> list[Any]:
    """Whole lines of a file that may still be written; none where there is no file."""
    if not path.is_file():
        return []
    *lines, last = read_bytes(path, kind).split(b"\n")
    documents = [parse_json(line, f"{path}:{number}", kind) for number, line in enumerate(lines, start=1) if line]
    try:
        documents += [parse_json(last, str(path), kind)] if last else []
    except MoescaleError:  # cut short, or being written
        pass
    return [build(record, document, str(path), kind) for document in documents]
