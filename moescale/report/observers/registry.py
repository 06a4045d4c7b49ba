"""Observers by name. To add one: its file in this folder, and a line in OBSERVERS; a user's own needs no line."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from moescale.errors import ConfigError, nearest
from moescale.report.metrics import Sample, StepMetrics, TrainSummary
from moescale.report.observers.observer import Observer, RunContext

OBSERVERS = {
    "json_lines": "moescale.report.observers.json_lines:JsonLines",
    "tensorboard": "moescale.report.observers.tensorboard:TensorBoard",
    "wandb": "moescale.report.observers.wandb:WandB",
    "expert_load": "moescale.report.observers.expert_load:ExpertLoad",
    "warnings": "moescale.report.observers.warnings:Warnings",
    "console": "moescale.report.observers.console:ConsoleLines",
    "progress_bar": "moescale.report.observers.progress_bar:ProgressBar",
}
"""Where each observer's class is, as ``module:class``; imported when a run asks for it."""
DEFAULT = "default"
"""Stands for DEFAULT_OBSERVERS, so that one can be added to them."""
DEFAULT_OBSERVERS = ("json_lines", "tensorboard", "expert_load", "warnings", "console", "progress_bar")
"""Those that need no package and no account beyond moescale's own."""


def expand_default(names: Iterable[str]) -> tuple[str, ...]:
    """``names`` with those of DEFAULT_OBSERVERS in place of ``default``; none is there twice."""
    listed = ((name,) if name != DEFAULT else DEFAULT_OBSERVERS for name in names)
    return tuple(dict.fromkeys(name for part in listed for name in part))


def make_observer(name: str) -> Observer:
    """Make the observer called ``name`` in OBSERVERS, or of the class that ``name`` gives as ``module:class``.

    Raises:
        ConfigError: there is no such name, module or class, or the class is not an :class:`Observer`.
    """
    target = OBSERVERS.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise ConfigError(
            f"run.observers ('{name}') must be one of {', '.join((DEFAULT, *OBSERVERS))}, or the class of your own as "
            f"module:class{nearest(name, OBSERVERS)}"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"run.observers ('{name}') cannot be imported ({error}); give module:class of a module on the Python path"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Observer)):
        raise ConfigError(
            f"run.observers ('{name}') must be a class derived from moescale.Observer, not {found!r}; derive it"
        )
    return found()


class ObserverList(Observer, AbstractContextManager):
    """Tells each of several observers, in their order; a context manager that closes those that were started."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self.observers: Sequence[Observer] = tuple(observers)
        self._started: list[Observer] = []

    def on_start(self, run: RunContext) -> None:
        for observer in self.observers:
            observer.on_start(run)
            self._started.append(observer)

    def on_resume(self, step: int, path: Path) -> None:
        for observer in self.observers:
            observer.on_resume(step, path)

    def on_step(self, metrics: StepMetrics) -> None:
        for observer in self.observers:
            observer.on_step(metrics)

    def on_validation(self, step: int, loss: float) -> None:
        for observer in self.observers:
            observer.on_validation(step, loss)

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for observer in self.observers:
            observer.on_samples(step, samples)

    def on_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        for observer in self.observers:
            observer.on_checkpoint(step, path, seconds)

    def on_finish(self, summary: TrainSummary) -> None:
        for observer in self.observers:
            observer.on_finish(summary)

    def close(self) -> None:
        """Close every observer that was started, the last one first, and then raise the first error of any."""
        problem: Exception | None = None
        while self._started:
            try:
                self._started.pop().close()
            except Exception as error:  # whatever a user's own raises; the others are closed all the same
                problem = problem or error
        if problem is not None:
            raise problem

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # else an error is on its way already, most often this one's cause
                raise
