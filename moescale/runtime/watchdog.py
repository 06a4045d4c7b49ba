"""Detects dead or hung ranks, ends the run, and reports the rank, collective and step on every rank.

Every rank regularly writes a beat to a key-value store: its step and the position of its Python threads, including the
collective in which it waits. The position is read from the stacks, at no cost to the training. If a rank sees no
progress of any rank for ``hang_seconds``, or no beat of another rank for ``lost_seconds``, it names the culprit and
exits. Every rank judges independently, so it does not matter which one fails. A rank that waits in a collective for a
slow rank keeps waiting as long as that rank makes progress.

The process that holds the store may itself freeze, and a call to a frozen store never returns: its timeout bounds the
wait for a key, not for an answer. Therefore one thread talks to the store, and another one judges by the time since the
store's last answer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from moescale.errors import MoescaleError, say
from moescale.runtime.judge import Beat, Judge
from moescale.runtime.ranks import Ranks

COLLECTIVES = (
    *("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_gather_object"),
    *("broadcast", "broadcast_object_list", "barrier", "all_gather", "gather_object"),
)
FSDP_WAITS = {
    "unshard": "all_gather_into_tensor (FSDP, parameters)",
    "foreach_all_gather": "all_gather_into_tensor (FSDP, parameters)",
    "wait_for_unshard": "all_gather_into_tensor (FSDP, parameters)",
    "foreach_all_gather_copy_out": "all_gather_into_tensor (FSDP, parameters)",
    "foreach_reduce": "reduce_scatter_tensor (FSDP, gradients)",
    "post_backward": "reduce_scatter_tensor (FSDP, gradients)",
    "_wait_for_post_backward": "reduce_scatter_tensor (FSDP, gradients)",
    "finalize_backward": "reduce_scatter_tensor (FSDP, gradients)",
}
"""Functions of torch's FSDP that start or await a collective, possibly under other names than torch.distributed's."""


class RankFailure(MoescaleError):
    """A rank died, exited or hangs; the run can be resumed from its newest checkpoint."""

    exit_status = 4


class Watchdog:
    """Watches the ranks of a run from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        ranks: Ranks,
        store: dist.Store,
        *,
        hang_seconds: float,
        lost_seconds: float = 20.0,
        interval_seconds: float = 1.0,
        store_held_by_first: bool = True,
        leave: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        leave: called with the verdict, in another thread; by default it prints the verdict and ends the process.
        store_held_by_first: the store is held by the first rank, not by a process outside the run.
        clock: returns seconds.
        """
        self.ranks = ranks
        self.lost_seconds = lost_seconds
        self.interval_seconds = interval_seconds
        self._clock = clock
        self._leave = leave or self._print_and_exit
        self._judge = Judge(
            ranks,
            hang_seconds=hang_seconds,
            lost_seconds=lost_seconds,
            store_held_by_first=store_held_by_first,
            now=clock(),
        )
        # A separate connection: in the other one, the main thread may wait minutes for a key of a slow rank.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # absent from torch's stubs
        self._store.set_timeout(timedelta(seconds=lost_seconds))
        self._main_thread = threading.get_ident()
        self._step, self._phase = 0, "start"
        self._count = self._num_reports = 0
        self._left: str | None = None
        self._failure: str | None = None
        """Verdict if the thread that talks to the store has failed: without it, hangs would go unnoticed."""
        self._stopped, self._judged = threading.Event(), threading.Event()
        self._talker = threading.Thread(target=self._talk, name="moescale-watchdog-store", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="moescale-watchdog", daemon=True)

    def start(self) -> None:
        """Start watching. A collective: when it returns, every rank's first beat is in the store."""
        self._beat()
        self.ranks.gather(None)
        self._judge.start(self._clock())
        self._talker.start()
        self._watcher.start()

    def progress(self, step: int, phase: str) -> None:
        """Note that ``step`` steps are done and that ``phase`` of the next one begins."""
        self._num_reports += 1
        self._step, self._phase = step, phase
        self._judge.note_progress(self._clock())

    def stop(self, left: str | None = None) -> None:
        """Stop watching; with ``left``, tell the other ranks why this one exits early."""
        self._left = left
        self._judged.set()
        self._stopped.set()
        if self._talker.ident is not None:
            self._talker.join(self.interval_seconds + 1)  # not longer: it may be stuck at a frozen store
        if left is not None and self.ranks.is_first and self._judge.store_held_by_first:
            self._let_others_read(self._clock() + 3 * self.interval_seconds)

    def _let_others_read(self, deadline: float) -> None:
        """Keep the store that this rank holds alive until the others have left or have had time to read it."""
        while self._clock() < deadline and not self._judge.store_failed and not self._talker.is_alive():
            if self._judge.have_all_left():
                return
            time.sleep(self.interval_seconds / 20)
            try:
                self._read()
            except RuntimeError:
                return

    def diagnose(self, error: Exception) -> str:
        """Return the verdict on a collective that failed on this rank, after the others have had time to report.

        Args:
            error: the error that the collective raised.
        """
        self._judged.set()  # keeps the judge from a verdict without the cause
        place, cause = _place_of_error(error), str(error)
        deadline = self._clock() + self.lost_seconds
        while self._clock() < deadline:
            verdict = self._judge.explain_failure(self._my_beat(), place, cause, 5 * self.interval_seconds)
            if verdict is not None:
                return verdict
            time.sleep(self.interval_seconds / 2)
        return self._judge.explain_without_culprit(self._my_beat(), place, cause, self._clock())

    def _talk(self) -> None:
        """Write this rank's beats and read the others', in the thread that may get stuck at the store."""
        while True:
            stopped = self._stopped.wait(self.interval_seconds)
            if stopped and self._left is None:
                return
            try:
                self._beat(self._left)
                self._read()
                self._judge.note_answer(self._clock())
            except RuntimeError:  # base class of all store errors
                self._judge.note_store_failure()
            except Exception as error:  # such as a malformed beat: without a verdict this rank would go silent
                self._failure = self._verdict_on_itself(error)
                return
            if stopped:
                return

    def _watch(self) -> None:
        while not self._judged.wait(self.interval_seconds):
            try:
                verdict = self._failure or self._judge.find_failure(self._my_beat(), self._clock())
            except Exception as error:
                verdict = self._verdict_on_itself(error)
            if verdict is not None:
                return self._leave(verdict)

    def _verdict_on_itself(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        return self._judge.explain_own_failure(self._my_beat(), text)

    def _beat(self, left: str | None = None) -> None:
        self._count += 1
        self._store.set(f"beat/{self.ranks.rank}", json.dumps(vars(self._my_beat(left))))

    def _read(self) -> None:
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        if not others:
            return
        for rank, text in zip(others, self._store.multi_get([f"beat/{rank}" for rank in others]), strict=True):
            self._judge.note_beat(rank, Beat(**json.loads(text)), self._clock())

    def _my_beat(self, left: str | None = None) -> Beat:
        place, in_collective = _place(sys._current_frames(), self._main_thread)
        return Beat(
            count=self._count,
            progress=self._num_reports,
            step=self._step,
            phase=self._phase,
            place=place,
            in_collective=in_collective,
            left=left,
        )

    def _print_and_exit(self, verdict: str) -> None:
        say(f"error: {verdict}", sys.stderr)
        os._exit(RankFailure.exit_status)  # the main thread is stuck and cannot be asked


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One frame of a stack."""

    function: str
    module: str
    line: str
    """As file:number."""


def _calls(frames: Iterable[tuple[FrameType, int]]) -> list[_Call]:
    return [
        _Call(
            function=frame.f_code.co_name,
            module=str(frame.f_globals.get("__name__")),
            line=f"{os.path.basename(frame.f_code.co_filename)}:{line}",
        )
        for frame, line in frames
    ]


def _stack(frame: FrameType | None) -> list[_Call]:
    """Return the calls of a thread, innermost first."""
    return _calls((frame, line) for frame, line in traceback.walk_stack(frame))


def _place(frames: dict[int, FrameType], main_thread: int) -> tuple[str, bool]:
    """Return the position of the process: the collective in a thread, or the main thread's innermost own line."""
    main = _stack(frames[main_thread]) if main_thread in frames else []
    # Backward on a GPU runs and waits in autograd's threads.
    for calls in (main, *(_stack(frame) for thread, frame in frames.items() if thread != main_thread)):
        place, in_collective = _place_of(calls)
        if in_collective:
            return place, True
    return _place_of(main)


def _place_of_error(error: BaseException) -> str:
    """Return the position where ``error`` was raised, from its traceback."""
    return _place_of(_calls(reversed(list(traceback.walk_tb(error.__traceback__)))))[0]


def _place_of(calls: Sequence[_Call]) -> tuple[str, bool]:
    collective = _collective(calls)
    own = next((call for call in calls if call.module.startswith("moescale.") and call.module != __name__), None)
    at = f"at {own.line}" if own is not None else "outside the package"
    return (at, False) if collective is None else (f"in the collective {collective}, {at}", True)


def _collective(calls: Sequence[_Call]) -> str | None:
    """Return the innermost collective called by this package's innermost frame.

    Frames further out are callers, not waits. FSDP awaits in separate functions the collectives that others started.
    """
    for call in calls:
        if call.module == "moescale.runtime.expert_parallel" and call.function == "arrive":
            return "all_to_all_single"
        if call.module.startswith("torch.distributed.fsdp") and call.function in FSDP_WAITS:
            return FSDP_WAITS[call.function]
        if call.module.startswith("torch.distributed") and call.function in COLLECTIVES:
            return call.function
        if call.module.startswith("moescale."):
            return None
    return None
