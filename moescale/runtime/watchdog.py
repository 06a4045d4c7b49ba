"""Ends a run of several ranks in which one has died or hangs, and says on every rank which one, at what, in which step.

Every rank tells a key-value store once in a while that it lives, its step, and where its Python threads are: among
others the collective it waits in, which is read from their stacks and costs the training nothing. A rank that sees no
progress for ``hang_seconds``, of its own or of any other, or that misses another one for ``lost_seconds``, names the
culprit and leaves. So no rank has to judge for the others, and it does not matter which one fails; and who waits in a
collective for a slow rank waits as long as that one gets on.

The process that holds the store may be the one that freezes, and a call to a frozen store never returns: its timeout
bounds the wait for a key, not for an answer. Therefore one thread talks to the store and another one judges by the
time since the store answered last.
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

from moescale.errors import MoescaleError
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
"""Functions of torch's FSDP that start or await a collective, which they may call by other names than torch.distributed
does."""

FAILED_PREFIX = "failed with: "
"""Of the reason of a rank that left because of another one."""


class RankFailure(MoescaleError):
    """A rank died, left or hangs; the run can be resumed from its newest checkpoint."""

    exit_status = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    count: int
    progress: int
    """How often the rank has reported progress."""
    step: int
    """Steps done."""
    phase: str
    place: str
    """The collective that it waits in, or the innermost line of this package that it runs."""
    in_collective: bool
    left: str | None = None
    """Why it left, once it has."""


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
    ) -> None:
        """``leave`` is called with the verdict, in another thread; by default it prints it and ends the process.

        ``store_held_by_first``: the store lives in the first rank, not in a process beside the ranks.
        """
        self.ranks = ranks
        self.hang_seconds = hang_seconds
        self.lost_seconds = lost_seconds
        self.interval_seconds = interval_seconds
        self._leave = leave or self._print_and_exit
        self._store_held_by_first = store_held_by_first
        # A connection of its own: the main thread may wait in the other one for minutes, for a key of a slow rank.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # absent from torch's stubs
        self._store.set_timeout(timedelta(seconds=lost_seconds))
        self._main_thread = threading.get_ident()
        self._step, self._phase = 0, "start"
        self._progressed = time.monotonic()  # some rank, as far as this one knows
        self._count = self._num_reports = 0
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._answered, self._store_failed = time.monotonic(), False
        self._left: str | None = None
        self._stopped, self._judged = threading.Event(), threading.Event()
        self._talker = threading.Thread(target=self._talk, name="moescale-watchdog-store", daemon=True)
        self._judge = threading.Thread(target=self._watch, name="moescale-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch. A collective: every rank's first beat is there when it returns."""
        self._beat()
        self.ranks.gather(None)
        self._progressed = self._answered = time.monotonic()
        self._talker.start()
        self._judge.start()

    def progress(self, step: int, phase: str) -> None:
        """Note that ``step`` steps are done and that ``phase`` of the next one begins."""
        self._num_reports += 1
        self._step, self._phase, self._progressed = step, phase, time.monotonic()

    def stop(self, left: str | None = None) -> None:
        """End watching; with ``left`` tell the others why this rank goes before them."""
        self._left = left
        self._judged.set()
        self._stopped.set()
        if self._talker.ident is not None:
            self._talker.join(self.interval_seconds + 1)  # no longer: it may be stuck at a store that is frozen
        if left is not None and self.ranks.is_first and self._store_held_by_first:
            self._let_others_read(time.monotonic() + 3 * self.interval_seconds)

    def _let_others_read(self, deadline: float) -> None:
        """Stay, with the store that goes with this rank, until the others leave as well or have had time to read it."""
        while time.monotonic() < deadline and not self._store_failed and not self._talker.is_alive():
            if all(beat.left is not None for beat, _ in self._seen.copy().values()):
                return
            time.sleep(self.interval_seconds / 20)
            try:
                self._read()
            except RuntimeError:
                return

    def diagnose(self, error: Exception) -> str:
        """Who is to blame that a collective failed on this rank; waits until the others had time to tell.

        Args:
            error: what the collective raised.
        """
        self._judged.set()  # the judge would answer without the cause
        place, cause = _place_of_error(error), str(error)
        deadline = time.monotonic() + self.lost_seconds
        while time.monotonic() < deadline:
            for rank, (beat, _) in sorted(self._seen.copy().items()):
                if beat.left is not None and not beat.left.startswith(FAILED_PREFIX):
                    return self._verdict(rank, f"has left: {beat.left}", place, cause)
            if self._store_failed:
                return self._verdict_on_store("is gone", place, cause)
            lost = self._silent_for(5 * self.interval_seconds)
            if lost:
                return self._verdict(lost[0], "died or is out of reach", place, cause)
            time.sleep(self.interval_seconds / 2)
        if time.monotonic() - self._answered > self.lost_seconds / 2:
            return self._verdict_on_store("does not answer", place, cause)
        return self._verdict(None, "a collective failed, though every rank answers", place, cause)

    def _talk(self) -> None:
        """What the thread does that may be stuck at the store: tell the others of this rank, read of them."""
        while True:
            stopped = self._stopped.wait(self.interval_seconds)
            if stopped and self._left is None:
                return
            try:
                self._beat(self._left)
                self._read()
                self._answered, self._store_failed = time.monotonic(), False
            except RuntimeError:  # what every kind of store error derives from
                self._store_failed = True
            if stopped:
                return

    def _watch(self) -> None:
        while not self._judged.wait(self.interval_seconds):
            verdict = self._find_failure(time.monotonic())
            if verdict is not None:
                return self._leave(verdict)

    def _find_failure(self, now: float) -> str | None:
        if now - self._answered > self.lost_seconds:
            what = "is gone" if self._store_failed else f"has not answered for {self.lost_seconds:.0f} s"
            return self._verdict_on_store(what, self._my_beat().place)
        lost = self._silent_for(self.lost_seconds)
        if lost:
            beat = self._seen[lost[0]][0]
            what = "died or is out of reach" if beat.left is None else f"has left: {beat.left}"
            return self._verdict(lost[0], what, self._my_beat().place)
        if now - self._progressed > self.hang_seconds:
            return self._verdict(self._slowest(), "hangs", self._my_beat().place)
        return None

    def _silent_for(self, seconds: float) -> list[int]:
        """Ranks without a beat for so long. The time in which the store did not answer is not held against them."""
        return sorted(rank for rank, (_, since) in self._seen.copy().items() if self._answered - since > seconds)

    def _slowest(self) -> int:
        """The rank that the others wait for: of those not in a collective, or else of all, the furthest behind."""
        beats = {rank: beat for rank, (beat, _) in self._seen.copy().items()} | {self.ranks.rank: self._my_beat()}
        return min(beats, key=lambda rank: (beats[rank].in_collective, beats[rank].step, rank))

    def _verdict(self, culprit: int | None, what: str, place: str, cause: str | None = None) -> str:
        text = f"rank {self.ranks.rank} of {self.ranks.size}, step {self._step + 1} ({self._phase}), {place}: "
        if culprit is None:
            text += what
        else:
            text += f"rank {culprit} {what}"
            beat = self._my_beat() if culprit == self.ranks.rank else self._seen.get(culprit, (None, 0))[0]
            if beat is not None and beat.left is None:
                text += f"; last seen in step {beat.step + 1} ({beat.phase}), {beat.place}"
        if cause is not None:
            text += f" [{first_line(cause)}]"
        return text + ". The same command resumes from the newest checkpoint"

    def _verdict_on_store(self, what: str, place: str, cause: str | None = None) -> str:
        if self._store_held_by_first:
            return self._verdict(0, f"died or is frozen: the store that it holds {what}", place, cause)
        return self._verdict(None, f"the machine of torchrun's store died or is frozen: the store {what}", place, cause)

    def _beat(self, left: str | None = None) -> None:
        self._count += 1
        self._store.set(f"beat/{self.ranks.rank}", json.dumps(vars(self._my_beat(left))))

    def _read(self) -> None:
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        if not others:
            return
        for rank, text in zip(others, self._store.multi_get([f"beat/{rank}" for rank in others]), strict=True):
            beat = Beat(**json.loads(text))
            known = self._seen.get(rank)
            if known is None or known[0].count != beat.count:
                self._seen[rank] = (beat, time.monotonic())
            if known is not None and known[0].progress != beat.progress:
                self._progressed = time.monotonic()

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
        print(f"error: {verdict}", file=sys.stderr, flush=True)
        os._exit(RankFailure.exit_status)  # the main thread is stuck and cannot be asked


def first_line(text: str) -> str:
    """The first line of an error's message, shortened."""
    return (text.strip().splitlines() or ["no message"])[0][:200]


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
    """The calls of a thread, innermost first."""
    return _calls((frame, line) for frame, line in traceback.walk_stack(frame))


def _place(frames: dict[int, FrameType], main_thread: int) -> tuple[str, bool]:
    """Where a process is: the collective one of its threads is in, or else the main thread's innermost own line."""
    main = _stack(frames[main_thread]) if main_thread in frames else []
    # Backward on a GPU runs, and waits, in threads of autograd's own.
    for calls in (main, *(_stack(frame) for thread, frame in frames.items() if thread != main_thread)):
        place, in_collective = _place_of(calls)
        if in_collective:
            return place, True
    return _place_of(main)


def _place_of_error(error: BaseException) -> str:
    """Where ``error`` was raised: its stack is unwound by now, its traceback is not."""
    return _place_of(_calls(reversed(list(traceback.walk_tb(error.__traceback__)))))[0]


def _place_of(calls: Sequence[_Call]) -> tuple[str, bool]:
    collective = _collective(calls)
    own = next((call for call in calls if call.module.startswith("moescale.") and call.module != __name__), None)
    at = f"at {own.line}" if own is not None else "outside the package"
    return (at, False) if collective is None else (f"in the collective {collective}, {at}", True)


def _collective(calls: Sequence[_Call]) -> str | None:
    """The innermost collective that was called since this package's innermost own call, which is not looked past:
    what called that one is no wait. FSDP waits in functions of its own for what it has started in others.
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
