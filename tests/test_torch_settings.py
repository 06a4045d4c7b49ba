"""Torch's settings of the process, which belong to its owner: the package leaves them alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_settings import setters_called, settings, use_torch

TESTS = Path(__file__).parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Packages of the extra `cute` may set what they like.
NO_EXTRA = {"MOESCALE_ATTENTION": "torch", "MOESCALE_EXPERTS": "triton"}


def after_first_use(use: str, device: str) -> dict:
    """Settings after ``use`` of ``torch_settings`` in a new process, and the names of what it set."""
    process = subprocess.run(
        [sys.executable, TESTS / "torch_settings.py", use, device],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)} | ({} if device == "cpu" else NO_EXTRA),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use", ["attention", "package"])
def test_settings_after_its_first_use_are_those_after_one_of_torch_and_none_was_set(use, device):
    ours = after_first_use(use, device)
    assert ours["set"] == []  # nor for a while: what a context saves before the first use is not what torch makes of it
    assert ours["settings"] == after_first_use("torch", device)["settings"]


@pytest.mark.gpu
def test_on_hopper_cudnn_comes_first():
    if torch.cuda.get_device_capability() != (9, 0) or torch.backends.cudnn.version() <= 91500:
        pytest.skip("needs a Hopper GPU and cuDNN 9.15.1")
    found = after_first_use("attention", "cuda")["settings"]["_set_sdp_priority_order"]
    assert json.loads(found)[0] == int(SDPBackend.CUDNN_ATTENTION)


def test_the_comparison_can_fail():
    before = settings()
    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    with setters_called() as called, sdpa_kernel(backends, set_priority=True):
        use_torch("cpu", torch.float32)
        within = settings()
    assert "_set_sdp_priority_order" in called
    assert {name for name in within if within[name] != before[name]} > {"_set_sdp_priority_order"}
    with setters_called() as called:
        use_torch("cpu", torch.float32)
    assert called == [] and settings() == before
