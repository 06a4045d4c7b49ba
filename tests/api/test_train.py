"""Training from Python: observers, hooks, backends, and the summary, in one process and in several."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch_settings import settings

import moescale
from moescale.api import train as api_train
from moescale.api.train import LocalRanksError
from moescale.convert.hf_config import read_model_config
from moescale.errors import ConfigError, MoescaleError
from moescale.plan import MeshShape, one_device_plan, save_plan


def request(model: Path, corpus: Path, output: Path, *, steps: int = 3, **fields: object) -> moescale.TrainRequest:
    batch = {} if "plan" in fields else {"tokens_per_step": 256, "micro_batch_sequences": 4}
    return moescale.TrainRequest(
        model=str(model),
        data=corpus,
        output=output,
        device="cpu",
        settings=moescale.TrainSettings(steps=steps, learning_rate=3e-3, validation_every=2, validation_sequences=4),
        **(batch | fields),
    )


class Listening(moescale.Observer):
    """Keeps everything it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.phases: list[tuple[int, str]] = []

    def on_start(self, run):
        self.told.append(("start", run.total_steps, run.document["model"]))

    def on_resume(self, step, path):
        self.told.append(("resume", step))

    def on_phase(self, step, phase):
        self.phases.append((step, phase))

    def on_step(self, metrics):
        self.told.append(("step", metrics.step))

    def on_validation(self, step, loss):
        self.told.append(("validation", step))

    def on_checkpoint(self, step, path, seconds):
        self.told.append(("checkpoint", step))

    def on_finish(self, summary):
        self.told.append(("finish", summary.steps))

    def close(self):
        self.told.append(("close",))


class Counting(moescale.TrainerHook):
    """Counts the updates."""

    num_updates = 0

    def after_update(self, update):
        self.num_updates += 1


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_from_python_tells_observers_and_returns_its_summary(tmp_path, model_folder, stdlib_corpus):
    observer, hook = Listening(), Counting()
    asked = request(model_folder, stdlib_corpus, tmp_path / "run")
    summary = moescale.train(asked, observers=[observer], hooks=[hook])
    assert (summary.steps, summary.tokens, summary.final_loss) == (3, 768, losses(tmp_path / "run")[-1])
    assert (0, "micro-batch 1") in observer.phases
    assert observer.told == [
        ("start", 3, str(model_folder.resolve())),
        *(("step", 1), ("step", 2), ("validation", 2), ("step", 3), ("validation", 3)),
        *(("checkpoint", 3), ("finish", 3), ("close",)),
    ]
    assert hook.num_updates == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == dataclasses.asdict(summary)


def test_a_deterministic_run_leaves_torch_as_it_was(tmp_path, model_folder, stdlib_corpus):
    class Looking(moescale.Observer):
        def on_step(self, metrics):
            modes.append(torch.get_deterministic_debug_mode())

    before, modes = settings(), []
    moescale.train(request(model_folder, stdlib_corpus, tmp_path / "run", deterministic=True), observers=[Looking()])
    assert modes == [2, 2, 2] and settings() == before


def test_a_run_that_an_observer_ended_resumes_and_ends_as_one_that_was_not(tmp_path, model_folder, stdlib_corpus):
    class Stopping(Listening):
        def on_step(self, metrics):
            if metrics.step == 2:
                raise InterruptedError

    straight = request(model_folder, stdlib_corpus, tmp_path / "straight", observers=())
    settings = dataclasses.replace(straight.settings, checkpoint_every=1)
    ended = dataclasses.replace(straight, output=tmp_path / "run", settings=settings)
    stopping, resumed = Stopping(), Listening()
    with pytest.raises(InterruptedError):
        moescale.train(ended, observers=[stopping])
    assert stopping.told[-1] == ("close",)
    assert not (tmp_path / "run" / "summary.json").exists()
    summary = moescale.train(ended, observers=[resumed])
    assert resumed.told[1:3] == [("resume", 1), ("step", 2)]
    assert summary.validation_loss == moescale.train(straight).validation_loss
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_backends_are_recorded_and_the_environment_overrides_with_a_notice(
    tmp_path, model_folder, stdlib_corpus, monkeypatch, capfd
):
    asked = request(model_folder, stdlib_corpus, tmp_path / "run", steps=1, experts_backend="grouped_mm")
    monkeypatch.setenv("MOESCALE_EXPERTS", "torch")
    moescale.train(asked)
    assert "warning: MOESCALE_EXPERTS=torch in the environment overrides experts_backend (grouped_mm)" in (
        capfd.readouterr().err
    )
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["backends"]
    assert recorded == {"experts": "torch", "attention": "auto"}


def test_a_backend_that_cannot_run_is_refused_by_the_run_that_asks_for_it(tmp_path, model_folder, stdlib_corpus):
    asked = request(model_folder, stdlib_corpus, tmp_path / "run", steps=1)
    with pytest.raises(MoescaleError, match="'cute'.* needs a Hopper GPU"):
        moescale.train(dataclasses.replace(asked, experts_backend="cute"))
    moescale.train(asked)  # the refused request has left nothing behind


def write_plan(path: Path, model_folder: Path) -> Path:
    """Two ranks that divide everything, four sequences a step."""
    plan = one_device_plan(
        read_model_config(model_folder),
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=2,
        compute_dtype="fp32",
    )
    plan = dataclasses.replace(plan, mesh=MeshShape(dp_shard=2), plan_gpus=2, runtime_gpus=2, tokens_per_step=4 * 64)
    save_plan(plan, path)
    return path


def test_a_plan_for_several_devices_starts_its_processes_and_returns_their_summary(
    tmp_path, model_folder, stdlib_corpus
):
    plan = write_plan(tmp_path / "plan.json", model_folder)
    one = moescale.train(request(model_folder, stdlib_corpus, tmp_path / "one", observers=()))
    two = moescale.train(request(model_folder, stdlib_corpus, tmp_path / "two", plan=plan, observers=("json_lines",)))
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-5)
    assert two.final_loss == losses(tmp_path / "two")[-1]
    assert not (tmp_path / "two" / "tensorboard").exists()


def test_the_status_of_processes_that_failed_is_that_of_the_error(tmp_path, model_folder, stdlib_corpus, monkeypatch):
    plan = write_plan(tmp_path / "plan.json", model_folder)
    monkeypatch.setattr(api_train, "run_local_ranks", lambda count, arguments, logs: 75)
    with pytest.raises(LocalRanksError, match="ended with status 75; the reason is above, or in .*logs") as caught:
        moescale.train(request(model_folder, stdlib_corpus, tmp_path / "two", plan=plan))
    assert caught.value.exit_status == 75


def test_observers_and_hooks_of_this_process_cannot_go_to_others(tmp_path, model_folder, stdlib_corpus):
    asked = request(model_folder, stdlib_corpus, tmp_path / "run", plan=write_plan(tmp_path / "p.json", model_folder))
    assert "RANK" not in os.environ
    with pytest.raises(ConfigError, match="was given observers, which the 2 processes of the plan cannot be given"):
        moescale.train(asked, observers=[Listening()])
    with pytest.raises(ConfigError, match="was given hooks, .* start this script with torchrun"):
        moescale.train(asked, hooks=[Counting()])
