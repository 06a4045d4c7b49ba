"""Context parallelism: every rank has a part of each sequence's tokens, and attention meets the keys of all."""

from __future__ import annotations

from collections.abc import Iterable

from moescale.plan import MeshShape
from moescale.planner.axes.axis import Axis, LayerPasses, MicroBatch, divisors
from moescale.planner.ledger import Ledger
from moescale.planner.links import link_of
from moescale.planner.problem import Problem


class ContextParallel(Axis):
    """Axis ``cp``. Weights are sharded over it, too: its ranks hold the same ones."""

    name = "cp"
    divides = frozenset({"tokens", "weights"})

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        """Return those that give every rank an early and a late piece of a sequence, as long: attention is causal."""
        length = problem.request.sequence_length
        return (size for size in divisors(left) if size == 1 or length % (2 * size) == 0)

    def communicate(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Send keys and values around the ring while attention runs (Liu et al. 2023); gradients go with them, too."""
        problem, cp = batch.problem, batch.mesh.cp
        if cp == 1 or problem.is_outside(layers.kind):
            return
        width = problem.workload.config.key_value_width
        link = link_of(problem.cluster, cp, batch.mesh.tp)
        once = (cp - 1) * (batch.dims["n"] * width * problem.itemsize / link.bytes_per_second + link.latency_seconds)
        attention = frozenset(op.name for op in layers.kind.operators if op.kind == "attention")
        ledger.communicate(self.name, layers.forward, once, layers.forward.seconds_of(attention))
        ledger.communicate(self.name, layers.backward, 2 * once, layers.backward.seconds_of(attention))
