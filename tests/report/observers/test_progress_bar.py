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
