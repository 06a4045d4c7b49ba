"""`moescale --help` answers at once, and `python -m moescale` is the same command."""

from __future__ import annotations

import subprocess
import sys

SLOW_TO_IMPORT = ("torch", "numpy", "pyarrow", "rich.markdown", "moescale.planner", "moescale.api")
PROGRAM = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", [name for name in {SLOW_TO_IMPORT} if name in sys.modules]))
sys.argv = ["moescale", "--help"]
runpy.run_module("moescale", run_name="__main__")
"""


def test_help_is_shown_without_importing_what_takes_long():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "Plan parallel training for a cluster" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"
