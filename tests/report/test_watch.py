"""Each warning is provoked, is given once, and is given again after the trouble has been gone."""

from __future__ import annotations

import random

import pytest

from moescale.report.metrics import StepMetrics
from moescale.report.watch import WINDOW, Expectation, RunWarning, Watcher

GIB = 2**30
EXPECTED = Expectation(top_k=2, memory_bytes=80 * GIB, step_seconds=0.5)
EVEN = [[1.0] * 16, [1.0] * 16]


def step(number: int, **changes) -> StepMetrics:
    fields = dict(
        step=number,
        loss=3.0 + random.Random(number).uniform(-0.05, 0.05),
        aux_loss=1.0,
        learning_rate=1e-4,
        gradient_norm=1.0,
        tokens=1024,
        step_seconds=0.5,
        data_seconds=0.001,
        peak_bytes=60 * GIB,
        expert_load=EVEN,
    )
    return StepMetrics(**(fields | changes))


def warnings_of(steps: list[StepMetrics], expected: Expectation = EXPECTED) -> list[RunWarning]:
    watcher = Watcher(expected)
    return [warning for metrics in steps for warning in watcher.on_step(metrics)]


def with_loads(layer: list[float]) -> list[list[float]]:
    return [EVEN[0], layer]


CASES = {
    "loss spike": dict(loss=4.2),
    "collapsed router": dict(expert_load=with_loads([7.0] + [0.6] * 15)),
    "dead experts": dict(expert_load=with_loads([0.0] * 3 + [16 / 13] * 13)),
    "waiting for data": dict(data_seconds=0.1),
    "memory nearly full": dict(peak_bytes=78 * GIB),
    "memory asked for again": dict(allocator_retries=4),
    "slower than planned": dict(step_seconds=0.7),
}


def test_a_healthy_run_has_no_warning():
    assert warnings_of([step(number) for number in range(1, 200)]) == []


def test_a_falling_loss_and_a_skipped_step_are_no_spike():
    falling = [step(number, loss=10 / number + 2) for number in range(1, 100)]
    assert warnings_of([*falling, step(100, loss=float("nan"), skipped=True), step(101, loss=2.1)]) == []


@pytest.mark.parametrize("kind", CASES)
def test_each_trouble_is_named_once_while_it_lasts_and_again_when_it_comes_back(kind):
    long = 1 if kind == "loss spike" else 2 * WINDOW
    number = iter(range(1, 1000))
    healthy = [step(next(number)) for _ in range(3 * WINDOW)]
    bad = [step(next(number), **CASES[kind]) for _ in range(long)]
    better = [step(next(number)) for _ in range(3 * WINDOW)]
    again = [step(next(number), **CASES[kind]) for _ in range(long)]
    first = warnings_of([*healthy, *bad])
    assert [warning.kind for warning in first] == [kind], first
    assert first[0].step > len(healthy) and first[0].message and first[0].advice
    assert [warning.kind for warning in warnings_of([*healthy, *bad, *better, *again])] == [kind, kind]


def test_experts_are_named_with_their_layer():
    steps = [step(number, expert_load=with_loads([0.0] * 12 + [4.0] * 4)) for number in range(1, 2 * WINDOW)]
    (warning,) = warnings_of(steps, Expectation())
    assert "12 of 16 experts of MoE layer 1 got less than 5%" in warning.message
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 4 more" in warning.message


def test_few_experts_that_all_tokens_choose_are_no_collapse():
    steps = [step(number, expert_load=[[1.0, 1.0]]) for number in range(1, 3 * WINDOW)]
    assert warnings_of(steps, Expectation(top_k=2)) == []


def test_memory_that_the_plan_fills_is_no_warning():
    steps = [step(number, peak_bytes=78 * GIB) for number in range(1, 3 * WINDOW)]
    assert warnings_of(steps, Expectation(memory_bytes=80 * GIB, planned_bytes=int(77.9 * GIB))) == []


def test_a_first_step_that_looks_for_its_memory_is_no_warning():
    steps = [step(number, allocator_retries=9 if number < 3 else 0) for number in range(1, 3 * WINDOW)]
    assert warnings_of(steps) == []


def test_nothing_is_said_of_what_is_not_known():
    steps = [step(number, step_seconds=9.0, peak_bytes=500 * GIB, expert_load=[]) for number in range(1, 3 * WINDOW)]
    assert warnings_of(steps, Expectation()) == []
