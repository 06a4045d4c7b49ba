"""A run, a resumed run and an export, killed before each of their file operations, end bit-equal when started again.

A process killed between two operations leaves what the first of them has left: killing it before the N-th, for every N,
is every kill there is. Of two ranks each in turn is killed, alone and together with the other. `make test-all` tries
every point, the ordinary tests a few.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.convert.hf_config import read_model_config
from moescale.plan import MeshShape, one_device_plan, save_plan

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
FEWEST_OPERATIONS = {("run", 1): 60, ("resume", 1): 30, ("export", 1): 30, ("run", 2): 80, ("resume", 2): 40}
SHORT = {("run", 1): 101, ("resume", 1): 53, ("export", 1): 29, ("run", 2): 113}

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler, for a library to preload"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kill_before.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", path, HERE / "kill_before.c", "-ldl"], check=True)
    return path


@pytest.fixture(scope="module")
def two_rank_plan(tmp_path_factory, model_folder) -> Path:
    one_device = one_device_plan(
        read_model_config(model_folder),
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
    )
    mesh = MeshShape(dp_shard=2, ep=2)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(dataclasses.replace(one_device, mesh=mesh, plan_gpus=2, runtime_gpus=2, tokens_per_step=128), path)
    return path


EVERY_POINT = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SHORT, id="some points"),  # in one process, whose start takes as long as a case
        *(
            pytest.param({case: 1}, id=f"every point of {case[0]} on {case[1]}", marks=EVERY_POINT)
            for case in FEWEST_OPERATIONS
        ),
    ],
)
def test_killed_before_any_file_operation_and_started_again_the_result_is_bit_equal(
    tmp_path, library, model_folder, stdlib_corpus, two_rank_plan, cases
):
    which = [f"{command}:{size}:{every}" for (command, size), every in cases.items()]
    arguments = (library, tmp_path, model_folder, stdlib_corpus, two_rank_plan, *which)
    done = subprocess.run(
        [sys.executable, HERE / "kill_points.py", *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case, counted in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        print(case, counted)
        assert counted["operations"] >= FEWEST_OPERATIONS[case]
        assert counted["killed"] >= 0.9 * counted["points"]
