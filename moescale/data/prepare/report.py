"""The report of `prepare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moescale.data.corpus.manifest import FIRST_POSITIONS, BadItems, Manifest, SplitCounts
from moescale.errors import printable


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """Accounts of one call; ``tokens_in == tokens_packed + tokens_dropped`` for every split."""

    output: Path
    unchanged: bool
    """True if the output existed already, made from the same input, so that nothing was done."""
    sequence_length: int
    splits: dict[str, SplitCounts]
    bad: dict[str, BadItems]
    skipped: dict[str, BadItems]
    read: dict[str, BadItems]
    seconds: float
    num_workers: int
    memory_limited: bool = False
    """Fewer processes than cores were used, for want of memory."""
    notices: tuple[str, ...] = ()
    """The interpretation of the records."""

    @staticmethod
    def of(
        manifest: Manifest,
        *,
        output: Path,
        unchanged: bool,
        seconds: float,
        num_workers: int,
        memory_limited: bool = False,
        notices: Sequence[str] = (),
    ) -> PrepareReport:
        return PrepareReport(
            output=output,
            unchanged=unchanged,
            sequence_length=manifest.sequence_length,
            splits=manifest.counts,
            bad=manifest.bad,
            skipped=manifest.skipped,
            read=manifest.read,
            seconds=seconds,
            num_workers=num_workers,
            memory_limited=memory_limited,
            notices=tuple(notices),
        )

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens_in(self) -> int:
        """Tokens of all documents, their end tokens included."""
        return sum(counts.tokens_in for counts in self.splits.values())

    @property
    def tokens_packed(self) -> int:
        return sum(counts.tokens_packed for counts in self.splits.values())

    @property
    def tokens_dropped(self) -> int:
        return sum(counts.tokens_dropped for counts in self.splits.values())

    @property
    def num_bad(self) -> int:
        return sum(items.count for items in self.bad.values())

    def to_dict(self) -> dict[str, Any]:
        totals = {name: getattr(self, name) for name in ("documents", "tokens_in", "tokens_packed", "tokens_dropped")}
        return {**asdict(self), "output": str(self.output), **totals}

    def to_text(self) -> str:
        head = f"{self.output}: "
        if self.unchanged:
            head += "unchanged, prepared from the same input before"
        else:
            speed = self.tokens_in / self.seconds if self.seconds else 0.0
            workers = "1 process" if self.num_workers == 1 else f"{self.num_workers} processes"
            workers += "; memory_gigabytes allows no more" if self.memory_limited else ""
            head += f"prepared in {self.seconds:,.1f} s by {workers} ({speed:,.0f} tokens/s)"
        lines = [head]
        for split, counts in self.splits.items():
            lines.append(
                f"  {split}: {counts.num_sequences:,} sequences of {counts.documents:,} documents; "
                f"{counts.tokens_in:,} tokens in, {counts.tokens_packed:,} packed, {counts.tokens_dropped:,} dropped"
            )
            if counts.num_sequences == 0:
                lines[-1] += f"; too few for one sequence, so there is no {split} split"
                if self.tokens_in and self.documents:
                    lines[-1] += f": prepare.validation_fraction {self._least_fraction():.2g} would make one"
        lines += [f"  {notice}" for notice in self.notices]
        if len(self.read) > 1 or "text" not in self.read:
            for kind, items in self.read.items():
                lines.append(f"  read as {kind}: {items.count:,} ({_listed(items)})")
        for kind, items in self.bad.items():
            lines.append(f"  left out, {kind.replace('_', ' ')}: {items.count:,} ({_listed(items)})")
            if items.detail:
                lines[-1] += f": {items.detail}"
        for reason, items in self.skipped.items():
            lines.append(f"  skipped, {reason}: {items.count:,}" + (f" ({_listed(items)})" if items.first else ""))
        return "\n".join(map(printable, lines))

    def _least_fraction(self) -> float:
        """Return a fraction of the documents that most likely fills a sequence, by their mean length."""
        return min(0.5, 2 * max(self.sequence_length / (self.tokens_in / self.documents), 2.0) / self.documents)


def _listed(items: BadItems) -> str:
    return ", ".join(items.first) + (", ..." if items.count > len(items.first) >= FIRST_POSITIONS else "")
