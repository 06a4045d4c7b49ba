"""Replicas: every scale unit has a whole copy of the weights and its own sequences."""

from __future__ import annotations

from collections.abc import Iterable

from moescale.formats import DTYPE_BYTES
from moescale.plan import MeshShape
from moescale.planner.axes.axis import Axis, MicroBatch, divisors
from moescale.planner.ledger import SLOWED, Ledger
from moescale.planner.links import ring_seconds
from moescale.planner.problem import Problem


class ReplicaParallel(Axis):
    """Axis ``dp_replicate``."""

    name = "dp_replicate"
    divides = frozenset({"sequences"})
    hidden_beneath = ()

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        """Return copies of scale units of the GPUs asked for, or of any, fewer GPUs per copy first."""
        units = [problem.request.plan_gpus] if problem.request.plan_gpus else divisors(left)
        return (left // unit for unit in units)

    def communicate_once(
        self, batch: MicroBatch, ledger: Ledger, exposed: dict[str, float], hidden: dict[str, float]
    ) -> None:
        """Sum this rank's share of the gradients over the replicas.

        With sharded weights beneath what the last micro-batch's backward leaves free.
        """
        if batch.mesh.dp_replicate == 1:
            return
        key = f"communication {self.name}"
        if batch.sharding == "zero1":
            exposed[key] = self._sum_of_updated(batch)
            return
        seconds = self._sum_of_sharded(batch)
        exposed[key] = max(0.0, seconds - ledger.free_backward)
        hidden[key] = min(seconds, ledger.free_backward)
        slowed = batch.problem.cluster.overlap_cost * hidden[key]
        exposed[SLOWED] = exposed.get(SLOWED, 0.0) + slowed

    def _sum_of_sharded(self, batch: MicroBatch) -> float:
        mesh = batch.mesh
        shard = batch.problem.rank_parameters(mesh) * DTYPE_BYTES[batch.gradient]
        return 2 * ring_seconds(batch.problem.cluster, shard, mesh.dp_replicate, mesh.copy_gpus)

    def _sum_of_updated(self, batch: MicroBatch) -> float:
        """In fp32, of the weights that this rank updates; in and out of buckets."""
        problem, mesh = batch.problem, batch.mesh
        share = problem.updated_parameters(mesh, batch.sharding)
        reduced = 2 * ring_seconds(problem.cluster, share * 4, mesh.dp_replicate, mesh.dp_shard)
        return reduced + share * 2 * (4 + problem.trained_itemsize) / problem.cluster.memory_bytes_per_second

    def micro_batch_bytes(self, batch: MicroBatch) -> dict[str, float]:
        """Sums of the micro-batches' gradients, before replicas add theirs; a step of one micro-batch has none."""
        request = batch.problem.request
        at_once = request.sequence_length * batch.sequences * batch.division.sequences
        if batch.mesh.dp_replicate == 1 or request.tokens_per_step <= at_once:
            return {}
        return {"sums for replicas": batch.problem.rank_parameters(batch.mesh) * DTYPE_BYTES[batch.gradient]}
