"""`moescale --help` answers at once, and `python -m moescale` is the same command."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW_TO_IMPORT = ("torch", "numpy", "pyarrow", "moescale.planner", "moescale.convert", "moescale.models")
PROGRAM = """
import atexit, runpy, sys
names = sys.argv.pop(1).split(",")
atexit.register(lambda: print("imported:", [name for name in names if name in sys.modules]))
sys.argv[0] = "moescale"
runpy.run_module("moescale", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "shown", "slow"),
    [
        ([], "Plan parallel training for a cluster", (*SLOW_TO_IMPORT, "rich.markdown", "moescale.api")),
        (["compile"], "--runtime-gpus", SLOW_TO_IMPORT),
        (["bench"], "--plot", (*SLOW_TO_IMPORT, "moescale.api")),
    ],
)
def test_help_is_shown_without_importing_what_takes_long(command, shown, slow):
    words = [sys.executable, "-c", PROGRAM, ",".join(slow), *command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert shown in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"
