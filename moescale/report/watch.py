"""Detects problems of a run from its step metrics. Each rule is a function, used live and in reports.

A rule looks at the last steps and returns a sentence or None. A warning is given once, and again only after the problem
has been gone, so that a run of days does not repeat the same line.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from moescale.report.metrics import StepMetrics

WINDOW = 20
"""Number of steps that a rule looks at."""
SPIKE_NATS = 0.5
SPIKE_DEVIATIONS = 8.0
DEAD_LOAD = 0.05
"""Load below which an expert is dead: a fraction of an even share, over ``WINDOW`` steps."""
DEAD_FRACTION = 0.1
"""Fraction of a layer's experts that must be dead for a warning."""
COLLAPSED_FRACTION = 0.5
"""Fraction of all tokens that choose the same expert."""
STARVED_FRACTION = 0.05
MEMORY_FRACTION = 0.97
PLANNED_FACTOR = 1.01
RETRYING_STEPS = 3
"""Number of the last ``WINDOW`` steps with a retry; the first step of a run may have one."""
SLOW_FACTOR = 1.15
NAMED = 8
"""Number of experts that a warning lists; it only counts the others."""


@dataclass(frozen=True, kw_only=True)
class RunWarning:
    """A problem that the user should look at."""

    kind: str
    """The rule's name, e.g. ``loss spike``."""
    step: int
    message: str
    """The observation, with values."""
    advice: str
    """The advice."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Values known before a run starts; None or 0 if unknown."""

    top_k: int = 0
    memory_bytes: int | None = None
    """Memory of the device, as the driver reports it."""
    planned_bytes: int | None = None
    """Peak of torch's allocator that the plan predicts."""
    step_seconds: float | None = None
    """Time of a step that the plan predicts."""


@dataclass(frozen=True)
class Recent:
    """The last steps, the newest last, with statistics that several rules use."""

    steps: list[StepMetrics]

    @cached_property
    def mean_loads(self) -> list[list[float]]:
        """Mean load of every expert per MoE layer over the last ``WINDOW`` steps; empty before that many steps."""
        loads = [step.expert_load for step in self.steps[-WINDOW:] if step.expert_load]
        if len(loads) < WINDOW:
            return []
        return [[statistics.fmean(load) for load in zip(*layer, strict=True)] for layer in zip(*loads, strict=True)]


class Watcher:
    """Checks every step of a run and returns new warnings."""

    def __init__(self, expected: Expectation) -> None:
        self.expected = expected
        self._steps: deque[StepMetrics] = deque(maxlen=3 * WINDOW)
        self._active: set[str] = set()

    def on_step(self, metrics: StepMetrics) -> list[RunWarning]:
        """Return the warnings that begin with this step; ongoing ones are not repeated."""
        self._steps.append(metrics)
        recent = Recent(list(self._steps))
        new = []
        for kind, (rule, advice) in RULES.items():
            message = rule(recent, self.expected)
            if message is None:
                self._active.discard(kind)
            elif kind not in self._active:
                self._active.add(kind)
                new.append(RunWarning(kind=kind, step=metrics.step, message=message, advice=advice))
        return new


def loss_spike(recent: Recent, _: Expectation) -> str | None:
    """Detect a loss far above the previous ones, beyond their spread."""
    losses = [step.loss for step in recent.steps[:-1] if math.isfinite(step.loss)][-WINDOW:]
    if len(losses) < WINDOW:
        return None
    middle = statistics.median(losses)
    deviation = statistics.median(abs(loss - middle) for loss in losses)
    last = recent.steps[-1].loss
    # A step with a non-finite loss ends the run, or is skipped and counted.
    if not math.isfinite(last) or last <= middle + max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation):
        return None
    return f"the loss is {last:.3f}, after {middle:.3f} in the {WINDOW} steps before"


def dead_experts(recent: Recent, _: Expectation) -> str | None:
    """Detect layers in which a tenth of the experts are hardly chosen."""
    layers = []
    for layer, loads in enumerate(recent.mean_loads):
        dead = [expert for expert, load in enumerate(loads) if load < DEAD_LOAD]
        if len(dead) > DEAD_FRACTION * len(loads):
            layers.append((layer, dead, len(loads)))
    if not layers:
        return None
    layer, dead, number = max(layers, key=lambda item: len(item[1]))
    more = f" ({len(layers)} layers like it)" if len(layers) > 1 else ""
    return (
        f"{len(dead)} of {number} experts of MoE layer {layer} got less than {DEAD_LOAD:.0%} of an even share over "
        f"{WINDOW} steps: {_named(dead)}{more}"
    )


def collapsed_router(recent: Recent, expected: Expectation) -> str | None:
    """Detect a layer in which most tokens choose the same expert."""
    if not expected.top_k:
        return None
    worst: tuple[float, int, int] | None = None
    for layer, loads in enumerate(recent.mean_loads):
        expert = max(range(len(loads)), key=lambda number: loads[number])
        share = loads[expert] * expected.top_k / len(loads)
        # With few experts, each is chosen by K / E of the tokens even if the router is balanced.
        if share > max(COLLAPSED_FRACTION, 2 * expected.top_k / len(loads)) and (worst is None or share > worst[0]):
            worst = (share, layer, expert)
    if worst is None:
        return None
    share, layer, expert = worst
    return f"{min(share, 1.0):.0%} of the tokens choose expert {expert} of MoE layer {layer}"


def starved(recent: Recent, _: Expectation) -> str | None:
    """Detect steps that wait for data."""
    steps = recent.steps[-WINDOW:]
    if len(steps) < WINDOW:
        return None
    waited = sum(step.data_seconds for step in steps)
    total = waited + sum(step.step_seconds for step in steps)
    if waited <= STARVED_FRACTION * total:
        return None
    return f"steps wait for data {waited / total:.0%} of their time"


def memory_short(recent: Recent, expected: Expectation) -> str | None:
    """Detect device memory that is nearly full although the plan does not predict it."""
    peak = recent.steps[-1].peak_bytes
    if not expected.memory_bytes or peak <= MEMORY_FRACTION * expected.memory_bytes:
        return None
    if expected.planned_bytes and peak <= PLANNED_FACTOR * expected.planned_bytes:
        return None
    return f"tensors take {peak / 2**30:.1f} of the {expected.memory_bytes / 2**30:.1f} GiB of the GPU"


def memory_asked_for_again(recent: Recent, _: Expectation) -> str | None:
    """Detect memory so short that torch's allocator retries in several steps."""
    steps = recent.steps[-WINDOW:]
    retrying = sum(step.allocator_retries > 0 for step in steps)
    if retrying < RETRYING_STEPS or not steps[-1].allocator_retries:
        return None
    retries = sum(step.allocator_retries for step in steps)
    return f"in {retrying} of {len(steps)} steps no memory was found at first, {retries} times: each stops the GPU"


def slower_than_planned(recent: Recent, expected: Expectation) -> str | None:
    """Detect steps that take longer than planned, without the first ones."""
    times = [step.step_seconds for step in recent.steps[-WINDOW:]]
    if not expected.step_seconds or len(times) < WINDOW:
        return None
    seconds = statistics.median(times)
    if seconds <= SLOW_FACTOR * expected.step_seconds:
        return None
    factor = seconds / expected.step_seconds
    return f"a step takes {seconds:.3g} s, {factor:.2f} times the {expected.step_seconds:.3g} s of the plan"


Rule = Callable[[Recent, Expectation], str | None]
RULES: dict[str, tuple[Rule, str]] = {
    "loss spike": (
        loss_spike,
        "if it does not come back within some steps, start again from the checkpoint before with a lower "
        "--learning-rate or a longer --warmup-steps, and look at the data of that step",
    ),
    "collapsed router": (
        collapsed_router,
        "lower --learning-rate; a higher aux_loss_alpha in config.json spreads the tokens; few and narrow data can be "
        "why",
    ),
    "dead experts": (
        dead_experts,
        "a higher aux_loss_alpha in config.json spreads the tokens; few and narrow data can be why",
    ),
    "waiting for data": (
        starved,
        "copy the corpus to a local disk; another program may use the disk or the processor",
    ),
    "memory nearly full": (
        memory_short,
        "compile the plan again with a --memory-limit 2 GiB below what is used now, before a longer run",
    ),
    "memory asked for again": (
        memory_asked_for_again,
        "compile the plan again with a --memory-limit 2 GiB below what is used now: steps take up to twice as long so",
    ),
    "slower than planned": (
        slower_than_planned,
        "moescale doctor finds a busy or throttled GPU; moescale calibrate measures this machine for compile --cluster",
    ),
}
"""The rules by name, each with its advice."""


def _named(experts: list[int]) -> str:
    names = ", ".join(map(str, experts[:NAMED]))
    return f"{names} and {len(experts) - NAMED} more" if len(experts) > NAMED else names
