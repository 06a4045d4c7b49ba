"""What a rank refuses of the environment that its launcher gives it, and how one that has not begun is stopped."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from moescale.errors import ConfigError, Preempted
from moescale.runtime.launch import join_ranks


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (dict(RANK="abc", WORLD_SIZE="2"), r"RANK \('abc'\) .* must be a whole number of at least 0 and below 2"),
        (dict(RANK="2", WORLD_SIZE="2"), r"RANK \('2'\) .* below 2; start the ranks with torchrun"),
        (dict(RANK="0", WORLD_SIZE="0"), r"WORLD_SIZE \('0'\) .* at least 1"),
        (dict(RANK="0", WORLD_SIZE="2"), r"MASTER_ADDR, the host of rank 0, is not in the environment"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost"), "MASTER_PORT is not in the environment"),
        (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="70000"), r"MASTER_PORT \('70000'\)"),
    ],
)
def test_an_environment_that_no_launcher_gives_is_refused_by_name(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), join_ranks(torch.device("cpu")):
        pass


def test_one_device_that_is_stopped_before_the_first_step_leaves_as_stopped():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM before training began"):
        with join_ranks(torch.device("cpu")):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
