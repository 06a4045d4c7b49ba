"""A step as a sequence of spans, for the page: what runs when, and the communication hidden beneath it.

The cost model adds a step up by what it goes to; here the same seconds are put in order. Micro-batches are drawn as
one. Communication hidden on an axis is drawn beneath the spans that hide it (:mod:`moescale.planner.axes`), divided
among them by their length: how much of it falls in which is not part of a prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moescale.planner.axes.registry import AXES, division_of
from moescale.planner.cost import COPIED, CostModel
from moescale.planner.problem import Problem
from moescale.planner.result import Evaluated, PlanResult
from moescale.planner.workload import LayerKind


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a step, in seconds from its start."""

    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The spans of a step, which fill it without a gap, and beneath them a lane for every axis that is hidden."""

    spans: tuple[Span, ...]
    hidden: dict[str, tuple[Span, ...]]


def step_timeline(result: PlanResult, evaluated: Evaluated) -> Timeline:
    """Put the parts of ``evaluated.time`` in the order of a step."""
    spans: list[Span] = []
    for name, seconds in _parts(result, evaluated):
        if seconds > 0:
            spans.append(Span(name=name, start=spans[-1].end if spans else 0.0, seconds=seconds))
    hidden = {name: seconds for name, seconds in evaluated.time.hidden.items() if seconds > 0}
    return Timeline(
        spans=tuple(spans), hidden={name: _beneath(name, seconds, spans) for name, seconds in hidden.items()}
    )


def _parts(result: PlanResult, evaluated: Evaluated) -> Iterator[tuple[str, float]]:
    """Name and seconds of every span, in order."""
    candidate = evaluated.candidate
    workload = result.workload
    problem = Problem(workload, result.cluster, result.request)
    cost, division = CostModel(problem), division_of(candidate.mesh)
    dims = problem.dims(candidate.micro_batch_sequences, division.tokens)

    def compute(kind: LayerKind) -> tuple[float, float]:
        shares = division.features, division.experts
        times = cost.layer_seconds(kind, dims, *shares, candidate.gemms)
        count = kind.count if kind is workload.outside else kind.count / division.layers
        scale = count * candidate.gradient_accumulation_steps
        return scale * sum(time[0] for time in times), scale * sum(time[1] for time in times)

    layers = [(kind.name, *compute(kind)) for kind in workload.layers]
    rest = {name: seconds for name, seconds in evaluated.time.exposed.items() if not name.startswith("compute ")}
    at_end = ("communication dp_replicate", "optimizer", COPIED, "step overhead")
    last = [(name, rest.pop(name, 0.0)) for name in at_end]
    for name, forward, _ in layers:
        yield f"forward, {name} layers", forward
    yield "embedding and loss", sum(compute(workload.outside))
    yield "recompute", rest.pop("recompute", 0.0)
    for name, _, backward in reversed(layers):
        yield f"backward, {name} layers", backward
    for name, seconds in rest.items():  # spread over both passes; what of it delays them is drawn behind them
        yield name.replace("communication", "waiting for communication"), seconds
    for name, seconds in last:
        yield name.replace("communication", "waiting for communication"), seconds


def _beneath(name: str, seconds: float, spans: list[Span]) -> tuple[Span, ...]:
    starts = next(axis.hidden_beneath for axis in AXES if name == f"communication {axis.name}")
    if not starts:
        end = max(span.end for span in spans if span.name.startswith("backward"))
        return (Span(name="beneath the last backward", start=end - seconds, seconds=seconds),)
    hiding = [span for span in spans if span.name.startswith(starts)]
    share = seconds / sum(span.seconds for span in hiding)
    return tuple(Span(name=f"beneath {span.name}", start=span.start, seconds=share * span.seconds) for span in hiding)
