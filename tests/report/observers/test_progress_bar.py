"""Progress in a terminal and in a log."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from moescale.report.observers import progress_bar
from moescale.report.registry import make_observer
from tests.report.test_observers import context, metrics


def shown(tmp_path, monkeypatch, *, is_terminal: bool, seconds_per_step: float = 10.0) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=100, markup=False, emoji=False)
    run = replace(context(tmp_path), console=console, total_steps=8)
    observer = make_observer("progress_bar")
    observer.on_start(run)
    for step in range(1, 9):
        monkeypatch.setattr(progress_bar.time, "monotonic", lambda step=step: seconds_per_step * step)
        observer.on_step(metrics(step))
    observer.close()
    return file.getvalue()


@pytest.mark.parametrize(("seconds", "expected"), [(10.0, [1, 4, 7, 8]), (60.0, list(range(1, 9))), (0.1, [1, 8])])
def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(tmp_path, monkeypatch, seconds, expected):
    text = shown(tmp_path, monkeypatch, is_terminal=False, seconds_per_step=seconds)
    line = "loss 3.0000  640 tokens/s  busiest expert 1.5 shares"
    assert text.splitlines() == [f"step {step}/8  {line}" for step in expected]


def test_a_terminal_gets_one_bar_in_place_and_no_lines(tmp_path, monkeypatch):
    text = shown(tmp_path, monkeypatch, is_terminal=True)
    assert "8/8" in text and "\x1b[2K" in text  # the line is drawn over
    assert "step 1/8  loss" not in text


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
def test_what_makes_the_first_steps_slow_is_said_once(tmp_path, is_terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=160, markup=False, emoji=False)
    observer = make_observer("progress_bar")
    observer.on_start(replace(context(tmp_path), console=console, total_steps=8))
    phases = ["waiting for data", "micro-batch 1: compiling and tuning kernels", "micro-batch 2: recording"]
    for phase in [*phases, phases[1], "micro-batch 3"]:
        observer.on_phase(0, phase)
        observer._progress.refresh()
    observer.on_step(metrics(1))
    observer.on_phase(1, "micro-batch 1")
    observer._progress.refresh()
    before = file.getvalue()
    observer.on_phase(1, "validation")
    observer._progress.refresh()
    after = file.getvalue().removeprefix(before)
    observer.close()
    if is_terminal:
        assert all(phase in before for phase in phases) and "validation" in after
        assert "micro-batch" not in before.rpartition("loss 3.0000")[2]
    else:
        notes = [line for line in before.splitlines() if "takes longer" in line]
        longer = "this step takes longer than those to come"
        assert notes == [f"step 1/8  {note}: {longer}" for note in ("compiling and tuning kernels", "recording")]
