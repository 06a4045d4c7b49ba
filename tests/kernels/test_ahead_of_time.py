"""The kernels around the experts compile, without a GPU, for the generations we name: Ampere, Hopper, Blackwell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CAPABILITIES = ("80", "90", "100")
SMALLEST_SHARED_MEMORY_BYTES = 99 * 2**10  # of sm_86 and sm_89; the data-centre parts have more


def test_every_kernel_compiles_for_every_generation() -> None:
    script = Path(__file__).with_name("ahead_of_time.py")
    # In a process of its own: kernels are defined for the interpreter here, and for the compiler there.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(script.parents[2])
    done = subprocess.run(
        [sys.executable, str(script), *CAPABILITIES],
        env=environment | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == list(CAPABILITIES)
    for capability, kernels in report.items():
        assert len(kernels) == 17, capability
        assert all(shared <= SMALLEST_SHARED_MEMORY_BYTES for shared in kernels.values()), capability
