"""What a rank refuses of the environment that its launcher gives it, and how one that has not begun is stopped."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch

from moescale.errors import ConfigError, Preempted
from moescale.runtime.join import _open_store, join_ranks
from moescale.runtime.launch import _free_port


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of sockets")
@pytest.mark.parametrize("host, addresses", [("127.0.0.1", {"0100007F"}), ("localhost", {"0100007F"})])
def test_the_store_of_ranks_on_one_host_listens_on_the_loopback_alone(host, addresses):
    port = _free_port()
    store = _open_store(host, port, True)
    other = _open_store(host, port, False)
    other.set("key", "value")
    assert store.get("key") == b"value"
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, number = local.split(":")
            if int(number, 16) == port and state == "0A":
                listening.add(address)
    assert listening == addresses


def test_a_name_that_the_host_gives_itself_may_be_one_that_others_use(monkeypatch):
    """Debian has a host's own name stand for 127.0.1.1: bound to it, the store would be out of the others' reach."""
    opened = {}
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **options: opened.update(options))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    _open_store("node-1", 29500, True)
    assert opened["is_master"] and "master_listen_fd" not in opened
