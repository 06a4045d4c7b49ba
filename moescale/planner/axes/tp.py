"""Tensor parallelism: every rank has a part of the features of each layer's weights and activations.

What of an operator it divides is registered with the operator (``Operator.tp``).
"""

from __future__ import annotations

from collections.abc import Iterable

from moescale.plan import MeshShape
from moescale.planner.axes.axis import Axis, LayerPasses, MicroBatch, divisors
from moescale.planner.ledger import Ledger
from moescale.planner.links import ring_seconds
from moescale.planner.problem import Problem


class TensorParallel(Axis):
    """Axis ``tp``, within a node."""

    name = "tp"
    divides = frozenset({"features"})

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        config = problem.workload.config
        for size in divisors(left):
            divides_model = config.num_heads % size == config.expert_intermediate_size % size == 0
            if divides_model and size <= problem.cluster.gpus_per_node:
                yield size

    def communicate(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Add up what attention and feed-forward result in: an all-reduce after each, in both passes."""
        if batch.mesh.tp == 1 or batch.problem.is_outside(layers.kind):
            return
        seconds = 2 * 2 * ring_seconds(batch.problem.cluster, batch.hidden_bytes, batch.mesh.tp, 1)
        ledger.communicate(self.name, layers.forward, seconds, 0.0)
        ledger.communicate(self.name, layers.backward, seconds, 0.0)
