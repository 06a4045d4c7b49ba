"""Starts the ranks of a run as local processes, passes signals on to them, and tells how the run ended."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moescale.errors import Preempted, say
from moescale.runtime.join import STOPPED_BEFORE_TRAINING
from moescale.runtime.watchdog import RankFailure

GRACE_SECONDS = 30.0
"""How long the other local ranks may take to tell what they saw, after one has ended badly."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status of what Ctrl-C has ended."""
UNCAUGHT = 1
"""Exit status of Python after an error that nobody caught, which Ctrl-C is while it imports its first modules."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def run_local_ranks(count: int, arguments: Sequence[str], logs: Path) -> int:
    """Run ``moescale`` with ``arguments`` as ``count`` local processes, and return the run's exit status.

    The first rank has this process's terminal, the others write to ``logs/rank-N.log``. A signal to stop goes on to
    every rank. Where one ends badly, the others get GRACE_SECONDS to tell what they saw, then they are killed. Where
    this process itself is killed, the ranks get SIGTERM (on Linux): they save and leave.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # its connections have no secret either
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with ExitStack() as files:
        processes: list[subprocess.Popen] = []
        with _passing_on_signals(processes) as passed_on:
            for rank in range(count):
                output = None if rank == 0 else files.enter_context((logs / f"rank-{rank}.log").open("a"))
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "moescale", *arguments],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=output,
                        # Ctrl-C reaches the terminal's whole group: the ranks get it from here only, once.
                        start_new_session=True,
                        preexec_fn=_ending_with(os.getpid()),
                    )
                )
                if passed_on:  # it may have come while this rank started; the others would wait for the one it ended
                    processes[-1].send_signal(max(passed_on))
                    break
            killed = _wait(processes)
    return _status([process.returncode for process in processes], killed, passed_on)


def _ending_with(launcher: int) -> Callable[[], None] | None:
    """What a rank does before it becomes Python: ask the kernel for SIGTERM when its launcher dies, even by SIGKILL."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found here: after the fork only what cannot deadlock is safe

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died before the kernel knew
            os._exit(RankFailure.exit_status)

    return ask


def _wait(processes: list[subprocess.Popen]) -> set[int]:
    """Wait for all; the ranks that had to be killed, because they stayed after another one had ended badly."""
    failed_at: float | None = None
    killed: set[int] = set()
    while None in (codes := [process.poll() for process in processes]):  # of all: the first may be the frozen one
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            for rank, process in enumerate(processes):
                if process.poll() is None:
                    killed.add(rank)
                    process.kill()
        time.sleep(0.02)
    return killed


def _status(codes: Sequence[int], killed: Collection[int] = (), passed_on: Collection[int] = ()) -> int:
    """Of the run, from its ranks': a rank's own reason says more than the others' that someone has left.

    Args:
        codes: what the ranks ended with, as subprocess says it.
        killed: ranks that did not end by themselves after another one had.
        passed_on: signals that this process was sent and passed on to all ranks.
    """
    stopped = False
    for rank in sorted(killed):
        say(
            f"error: rank {rank} still ran {GRACE_SECONDS:.0f} s after another one had failed, and was killed; the "
            "other ranks' logs say what they saw",
            sys.stderr,
        )
    for rank, code in enumerate(codes):
        if -code in passed_on:  # no failure: it was importing or leaving, in between it answers the signal itself
            stopped = True
        elif code < 0 and rank not in killed:
            say(f"error: rank {rank} was ended by {signal.Signals(-code).name}", sys.stderr)
            return RankFailure.exit_status
    interrupted = {INTERRUPTED}  # says less than 75: a rank interrupted as it leaves has saved what the others have
    if signal.SIGINT in passed_on:
        interrupted |= {-signal.SIGINT, UNCAUGHT}
    weak = interrupted | {RankFailure.exit_status}
    own = next((code for code in codes if code > 0 and code not in weak), None)
    if own is not None:
        return own
    if interrupted.intersection(codes):
        return INTERRUPTED
    if stopped:
        say(STOPPED_BEFORE_TRAINING, sys.stderr)
        return Preempted.exit_status
    return RankFailure.exit_status if any(codes) else 0


@contextmanager
def _passing_on_signals(processes: Sequence[subprocess.Popen]) -> Iterator[set[int]]:
    """Send what this process is told to all of ``processes``; yields the signals there were."""
    passed_on: set[int] = set()

    def pass_on(number: int, _frame: object) -> None:
        passed_on.add(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield passed_on
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
