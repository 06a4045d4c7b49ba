"""One rank's knowledge of all ranks of a run, and its verdict when the run makes no progress.

A rank is blamed if it has left, or if it has sent no beat for ``lost_seconds``. If nothing has progressed for
``hang_seconds``, the rank that the others wait for is blamed. Times are passed in, in seconds of one clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from moescale.runtime.ranks import Ranks

FAILED_PREFIX = "failed with: "
"""Begins the reason of a rank that left because another one failed."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's report on itself."""

    count: int
    progress: int
    """Number of times the rank has reported progress."""
    step: int
    """Steps done."""
    phase: str
    place: str
    """The collective in which it waits, or the innermost line of this package that it runs."""
    in_collective: bool
    left: str | None = None
    """The reason for leaving, once it has left."""


class Judge:
    """Keeps the last beat of every other rank and derives verdicts from them. Thread-safe."""

    def __init__(
        self, ranks: Ranks, *, hang_seconds: float, lost_seconds: float, store_held_by_first: bool, now: float
    ) -> None:
        """``store_held_by_first``: the store lives in the first rank, not in a process outside the run."""
        self.ranks = ranks
        self.hang_seconds = hang_seconds
        self.lost_seconds = lost_seconds
        self.store_held_by_first = store_held_by_first
        self.store_failed = False
        self._seen: dict[int, tuple[Beat, float]] = {}
        self._progressed = self._answered = now

    def start(self, now: float) -> None:
        """Start counting silence at ``now``."""
        self._progressed = self._answered = now

    def note_progress(self, now: float) -> None:
        """Note progress of this rank."""
        self._progressed = now

    def note_beat(self, rank: int, beat: Beat, now: float) -> None:
        """Note the ``beat`` of another rank in the store, which may be the one already seen."""
        known = self._seen.get(rank)
        if known is None or known[0].count != beat.count:
            self._seen[rank] = (beat, now)
        if known is not None and known[0].progress != beat.progress:
            self._progressed = now

    def note_answer(self, now: float) -> None:
        """Note that the store has answered."""
        self._answered, self.store_failed = now, False

    def note_store_failure(self) -> None:
        """Note that the store refused to answer: its holder or the connection is gone."""
        self.store_failed = True

    def have_all_left(self) -> bool:
        """Return True if every other rank that has sent a beat has left."""
        return all(beat.left is not None for beat, _ in self._seen.copy().values())

    def find_failure(self, mine: Beat, now: float) -> str | None:
        """Return the verdict on the run, or None if nothing is wrong. ``mine`` is this rank's own state."""
        if now - self._answered > self.lost_seconds:
            what = "is gone" if self.store_failed else f"has not answered for {self.lost_seconds:.0f} s"
            return self._verdict_on_store(what, mine, mine.place)
        lost = self._silent_for(self.lost_seconds)
        if lost:
            beat = self._seen[lost[0]][0]
            what = "died or is out of reach" if beat.left is None else f"has left: {beat.left}"
            return self._verdict(lost[0], what, mine, mine.place)
        if now - self._progressed > self.hang_seconds:
            return self._verdict(self._slowest(mine), "hangs", mine, mine.place)
        return None

    def explain_failure(self, mine: Beat, place: str, cause: str, silent_seconds: float) -> str | None:
        """Return the verdict on a collective that failed at ``place`` with ``cause``; None if no rank is to blame yet.

        A rank without a beat for ``silent_seconds`` counts as gone.
        """
        for rank, (beat, _) in sorted(self._seen.copy().items()):
            if beat.left is not None and not beat.left.startswith(FAILED_PREFIX):
                return self._verdict(rank, f"has left: {beat.left}", mine, place, cause)
        if self.store_failed:
            return self._verdict_on_store("is gone", mine, place, cause)
        lost = self._silent_for(silent_seconds)
        return self._verdict(lost[0], "died or is out of reach", mine, place, cause) if lost else None

    def explain_without_culprit(self, mine: Beat, place: str, cause: str, now: float) -> str:
        """Return the verdict on such a failure when every rank has had time to report and none is to blame."""
        if now - self._answered > self.lost_seconds / 2:
            return self._verdict_on_store("does not answer", mine, place, cause)
        return self._verdict(None, "a collective failed, though every rank answers", mine, place, cause)

    def explain_own_failure(self, mine: Beat, cause: str) -> str:
        """Return the verdict when a thread of the watchdog itself has failed."""
        return self._verdict(None, "the watchdog could not go on", mine, "in a thread of its own", cause)

    def _silent_for(self, seconds: float) -> list[int]:
        """Return the ranks without a beat for that long, not counting the time in which the store did not answer."""
        return sorted(rank for rank, (_, since) in self._seen.copy().items() if self._answered - since > seconds)

    def _slowest(self, mine: Beat) -> int:
        """Return the rank that the others wait for: the furthest behind of those not in a collective, or of all."""
        beats = {rank: beat for rank, (beat, _) in self._seen.copy().items()} | {self.ranks.rank: mine}
        return min(beats, key=lambda rank: (beats[rank].in_collective, beats[rank].step, rank))

    def _verdict(self, culprit: int | None, what: str, mine: Beat, place: str, cause: str | None = None) -> str:
        text = f"rank {self.ranks.rank} of {self.ranks.size}, step {mine.step + 1} ({mine.phase}), {place}: "
        if culprit is None:
            text += what
        else:
            text += f"rank {culprit} {what}"
            beat = mine if culprit == self.ranks.rank else self._seen.get(culprit, (None, 0))[0]
            if beat is not None and beat.left is None:
                text += f"; last seen in step {beat.step + 1} ({beat.phase}), {beat.place}"
        if cause is not None:
            text += f" [{first_line(cause)}]"
        return text + ". The same command resumes from the newest checkpoint"

    def _verdict_on_store(self, what: str, mine: Beat, place: str, cause: str | None = None) -> str:
        if self.store_held_by_first:
            return self._verdict(0, f"died or is frozen: the store that it holds {what}", mine, place, cause)
        holder = "the machine of torchrun's store died or is frozen: the store"
        return self._verdict(None, f"{holder} {what}", mine, place, cause)


def first_line(text: str) -> str:
    """Return the first line of an error's message, shortened."""
    return (text.strip().splitlines() or ["no message"])[0][:200]
