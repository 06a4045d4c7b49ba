"""The kernels around the experts compile, without a GPU, for the generations we name: Ampere, Hopper, Blackwell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from moescale.kernels.attention.launch_config import Kernel, launch_for

CAPABILITIES = ("80", "90", "100")
SMALLEST_SHARED_MEMORY_BYTES = 99 * 2**10  # of sm_86 and sm_89; the data-centre parts have more
HOPPER_SHARED_MEMORY_BYTES = 227 * 2**10


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--every-variant",), marks=pytest.mark.slow)], ids=["some", "every variant"]
)
def test_every_kernel_compiles_for_every_generation(options: tuple[str, ...]) -> None:
    script = Path(__file__).with_name("ahead_of_time.py")
    # In a process of its own: kernels are defined for the interpreter here, and for the compiler there.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(script.parents[2])
    done = subprocess.run(
        [sys.executable, str(script), *options, *CAPABILITIES],
        env=environment | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == list(CAPABILITIES)
    for capability, kernels in report.items():
        assert len(kernels) == (27 if options or capability == "90" else 2), capability
        for name, shared in kernels.items():
            on_hopper = capability == "90" and name.startswith("attention")  # with launch parameters of its own
            most = HOPPER_SHARED_MEMORY_BYTES if on_hopper else SMALLEST_SHARED_MEMORY_BYTES
            assert shared <= most, (capability, name)


@pytest.mark.parametrize("widths", [(192, 128), (64, 64), (256, 256), (128, 128), (48, 16)])
def test_attention_finds_launch_parameters_for_every_width_and_small_ones_where_it_is_not_tuned(widths) -> None:
    for kernel in get_args(Kernel):
        hopper, other, interpreter = (
            launch_for(kernel, *widths, itemsize=2, capability=capability) for capability in ((9, 0), (8, 0), None)
        )
        assert other == interpreter == launch_for(kernel, *widths, itemsize=4, capability=(9, 0))
        assert hopper.rows * hopper.columns >= other.rows * other.columns
