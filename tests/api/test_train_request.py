"""A request and the arguments of `moescale run` say the same."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from moescale.api.train_request import TrainRequest, request_arguments
from moescale.cli import app, run
from moescale.errors import ConfigError
from moescale.report.metrics import TrainSummary
from moescale.report.registry import DEFAULT_OBSERVERS
from moescale.runtime.settings import TrainSettings

LEAST = {"model": "tiny", "data": Path("corpus"), "output": Path("run")}
OTHER_VALUES = {
    "ignore_config_field": ("a", "b"),
    "plan": Path("-plan.json"),
    "tokens_per_step": 4096,
    "micro_batch_sequences": 2,
    "precision": "fp32",
    "lora": "rank=4,targets=experts",
    "adapter": Path("adapter"),
    "profile": 3,
    "check_machine": False,
    "initialize": "random",
    "device": "cuda:1",
    "resume": "last-good",
    "compile": False,
    "experts_backend": "torch",
    "attention_backend": "cute",
    "observers": (),
    "hang_seconds": 1e-3 + 7,
    "deterministic": True,
    "settings": TrainSettings(steps=7, seed=-3, learning_rate=1e-5, final_checkpoint=False, schedule="linear"),
}

SUMMARY = TrainSummary(
    steps=7,
    tokens=448,
    seconds=1.5,
    final_loss=2.5,
    validation_loss=None,
    skipped_steps=0,
    resumed_from_step=None,
    checkpoint=None,
)


@pytest.fixture
def parsed(monkeypatch):
    """A function from arguments to the request that the command line makes of them."""
    seen: list[TrainRequest] = []

    def note(request: TrainRequest) -> TrainSummary:
        seen.append(request)
        return SUMMARY

    monkeypatch.setattr(run, "train", note)

    def parse(arguments: list[str]) -> TrainRequest:
        app(arguments, exit_on_error=False, result_action="return_value")
        return seen.pop()

    return parse


def test_every_field_is_tried():
    assert {item.name for item in fields(TrainRequest)} == {*LEAST, *OTHER_VALUES}


@pytest.mark.parametrize("name", [None, *OTHER_VALUES])
def test_the_arguments_of_a_request_ask_for_the_same_run(parsed, name):
    request = TrainRequest(**LEAST, **({} if name is None else {name: OTHER_VALUES[name]}))
    assert parsed(request_arguments(request)) == request


def test_the_arguments_of_all_fields_together_ask_for_the_same_run(parsed):
    request = TrainRequest(**LEAST, **OTHER_VALUES)
    assert parsed(request_arguments(request)) == request


def test_json_prints_the_summary_and_leaves_the_progress_bar_out(parsed, capsys):
    arguments = request_arguments(TrainRequest(**LEAST))
    request = parsed([*arguments, "--json"])
    others = tuple(name for name in DEFAULT_OBSERVERS if name != "progress_bar")
    assert len(others) == len(DEFAULT_OBSERVERS) - 1
    assert request == replace(TrainRequest(**LEAST), observers=others)
    assert json.loads(capsys.readouterr().out) == asdict(SUMMARY)


def test_paths_may_be_strings():
    assert TrainRequest(model="tiny", data="corpus", output="run") == TrainRequest(**LEAST)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("experts_backend", "cuter", r"run.experts_backend \('cuter'\) must be one of auto, .*; did you mean 'cute'"),
        ("resume", "yes", r"run.resume \('yes'\) must be one of last, last-good, never"),
        ("precision", "bf32", r"run.precision \('bf32'\) must be one of bf16, fp32, fp8"),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        TrainRequest(**LEAST, **{name: value})


def test_default_stands_for_the_default_observers_so_that_one_can_be_added():
    request = TrainRequest(**LEAST, observers=("default", "wandb"))
    assert request.observers == (*DEFAULT_OBSERVERS, "wandb")
