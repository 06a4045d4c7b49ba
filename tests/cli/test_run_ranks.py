"""`moescale run` on several CPU ranks that it starts itself: same losses, resumable anywhere, failures named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moescale.cli import main
from moescale.convert.hf_config import read_model_config
from moescale.plan import MeshShape, ParallelPlan, one_device_plan, save_plan
from moescale.runtime import launch
from moescale.runtime.launch import _status
from moescale.runtime.output_lock import hold_output
from warm_start import WarmProcess

STEPS = 6


def write_plan(path: Path, model_folder: Path, *, ranks: int, **mesh: int) -> Path:
    """8 sequences of 64 tokens a step, one sequence a micro-batch."""
    plan = one_device_plan(
        read_model_config(model_folder),
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=8,
        compute_dtype="fp32",
    )
    shape = MeshShape(**mesh)
    plan = dataclasses.replace(
        plan,
        mesh=shape,
        plan_gpus=shape.dp_shard,
        runtime_gpus=ranks,
        gradient_accumulation_steps=8 // ranks,
    )
    assert isinstance(plan, ParallelPlan)
    save_plan(plan, path)
    return path


def command(model: Path, corpus: Path, plan: Path, output: Path, *more: object) -> list[str]:
    options = ("--model", model, "--data", corpus, "--plan", plan, "--output", output, "--device", "cpu")
    rate = ("--learning-rate", 3e-3, "--json")
    return [sys.executable, "-m", "moescale", "run", *map(str, (*options, *rate, *more))]


def start(arguments: list[str], env: dict[str, str] | None = None) -> WarmProcess:
    return WarmProcess(arguments[3:], env)


def run_here(arguments: list[str]) -> None:
    """A run of one rank in this process, which has imported everything."""
    with pytest.raises(SystemExit) as caught:
        main(arguments[3:])
    assert not caught.value.code


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, model_folder, stdlib_corpus) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    plan = write_plan(folder / "plan.json", model_folder, ranks=1)
    run_here(command(model_folder, stdlib_corpus, plan, folder / "run", "--steps", STEPS))
    return losses(folder / "run")


def test_two_ranks_with_divided_experts_give_the_losses_of_one(tmp_path, model_folder, stdlib_corpus, one_rank):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2, ep=2)
    process = start(command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--steps", STEPS))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(out)["steps"] == STEPS
    assert losses(tmp_path / "run") == pytest.approx(one_rank, rel=1e-4)


def test_a_stopped_run_of_two_ranks_continues_on_one(tmp_path, model_folder, stdlib_corpus, one_rank):
    two = write_plan(tmp_path / "two.json", model_folder, ranks=2, dp_shard=2)
    one = write_plan(tmp_path / "one.json", model_folder, ranks=1)
    output = tmp_path / "run"
    process = start(command(model_folder, stdlib_corpus, two, output, "--steps", STEPS))
    wait_for_step(process, output, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    run_here(command(model_folder, stdlib_corpus, one, output, "--steps", STEPS))
    assert losses(output) == pytest.approx(one_rank, rel=1e-4)


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path, model_folder, stdlib_corpus):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    output = tmp_path / "run"
    process = start(command(model_folder, stdlib_corpus, plan, output, "--steps", 100_000))
    wait_for_step(process, output, 2)
    os.kill(int(children_of(process)[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "rank 1 was ended by SIGKILL" in errors
    assert re.search(r"rank 0 of 2, step \d+ \([^)]+\), in the collective \w+", errors), errors


AnyProcess = subprocess.Popen | WarmProcess


def terminate_when(process: AnyProcess, ready: Callable[[], bool]) -> tuple[int | None, str]:
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_run_stopped_while_its_ranks_import_leaves_as_stopped(tmp_path, model_folder, stdlib_corpus):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    arguments = command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--steps", STEPS)
    # A start of Python for the launcher and for each rank, unlike in the tests around this one.
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status, errors = terminate_when(process, lambda: len(children_of(process)) == 2)
    assert status == 75, errors
    assert "stopped by SIGTERM before training began" in errors


def test_a_rank_stopped_before_the_first_step_leaves_as_stopped(tmp_path, model_folder, stdlib_corpus):
    """It has joined and waits for the second one, which is the longest and simplest way of not training yet."""
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--steps", STEPS)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    process = start(arguments, os.environ | {name: str(value) for name, value in alone.items()})
    status, errors = terminate_when(process, listens)
    assert status == 75, errors
    assert "stopped by SIGTERM before training began" in errors


@pytest.mark.timeout(30)
def test_a_first_rank_that_stays_after_another_one_failed_is_killed(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    processes = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])]
    assert launch._wait(processes) == {0}


def test_a_rank_that_had_to_be_killed_does_not_hide_why_another_one_failed(capsys):
    assert _status([-signal.SIGKILL, 2], killed={0}) == 2
    assert "rank 0 still ran 30 s after another one had failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ((-signal.SIGINT, -signal.SIGINT), 130),
        ((130, -signal.SIGINT), 130),
        ((4, -signal.SIGINT), 130),
        ((-signal.SIGINT, 1), 130),
        ((75, -signal.SIGINT), 75),
        ((130, 75), 75),
        ((130, 2), 2),
    ],
)
def test_ranks_that_ctrl_c_ends_while_they_import_or_leave_have_not_failed(codes, status, capsys):
    assert _status(codes, passed_on={signal.SIGINT}) == status
    assert capsys.readouterr().err == ""


def test_a_rank_ended_by_a_signal_that_was_not_passed_on_has_failed(capsys):
    assert _status([4, -signal.SIGTERM]) == 4
    assert "rank 1 was ended by SIGTERM" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell children that their parent died")
def test_ranks_save_and_leave_when_their_launcher_is_killed(tmp_path, model_folder, stdlib_corpus):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    output = tmp_path / "run"
    process = start(command(model_folder, stdlib_corpus, plan, output, "--steps", 100_000))
    wait_for_step(process, output, 2)
    children = [Path("/proc", pid) for pid in children_of(process)]
    process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(is_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [child for child in children if is_alive(child)]
    for child in left:
        os.kill(int(child.name), signal.SIGKILL)
    assert not left
    assert "stopped by SIGTERM after step" in process.communicate(timeout=0)[1]
    assert list((output / "checkpoints").glob("step-*"))


def children_of(process: AnyProcess) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def is_alive(process: Path) -> bool:
    """Whether it runs; one that nobody waits for stays as a zombie where the first process adopts none."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("present", "absent"), [(0, 1), (1, 0)])
def test_a_rank_that_never_arrives_is_named_in_time(tmp_path, model_folder, stdlib_corpus, present, absent):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": present, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--hang-seconds", 1)
    process = start(arguments, os.environ | {name: str(value) for name, value in alone.items()})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert f"rank {present}, before the first step: rank {absent}" in errors
    assert "within 1 s" in errors


def error_in_this_process(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments[3:])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_second_run_that_is_refused_leaves_the_logs_of_the_first(tmp_path, model_folder, stdlib_corpus, capsys):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    arguments = command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--steps", 1)
    with hold_output(tmp_path / "run"):
        assert "another process trains into it" in error_in_this_process(capsys, arguments)
    assert not (tmp_path / "run" / "logs").exists()


def test_a_plan_for_gpus_runs_on_cpus_only_where_it_is_told_to(
    tmp_path, model_folder, stdlib_corpus, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    arguments = command(model_folder, stdlib_corpus, plan, tmp_path / "run")
    without_device = [argument for argument in arguments if argument not in ("--device", "cpu")]
    message = error_in_this_process(capsys, without_device)
    assert "plan.runtime_gpus (2) needs GPUs, and torch sees none here; pass --device cpu" in message


def run_launched(arguments: list[str], **environment: object) -> tuple[int, str]:
    """Exit status and standard error, on one line, of one rank whose launcher sets ``environment``."""
    process = start(arguments, os.environ | {name: str(value) for name, value in environment.items()})
    _, errors = process.communicate(timeout=60)
    return process.wait(0), " ".join(errors.split())


def test_a_port_that_is_taken_is_named_and_nobody_is_said_to_be_missing(tmp_path, model_folder, stdlib_corpus):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=2, dp_shard=2)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--hang-seconds", 30)
        status, errors = run_launched(arguments, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert status == 4, errors
    assert f"the store at 127.0.0.1:{port} could not be opened [" in errors
    assert "set MASTER_PORT to a port that is free" in errors
    assert "did not arrive" not in errors


def test_one_launched_rank_needs_no_store(tmp_path, model_folder, stdlib_corpus):
    plan = write_plan(tmp_path / "plan.json", model_folder, ranks=1)
    status, errors = run_launched(
        command(model_folder, stdlib_corpus, plan, tmp_path / "run", "--steps", 1), RANK=0, WORLD_SIZE=1
    )
    assert status == 0, errors


def wait_for_step(process: WarmProcess, output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").is_file() and len(losses(output)) >= step:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate(timeout=10)[1]!r}")


@pytest.mark.parametrize(
    ("statuses", "requeues"),
    [((0, 0), False), ((75, 75), True), ((4, 137), True), ((4, 2), False), ((3, 4), False), ((1, 1), False)],
)
def test_the_slurm_script_requeues_what_was_stopped_or_lost_a_rank_only(tmp_path, statuses, requeues):
    tools = tmp_path / "bin"
    tools.mkdir()
    programs = {
        "scontrol": f'if [ "$1" = requeue ]; then touch {tmp_path}/requeued; else echo localhost; fi',
        # Options up to `bash`, then the command of each task; the highest status, as Slurm's.
        "srun": """
            while [ $# -gt 0 ] && [ "$1" != bash ]; do shift; done
            worst=0
            for task in 0 1; do
                SLURM_PROCID=$task SLURM_LOCALID=$task "$@" || { code=$?; [ $code -gt $worst ] && worst=$code; }
            done
            exit $worst""",
        "python": f"""
            [ "$*" = "-m moescale run --plan p --model m --data d --output {tmp_path}/run" ] || exit 9
            statuses=({" ".join(map(str, statuses))})
            exit ${{statuses[$RANK]}}""",
    }
    for name, body in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    inputs = {"PLAN": "p", "MODEL": "m", "DATA": "d", "OUTPUT": str(tmp_path / "run")}
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    done = subprocess.run(
        ["bash", Path(__file__).parents[2] / "examples/slurm/train.sbatch"],
        env=os.environ | inputs | slurm | {"SLURM_GPUS_ON_NODE": "2", "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == max(statuses), done.stderr
    assert (tmp_path / "requeued").exists() == requeues
