"""Pipeline parallelism: every stage has a part of the layers, and passes activations on to the next.

It adds no activations: the first stage holds those of as many micro-batches as there are stages, pp times 1 / pp of the
layers' activations.
"""

from __future__ import annotations

from collections.abc import Iterable

from moescale.plan import MeshShape
from moescale.planner.axes.axis import Axis, LayerPasses, MicroBatch, divisors
from moescale.planner.ledger import Ledger
from moescale.planner.links import link_of
from moescale.planner.problem import Problem


class PipelineParallel(Axis):
    """Axis ``pp``."""

    name = "pp"
    divides = frozenset({"layers"})

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        return (size for size in divisors(left) if size <= problem.workload.config.num_layers)

    def communicate(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        problem, mesh = batch.problem, batch.mesh
        if mesh.pp == 1 or problem.is_outside(layers.kind):
            return
        link = link_of(problem.cluster, mesh.pp, mesh.tp * mesh.cp * mesh.dp_shard)
        hop = batch.hidden_bytes / link.bytes_per_second + link.latency_seconds
        share = mesh.pp / problem.workload.config.num_layers  # of one hop per stage, for each of the stage's layers
        ledger.communicate(self.name, layers.forward, hop * share, 0.0)
        ledger.communicate(self.name, layers.backward, hop * share, 0.0)

    def communicate_once(
        self, batch: MicroBatch, ledger: Ledger, exposed: dict[str, float], hidden: dict[str, float]
    ) -> None:
        """The first and last stages idle while a micro-batch passes the others (1F1B, Narayanan et al. 2021)."""
        if batch.mesh.pp > 1:
            exposed["pipeline bubble"] = (batch.mesh.pp - 1) * sum(ledger.exposed.values())
