"""What a mesh axis tells the planner. Each axis overrides what it has; the rest costs nothing.

To add one: a field of :class:`moescale.plan.MeshShape`, a file here, a place in the two orders of
:mod:`moescale.planner.axes.registry`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from moescale.config import ModelConfig
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.ledger import Ledger, Pass
from moescale.planner.problem import Problem
from moescale.planner.request import IN_COMPUTE_DTYPE, Gemms, PlanRequest
from moescale.planner.workload import LayerKind

Part = Literal["sequences", "layers", "features", "tokens", "experts", "weights"]


@dataclass(frozen=True, kw_only=True)
class Division:
    """Into how many shares a mesh divides each part of the work: the sizes of the axes that divide it, multiplied."""

    sequences: int = 1
    """Those of a step."""
    layers: int = 1
    features: int = 1
    """Dims of weights and activations of operators whose ``tp`` is ``shard``."""
    tokens: int = 1
    """Those of a sequence."""
    experts: int = 1
    """Weights with an expert dim that is summed away (:func:`moescale.operators.is_routed`)."""
    weights: int = 1
    """What of a layer's weights and states a rank keeps; it computes with them gathered."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch of a plan, on one rank."""

    problem: Problem
    mesh: MeshShape
    division: Division
    sequences: int
    sharding: str
    """The plan's ``dense_sharding``."""
    gradient: str
    """In which gradients are accumulated and reduced."""
    gemms: Gemms = IN_COMPUTE_DTYPE

    @functools.cached_property
    def dims(self) -> dict[str, int]:
        """Sizes of the operators' dims, with the tokens that the rank computes."""
        return self.problem.dims(self.sequences, self.division.tokens)

    @property
    def hidden_bytes(self) -> int:
        """What the hidden states take between two layers."""
        return self.dims["n"] * self.dims["h"] * self.problem.itemsize


@dataclass(frozen=True, kw_only=True)
class LayerPasses:
    """Forward and backward of the layers of one kind in a micro-batch."""

    kind: LayerKind
    plan: LayerPlan
    forward: Pass
    backward: Pass


class Axis:
    """One axis of the mesh."""

    name: ClassVar[str]
    """A field of :class:`~moescale.plan.MeshShape`, and the decision of a plan."""
    divides: ClassVar[frozenset[Part]]
    takes_ranks: ClassVar[bool] = True
    """False: it is laid over ranks that other axes have taken."""
    hidden_beneath: ClassVar[tuple[str, ...]] = ("forward", "backward")
    """Spans of a step's timeline that hide its communication, by how their names begin; none: the backward's end."""

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        """Return the sizes it may have, in the order of preference.

        ``mesh`` has the sizes of the axes before it in ``registry.AXES`` and 1 for all others; ``left`` is how many
        ranks they leave.
        """
        return divisors(left)

    def multiple(self, request: PlanRequest, config: ModelConfig) -> tuple[int, str]:
        """Return a number that each of its sizes divides, and the words for it in an error about a pinned size."""
        return request.runtime_gpus, f"compile.runtime_gpus ({request.runtime_gpus})"

    def communicate(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Account what ``layers``, or what is outside the layers, communicate in both passes of a micro-batch."""

    def communicate_once(
        self, batch: MicroBatch, ledger: Ledger, exposed: dict[str, float], hidden: dict[str, float]
    ) -> None:
        """Account in ``exposed`` and ``hidden`` what comes once a step; ``ledger`` is that of one micro-batch."""

    def kept_bytes(self, batch: MicroBatch, kind: LayerKind, dropped: frozenset[str]) -> Iterable[float]:
        """Return what one layer keeps from its forward to its backward because of the axis.

        ``dropped`` names the tensors that are recomputed instead.
        """
        return ()

    def micro_batch_bytes(self, batch: MicroBatch) -> dict[str, float]:
        """Return what is there during a whole micro-batch because of the axis, by class; weights sharded by FSDP2."""
        return {}

    def outside_bytes(self, batch: MicroBatch) -> dict[str, float]:
        """Return what is no part of what torch's allocator hands out at the peak, by class."""
        return {}


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
