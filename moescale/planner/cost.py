"""Step time of a plan: compute by operator, communication by axis, what of it stays exposed, optimizer, bubbles.

Every term is monotone in the cluster's rates: a faster link or kernel never makes a plan slower.

Compute. A product takes ``FLOPs / rate``, the rate read from the cluster file's table (dense products by their FLOPs,
routed experts by rows per expert, attention by sequence length), element-wise work ``bytes / bandwidth``; all at the
clock that lasts under load, and each kernel a launch more.

Communication (:mod:`moescale.planner.links`). Weights are gathered beside the compute of the layer before (FSDP's
prefetch), gradients reduced beside the backward of the next; rows travel beside the shared experts; replicas are summed
beside the last backward. Only what compute does not cover is exposed.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field

from moescale.formats import DTYPE_BYTES, MASTER_BYTES, MOMENT_BYTES
from moescale.operators import Operator, forward_flops, is_routed, moved_bytes
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.cluster import Cluster
from moescale.planner.exchange import PeerExchange, is_recorded, reads_peers, row_factor
from moescale.planner.links import all_to_all_seconds, link_of, ring_seconds
from moescale.planner.request import Candidate, Formats, PlanRequest
from moescale.planner.shares import expert_padding, local_parameters, rank_parameters, updated_parameters
from moescale.planner.workload import LayerKind, Workload

KERNELS_PER_OPERATOR = {"dense_gemm": (1, 2), "grouped_gemm": (5, 8), "attention": (1, 3), "elementwise": (1, 1)}
"""Launches of an operator's forward and backward."""


MADE_PLAIN = "weights from fp8"
"""What makes frozen weights plain for their products, in every forward and backward."""
SLOWED = "slowed by communication"
"""What computation loses to collectives beside it, a part of the time."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; of hidden communication what it slows."""

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


@dataclass(kw_only=True)
class _Pass:
    """One layer kind's forward or backward: its compute, and how much of that no communication runs beside yet."""

    count: float
    """Layers."""
    compute: dict[str, float]
    """Seconds by operator, of one layer."""
    recompute: float = 0.0
    free: float = field(init=False)

    def __post_init__(self) -> None:
        self.free = sum(self.compute.values()) + self.recompute


@dataclass(kw_only=True)
class _Ledger:
    """Adds up a micro-batch. A second of compute hides a second of communication once: what one axis has used is gone.

    Without that rule a faster operator could make a plan slower, by hiding less on several axes at a time.
    """

    exposed: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    hidden: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    free_backward: float = 0.0

    def add_compute(self, *passes: _Pass) -> None:
        for part in passes:
            for name, seconds in part.compute.items():
                self.exposed[f"compute {name}"] += part.count * seconds
            if part.recompute:
                self.exposed["recompute"] += part.count * part.recompute

    def communicate(self, axis: str, part: _Pass, seconds: float, beside: float) -> None:
        """Account ``seconds`` per layer, of which up to ``beside`` can run beside compute."""
        covered = min(seconds, beside, part.free)
        part.free -= covered
        self.exposed[f"communication {axis}"] += part.count * (seconds - covered)
        self.hidden[f"communication {axis}"] += part.count * covered


class CostModel:
    """Times of candidates for one model, cluster and request; partial results are kept."""

    def __init__(self, workload: Workload, cluster: Cluster, request: PlanRequest) -> None:
        self.workload = workload
        self.cluster = cluster
        self.request = request
        self.itemsize = DTYPE_BYTES[request.compute_dtype]
        self._kinds = {kind.name: kind for kind in (*workload.layers, workload.outside)}
        self._own_bytes = {kind.name: workload.layer_bytes(kind, self.itemsize) for kind in workload.layers}
        self._outside_parameters = workload.outside_parameters()
        self._adapters = {kind.name: workload.adapter_parameters(kind) for kind in workload.layers}
        self._trained_parameters = {kind.name: workload.trained_parameters(kind) for kind in workload.layers}
        self._trained_weights = workload.trained
        self._trained_itemsize = self.itemsize if workload.lora is None else DTYPE_BYTES["fp32"]
        self._share = functools.cache(functools.partial(rank_parameters, self._trained_weights))
        self._local = functools.cache(functools.partial(local_parameters, self._trained_weights))
        self._updated = functools.cache(functools.partial(updated_parameters, self._trained_weights))
        self._micro_batch = functools.cache(self._micro_batch_uncached)
        self._layer_time = functools.cache(self._layer_time_uncached)
        self.without_optimizer = functools.cache(self._without_optimizer_uncached)

    def step(self, candidate: Candidate) -> StepTime:
        """The whole step of ``candidate``."""
        without = self.without_optimizer(
            candidate.mesh, candidate.micro_batch_sequences, candidate.gradient_accumulation_steps,
            candidate.layers, candidate.formats.gradient_dtype,
            candidate.dense_sharding,
        )  # fmt: skip
        optimizer = self.optimizer_seconds(candidate.mesh, candidate.formats, candidate.dense_sharding)
        return StepTime(exposed=without.exposed | optimizer, hidden=without.hidden)

    def _without_optimizer_uncached(
        self,
        mesh: MeshShape,
        sequences: int,
        accumulation: int,
        layers: tuple[LayerPlan, ...],
        gradient: str,
        sharding: str = "fsdp",
    ) -> StepTime:
        """Forward, backward and communication of all micro-batches."""
        micro_batch = self._micro_batch(mesh, sequences, layers, gradient, sharding)
        total = {name: seconds * accumulation for name, seconds in micro_batch.exposed.items()}
        covered = {name: seconds * accumulation for name, seconds in micro_batch.hidden.items()}
        if mesh.pp > 1:
            # The first and last stages idle while a micro-batch passes the others (1F1B, Narayanan et al. 2021).
            total["pipeline bubble"] = (mesh.pp - 1) * sum(micro_batch.exposed.values())
        if sharding == "zero1":
            total |= self._once_a_step(mesh)
        elif mesh.dp_replicate > 1:  # beside what the last micro-batch's backward leaves free
            seconds = self._replicate_seconds(mesh, gradient)
            total["communication dp_replicate"] = max(0.0, seconds - micro_batch.free_backward)
            covered["communication dp_replicate"] = min(seconds, micro_batch.free_backward)
            slowed = self.cluster.overlap_cost * covered["communication dp_replicate"]
            total[SLOWED] = total.get(SLOWED, 0.0) + slowed
        total["step overhead"] = self.cluster.step_overhead_seconds
        return StepTime(exposed=total, hidden=covered)

    def _once_a_step(self, mesh: MeshShape) -> dict[str, float]:
        """With whole weights: gradients summed in fp32, each rank's share of weights handed to the others, copies."""
        if mesh.dp_shard * mesh.dp_replicate == 1:
            return {}
        trained, size = self._trained_weights, self._trained_itemsize
        local, shards, memory = trained.routed / mesh.ep, mesh.dp_shard // mesh.ep, self.cluster.memory_bytes_per_second
        scattered = 0.0
        for weights, ranks, stride in ((trained.others, mesh.dp_shard, 1), (local, shards, mesh.ep)):
            scattered += ring_seconds(self.cluster, weights * 4, ranks, stride)
            scattered += ring_seconds(self.cluster, weights * size, ranks, stride)
            if ranks > 1:  # into fp32 buckets and out of bf16 ones: zeroed, written, read, written
                scattered += weights * (4 + size + 4 + 3 * size) / memory
        seconds = {"communication dp_shard": scattered}
        if mesh.dp_replicate > 1:
            share = self._updated(mesh, "zero1")
            reduced = 2 * ring_seconds(self.cluster, share * 4, mesh.dp_replicate, mesh.dp_shard)
            seconds["communication dp_replicate"] = reduced + share * 2 * (4 + size) / memory
        return seconds

    def optimizer_seconds(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> dict[str, float]:
        """One pass over this rank's states, the gradient norm before it and the clearing after it."""
        weights = self._updated(mesh, sharding)
        gradient = DTYPE_BYTES[formats.gradient_dtype]
        state = MOMENT_BYTES[formats.optimizer_state_dtype] + self.master_bytes(formats)
        moved = 2 * self._trained_itemsize + gradient
        seconds = (
            (weights + self._local(mesh, sharding)) * gradient / self.cluster.memory_bytes_per_second
        )  # norm, clearing
        if formats.offload_optimizer:
            seconds += weights * state * 2 / self.cluster.host.bytes_per_second
            seconds += weights * (moved + 2 * state) / self.cluster.optimizer_bytes_per_second
        else:
            seconds += weights * (moved + 2 * state) / self.cluster.optimizer_bytes_per_second
        return {"optimizer": seconds}

    def master_bytes(self, formats: Formats) -> float:
        """Bytes beside each weight that is trained; one in fp32 is its own master."""
        return 0.0 if self._trained_itemsize == 4 else MASTER_BYTES[formats.master_weight_format]

    def rank_parameters(self, mesh: MeshShape) -> float:
        """Weights whose state the fullest rank keeps."""
        return self._share(mesh)

    def _micro_batch_uncached(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str, sharding: str
    ) -> _Ledger:
        """Forward and backward of one micro-batch on one rank."""
        ledger = _Ledger()
        plans = {layer.kind: layer for layer in layers}
        plans[self.workload.outside.name] = LayerPlan(kind=self.workload.outside.name, reshard_after_forward=False)
        for kind in (*self.workload.layers, self.workload.outside):
            plan = plans[kind.name]
            # A stage has its share of the layers; the loss comes on top of one of them.
            count = kind.count if kind is self.workload.outside else kind.count / mesh.pp
            time = self._layer_time(kind.name, mesh.tp, mesh.cp, mesh.ep, sequences, plan.recompute)
            forward = _Pass(count=count, compute=time.forward)
            again = time.recompute * plan.recomputed_share(kind.count)
            backward = _Pass(count=count, compute=time.backward, recompute=again)
            ledger.add_compute(forward, backward)
            if kind.is_routed and mesh.ep > 1:
                if reads_peers(mesh, sharding, self.cluster):
                    self._add_peer_exchange(ledger, forward, backward, mesh, sequences, plan)
                else:
                    self._add_exchange(ledger, forward, backward, kind, mesh, sequences, plan)
            if kind is not self.workload.outside:
                self._add_unsupported_axes(ledger, forward, backward, mesh, sequences)
            if sharding == "fsdp":
                self._add_sharding(ledger, forward, backward, kind, mesh, plan, gradient)
            self._add_passes_over_weights(ledger, count, kind, mesh, plan, gradient, sharding)
            ledger.free_backward += count * backward.free
        if any(ledger.hidden.values()):
            ledger.exposed[SLOWED] = self.cluster.overlap_cost * sum(ledger.hidden.values())
        if not is_recorded(mesh, sharding, self.cluster, self.request.compute_dtype):
            host = self._host_seconds(mesh, plans, sharding)
            ledger.exposed["host launches"] = max(0.0, host - sum(ledger.exposed.values()))
        return ledger

    def _host_seconds(self, mesh: MeshShape, plans: dict[str, LayerPlan], sharding: str) -> float:
        """In which the host launches a micro-batch's kernels; the GPU waits for it where that takes longer."""
        total = 0.0
        for kind in self.workload.layers:
            plan = plans[kind.name]
            again = plan.recomputed_share(kind.count) if plan.recompute == "block" else 0.0
            seconds = self.cluster.host_layer_seconds * (1 + again / 3)
            seconds += self.cluster.host_sharding_seconds if sharding == "fsdp" else 0.0
            seconds += self.cluster.host_exchange_seconds if kind.is_routed and mesh.ep > 1 else 0.0
            total += kind.count / mesh.pp * seconds
        return total

    def _add_peer_exchange(
        self, ledger: _Ledger, forward: _Pass, backward: _Pass, mesh: MeshShape, sequences: int, plan: LayerPlan
    ) -> None:
        """Read peers' rows and results: in the order of the graph, beside nothing."""
        dims = self.workload.dims(sequences * self.request.sequence_length, self.request.sequence_length)
        there, back = PeerExchange.of(self.workload.config, dims, mesh.ep, self.itemsize).pass_seconds(self.cluster)
        again = there * plan.recomputed_share(forward.count * mesh.pp) if plan.recompute == "block" else 0.0
        ledger.communicate("ep", forward, there, 0.0)
        ledger.communicate("ep", backward, back + again, 0.0)

    def _layer_time_uncached(
        self, kind: str, tp: int, cp: int, ep: int, sequences: int, recompute: str | tuple[str, ...]
    ) -> _LayerTime:
        tokens = sequences * self.request.sequence_length // cp
        dims = self.workload.dims(tokens, self.request.sequence_length)
        forward: dict[str, float] = defaultdict(float)
        backward: dict[str, float] = defaultdict(float)
        again = 0.0
        for op in self._kinds[kind].operators:  # one that occurs several times takes its time several times
            seconds = self._operator_seconds(op, dims, tp, ep)
            plain = self._plain_seconds(op, tp, ep)
            for part, of_part in ((forward, seconds[0]), (backward, seconds[1])):
                part[op.name] += of_part - plain
                if plain:
                    part[MADE_PLAIN] += plain
            if recompute == "block":
                again += seconds[0]
            elif op.recompute is not None and op.name in recompute:
                again += seconds[0] * op.recompute.forward_share
        return _LayerTime(forward=forward, backward=backward, recompute=again)

    def _operator_seconds(self, op: Operator, dims: dict[str, int], tp: int, ep: int) -> tuple[float, float]:
        """Forward and backward of one operator on one rank."""
        launches = KERNELS_PER_OPERATOR[op.kind]
        cluster = self.cluster
        if op.kind == "elementwise":
            share = tp if op.tp == "shard" else 1
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
        plain = self._plain_seconds(op, tp, ep)
        forward, backward = (number * cluster.launch_seconds + plain for number in launches)
        return seconds + forward, seconds * ratio + backward

    def _plain_seconds(self, op: Operator, tp: int, ep: int) -> float:
        """Making the weights of ``op`` in fp8 plain for one pass: codes and scales are read, weights written, once."""
        weights = self.workload.in_fp8(op)
        moved: float = sum(weight.stored_bytes + weight.elements * self.itemsize for weight in weights)
        moved /= tp * (ep if is_routed(op) else 1)
        return moved / self.cluster.elementwise_bytes_per_second + len(weights) * self.cluster.launch_seconds

    @staticmethod
    def _without_table(op: Operator, dims: dict[str, int]) -> dict[str, int]:
        """A look-up reads the rows it needs, not the table."""
        return dims | {"w": dims["n"]} if op.is_lookup else dims

    def _layer_bytes(self, kind: LayerKind, mesh: MeshShape, sharding: str = "fsdp") -> tuple[float, float]:
        """Bytes of a layer's weights on the ranks that gather them: (without routed experts, routed experts)."""
        if kind is self.workload.outside:
            return self._outside_parameters * self.itemsize / mesh.tp, 0.0
        dense, routed = self._gathered(self._own_bytes[kind.name], mesh, sharding)
        more_dense, more_routed = self._gathered(self._adapters[kind.name], mesh, sharding)
        return dense + more_dense * 4, routed + more_routed * 4

    def _gathered(self, weights: tuple[float, float], mesh: MeshShape, sharding: str) -> tuple[float, float]:
        padding = expert_padding(self.workload.config, mesh) if sharding == "fsdp" else 1.0
        return weights[0] / mesh.tp, weights[1] * padding / (mesh.tp * mesh.ep)

    def _trained(self, kind: LayerKind, mesh: MeshShape, sharding: str) -> tuple[float, float]:
        """Weights of a layer with gradients, on the ranks that gather them, as :meth:`_layer_bytes`."""
        if kind is self.workload.outside:
            return (self._outside_parameters / mesh.tp, 0.0) if self.workload.lora is None else (0.0, 0.0)
        return self._gathered(self._trained_parameters[kind.name], mesh, sharding)

    def _add_sharding(
        self,
        ledger: _Ledger,
        forward: _Pass,
        backward: _Pass,
        kind: LayerKind,
        mesh: MeshShape,
        plan: LayerPlan,
        gradient: str,
    ) -> None:
        """Gather a layer's weights ahead of each pass, reduce its gradients behind the backward."""
        ranks, stride = mesh.dp_shard * mesh.cp, mesh.tp
        if ranks == 1:
            return

        def collective(sizes: tuple[float, float], scale: float) -> float:
            replicas_of_experts = ranks // mesh.ep
            return ring_seconds(self.cluster, sizes[0] * scale, ranks, stride) + ring_seconds(
                self.cluster, sizes[1] * scale, replicas_of_experts, stride * mesh.ep
            )

        gather = collective(self._layer_bytes(kind, mesh), 1.0)
        reduce = collective(self._trained(kind, mesh, "fsdp"), DTYPE_BYTES[gradient])
        ledger.communicate("dp_shard", forward, gather, forward.free)
        behind = gather + reduce if plan.reshard_after_forward else reduce
        ledger.communicate("dp_shard", backward, behind, backward.free)

    def _add_passes_over_weights(
        self,
        ledger: _Ledger,
        count: float,
        kind: LayerKind,
        mesh: MeshShape,
        plan: LayerPlan,
        gradient: str,
        sharding: str,
    ) -> None:
        """Add the micro-batch's gradients to their buffers; copy weights out of what FSDP2 gathered, gradients into it.

        Undivided weights of layers, experts that a rank has to itself among them, are added to inside the product. The
        experts' measured rate contains that, for bf16 buffers; that of dense products writes bf16 gradients and adds
        nothing. Of FSDP2's copies, those that its collectives start from and end in are the compute stream's work
        (``foreach_all_gather_copy_out``, ``foreach_reduce`` in torch.distributed.fsdp).
        """
        size, gradient_size = self._trained_itemsize, DTYPE_BYTES[gradient]
        dense, routed = self._trained(kind, mesh, sharding)
        ranks = mesh.dp_shard * mesh.cp
        # What the measured rates contain of it. In fp32 autograd makes every gradient and then reads it again.
        in_bf16 = size == 2
        added_to_own_experts = routed * (2 * gradient_size - (2 * size if in_bf16 else -size))
        if sharding == "zero1" or ranks * mesh.dp_replicate == 1:
            inside_dense = size if in_bf16 and kind is not self.workload.outside else -size
            added = dense * (2 * gradient_size - inside_dense) + added_to_own_experts
            copied = 0.0
        else:
            expert_shards = ranks // mesh.ep
            own_experts = expert_shards * mesh.dp_replicate == 1
            added = dense / ranks * 3 * gradient_size
            added += added_to_own_experts if own_experts else routed / expert_shards * 3 * gradient_size
            passes = 2 if plan.reshard_after_forward else 1
            copied = (dense + (0.0 if own_experts else routed)) * (size + gradient_size)
            held, held_routed = self._layer_bytes(kind, mesh, sharding)
            copied += passes * 2 * (held + (0.0 if own_experts else held_routed))
        ledger.exposed["gradient accumulation"] += count * added / self.cluster.memory_bytes_per_second
        if copied:
            ledger.exposed["sharding copies"] += count * copied / self.cluster.memory_bytes_per_second

    def _add_exchange(
        self,
        ledger: _Ledger,
        forward: _Pass,
        backward: _Pass,
        kind: LayerKind,
        mesh: MeshShape,
        sequences: int,
        plan: LayerPlan,
    ) -> None:
        """Dispatch rows to their experts and combine them, overlapped with what the layer's operators declare.

        Once more where the block is recomputed.
        """
        tokens = sequences * self.request.sequence_length // mesh.cp
        dims = self.workload.dims(tokens, self.request.sequence_length)
        sent = (
            dims["n"]
            * dims["k"]
            * dims["h"]
            * self.itemsize
            * row_factor(self.workload.config, mesh, self.request.router_imbalance)
        )
        both_ways = 2 * all_to_all_seconds(self.cluster, sent, mesh.ep, mesh.tp)
        names = frozenset(op.name for op in kind.operators if op.overlaps == "ep")
        in_forward, in_backward = (_seconds_of(part.compute, names) for part in (forward, backward))
        ledger.communicate("ep", forward, both_ways, in_forward)
        ledger.communicate("ep", backward, both_ways, in_backward)
        if plan.recompute == "block":
            share = plan.recomputed_share(kind.count)
            ledger.communicate("ep", backward, share * both_ways, share * in_forward)

    def _add_unsupported_axes(
        self, ledger: _Ledger, forward: _Pass, backward: _Pass, mesh: MeshShape, sequences: int
    ) -> None:
        tokens = sequences * self.request.sequence_length // mesh.cp
        config = self.workload.config
        activations = tokens * config.hidden_size * self.itemsize
        if mesh.tp > 1:  # all-reduce behind attention and feed-forward, in both passes
            reduce = 2 * 2 * ring_seconds(self.cluster, activations, mesh.tp, 1)
            ledger.communicate("tp", forward, reduce, 0.0)
            ledger.communicate("tp", backward, reduce, 0.0)
        if mesh.cp > 1:  # keys and values travel around the ring beside attention (Liu et al. 2023)
            width = config.key_value_width
            link = link_of(self.cluster, mesh.cp, mesh.tp)
            once = (mesh.cp - 1) * (tokens * width * self.itemsize / link.bytes_per_second + link.latency_seconds)
            layers = self.workload.layers
            names = frozenset(op.name for kind in layers for op in kind.operators if op.kind == "attention")
            ledger.communicate("cp", forward, once, _seconds_of(forward.compute, names))
            ledger.communicate("cp", backward, 2 * once, _seconds_of(backward.compute, names))
        if mesh.pp > 1:
            link = link_of(self.cluster, mesh.pp, mesh.tp * mesh.cp * mesh.dp_shard)
            hop = activations / link.bytes_per_second + link.latency_seconds
            share = mesh.pp / config.num_layers  # of one hop per stage, for each of the stage's layers
            ledger.communicate("pp", forward, hop * share, 0.0)
            ledger.communicate("pp", backward, hop * share, 0.0)

    def _replicate_seconds(self, mesh: MeshShape, gradient: str) -> float:
        """All-reduce of this rank's gradient shard over the replicas: once a step."""
        shard = self.rank_parameters(mesh) * DTYPE_BYTES[gradient]
        stride = mesh.pp * mesh.tp * mesh.cp * mesh.dp_shard
        return 2 * ring_seconds(self.cluster, shard, mesh.dp_replicate, stride)


def _seconds_of(compute: dict[str, float], names: frozenset[str]) -> float:
    """Compute of the named operators in a pass, which communication of a kind can run beside."""
    return sum(seconds for name, seconds in compute.items() if name in names)
