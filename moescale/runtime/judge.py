"""What one rank knows of all ranks of a run, and whom it blames when the run does not get on.

A rank is blamed that has left, that has not been heard of for ``lost_seconds``, or, where nothing has progressed for
``hang_seconds``, the one that the others wait for. Times are passed in, in seconds of one clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from moescale.runtime.ranks import Ranks

FAILED_PREFIX = "failed with: "
"""Of the reason of a rank that left because of another one."""


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


class Judge:
    """Keeps the last beat of every other rank, and judges by them. Its methods may be called by several threads."""

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
        """Count silence from ``now`` on."""
        self._progressed = self._answered = now

    def note_progress(self, now: float) -> None:
        """This rank has got on."""
        self._progressed = now

    def note_beat(self, rank: int, beat: Beat, now: float) -> None:
        """The store holds ``beat`` of another rank, which may be the one seen before."""
        known = self._seen.get(rank)
        if known is None or known[0].count != beat.count:
            self._seen[rank] = (beat, now)
        if known is not None and known[0].progress != beat.progress:
            self._progressed = now

    def note_answer(self, now: float) -> None:
        """The store has answered."""
        self._answered, self.store_failed = now, False

    def note_store_failure(self) -> None:
        """The store has refused to answer: its holder is gone, or the connection is."""
        self.store_failed = True

    def have_all_left(self) -> bool:
        """Whether every other rank that was heard of has left."""
        return all(beat.left is not None for beat, _ in self._seen.copy().values())

    def find_failure(self, mine: Beat, now: float) -> str | None:
        """Return the verdict on the run, or None where nothing is wrong. ``mine`` is this rank's own state."""
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
        """Return whom to blame for a collective that failed at ``place`` with ``cause``; None where nobody is yet.

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
        """Return what to say of such a failure when every rank has had time to tell."""
        if now - self._answered > self.lost_seconds / 2:
            return self._verdict_on_store("does not answer", mine, place, cause)
        return self._verdict(None, "a collective failed, though every rank answers", mine, place, cause)

    def explain_own_failure(self, mine: Beat, cause: str) -> str:
        """The verdict where a thread of the watchdog itself has failed."""
        return self._verdict(None, "the watchdog could not go on", mine, "in a thread of its own", cause)

    def _silent_for(self, seconds: float) -> list[int]:
        """Ranks without a beat for so long. The time in which the store did not answer is not held against them."""
        return sorted(rank for rank, (_, since) in self._seen.copy().items() if self._answered - since > seconds)

    def _slowest(self, mine: Beat) -> int:
        """The rank that the others wait for: of those not in a collective, or else of all, the furthest behind."""
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
    """The first line of an error's message, shortened."""
    return (text.strip().splitlines() or ["no message"])[0][:200]
