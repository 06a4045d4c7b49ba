"""Finds observers by name: those of :mod:`moescale.report.observers`, and a user's own as ``module:class``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from moescale.errors import ConfigError, nearest
from moescale.report import observers
from moescale.report.metrics import Sample, StepMetrics, TrainSummary
from moescale.report.observer import Observer, RunContext


def _class_in(name: str) -> type[Observer]:
    """Return the observer class that the module ``name`` defines."""
    (found,) = (
        value
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and issubclass(value, Observer) and value.__module__ == name
    )
    return found


OBSERVERS: dict[str, type[Observer]] = {
    module.name: _class_in(f"{observers.__name__}.{module.name}") for module in pkgutil.iter_modules(observers.__path__)
}
"""The observers of :mod:`moescale.report.observers`, by the names of their modules."""
DEFAULT = "default"
"""Name that stands for DEFAULT_OBSERVERS, so that others can be added to them."""
DEFAULT_OBSERVERS = tuple(name for name, observer in OBSERVERS.items() if observer.is_default)


def expand_default(names: Iterable[str]) -> tuple[str, ...]:
    """Return ``names`` with ``default`` replaced by DEFAULT_OBSERVERS, without duplicates."""
    listed = ((name,) if name != DEFAULT else DEFAULT_OBSERVERS for name in names)
    return tuple(dict.fromkeys(name for part in listed for name in part))


def make_observer(name: str) -> Observer:
    """Make the observer ``name`` of OBSERVERS, or one of the class that ``name`` gives as ``module:class``.

    Raises:
        ConfigError: there is no such name, module or class, or the class is not an :class:`Observer`.
    """
    if name in OBSERVERS:
        return OBSERVERS[name]()
    module_name, colon, class_name = name.partition(":")
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
    """Forwards calls to several observers in order. A context manager that closes those that were started."""

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

    def on_phase(self, step: int, phase: str) -> None:
        for observer in self.observers:
            observer.on_phase(step, phase)

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
        """Close all started observers, the last one first, then raise the first error that occurred."""
        problem: Exception | None = None
        while self._started:
            try:
                self._started.pop().close()
            except Exception as error:  # of any type: a user's observer may raise it, and the others are still closed
                problem = problem or error
        if problem is not None:
            raise problem

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # otherwise an error is propagating, most often the cause of this one
                raise
