"""Runs killed at random moments: every restart finds a whole checkpoint and ends with the undisturbed run's weights."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest

from moescale.convert.hf_config import read_model_config
from moescale.plan import MeshShape, one_device_plan, save_plan
from moescale.runtime.checkpoint import verify
from moescale.runtime.checkpoint_store import CheckpointStore
from warm_start import WarmProcess, run_warm

STEPS = 20


@pytest.fixture(scope="module")
def command(tmp_path_factory, model_folder, stdlib_corpus):
    """The command line of a run of two ranks that saves at every step; the output folder is still to come."""
    plan = one_device_plan(
        read_model_config(model_folder),
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
    )
    mesh = MeshShape(dp_shard=2, ep=2)
    plan = dataclasses.replace(plan, mesh=mesh, plan_gpus=2, runtime_gpus=2, tokens_per_step=128)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(plan, path)
    inputs = ("--model", model_folder, "--data", stdlib_corpus, "--plan", path, "--device", "cpu", "--json")
    schedule = ("--steps", STEPS, "--checkpoint-every", 1, "--validation-sequences", 2, "--learning-rate", 3e-3)
    return ["run", *map(str, (*inputs, *schedule)), "--output"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, command) -> list[bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(command, output)
    return final_files(output)


def final_files(output: Path) -> list[bytes]:
    last = CheckpointStore(output / "checkpoints", keep=1).last()
    assert last is not None and last.step == STEPS
    return [path.read_bytes() for path in sorted(last.path.glob("*.safetensors"))]


def kill_somewhere(command: list[str], output: Path, chance: random.Random) -> str | None:
    """Start or resume the run, and kill one rank or all of it after a random time; what was done, None if it ended."""
    process = WarmProcess([*command, output])
    store = CheckpointStore(output / "checkpoints", keep=1)
    before = store.last()
    # Once the first new checkpoint is there, every moment is one of training or writing.
    while process.poll() is None and (last := store.last()) == before:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.4))
    if process.poll() is not None:
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors
        return None
    ranks = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    victims = ranks if chance.random() < 0.4 else [chance.choice(ranks)]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 4), errors
    return f"killed {len(victims)} of {len(ranks)} after step {last.step if last else 0}"


def finish(command: list[str], output: Path) -> None:
    done = run_warm([*command, output], timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "kills", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["few", "many"]
)
def test_a_run_killed_again_and_again_ends_with_the_weights_of_the_undisturbed_one(
    tmp_path, command, undisturbed, kills
):
    chance = random.Random(kills)
    done: list[str] = []
    number = 0  # a run that ends before all kills are done is followed by another
    while len(done) < kills:
        output = tmp_path / str(number)
        event = kill_somewhere(command, output, chance)
        checkpoints = CheckpointStore(output / "checkpoints", keep=1).list()
        assert checkpoints, f"no whole checkpoint is left: {event}"
        for checkpoint in checkpoints:
            verify(checkpoint)
        if event is not None:
            done.append(event)
        else:
            assert final_files(output) == undisturbed, done
            number += 1
    finish(command, tmp_path / str(number))
    assert final_files(tmp_path / str(number)) == undisturbed, done
