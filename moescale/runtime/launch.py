"""Starts the ranks of a run as local processes, forwards signals to them, and returns the exit status of the run."""

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
"""Time for the other local ranks to report what they saw after one has failed."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a process ended by Ctrl-C."""
UNCAUGHT = 1
"""Exit status of Python after an uncaught error, as which Ctrl-C counts while the first modules are imported."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl."""


def run_local_ranks(count: int, arguments: Sequence[str], logs: Path) -> int:
    """Run ``moescale`` with ``arguments`` as ``count`` local processes, and return the run's exit status.

    The first rank has this process's terminal; the others write to ``logs/rank-N.log``. A signal to stop is forwarded
    to every rank. If one fails, the others have GRACE_SECONDS to report what they saw, then they are killed. If this
    process itself is killed, the ranks get SIGTERM (on Linux), so that they save and exit.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo's connections have no authentication either
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
                        # Ctrl-C goes to the terminal's whole process group; the ranks shall get it once, from here.
                        start_new_session=True,
                        preexec_fn=_ending_with(os.getpid()),
                    )
                )
                if passed_on:  # a signal during this rank's start may have missed it
                    processes[-1].send_signal(max(passed_on))
                    break
            killed = _wait(processes)
    return _status([process.returncode for process in processes], killed, passed_on)


def _ending_with(launcher: int) -> Callable[[], None] | None:
    """Return a function for a rank to call before exec: it requests SIGTERM from the kernel when the launcher dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork a lookup could deadlock

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # the launcher died before the request
            os._exit(RankFailure.exit_status)

    return ask


def _wait(processes: list[subprocess.Popen]) -> set[int]:
    """Wait for all processes, and return the ranks that had to be killed because they outlived a failed one."""
    failed_at: float | None = None
    killed: set[int] = set()
    while None in (codes := [process.poll() for process in processes]):  # polls all: the first may be frozen
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
    """Return the exit status of the run. A rank's own failure outranks "another rank left".

    Args:
        codes: return codes of the ranks, as subprocess gives them.
        killed: ranks that were killed because they outlived a failed one.
        passed_on: signals that this process received and forwarded to all ranks.
    """
    stopped = False
    for rank in sorted(killed):
        say(
            f"error: rank {rank} still ran {GRACE_SECONDS:.0f} s after another one had failed, and was killed; the "
            "other ranks' logs say what they saw",
            sys.stderr,
        )
    for rank, code in enumerate(codes):
        if -code in passed_on:  # not a failure: while importing or exiting, a rank has no handler
            stopped = True
        elif code < 0 and rank not in killed:
            say(f"error: rank {rank} was ended by {signal.Signals(-code).name}", sys.stderr)
            return RankFailure.exit_status
    interrupted = {INTERRUPTED}  # outranked by 75: a rank interrupted while it exits has saved, as the others have
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
    """Forward SIGINT and SIGTERM to all of ``processes``, and yield the set of signals received."""
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
