"""What a run leaves in metrics.jsonl and TensorBoard files, also where it was resumed and where writing fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from moescale.errors import ConfigError, MoescaleError
from moescale.report.metrics import Sample, StepMetrics
from moescale.report.observer import Observer, RunContext
from moescale.report.registry import DEFAULT_OBSERVERS, OBSERVERS, ObserverList, make_observer


def context(folder: Path) -> RunContext:
    return RunContext(folder=folder, total_steps=4, flops_per_token=1e6, peak_flops=None)


@contextmanager
def make_log(folder: Path, *names: str) -> Iterator[ObserverList]:
    """The observers ``names``, by default all, of a run in ``folder``."""
    with ObserverList(make_observer(name) for name in names or DEFAULT_OBSERVERS) as observers:
        observers.on_start(context(folder))
        yield observers


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=3.0,
        aux_loss=1.0,
        learning_rate=1e-3,
        gradient_norm=0.5,
        tokens=64,
        step_seconds=0.1,
        peak_bytes=0,
        expert_load=[[0.5, 1.5], [0.9, 1.1]],
    )


def records_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def validations_in_tensorboard(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [round(event.value, 4) for event in events.Scalars("validation/loss")]


def test_a_step_is_logged_with_the_extremes_of_the_load(tmp_path):
    with make_log(tmp_path) as log:
        log.on_step(metrics(1))
    (record,) = records_in(tmp_path)
    assert (record["expert_load_max"], record["expert_load_min"]) == ([1.5, 1.1], [0.5, 0.9])


def test_samples_are_a_record_and_go_with_the_steps_that_are_done_again(tmp_path):
    sample = Sample(sequence=3, prompt="a ", answer="b", wanted="c")
    for resumed in (None, 1):
        with make_log(tmp_path) as log:
            if resumed is not None:
                log.on_resume(resumed, tmp_path)
            for step in range(1 if resumed is None else resumed + 1, 4):
                log.on_step(metrics(step))
                log.on_samples(step, [sample])
    found = [record for record in records_in(tmp_path) if "samples" in record]
    assert [record["step"] for record in found] == [1, 2, 3]
    assert found[0]["samples"] == [{"sequence": 3, "prompt": "a ", "answer": "b", "wanted": "c"}]


def test_what_is_not_finite_is_null_and_a_validation_that_is_not_is_there_once(tmp_path):
    for _ in range(2):
        with make_log(tmp_path) as log:
            log.on_resume(1, tmp_path / "checkpoints")
            log.on_validation(1, math.nan)
            log.on_step(replace(metrics(2), loss=math.nan, gradient_norm=math.inf, expert_load=[[math.nan, 1.0]]))
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    validation, step = records_in(tmp_path)
    assert validation == {"step": 1, "validation_loss": None, "validation_perplexity": None}
    assert (step["loss"], step["gradient_norm"], step["expert_load_max"]) == (None, None, [None])


@pytest.mark.parametrize("second_loss, in_tensorboard", [(2.5, [2.5]), (2.25, [2.5, 2.25])])
def test_a_finished_run_started_again_has_its_last_validation_once(tmp_path, second_loss, in_tensorboard):
    with make_log(tmp_path) as log:
        log.on_step(metrics(1))
        log.on_validation(1, 2.75)
        log.on_step(metrics(2))
        log.on_validation(2, 2.5)
    for _ in range(2):
        with make_log(tmp_path) as log:
            log.on_resume(2, tmp_path / "checkpoints")
            log.on_validation(2, second_loss)
    logged = [(record["step"], record["validation_loss"]) for record in records_in(tmp_path) if "loss" not in record]
    assert logged == [(1, 2.75), (2, second_loss)]
    assert [record["step"] for record in records_in(tmp_path) if "loss" in record] == [1, 2]
    assert validations_in_tensorboard(tmp_path) == [2.75, *in_tensorboard]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(MoescaleError, match=r"metrics.jsonl cannot be written: No space left .* resumes from the last"),
        make_log(tmp_path) as log,
    ):
        log.on_step(metrics(1))


def test_tensorboard_files_that_cannot_be_made_are_an_error_with_a_remedy(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with (
        pytest.raises(
            MoescaleError, match=r"tensorboard cannot be written: .*; free disk space .* resumes from the last"
        ),
        make_log(tmp_path) as log,
    ):
        log.on_step(metrics(1))


@pytest.mark.parametrize("method", ["add_scalar", "close"])
def test_what_the_event_writer_reports_late_is_an_error_with_a_remedy(tmp_path, monkeypatch, method):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{method}", fail)
    with pytest.raises(MoescaleError, match=r"cannot be written: No space left"), make_log(tmp_path) as log:
        log.on_step(metrics(1))


def test_an_error_on_its_way_is_not_replaced_by_one_of_closing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", fail)
    with pytest.raises(ZeroDivisionError), make_log(tmp_path) as log:
        log.on_step(metrics(1))
        raise ZeroDivisionError


def test_records_are_kept_where_dropping_the_later_ones_fails(tmp_path, monkeypatch):
    with make_log(tmp_path, "json_lines") as log:
        for step in (1, 2, 3):
            log.on_step(metrics(step))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(MoescaleError, match="metrics.jsonl cannot be written"), make_log(tmp_path, "json_lines") as log:
        log.on_resume(2, tmp_path / "checkpoints")
        log.on_step(metrics(3))
    assert [record["step"] for record in records_in(tmp_path)] == [1, 2, 3]


def test_lines_that_are_no_records_are_moved_aside_when_a_run_resumes(tmp_path):
    damaged = [b'{"loss": 1.0}', b'{"step": "x"}', b"[1]", b"\xff\xfe", b'{"step": 1e999}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([b'{"step": 0}', *damaged, b'{"step": 0, "lo']))
    with make_log(tmp_path) as log:
        log.on_validation(1, 2.0)
    assert [record["step"] for record in records_in(tmp_path)] == [0, 1]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes().splitlines() == damaged


class Failing(Observer):
    """Fails where it is told to; notes whether it was closed."""

    def __init__(self, where: str = "") -> None:
        self.where = where
        self.is_closed = False

    def on_start(self, run):
        if self.where == "on_start":
            raise RuntimeError("no connection")

    def close(self):
        self.is_closed = True
        if self.where == "close":
            raise RuntimeError("no connection")


def test_all_observers_that_were_started_are_closed_whatever_one_of_them_raises(tmp_path):
    first, middle, last = Failing(), Failing("close"), Failing("on_start")
    with pytest.raises(RuntimeError, match="no connection"), ObserverList([first, middle, last]) as observers:
        observers.on_start(context(tmp_path))
    assert (first.is_closed, middle.is_closed, last.is_closed) == (True, True, False)


def test_an_observer_that_fails_to_close_is_an_error_where_nothing_else_is(tmp_path):
    first = Failing()
    with pytest.raises(RuntimeError, match="no connection"), ObserverList([first, Failing("close")]) as observers:
        observers.on_start(context(tmp_path))
    assert first.is_closed


NEW_OBSERVER = """
from moescale.report.observer import Observer

class Diary(Observer):
    is_default = True
"""
PROGRAM = """
import sys
from moescale.report import observers
observers.__path__.append(sys.argv[1])
from moescale.report.registry import DEFAULT_OBSERVERS, OBSERVERS
slow = sorted({"torch", "tensorboard", "wandb"} & set(sys.modules))
from moescale.api.train_request import TrainRequest
print(OBSERVERS["diary"].__name__, "diary" in DEFAULT_OBSERVERS)
print("diary, " in TrainRequest.__dataclass_fields__["observers"].metadata["help"], slow)
"""


def test_a_file_among_the_observers_is_all_that_a_new_one_needs(tmp_path):
    (tmp_path / "diary.py").write_text(NEW_OBSERVER)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["Diary True", "True []"]


def test_only_observers_that_need_no_other_package_are_used_by_default():
    assert set(OBSERVERS) - set(DEFAULT_OBSERVERS) == {"wandb"}


def test_an_observer_of_the_users_own_is_named_by_module_and_class():
    assert isinstance(make_observer("moescale.report.observer:Observer"), Observer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tensor_board",
            r"run.observers \('tensor_board'\) must be one of default, console, .*; did you mean 'tensorboard'",
        ),
        ("no_such_module:Observer", r"cannot be imported \(No module named 'no_such_module'\)"),
        ("moescale.report.metrics:Nothing", r"cannot be imported \(.*no attribute 'Nothing'\)"),
        ("moescale.report.metrics:StepMetrics", r"must be a class derived from moescale.Observer"),
    ],
)
def test_what_is_no_observer_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        make_observer(name)


def test_a_metric_of_a_hooks_own_is_recorded_and_replaces_none(tmp_path):
    with make_log(tmp_path) as log:
        log.on_step(replace(metrics(1), extra={"rows_dropped": 3.0, "loss": 99.0}))
    (record,) = records_in(tmp_path)
    assert (record["rows_dropped"], record["loss"]) == (3.0, 3.0)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/rows_dropped")] == [3.0]


def test_json_lines_and_tensorboard_can_be_had_without_each_other(tmp_path):
    for name in ("json_lines", "tensorboard"):
        (tmp_path / name).mkdir()
        with make_log(tmp_path / name, name) as log:
            log.on_step(metrics(1))
    assert [path.name for path in (tmp_path / "json_lines").iterdir()] == ["metrics.jsonl"]
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["tensorboard"]
