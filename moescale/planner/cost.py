"""Step time of a plan: compute by operator, communication by axis, what of it stays exposed, optimizer, bubbles.

Every term is monotone in the cluster's rates: a faster link or kernel never makes a plan slower.

Compute. A product takes ``FLOPs / rate``, the rate read from the cluster file's table (dense products by their FLOPs,
routed experts by rows per expert, attention by sequence length), element-wise work ``bytes / bandwidth``; all at the
clock that lasts under load, and each kernel a launch more.

Communication. Ring collectives (Thakur et al. 2005): an all-gather or reduce-scatter of B bytes over p ranks moves
``(p - 1) / p * B`` per rank within a node, and between N nodes ``(N - 1) / N * B`` through the node's links together;
the slower of the two counts. An all-to-all sends each rank's rows directly, those for other nodes over the rank's own link.
Weights are gathered beside the compute of the layer before (FSDP's prefetch), gradients reduced beside the backward of
the next; rows travel beside the shared experts. Only what compute does not cover is exposed.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass

from moescale.operators import Operator, forward_flops, moved_bytes
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.cluster import Cluster, Link
from moescale.planner.request import Candidate, Formats, PlanRequest
from moescale.planner.workload import LayerKind, Workload

KERNELS_PER_OPERATOR = {"dense_gemm": (1, 2), "grouped_gemm": (5, 8), "attention": (1, 3), "elementwise": (1, 1)}
"""Launches of an operator's forward and backward."""
MOMENT_BYTES = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0 + 8.0 / 128}
"""Both AdamW moments of one weight; 8-bit blocks of 128 have an fp32 scale each."""
MASTER_BYTES = {"fp32": 4.0, "bf16_remainder": 2.0, "stochastic_bf16": 0.0}
"""What stands beside a bf16 weight."""
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; hidden communication costs nothing."""

    exposed: dict[str, float]
    hidden: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.exposed.values())


@dataclass(frozen=True, kw_only=True)
class _LayerTime:
    """One layer's forward and backward: seconds of compute by operator, and of collectives."""

    forward: dict[str, float]
    backward: dict[str, float]
    recompute: float


class CostModel:
    """Times of candidates for one model, cluster and request; partial results are kept."""

    def __init__(self, workload: Workload, cluster: Cluster, request: PlanRequest) -> None:
        self.workload = workload
        self.cluster = cluster
        self.request = request
        self.itemsize = DTYPE_BYTES[request.compute_dtype]
        self._kinds = {kind.name: kind for kind in (*workload.layers, workload.outside)}
        self._parameters = workload.parameters()
        self._layer_parameters = {kind.name: workload.layer_parameters(kind) for kind in workload.layers}
        self._outside_parameters = workload.outside_parameters()
        self._micro_batch = functools.cache(self._micro_batch_uncached)
        self._layer_time = functools.cache(self._layer_time_uncached)
        self.without_optimizer = functools.cache(self._without_optimizer_uncached)

    def step(self, candidate: Candidate) -> StepTime:
        """The whole step of ``candidate``."""
        without = self.without_optimizer(
            candidate.mesh, candidate.micro_batch_sequences, candidate.gradient_accumulation_steps,
            candidate.dense_layers, candidate.moe_layers, candidate.formats.gradient_dtype,
        )  # fmt: skip
        optimizer = self.optimizer_seconds(candidate.mesh, candidate.formats)
        return StepTime(exposed=without.exposed | optimizer, hidden=without.hidden)

    def _without_optimizer_uncached(
        self, mesh: MeshShape, sequences: int, accumulation: int, dense: LayerPlan, moe: LayerPlan, gradient: str
    ) -> StepTime:
        """Forward, backward and communication of all micro-batches."""
        exposed, hidden = self._micro_batch(mesh, sequences, dense, moe, gradient)
        total = {name: seconds * accumulation for name, seconds in exposed.items()}
        covered = {name: seconds * accumulation for name, seconds in hidden.items()}
        if mesh.pp > 1:
            # The first and last stages idle while a micro-batch passes the others (1F1B, Narayanan et al. 2021).
            total["pipeline bubble"] = (mesh.pp - 1) * sum(exposed.values())
        if mesh.dp_replicate > 1:
            seconds = self._replicate_seconds(mesh, gradient)
            last_backward = sum(value for name, value in exposed.items() if name.startswith("compute")) * 2 / 3
            total["communication dp_replicate"] = max(0.0, seconds - last_backward)
            covered["communication dp_replicate"] = min(seconds, last_backward)
        total["step overhead"] = self.cluster.step_overhead_seconds
        return StepTime(exposed=total, hidden=covered)

    def optimizer_seconds(self, mesh: MeshShape, formats: Formats) -> dict[str, float]:
        """One pass over this rank's states, the gradient norm before it and the clearing after it."""
        weights = self.rank_parameters(mesh)
        gradient = DTYPE_BYTES[formats.gradient_dtype]
        state = MOMENT_BYTES[formats.optimizer_state_dtype] + self.master_bytes(formats)
        moved = 2 * self.itemsize + gradient
        seconds = weights * 2 * gradient / self.cluster.memory_bytes_per_second  # norm, clearing
        if formats.offload_optimizer:
            seconds += weights * state * 2 / self.cluster.host.bytes_per_second
            seconds += weights * (moved + 2 * state) / self.cluster.optimizer_bytes_per_second
        else:
            seconds += weights * (moved + 2 * state) / self.cluster.optimizer_bytes_per_second
        return {"optimizer": seconds}

    def master_bytes(self, formats: Formats) -> float:
        """Bytes beside each weight; a model in fp32 is its own master."""
        return 0.0 if self.request.compute_dtype == "fp32" else MASTER_BYTES[formats.master_weight_format]

    def rank_parameters(self, mesh: MeshShape) -> float:
        """Weights whose state one rank keeps: an equal share of the model."""
        return self._parameters / (mesh.pp * mesh.tp * mesh.dp_shard * mesh.cp)

    def _micro_batch_uncached(
        self, mesh: MeshShape, sequences: int, dense: LayerPlan, moe: LayerPlan, gradient: str
    ) -> tuple[dict[str, float], dict[str, float]]:
        exposed: defaultdict[str, float] = defaultdict(float)
        hidden: defaultdict[str, float] = defaultdict(float)
        for kind in (*self.workload.layers, self.workload.outside):
            plan = {"dense": dense, "moe": moe}.get(kind.name, LayerPlan(reshard_after_forward=False))
            # A stage has its share of the layers; the loss comes on top of one of them.
            count = kind.count if kind is self.workload.outside else kind.count / mesh.pp
            time = self._layer_time(kind.name, mesh.tp, mesh.cp, mesh.ep, sequences, plan.recompute)
            forward, backward = sum(time.forward.values()), sum(time.backward.values()) + time.recompute
            for part in (time.forward, time.backward):
                for name, seconds in part.items():
                    exposed[f"compute {name}"] += count * seconds
            if time.recompute:
                exposed["recompute"] += count * time.recompute
            self._add_sharding(kind, mesh, plan, gradient, count, forward, backward, exposed, hidden)
            if kind.name == "moe" and mesh.ep > 1:
                self._add_experts(time, mesh, sequences, plan, count, exposed, hidden)
            if kind is not self.workload.outside:
                self._add_unsupported_axes(mesh, sequences, count, time, exposed, hidden)
        return dict(exposed), dict(hidden)

    def _layer_time_uncached(
        self, kind: str, tp: int, cp: int, ep: int, sequences: int, recompute: str | tuple[str, ...]
    ) -> _LayerTime:
        tokens = sequences * self.request.sequence_length // cp
        dims = self.workload.dims(tokens, self.request.sequence_length)
        forward, backward, again = {}, {}, 0.0
        for op in self._kinds[kind].operators:
            seconds = self._operator_seconds(op, dims, tp, ep)
            forward[op.name], backward[op.name] = seconds
            if recompute == "block":
                again += seconds[0]
            elif op.name == "experts" and op.name in recompute:
                again += seconds[0] * 2 / 3  # gate and up, without down
        return _LayerTime(forward=forward, backward=backward, recompute=again)

    def _operator_seconds(self, op: Operator, dims: dict[str, int], tp: int, ep: int) -> tuple[float, float]:
        """Forward and backward of one operator on one rank."""
        launches = KERNELS_PER_OPERATOR[op.kind]
        cluster = self.cluster
        if op.kind == "elementwise":
            share = 1 if op.name.endswith("norm") or op.name == "residual" else tp
            seconds = moved_bytes(op, self._without_table(op, dims), self.itemsize) / share
            seconds /= cluster.elementwise_bytes_per_second
            ratio = op.backward_bytes_ratio
        else:
            flops = forward_flops(op, dims) / tp
            if op.kind == "dense_gemm":
                rate = cluster.dense_gemm.at(flops)
            elif op.kind == "grouped_gemm":
                rate = cluster.grouped_gemm.at(dims["n"] * dims["k"] * ep / max(1, dims["e"]))
                flops *= self.request.router_imbalance if ep > 1 else 1.0
            else:
                rate = cluster.attention.at(dims["x"])
            if self.request.compute_dtype == "fp32":
                rate /= 8  # no tensor cores in full fp32
            seconds = flops / (rate * cluster.sustained_clock)
            ratio = op.backward_flops_ratio
        return seconds + launches[0] * cluster.launch_seconds, seconds * ratio + launches[1] * cluster.launch_seconds

    @staticmethod
    def _without_table(op: Operator, dims: dict[str, int]) -> dict[str, int]:
        """A look-up reads the rows it needs, not the table."""
        return dims | {"w": dims["n"]} if op.name == "embedding" else dims

    def _layer_bytes(self, kind: LayerKind, mesh: MeshShape) -> tuple[float, float]:
        """Bytes of a layer's weights on the ranks that gather them: (without routed experts, routed experts)."""
        if kind is self.workload.outside:
            return self._outside_parameters * self.itemsize / mesh.tp, 0.0
        dense, routed = self._layer_parameters[kind.name]
        return dense * self.itemsize / mesh.tp, routed * self.itemsize / (mesh.tp * mesh.ep)

    def _add_sharding(
        self,
        kind: LayerKind,
        mesh: MeshShape,
        plan: LayerPlan,
        gradient: str,
        count: float,
        forward: float,
        backward: float,
        exposed: dict[str, float],
        hidden: dict[str, float],
    ) -> None:
        ranks = mesh.dp_shard * mesh.cp
        if ranks == 1:
            return
        dense, routed = self._layer_bytes(kind, mesh)
        ratio = DTYPE_BYTES[gradient] / self.itemsize
        stride = mesh.tp
        gather = self.ring_seconds(dense, ranks, stride) + self.ring_seconds(routed, ranks // mesh.ep, stride * mesh.ep)
        reduce = self.ring_seconds(dense * ratio, ranks, stride)
        reduce += self.ring_seconds(routed * ratio, ranks // mesh.ep, stride * mesh.ep)
        behind = gather + reduce if plan.reshard_after_forward else reduce
        for seconds, cover in ((gather, forward), (behind, backward)):
            exposed["communication dp_shard"] += count * max(0.0, seconds - cover)
            hidden["communication dp_shard"] += count * min(seconds, cover)

    def _add_experts(
        self,
        time: _LayerTime,
        mesh: MeshShape,
        sequences: int,
        plan: LayerPlan,
        count: float,
        exposed: dict[str, float],
        hidden: dict[str, float],
    ) -> None:
        tokens = sequences * self.request.sequence_length // mesh.cp
        dims = self.workload.dims(tokens, 1)
        sent = dims["n"] * dims["k"] * dims["h"] * self.itemsize * self.request.router_imbalance
        both_ways = 2 * self.all_to_all_seconds(sent, mesh.ep, mesh.tp)
        passes = [time.forward, time.backward] + ([time.forward] if plan.recompute == "block" else [])
        for part in passes:
            beside = sum(seconds for name, seconds in part.items() if name.startswith("shared"))
            exposed["communication ep"] += count * max(0.0, both_ways - beside)
            hidden["communication ep"] += count * min(both_ways, beside)

    def _add_unsupported_axes(
        self,
        mesh: MeshShape,
        sequences: int,
        count: float,
        time: _LayerTime,
        exposed: dict[str, float],
        hidden: dict[str, float],
    ) -> None:
        tokens = sequences * self.request.sequence_length // mesh.cp
        config = self.workload.config
        activations = tokens * config.hidden_size * self.itemsize
        if mesh.tp > 1:  # all-reduce behind attention and feed-forward, in both passes
            exposed["communication tp"] += count * 4 * 2 * self.ring_seconds(activations, mesh.tp, 1)
        if mesh.cp > 1:  # keys and values travel around the ring beside attention (Liu et al. 2023)
            width = config.num_heads * (config.qk_head_dim + config.v_head_dim)
            seconds = 3 * (mesh.cp - 1) * tokens * width * self.itemsize / self._link(mesh.cp, mesh.tp).bytes_per_second
            cover = time.forward["attention"] + time.backward["attention"]
            exposed["communication cp"] += count * max(0.0, seconds - cover)
            hidden["communication cp"] += count * min(seconds, cover)
        if mesh.pp > 1:
            link = self._link(mesh.pp, mesh.tp * mesh.cp * mesh.dp_shard)
            hops = 2 * (activations / link.bytes_per_second + link.latency_seconds)
            exposed["communication pp"] += hops * count / max(1, self.workload.config.num_layers)

    def _replicate_seconds(self, mesh: MeshShape, gradient: str) -> float:
        """All-reduce of this rank's gradient shard over the replicas: once a step."""
        shard = self.rank_parameters(mesh) * DTYPE_BYTES[gradient]
        return 2 * self.ring_seconds(shard, mesh.dp_replicate, mesh.pp * mesh.tp * mesh.cp * mesh.dp_shard)

    def ring_seconds(self, num_bytes: float, ranks: int, stride: int) -> float:
        """All-gather or reduce-scatter to or from ``num_bytes`` over ``ranks`` whose numbers are ``stride`` apart."""
        if ranks == 1 or num_bytes == 0:
            return 0.0
        cluster = self.cluster
        per_node = max(1, min(ranks, cluster.gpus_per_node // stride))
        nodes = math.ceil(ranks / per_node)
        latency = math.ceil(math.log2(ranks)) * self._link(ranks, stride).latency_seconds
        inside = (ranks - 1) / ranks * num_bytes / cluster.intra_node.bytes_per_second if per_node > 1 else 0.0
        between = (nodes - 1) / nodes * num_bytes / (per_node * cluster.inter_node.bytes_per_second)
        return max(inside, between) + latency

    def all_to_all_seconds(self, num_bytes: float, ranks: int, stride: int) -> float:
        """Each rank sends ``num_bytes``, equal parts to all ``ranks`` (one of them itself)."""
        cluster = self.cluster
        per_node = max(1, min(ranks, cluster.gpus_per_node // stride))
        inside = (per_node - 1) / ranks * num_bytes / cluster.intra_node.bytes_per_second
        between = (ranks - per_node) / ranks * num_bytes / cluster.inter_node.bytes_per_second
        return max(inside, between) + self._link(ranks, stride).latency_seconds

    def _link(self, ranks: int, stride: int) -> Link:
        inside = ranks * stride <= self.cluster.gpus_per_node
        return self.cluster.intra_node if inside else self.cluster.inter_node
