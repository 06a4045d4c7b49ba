"""Ends a run of several ranks in which one has died or hangs, and says on every rank which one, at what, in which step.

Every rank tells a key-value store once in a while that it lives, its step, and where its Python threads are: among
others the collective it waits in, which is read from their stacks and costs the training nothing. A rank whose own
progress stops for ``hang_seconds``, or that misses another one for ``lost_seconds``, names the culprit and leaves. So
no rank has to judge for the others, and it does not matter which one fails.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

from moescale.errors import MoescaleError
from moescale.runtime.ranks import Ranks

COLLECTIVES = (
    *("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_gather_object"),
    *("broadcast", "broadcast_object_list", "barrier", "all_gather", "gather_object"),
)


FAILED_PREFIX = "failed with: "
"""Of the reason of a rank that left because of another one."""


class RankFailure(MoescaleError):
    """A rank died, left or hangs; the run can be resumed from its newest checkpoint."""

    exit_status = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    count: int
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
        leave: Callable[[str], None] | None = None,
    ) -> None:
        """``leave`` is called with the verdict, in another thread; by default it prints it and ends the process."""
        self.ranks = ranks
        self.hang_seconds = hang_seconds
        self.lost_seconds = lost_seconds
        self.interval_seconds = interval_seconds
        self._leave = leave or self._print_and_exit
        self._store = store
        self._main_thread = threading.get_ident()
        self._step, self._phase, self._progressed = 0, "start", time.monotonic()
        self._count = 0
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch. A collective: every rank's first beat is there when it returns."""
        self._beat()
        self.ranks.gather(None)
        self._thread = threading.Thread(target=self._watch, name="moescale-watchdog", daemon=True)
        self._thread.start()

    def progress(self, step: int, phase: str) -> None:
        """Note that ``step`` steps are done and that ``phase`` of the next one begins."""
        self._step, self._phase, self._progressed = step, phase, time.monotonic()

    def stop(self, left: str | None = None) -> None:
        """End watching; with ``left`` tell the others why this rank goes before them."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(self.interval_seconds + 1)
        if left is not None:
            self._try_store(lambda: self._beat(left))

    def diagnose(self, cause: str) -> str:
        """Who is to blame that a collective failed on this rank; waits until the others had time to tell.

        Args:
            cause: the error as the collective raised it.
        """
        place = self._my_beat().place
        deadline = time.monotonic() + self.lost_seconds
        while time.monotonic() < deadline:
            if not self._try_store(self._read):
                return self._verdict(0, "is gone with the store that it holds", place, cause)
            for rank, (beat, _) in sorted(self._seen.items()):
                if beat.left is not None and not beat.left.startswith(FAILED_PREFIX):
                    return self._verdict(rank, f"has left: {beat.left}", place, cause)
            lost = [
                rank for rank, (_, since) in self._seen.items() if time.monotonic() - since > 5 * self.interval_seconds
            ]
            if lost:
                return self._verdict(min(lost), "died or is out of reach", place, cause)
            time.sleep(self.interval_seconds / 2)
        return self._verdict(None, "", place, cause)

    def _watch(self) -> None:
        store_failing_since = None
        while not self._stopped.wait(self.interval_seconds):
            if self._try_store(self._beat_and_read):
                store_failing_since = None
            else:
                store_failing_since = store_failing_since or time.monotonic()
                if time.monotonic() - store_failing_since > self.lost_seconds:
                    return self._leave(self._verdict(0, "is gone with the store that it holds", self._my_beat().place))
            now = time.monotonic()
            for rank, (beat, since) in sorted(self._seen.items()):
                if beat.left is None and now - since > self.lost_seconds:
                    return self._leave(self._verdict(rank, "died or is out of reach", self._my_beat().place))
            if now - self._progressed > self.hang_seconds:
                return self._leave(self._verdict(self._slowest(), "hangs", self._my_beat().place))

    def _slowest(self) -> int:
        """The rank that the others wait for: of those not in a collective, or else of all, the furthest behind."""
        beats = {rank: beat for rank, (beat, _) in self._seen.items()} | {self.ranks.rank: self._my_beat()}
        return min(beats, key=lambda rank: (beats[rank].in_collective, beats[rank].step, rank))

    def _verdict(self, culprit: int | None, what: str, place: str, cause: str | None = None) -> str:
        text = f"rank {self.ranks.rank} of {self.ranks.size}, step {self._step + 1} ({self._phase}), {place}: "
        if culprit is None:
            text += "a collective failed, though every rank answers"
        else:
            text += f"rank {culprit} {what}"
            beat = self._my_beat() if culprit == self.ranks.rank else self._seen.get(culprit, (None, 0))[0]
            if beat is not None and beat.left is None:
                text += f"; last seen in step {beat.step + 1} ({beat.phase}), {beat.place}"
        if cause is not None:
            text += f" [{cause.strip().splitlines()[0][:200]}]"
        return text + ". The same command resumes from the newest checkpoint"

    def _beat_and_read(self) -> None:
        self._beat()
        self._read()

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

    def _try_store(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except RuntimeError:  # what every kind of store error derives from
            return False
        return True

    def _my_beat(self, left: str | None = None) -> Beat:
        place, in_collective = _place(sys._current_frames(), self._main_thread)
        return Beat(
            count=self._count,
            step=self._step,
            phase=self._phase,
            place=place,
            in_collective=in_collective,
            left=left,
        )

    def _print_and_exit(self, verdict: str) -> None:
        print(f"error: {verdict}", file=sys.stderr, flush=True)
        os._exit(RankFailure.exit_status)  # the main thread is stuck and cannot be asked


def _place(frames: dict[int, FrameType], main_thread: int) -> tuple[str, bool]:
    """Where a process is: the collective one of its threads is in, or else the main thread's innermost own line."""
    for frame in frames.values():
        collective = _collective(frame)
        if collective is not None:
            return f"in the collective {collective}", True
    own: FrameType | None = frames.get(main_thread)
    while own is not None:
        if "moescale" in own.f_code.co_filename and own.f_globals.get("__name__") != __name__:
            return f"at {os.path.basename(own.f_code.co_filename)}:{own.f_lineno}", False
        own = own.f_back
    return "outside the package", False


def _collective(frame: FrameType) -> str | None:
    """The collective called by the innermost frames, and the function of torch or of this package that called it."""
    current: FrameType | None = frame
    for _ in range(6):  # the waiting itself is a few frames below the call
        if current is None:
            return None
        name, module = current.f_code.co_name, str(current.f_globals.get("__name__"))
        if name in COLLECTIVES and module.startswith("torch.distributed"):
            return name
        if name == "arrive" and module == "moescale.runtime.expert_parallel":
            return "all_to_all_single"
        current = current.f_back
    return None
