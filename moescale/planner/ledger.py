"""Where the time of a micro-batch and of a step is added up: what of communication compute hides, and what not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

SLOWED = "slowed by communication"
"""What computation loses to collectives that run at the same time, a part of the time."""


@dataclass(kw_only=True)
class Pass:
    """One layer kind's forward or backward: its compute, and how much of that hides no communication yet."""

    count: float
    """Layers."""
    compute: dict[str, float]
    """Seconds by operator, of one layer."""
    recompute: float = 0.0
    free: float = field(init=False)

    def __post_init__(self) -> None:
        self.free = sum(self.compute.values()) + self.recompute

    def seconds_of(self, operators: Collection[str]) -> float:
        """Compute of the named operators, in one layer."""
        return sum(seconds for name, seconds in self.compute.items() if name in operators)


@dataclass(kw_only=True)
class Ledger:
    """Adds up seconds, by what they go to. A second of compute hides a second of communication once.

    What one axis has used is gone. Without that rule a faster operator could make a plan slower, by hiding less on
    several axes at a time.
    """

    exposed: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    hidden: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    free_backward: float = 0.0

    def add_compute(self, *passes: Pass) -> None:
        """Account the compute of all layers of the passes."""
        for part in passes:
            for name, seconds in part.compute.items():
                self.exposed[f"compute {name}"] += part.count * seconds
            if part.recompute:
                self.exposed["recompute"] += part.count * part.recompute

    def communicate(self, axis: str, part: Pass, seconds: float, beneath: float) -> None:
        """Account ``seconds`` per layer, of which compute hides up to ``beneath``."""
        covered = min(seconds, beneath, part.free)
        part.free -= covered
        self.exposed[f"communication {axis}"] += part.count * (seconds - covered)
        self.hidden[f"communication {axis}"] += part.count * covered
