"""A rank that hangs, leaves or dies is named with its step and what it was at, by every other rank."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gloo_ranks import GlooRanks
from moescale.runtime.judge import FAILED_PREFIX
from moescale.runtime.ranks import current_ranks
from moescale.runtime.watchdog import Watchdog


@pytest.fixture(scope="module")
def three_ranks():
    group = GlooRanks(3)
    yield group
    group.close()


def watch(name: str, verdicts: list[str], *, hang_seconds=600.0, lost_seconds=600.0) -> Watchdog:
    """A watchdog of this rank, which notes its verdict in the store as ``NAME/noticed/RANK`` too."""
    store = dist.distributed_c10d._get_default_store()
    rank = current_ranks().rank

    def leave(verdict: str) -> None:
        verdicts.append(verdict)
        store.clone().set(f"{name}/noticed/{rank}", "")

    watchdog = Watchdog(
        current_ranks(),
        dist.PrefixStore(name, store),
        hang_seconds=hang_seconds,
        lost_seconds=lost_seconds,
        interval_seconds=0.1,
        leave=leave,
    )
    watchdog.start()
    return watchdog


def wait_until_noticed_by(name: str, *ranks: int) -> None:
    """Return when these ranks have come to a verdict, however long the machine takes for it."""
    store = dist.distributed_c10d._get_default_store()
    store.wait([f"{name}/noticed/{rank}" for rank in ranks], timedelta(seconds=100))


def hang_on_rank_1() -> list[str]:
    verdicts: list[str] = []
    watchdog = watch("hang", verdicts, hang_seconds=1.5)
    watchdog.progress(6, "micro-batch 2")
    if current_ranks().rank == 1:
        wait_until_noticed_by("hang", 0, 1, 2)
    dist.all_reduce(torch.zeros(1))
    watchdog.stop()
    return verdicts


def test_a_rank_that_hangs_is_named_by_all_with_the_collective_they_wait_in(three_ranks):
    for rank, verdicts in enumerate(three_ranks.run(hang_on_rank_1)):
        assert verdicts, f"rank {rank} noticed nothing"
        assert f"rank {rank} of 3, step 7 (micro-batch 2), " in verdicts[0]
        assert "rank 1 hangs; last seen in step 7 (micro-batch 2), " in verdicts[0]
        if rank != 1:
            assert "in the collective all_reduce, outside the package: rank 1 hangs" in verdicts[0]


def lose_rank_2() -> list[str]:
    verdicts: list[str] = []
    watchdog = watch("lose", verdicts, lost_seconds=4.0)
    watchdog.progress(3, "micro-batch 1")
    dist.barrier()
    if current_ranks().rank == 2:
        watchdog._beat()
        watchdog._judged.set()
        watchdog._stopped.set()  # as if it were killed: its beats end
    wait_until_noticed_by("lose", 0, 1)
    watchdog.stop()
    dist.barrier()
    return verdicts


def test_a_rank_whose_beats_end_is_named_with_where_it_was_last(three_ranks):
    first, second, lost = three_ranks.run(lose_rank_2)
    assert lost == []
    for verdicts in (first, second):
        assert "rank 2 died or is out of reach; last seen in step 4 (micro-batch 1)" in verdicts[0]


def diagnose_a_rank_that_left() -> str:
    watchdog = watch("left", [], lost_seconds=10.0)
    rank = current_ranks().rank
    if rank == 0:
        watchdog.stop(left="DataError: the corpus has changed")
    elif rank == 1:
        watchdog.stop(left=f"{FAILED_PREFIX}rank 0 is gone")  # itself a victim, and not to blame
    dist.barrier()
    text = watchdog.diagnose(RuntimeError("Connection closed by peer\nmore")) if rank == 2 else ""
    watchdog.stop()
    dist.barrier()
    return text


def test_a_collective_that_failed_is_explained_by_the_rank_that_left_first_and_why(three_ranks):
    text = three_ranks.run(diagnose_a_rank_that_left)[2]
    assert "rank 0 has left: DataError: the corpus has changed" in text
    assert "[Connection closed by peer]" in text


def leave_with_an_error_that_all_have() -> float:
    watchdog = Watchdog(
        current_ranks(),
        dist.PrefixStore("agreed", dist.distributed_c10d._get_default_store()),
        hang_seconds=60.0,
        interval_seconds=5.0,
    )
    watchdog.start()
    dist.barrier()
    began = time.monotonic()
    watchdog.stop(left="Preempted: stopped after the same step")
    return time.monotonic() - began


def test_the_holder_of_the_store_does_not_stay_for_ranks_that_leave_as_well(three_ranks):
    assert max(three_ranks.run(leave_with_an_error_that_all_have)) < 5


def hang_under_fsdp(in_backward: bool) -> list[str]:
    verdicts: list[str] = []
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)), reshard_after_forward=False)
    watchdog = watch(f"fsdp-{in_backward}", verdicts, hang_seconds=1.5)
    if in_backward:
        loss = model(torch.ones(1, 8)).sum()
    if current_ranks().rank == 1:
        wait_until_noticed_by(f"fsdp-{in_backward}", 0, 1, 2)
    if not in_backward:
        loss = model(torch.ones(1, 8)).sum()
    loss.backward()
    watchdog.stop()
    return verdicts


@pytest.mark.parametrize(("in_backward", "collective"), [(False, "all_gather"), (True, "reduce_scatter")])
def test_the_collective_of_a_hang_under_fsdp_is_named(three_ranks, in_backward, collective):
    for rank, verdicts in enumerate(three_ranks.run(hang_under_fsdp, in_backward)):
        if rank != 1:
            assert f"in the collective {collective}" in verdicts[0]
        assert "rank 1 hangs" in verdicts[0]


def diagnose_a_collective_that_failed() -> str:
    watchdog = watch("failed", [], lost_seconds=2.0)
    rank = current_ranks().rank
    text = ""
    if rank == 2:
        try:
            current_ranks().sum("no tensor")
        except Exception as error:
            text = watchdog.diagnose(error)
    dist.barrier()
    watchdog.stop()
    return text


def test_the_collective_that_failed_is_named_though_its_stack_is_unwound(three_ranks):
    text = three_ranks.run(diagnose_a_collective_that_failed)[2]
    assert "in the collective all_reduce, at ranks.py:" in text


def wait_for_a_verdict_on_a_frozen_store(port: int, holder: int, hang_seconds: float) -> tuple[list[str], float]:
    verdicts: list[str] = []
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    watchdog = Watchdog(
        current_ranks(),
        dist.PrefixStore(f"frozen-{hang_seconds}", store),
        hang_seconds=hang_seconds,
        lost_seconds=2.0,
        interval_seconds=0.1,
        leave=verdicts.append,
    )
    watchdog.start()
    dist.barrier()
    frozen = time.monotonic()
    if current_ranks().rank == 1:
        os.kill(holder, signal.SIGSTOP)
    while not verdicts and time.monotonic() < frozen + 20:
        time.sleep(0.05)
    noticed = time.monotonic()
    watchdog.stop(left="a verdict")
    assert time.monotonic() - noticed < 5, "stopping waited for the store"
    dist.barrier()
    return verdicts, noticed - frozen


def hold_a_store(port):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    time.sleep(600)


@pytest.fixture
def store_of_another_process(three_ranks):
    context = mp.get_context("forkserver")  # the one that the ranks have started
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_a_store, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    yield ours.recv(), process.pid
    process.kill()
    process.join()


def test_a_store_that_freezes_with_its_holder_ends_the_others_in_time(three_ranks, store_of_another_process):
    for verdicts, seconds in three_ranks.run(wait_for_a_verdict_on_a_frozen_store, *store_of_another_process, 60.0):
        assert "rank 0 died or is frozen: the store that it holds has not answered for 2 s" in verdicts[0]
        assert seconds < 10


def test_a_hang_is_noticed_though_the_store_does_not_answer(three_ranks, store_of_another_process):
    for verdicts, _ in three_ranks.run(wait_for_a_verdict_on_a_frozen_store, *store_of_another_process, 1.0):
        assert " hangs; last seen in step 1" in verdicts[0]


def fail_in_a_thread(method: str) -> list[str]:
    verdicts: list[str] = []
    watchdog = watch(f"fail in {method}", verdicts)
    watchdog.progress(3, "micro-batch 1")

    def fail(*_: object) -> None:
        raise KeyError("injected")

    setattr(watchdog if method == "_read" else watchdog._judge, method, fail)
    deadline = time.monotonic() + 20
    while not verdicts and time.monotonic() < deadline:
        time.sleep(0.05)
    dist.barrier()
    watchdog.stop()
    return verdicts


@pytest.mark.parametrize("method", ["_read", "find_failure"])
def test_a_watchdog_that_cannot_go_on_ends_the_run_and_says_so(three_ranks, method):
    for rank, verdicts in enumerate(three_ranks.run(fail_in_a_thread, method)):
        assert verdicts == [
            f"rank {rank} of 3, step 4 (micro-batch 1), in a thread of its own: the watchdog could not go on "
            "[KeyError: 'injected']. The same command resumes from the newest checkpoint"
        ]
