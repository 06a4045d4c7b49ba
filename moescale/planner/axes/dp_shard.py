"""Sharded data parallelism: ranks of a scale unit have their own sequences and share the weights they all need.

With ``dense_sharding`` fsdp a rank keeps its share of every weight (FSDP2, over the ranks of ``dp_shard`` and ``cp``).
A layer's weights are gathered ahead of each of its passes, and its gradients reduced behind the backward. With zero1 a
rank keeps all weights but those of other ranks' experts, and updates its share of them once a step. In both, routed
experts are shared by the ranks that hold the same ones, ``1 / ep`` of all.
"""

from __future__ import annotations

from collections.abc import Iterable

from moescale.formats import DTYPE_BYTES
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.axes.axis import Axis, LayerPasses, MicroBatch
from moescale.planner.ledger import Ledger
from moescale.planner.links import ring_seconds
from moescale.planner.problem import Problem
from moescale.planner.shares import expert_padding
from moescale.planner.workload import LayerKind

BUCKET_ELEMENTS = 64 * 2**20
"""Of the sums of gradients with whole weights (``runtime.zero``)."""


class ShardedDataParallel(Axis):
    """Axis ``dp_shard``, which takes the ranks that the other axes of a scale unit leave."""

    name = "dp_shard"
    divides = frozenset({"sequences", "weights"})
    hidden_beneath = ("forward", "embedding and loss", "recompute", "backward")

    def sizes(self, problem: Problem, mesh: MeshShape, left: int) -> Iterable[int]:
        return (left,)

    def communicate(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Gather weights and reduce gradients at the same time as anything; then the GPU's own passes over them."""
        if batch.sharding == "fsdp" and batch.division.weights > 1:
            self._gather_and_reduce(batch, layers, ledger)
        self._pass_over_gradients(batch, layers, ledger)

    def _gather_and_reduce(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        mesh, ranks = batch.mesh, batch.division.weights

        def collective(sizes: tuple[float, float], scale: float) -> float:
            cluster, expert_shards = batch.problem.cluster, ranks // batch.division.experts
            return ring_seconds(cluster, sizes[0] * scale, ranks, mesh.tp) + ring_seconds(
                cluster, sizes[1] * scale, expert_shards, mesh.tp * mesh.ep
            )

        gather = collective(self._gathered_bytes(batch, layers.kind), 1.0)
        reduce = collective(self._trained(batch, layers.kind), DTYPE_BYTES[batch.gradient])
        ledger.communicate(self.name, layers.forward, gather, layers.forward.free)
        behind = gather + reduce if layers.plan.reshard_after_forward else reduce
        ledger.communicate(self.name, layers.backward, behind, layers.backward.free)

    def _pass_over_gradients(self, batch: MicroBatch, layers: LayerPasses, ledger: Ledger) -> None:
        """Add the micro-batch's gradients to their buffers; copy weights out of what FSDP2 gathered, gradients into it.

        Whole weights of layers, experts that a rank has to itself among them, are added to inside the GEMM. The
        experts' measured rate contains that, for bf16 buffers; that of dense GEMMs writes bf16 gradients and adds
        nothing. Of FSDP2's copies, those that its collectives start from and end in are the compute stream's work
        (``foreach_all_gather_copy_out``, ``foreach_reduce`` in torch.distributed.fsdp).
        """
        problem, kind, ranks, replicas = batch.problem, layers.kind, batch.division.weights, batch.mesh.dp_replicate
        size, gradient_size = problem.trained_itemsize, DTYPE_BYTES[batch.gradient]
        dense, routed = self._trained(batch, kind)
        # What the measured rates contain of it. In fp32 autograd makes every gradient and then reads it again.
        in_bf16 = size == 2
        added_to_own_experts = routed * (2 * gradient_size - (2 * size if in_bf16 else -size))
        if batch.sharding == "zero1" or ranks * replicas == 1:
            inside_dense = size if in_bf16 and not problem.is_outside(kind) else -size
            added = dense * (2 * gradient_size - inside_dense) + added_to_own_experts
            copied = 0.0
        else:
            expert_shards = ranks // batch.division.experts
            own_experts = expert_shards * replicas == 1
            added = dense / ranks * 3 * gradient_size
            added += added_to_own_experts if own_experts else routed / expert_shards * 3 * gradient_size
            passes = 2 if layers.plan.reshard_after_forward else 1
            copied = (dense + (0.0 if own_experts else routed)) * (size + gradient_size)
            held, held_routed = self._gathered_bytes(batch, kind)
            copied += passes * 2 * (held + (0.0 if own_experts else held_routed))
        count, bytes_per_second = layers.forward.count, problem.cluster.memory_bytes_per_second
        ledger.exposed["gradient accumulation"] += count * added / bytes_per_second
        if copied:
            ledger.exposed["sharding copies"] += count * copied / bytes_per_second

    def _gathered_bytes(self, batch: MicroBatch, kind: LayerKind) -> tuple[float, float]:
        """Bytes of a layer's weights on the ranks that gather them: (without routed experts, routed experts)."""
        problem = batch.problem
        if problem.is_outside(kind):
            return problem.outside_parameters * problem.itemsize / batch.division.features, 0.0
        dense, routed = self._gathered(batch, problem.own_bytes[kind.name])
        more_dense, more_routed = self._gathered(batch, problem.adapters[kind.name])
        return dense + more_dense * 4, routed + more_routed * 4

    def _trained(self, batch: MicroBatch, kind: LayerKind) -> tuple[float, float]:
        """Weights of a layer with gradients, on the ranks that gather them, as :meth:`_gathered_bytes`."""
        problem = batch.problem
        if problem.is_outside(kind):
            trained = problem.outside_parameters if problem.workload.lora is None else 0
            return trained / batch.division.features, 0.0
        return self._gathered(batch, problem.trained_parameters[kind.name])

    def _gathered(self, batch: MicroBatch, weights: tuple[int, int]) -> tuple[float, float]:
        padding = expert_padding(batch.problem.workload.config, batch.mesh) if batch.sharding == "fsdp" else 1.0
        division = batch.division
        return weights[0] / division.features, weights[1] * padding / (division.features * division.experts)

    def communicate_once(
        self, batch: MicroBatch, ledger: Ledger, exposed: dict[str, float], hidden: dict[str, float]
    ) -> None:
        """With whole weights: gradients summed in fp32, each rank's share of weights handed to the others, copies."""
        problem, mesh = batch.problem, batch.mesh
        if batch.sharding != "zero1" or mesh.dp_shard * mesh.dp_replicate == 1:
            return
        cluster, trained, size = problem.cluster, problem.trained, problem.trained_itemsize
        local, shards = trained.routed / mesh.ep, mesh.dp_shard // mesh.ep
        seconds = 0.0
        for weights, ranks, stride in ((trained.others, mesh.dp_shard, 1), (local, shards, mesh.ep)):
            seconds += ring_seconds(cluster, weights * 4, ranks, stride)
            seconds += ring_seconds(cluster, weights * size, ranks, stride)
            if ranks > 1:  # into fp32 buckets and out of bf16 ones: zeroed, written, read, written
                seconds += weights * (4 + size + 4 + 3 * size) / cluster.memory_bytes_per_second
        exposed[f"communication {self.name}"] = seconds

    def outside_bytes(self, batch: MicroBatch) -> dict[str, float]:
        """Buckets of the update, which comes after the micro-batches.

        Their memory is new where these are a CUDA graph, whose pool keeps its own.
        """
        mesh = batch.mesh
        if batch.sharding != "zero1" or mesh.dp_shard * mesh.dp_replicate == 1:
            return {}
        elements = min(BUCKET_ELEMENTS, batch.problem.local_parameters(mesh, batch.sharding))
        return {"buckets of the update": 4 * elements * (1 + 1 / mesh.dp_shard)}

    def layer_bytes(self, batch: MicroBatch, kind: LayerKind) -> float:
        """A layer's weights as FSDP2 gathers them; 0 for what no other rank holds.

        FSDP2 keeps a gathered copy also of weights that are only replicated, not sharded.
        """
        own = self._shared(batch, batch.problem.own_bytes[kind.name])
        return own + self._shared(batch, batch.problem.adapters[kind.name]) * DTYPE_BYTES["fp32"]

    def gathered_again_bytes(self, batch: MicroBatch, kind: LayerKind, plan: LayerPlan) -> float:
        """A layer's weights as the backward gathers them again, where the forward freed them."""
        return self.layer_bytes(batch, kind) if plan.reshard_after_forward else 0.0

    def gradient_bytes(self, batch: MicroBatch, kind: LayerKind, itemsize: int) -> float:
        """A layer's gradients before they are reduced, in elements of ``itemsize`` bytes."""
        return self._shared(batch, batch.problem.trained_parameters[kind.name]) * itemsize

    def staying_bytes(self, batch: MicroBatch, plans: dict[str, LayerPlan]) -> float:
        """Weights that stay gathered from their forward to their backward: those outside layers, and as planned."""
        if self.is_whole(batch):
            return 0.0
        problem, division = batch.problem, batch.division
        gathered = problem.outside_parameters * problem.itemsize / division.features
        for kind in problem.workload.layers:
            if not plans[kind.name].reshard_after_forward:
                gathered += kind.count / division.layers * self.layer_bytes(batch, kind)
        return gathered

    def expert_gradient_bytes(self, batch: MicroBatch, kind: LayerKind) -> float:
        """A layer's gradients of its own experts, unless the GEMM adds to their buffers itself."""
        division = batch.division
        own_experts = division.weights // division.experts * batch.mesh.dp_replicate == 1
        if own_experts and batch.problem.request.compute_dtype == "bf16":
            return 0.0
        _, routed = batch.problem.trained_parameters[kind.name]
        return routed * batch.problem.trained_itemsize / (division.features * division.experts)

    def is_whole(self, batch: MicroBatch) -> bool:
        """Whether the rank's weights are on no other rank: FSDP2 is not applied."""
        return batch.division.weights * batch.mesh.dp_replicate == 1

    def _shared(self, batch: MicroBatch, weights: tuple[int, int]) -> float:
        """Of a layer's weights or bytes (without routed experts, routed experts) those that other ranks have, too."""
        if self.is_whole(batch):
            return 0.0
        (dense, routed), division = weights, batch.division
        shared = division.weights * batch.mesh.dp_replicate > division.experts
        padding = expert_padding(batch.problem.workload.config, batch.mesh)
        gathered = routed * padding / division.experts if shared else 0.0
        return (dense + gathered) / division.features
