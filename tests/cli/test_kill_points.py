"""A run, a resumed run and an export, killed before each of their file operations, end bit-equal when started again.

A process killed between two operations leaves what the first of them has left: killing it before the N-th, for every N,
is every kill there is. `make test-all` tries every point, the ordinary tests a few.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
FEWEST_OPERATIONS = {"run": 60, "resume": 30, "export": 30}
SHORT = {"run": 37, "resume": 23, "export": 19}

pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler, for a library to preload"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kill_before.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", path, HERE / "kill_before.c", "-ldl"], check=True)
    return path


@pytest.mark.parametrize("command", list(SHORT))
@pytest.mark.parametrize(
    "exhaustive",
    [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["some points", "every point"],
)
def test_killed_before_any_file_operation_and_started_again_the_result_is_bit_equal(
    tmp_path, library, model_folder, stdlib_corpus, command, exhaustive
):
    every = 1 if exhaustive else SHORT[command]
    arguments = (library, tmp_path, model_folder, stdlib_corpus, command, every)
    done = subprocess.run(
        [sys.executable, HERE / "kill_points.py", *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    print(f"{command}: {counted['operations']} file operations, killed before {counted['killed']} of them")
    assert counted["operations"] >= FEWEST_OPERATIONS[command]
    assert counted["killed"] >= 0.9 * (counted["operations"] // every)
