"""Expert parallelism: every rank has a part of each layer's routed experts, and tokens' rows go to theirs.

The axis is laid over the data-parallel ranks of a scale unit, ``dp_shard * cp``, and takes none of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from moescale.config import ModelConfig
from moescale.plan import MeshShape
from moescale.planner.axes.axis import Axis, LayerPasses, MicroBatch, divisors
from moescale.planner.exchange import PeerExchange, reads_peers, row_factor
from moescale.planner.ledger import Ledger
from moescale.planner.links import all_to_all_seconds
from moescale.planner.problem import Problem
from moescale.planner.request import PlanRequest
from moescale.planner.workload import LayerKind


class ExpertParallel(Axis):
    """Axis ``ep``."""

    name = "ep"
    divides = frozenset({"experts"})
    takes_ranks = False
    hidden_beneath = ("forward, moe", "backward, moe")

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        """Return divisors of ``dp_shard * cp``; ``left`` is what ``dp_shard`` will be."""
        config = problem.workload.config
        if not config.num_moe_layers:
            return (1,)
        return (size for size in divisors(left * mesh.cp) if (config.num_experts or 1) % size == 0)

    def multiple(self, request: PlanRequest, config: ModelConfig) -> tuple[int, str]:
        whole, words = super().multiple(request, config)
        words += f" and of model.num_experts ({config.num_experts or 'none, so 1'})"
        return math.gcd(whole, config.num_experts or 1), words

    def communicate(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Dispatch rows to their experts and combine the results; once more where the block is recomputed."""
        if batch.mesh.ep == 1 or not layers.kind.is_routed:
            return
        if reads_peers(batch.mesh, batch.sharding, batch.problem.cluster):
            self._read_peers(batch, layers, ledger)
        else:
            self._all_to_all(batch, layers, ledger)

    def _read_peers(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Read peers' rows and results: in the order of the graph, at the same time as nothing."""
        there, back = self.peer_exchange(batch).pass_seconds(batch.problem.cluster)
        plan = layers.plan
        again = there * plan.recomputed_share(layers.kind.count) if plan.recompute == "block" else 0.0
        ledger.communicate(self.name, layers.forward, there, 0.0)
        ledger.communicate(self.name, layers.backward, back + again, 0.0)

    def _all_to_all(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Send rows while the operators run that say so (``Operator.overlaps``)."""
        sent = self._row_bytes(batch) * self.row_factor(batch)
        both_ways = 2 * all_to_all_seconds(batch.problem.cluster, sent, batch.mesh.ep, batch.mesh.tp)
        names = frozenset(op.name for op in layers.kind.operators if op.overlaps == self.name)
        in_forward, in_backward = layers.forward.seconds_of(names), layers.backward.seconds_of(names)
        ledger.communicate(self.name, layers.forward, both_ways, in_forward)
        ledger.communicate(self.name, layers.backward, both_ways, in_backward)
        if layers.plan.recompute == "block":
            share = layers.plan.recomputed_share(layers.kind.count)
            ledger.communicate(self.name, layers.backward, share * both_ways, share * in_forward)

    def kept_bytes(self, batch: MicroBatch, kind: LayerKind, dropped: frozenset[str]) -> Iterable[float]:
        if batch.mesh.ep > 1 and kind.is_routed:
            yield self.exchanged_rows(batch)
            yield self.padding(batch, keeps_pre_activation=not dropped)

    def outside_bytes(self, batch: MicroBatch) -> dict[str, float]:
        """The block of memory that a rank shows its peers."""
        if not reads_peers(batch.mesh, batch.sharding, batch.problem.cluster):
            return {}
        return {"symmetric memory": float(self.peer_exchange(batch).symmetric_bytes())}

    def row_factor(self, batch: MicroBatch) -> float:
        """Rows of the fullest rank behind an all-to-all, as :func:`moescale.planner.exchange.row_factor`."""
        problem = batch.problem
        return row_factor(problem.workload.config, batch.mesh, problem.request.router_imbalance)

    def peer_exchange(self, batch: MicroBatch) -> PeerExchange:
        """The exchange through peers' memory."""
        in_fp8 = batch.gemms.expert_gemms == "fp8"
        config, itemsize = batch.problem.workload.config, batch.problem.itemsize
        return PeerExchange.of(config, batch.dims, batch.mesh.ep, itemsize, in_fp8=in_fp8)

    def exchanged_rows(self, batch: MicroBatch) -> float:
        """Behind an all-to-all the experts' input rows and their returned results are kept: they exist only as rows."""
        factor = self.row_factor(batch)
        # The exchange of two ranks returns padded slots too, others what was sent.
        returned = factor if batch.mesh.ep == 2 else 1.0
        return self._row_bytes(batch) * (returned + factor)

    def padding(self, batch: MicroBatch, *, keeps_pre_activation: bool) -> float:
        """Pre-activations of slots that hold no row, or of rows beyond an equal share."""
        more = batch.dims["n"] * batch.dims["k"] * (self.row_factor(batch) - 1)
        size = more * 2 * batch.dims["f"] * batch.problem.itemsize / batch.division.features
        return size if keeps_pre_activation else 0.0

    def _row_bytes(self, batch: MicroBatch) -> int:
        """What the rank's tokens take, once for every expert they go to."""
        return batch.dims["n"] * batch.dims["k"] * batch.dims["h"] * batch.problem.itemsize
