"""What a run finds out about its machine before the first step: it warns, refuses and says what mends it."""

from __future__ import annotations

import json
import math
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moescale.cli import main
from moescale.convert.hf_config import read_model_config, resolve_model
from moescale.kernels.backends import BackendSettings
from moescale.lora import parse_lora
from moescale.plan import Prediction, one_device_plan
from moescale.planner.cluster import load_cluster
from moescale.runtime.settings import TrainSettings
from moescale.tools import preflight
from moescale.tools.preflight import checkpoints_to_come, experts_in_fp8, gpu_memory, packages, planned_gpu

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def plan_of(config, **changes):
    return one_device_plan(
        config,
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
        **changes,
    )


@pytest.fixture
def plan():
    prediction = Prediction(
        step_seconds=1.0,
        tokens_per_second=64.0,
        breakdown_seconds={},
        peak_bytes=70 * GIB,
        breakdown_bytes={"context": GIB},
    )
    return replace(plan_of(read_model_config(resolve_model("tiny"), ())), prediction=prediction)


def run(model: Path, corpus: Path, output: Path, *more: object, steps: int = 2) -> int:
    inputs = (
        "--model",
        model,
        "--data",
        corpus,
        "--output",
        output,
        "--device",
        "cpu",
        "--steps",
        steps,
        "--validation-sequences",
        1,
    )
    with pytest.raises(SystemExit) as caught:
        main(["run", *map(str, (*inputs, "--observers", "json_lines", *more))])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("lora", [None, "rank=4,targets=experts", "rank=4,base=fp8"])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(tmp_path, model_folder, stdlib_corpus, lora):
    adapters = () if lora is None else ("--lora", lora, "--initialize", "random")
    assert run(model_folder, stdlib_corpus, tmp_path, *adapters, steps=1) == 0
    config = read_model_config(model_folder, ())
    expected = preflight.checkpoint_bytes(config, plan_of(config, lora=None if lora is None else parse_lora(lora)))
    files = list((tmp_path / "checkpoints").rglob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert sum(path.stat().st_size for path in files) - headers == expected
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["seconds"] < 1
    assert any(f"1 more checkpoints of {expected:,}" in finding["detail"] for finding in found["findings"])


def test_a_run_whose_disk_takes_no_checkpoint_is_refused_unless_asked_not_to(
    tmp_path, model_folder, stdlib_corpus, monkeypatch, capsys
):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(1000, 0, 1000))
    assert run(model_folder, stdlib_corpus, tmp_path) == 2
    message = capsys.readouterr().err
    assert "disk: " in message and "the disk 1,000 left; free space, or choose another --output" in message
    assert json.loads((tmp_path / "machine.json").read_text())["findings"][0]["status"] == "problem"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_whose_disk_fills_later_is_warned_of(tmp_path, model_folder, stdlib_corpus, monkeypatch, capsys):
    config = read_model_config(model_folder, ())
    size = preflight.checkpoint_bytes(config, plan_of(config))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(10 * size, 0, 2 * size))
    assert run(model_folder, stdlib_corpus, tmp_path, "--checkpoint-every", 1, steps=3) == 0
    message = " ".join(capsys.readouterr().err.split())
    assert "warning: disk:" in message and "adds 3 checkpoints" in message and "enough for 2" in message


@pytest.mark.parametrize(
    ("settings", "steps_left", "present", "expected"),
    [
        ({}, 10, 0, 1),
        ({}, 0, 2, 0),
        ({"final_checkpoint": False}, 10, 0, 0),
        ({"checkpoint_every": 5}, 10, 0, 2),
        ({"checkpoint_every": 1}, 10, 0, 3),
        ({"checkpoint_every": 1}, 10, 2, 1),
        ({"checkpoint_minutes": 30.0}, 10, 0, 3),
        ({"checkpoint_every": 1}, 10, 5, 1),  # more were kept before
    ],
)
def test_one_more_checkpoint_than_is_kept_lies_on_the_disk_at_times(settings, steps_left, present, expected):
    assert checkpoints_to_come(TrainSettings(**settings), steps_left, present) == expected


@pytest.mark.parametrize(
    ("free", "total", "status", "message"),
    [
        (69, 80, "ok", "70.0 GiB are free"),  # the context is made already
        (66, 80, "warning", "67.0 of 80.0 GiB are free"),
        (40, 80, "problem", "41.0 of 80.0 GiB are free"),
        (67, 68, "warning", "this one has 68.0 GiB"),
        (39, 40, "problem", "this one has 40.0 GiB"),
    ],
)
def test_the_plans_peak_is_held_against_free_memory(plan, free, total, status, message):
    finding = gpu_memory(plan, free * GIB, total * GIB)
    assert finding.status == status and message in finding.detail
    assert bool(finding.remedy) == (status != "ok")


def test_a_plan_without_a_prediction_is_not_held_against_anything(plan):
    assert gpu_memory(replace(plan, prediction=None), 0, 1).status == "ok"


def test_a_plan_for_another_gpu_is_warned_of_by_name(plan):
    cluster = load_cluster("h200")
    plan = replace(plan, cluster_fingerprint=cluster.fingerprint())
    assert [finding.status for finding in planned_gpu(plan, cluster.gpu)] == ["ok"]
    (finding,) = planned_gpu(plan, "NVIDIA A100-SXM4-80GB")
    assert finding.status == "warning" and "h200" in finding.detail and "A100" in finding.detail
    assert "calibrate" in finding.remedy
    assert list(planned_gpu(replace(plan, cluster_fingerprint="f" * 16), cluster.gpu)) == []


@pytest.mark.parametrize(("backend", "statuses"), [("auto", []), ("triton", []), ("cute", ["warning"])])
def test_an_experts_backend_that_fp8_does_not_use_is_warned_of(plan, backend, statuses):
    backends, plan = BackendSettings(experts=backend), replace(plan, compute_dtype="bf16")
    findings = list(experts_in_fp8(replace(plan, expert_gemms="fp8"), backends))
    assert [finding.status for finding in findings] == statuses
    assert all(f"not by the backend named ({backend})" in finding.detail for finding in findings)
    assert list(experts_in_fp8(replace(plan, dense_gemms="fp8"), backends)) == []


def test_a_backend_that_is_named_and_not_installed_is_a_problem(monkeypatch):
    monkeypatch.setattr("moescale.tools.doctor._version", lambda package: None)
    experts, attention = packages(BackendSettings(experts="cute"), torch.device("cuda"))
    assert experts.status == "problem" and "pip install 'moescale[cute]'" in experts.remedy
    assert attention.status == "note"  # it is faster with it, but nothing asked for it
    assert list(packages(BackendSettings(experts="cute"), torch.device("cpu"))) == []


def test_a_16b_model_is_examined_in_less_than_a_second(tmp_path):
    config = read_model_config(resolve_model("deepseek-coder-v2-lite"), ())
    job = preflight.Job(
        config=config,
        plan=plan_of(config),
        settings=TrainSettings(steps=10),
        backends=BackendSettings(),
        device=torch.device("cpu"),
        checkpoints=tmp_path,
        num_checkpoints=0,
        steps_left=10,
    )
    seconds = []
    for _ in range(3):  # of the process's own time the least counts: other processes cannot lengthen it much
        started = time.process_time()
        found = list(preflight.examine_job(job))
        seconds.append(time.process_time() - started)
    assert found[0].name == "disk"
    assert min(seconds) < 1


def test_a_checkpoint_of_a_16b_model_has_fp32_weights_and_two_fp32_moments():
    config = read_model_config(resolve_model("deepseek-coder-v2-lite"), ())
    assert math.isclose(preflight.checkpoint_bytes(config, plan_of(config)), 12 * 15.706e9, rel_tol=1e-3)
