"""Joins a process to a run: reads its rank from the environment, connects to the other ranks and watches them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moescale.errors import ConfigError, Preempted, say
from moescale.runtime.judge import FAILED_PREFIX, first_line
from moescale.runtime.ranks import ONE_RANK, Ranks, current_ranks
from moescale.runtime.watchdog import RankFailure, Watchdog

COLLECTIVE_TIMEOUT = timedelta(days=2)
"""Timeout of the process group's backends: longer than any --hang-seconds, because the watchdog knows which rank is
merely slow."""
STOPPED_BEFORE_TRAINING = "stopped by SIGTERM before training began; nothing is lost, the same command starts again"
_START_WITH_LAUNCHER = (
    "start the ranks with torchrun or examples/slurm, or unset RANK and WORLD_SIZE for `moescale run` to start them"
)


class StopBeforeTraining:
    """Turns SIGTERM into a clean exit until the trainer installs its handler."""

    def __init__(self) -> None:
        self._training_began = False
        self._previous: Any = None

    def __enter__(self) -> StopBeforeTraining:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def note_progress(self) -> None:
        """Note whether another handler has been installed by now."""
        self._training_began |= signal.getsignal(signal.SIGTERM) != self._on_signal

    def _on_signal(self, _number: int, _frame: object) -> None:
        if not self._training_began:  # after training everything is saved, and the rank is about to exit
            raise Preempted(STOPPED_BEFORE_TRAINING)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A process's membership in a run: its rank, its device and its watchdog."""

    ranks: Ranks
    device: torch.device
    watchdog: Watchdog | None
    stop: StopBeforeTraining | None = None

    def progress(self, step: int, phase: str) -> None:
        """Report to the watchdog, if any, that ``step`` steps are done and ``phase`` begins."""
        if self.stop is not None:
            self.stop.note_progress()
        if self.watchdog is not None:
            self.watchdog.progress(step, phase)


def was_launched() -> bool:
    """Return True if torchrun or :func:`moescale.runtime.launch.run_local_ranks` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Return True if this process is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_ranks(device: torch.device, *, hang_seconds: float = 600.0) -> Iterator[Membership]:
    """Join the other processes of the run, if any. Failures between ranks are raised as RankFailure.

    Args:
        device: only its type is used; on CUDA each process takes the GPU of its local rank.
        hang_seconds: abort after this many seconds without progress, or without a rank joining; the error names the
            rank.
    """
    with StopBeforeTraining() as stop:
        if not was_launched():
            yield Membership(ranks=ONE_RANK, device=device, watchdog=None, stop=stop)
            return
        place = _place_in_run()
        if device.type == "cuda":
            device = torch.device("cuda", _environment_number("LOCAL_RANK", below=torch.cuda.device_count()))
            torch.cuda.set_device(device)
        watchdog = _meet(place, device, hang_seconds)
        ranks = watchdog.ranks
        try:
            yield Membership(ranks=ranks, device=device, watchdog=watchdog, stop=stop)
            ranks.gather(None)  # the first rank holds the watchdogs' store, so no rank exits before all are done
        except BaseException as error:
            if isinstance(error, Exception) and _is_of_a_collective(error):
                verdict = watchdog.diagnose(error)
                watchdog.stop(left=f"{FAILED_PREFIX}{verdict}")
                raise RankFailure(verdict) from error
            watchdog.stop(left=f"{type(error).__name__}: {error}")
            raise
        watchdog.stop()
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class _Place:
    """This process's rank and the address where the ranks meet, from the environment."""

    rank: int
    size: int
    host: str | None = None
    port: int | None = None
    """Port of the store; None for a single rank, which needs none."""


def _place_in_run() -> _Place:
    """Read RANK, WORLD_SIZE and, for several ranks, MASTER_ADDR and MASTER_PORT. Raises ConfigError for a bad value."""
    size = _environment_number("WORLD_SIZE", at_least=1)
    rank = _environment_number("RANK", below=size)
    if size == 1:
        return _Place(rank=rank, size=size)
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"MASTER_ADDR, the host of rank 0, is not in the environment, where WORLD_SIZE is {size}; "
            f"{_START_WITH_LAUNCHER}"
        )
    port = _environment_number("MASTER_PORT", at_least=1, below=65536)
    return _Place(rank=rank, size=size, host=os.environ["MASTER_ADDR"], port=port)


def _environment_number(name: str, *, at_least: int = 0, below: int | None = None) -> int:
    text = os.environ.get(name)
    rule = f"a whole number of at least {at_least}" + (f" and below {below}" if below is not None else "")
    if text is None:
        raise ConfigError(f"{name} is not in the environment and must be {rule}; {_START_WITH_LAUNCHER}")
    if not text.isdecimal() or int(text) < at_least or (below is not None and int(text) >= below):
        raise ConfigError(f"{name} ({text!r}) in the environment must be {rule}; {_START_WITH_LAUNCHER}")
    return int(text)


def _meet(place: _Place, device: torch.device, hang_seconds: float) -> Watchdog:
    """Wait for the other ranks and connect to them, each within ``hang_seconds``; return the started watchdog."""
    rank, size = place.rank, place.size
    held_by_first = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    who, missing = f"rank {rank} of {size}, before the first step", [other for other in range(size) if other != rank]
    try:
        # A call to a frozen process may never return; whatever is detected in time is raised as an error.
        with _ending_after(hang_seconds + 10, lambda: f"{who}: {_arrival_text(missing, hang_seconds)}"):
            store = _wait_for_all(place, missing, held_by_first, hang_seconds) if size > 1 else dist.HashStore()
        with _ending_after(hang_seconds, lambda: f"{who}: the ranks did not connect in {hang_seconds:.0f} s"):
            # Hosts exchange numbers through gloo, so that they do not wait for the accelerators' queues.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            group_store = dist.PrefixStore("default_pg", store)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
            watchdog = Watchdog(
                current_ranks(),
                dist.PrefixStore("watchdog", store),
                hang_seconds=hang_seconds,
                store_held_by_first=held_by_first,
            )
            watchdog.start()
    except RuntimeError as error:
        absent = f"; {_arrival_text(missing, hang_seconds)}" if missing else ""
        raise RankFailure(f"{who}: the ranks could not connect [{first_line(str(error))}]{absent}") from error
    return watchdog


def _wait_for_all(place: _Place, missing: list[int], held_by_first: bool, seconds: float) -> dist.Store:
    """Open the store and remove from ``missing`` every rank that has arrived, until the list is empty.

    torch's own rendezvous is not used: it cannot name missing ranks, and a signal does not interrupt it.
    """
    deadline = time.monotonic() + seconds
    rank, host, port = place.rank, place.host, place.port
    assert host is not None and port is not None
    holds_store = held_by_first and rank == 0
    while not holds_store:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                holder = "rank 0, which holds" if held_by_first else "torchrun, which holds"
                raise RankFailure(
                    f"rank {rank}, before the first step: {holder} the store at {host}:{port}, could not be reached "
                    f"within {seconds:.0f} s ({error}); see whether it has started, and whether MASTER_ADDR is right"
                ) from error
            time.sleep(0.2)
    try:
        store = _open_store(host, port, holds_store)
    except (RuntimeError, OSError) as error:
        remedy = "set MASTER_PORT to a port that is free" if holds_store else "see the log of rank 0"
        raise RankFailure(
            f"rank {rank}, before the first step: the store at {host}:{port} could not be opened "
            f"[{first_line(str(error))}]; {remedy}, then start again"
        ) from error
    store.set(f"arrived/{rank}", "")
    while missing:
        if store.check([f"arrived/{missing[0]}"]):
            missing.pop(0)
        elif time.monotonic() > deadline:
            missing[:] = [other for other in missing if not store.check([f"arrived/{other}"])]
            raise RankFailure(f"rank {rank}, before the first step: {_arrival_text(missing, seconds)}")
        else:
            time.sleep(0.1)
    return store


def _open_store(host: str, port: int, holds_store: bool) -> dist.Store:
    """Open the store or connect to it.

    The store has no authentication. If the ranks meet on the loopback interface, it listens on that one only; otherwise
    torch listens on every interface. Names other than localhost are not resolved: a host may call itself 127.0.1.1.
    """
    options: dict[str, Any] = {}
    if holds_store and (host == "localhost" or host.startswith("127.")):
        options["master_listen_fd"] = socket.create_server((host, port)).detach()
    return dist.TCPStore(
        host,
        port,
        is_master=holds_store,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
        **options,
    )


def _arrival_text(missing: Sequence[int], seconds: float) -> str:
    names = ", ".join(str(rank) for rank in missing[:16]) + (f" and {len(missing) - 16} more" * (len(missing) > 16))
    return (
        f"rank{'s' * (len(missing) > 1)} {names} did not arrive within {seconds:.0f} s (--hang-seconds); "
        "see their logs and machines, then start again"
    )


@contextmanager
def _ending_after(seconds: float, verdict: Callable[[], str]) -> Iterator[None]:
    """End the process with ``verdict`` if the body takes longer than ``seconds``, wherever it is stuck."""

    def end() -> None:
        say(f"error: {verdict()}", sys.stderr)
        os._exit(RankFailure.exit_status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_of_a_collective(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, dist.DistError) or any(
        f"torch{os.sep}distributed" in frame.filename or frame.name in ("arrive", "depart") for frame in frames
    )
