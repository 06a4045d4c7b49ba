"""Peak memory of a plan per rank, by class, and the moment of the step at which it falls.

What lives through the step: weights, gradient buffers, optimizer state. On top of it the largest of the moments of
:mod:`moescale.planner.moments`. The optimizer updates states in place; only those kept in host memory visit the device
for it (**update**).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moescale.formats import DTYPE_BYTES, MASTER_BYTES, MOMENT_BYTES
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.cluster import Cluster
from moescale.planner.exchange import reads_peers
from moescale.planner.moments import Moments, both_ends
from moescale.planner.request import Candidate, Formats, PlanRequest
from moescale.planner.shares import gate_up_padding, local_parameters, updated_parameters
from moescale.planner.workload import Workload

OUTSIDE_ALLOCATED = ("context", "NCCL", "symmetric memory", "buckets of the update", "allocator slack")
"""Classes that are on the device, but no part of what torch counts as allocated at the peak.

Buckets of the update come after the micro-batches: their memory is new where these are a CUDA graph, whose pool keeps
its own."""
BUCKET_ELEMENTS = 64 * 2**20
"""Of the sums of gradients with whole weights (``runtime.zero``)."""


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of one rank at the peak."""

    breakdown: dict[str, float]
    moment: str

    @property
    def total(self) -> float:
        return sum(self.breakdown.values())

    @property
    def allocated(self) -> float:
        """What torch's allocator hands out at the peak: ``torch.cuda.max_memory_allocated``."""
        return sum(size for name, size in self.breakdown.items() if name not in OUTSIDE_ALLOCATED)


class MemoryModel:
    """Peaks of candidates for one model, cluster and request; partial results are kept."""

    def __init__(self, workload: Workload, cluster: Cluster, request: PlanRequest) -> None:
        self.workload = workload
        self.cluster = cluster
        self.request = request
        self.itemsize = DTYPE_BYTES[request.compute_dtype]
        self.moments = Moments(workload, cluster, request)
        self.transient = functools.cache(self._transient_uncached)
        self._partly_recomputed_bytes = functools.cache(self._partly_recomputed_bytes_uncached)
        self._own_bytes = functools.cache(functools.partial(local_parameters, workload.stored(self.itemsize)))
        self._trained = functools.cache(functools.partial(local_parameters, workload.trained))
        self._updated = functools.cache(functools.partial(updated_parameters, workload.trained))
        self.outside_allocator = functools.cache(self._outside_allocator_uncached)

    def peak(self, candidate: Candidate) -> PeakMemory:
        """The peak of ``candidate``, by class."""
        transient, moment = self.transient(
            candidate.mesh, candidate.micro_batch_sequences, candidate.layers,
            candidate.formats.gradient_dtype, candidate.dense_sharding,
        )  # fmt: skip
        sharding = candidate.dense_sharding
        at_update = self.update_bytes(candidate.mesh, candidate.formats, sharding)
        if at_update > sum(transient.values()):
            transient, moment = {"states from the host": at_update}, "update"
        persistent = self.persistent(candidate.mesh, candidate.formats, sharding)
        outside = self.outside_allocator(candidate.mesh, candidate.micro_batch_sequences, sharding)
        return PeakMemory(breakdown=persistent | outside | transient, moment=moment)

    def persistent(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> dict[str, float]:
        """Weights, adapters, gradients and optimizer state of one rank."""
        trained, updated = self._trained(mesh, sharding), self._updated(mesh, sharding)
        adapters = {} if self.workload.lora is None else {"adapters": trained * DTYPE_BYTES["fp32"]}
        return {
            "weights": self._own_bytes(mesh, sharding),
            **adapters,
            "gradients": trained * DTYPE_BYTES[formats.gradient_dtype],
            "optimizer": 0.0 if formats.offload_optimizer else updated * self._state_bytes(formats),
        }

    def _outside_allocator_uncached(self, mesh: MeshShape, sequences: int, sharding: str) -> dict[str, float]:
        """What a rank's process takes of the GPU besides its tensors, and tensors after the micro-batches' graph."""
        found = {"context": float(self.cluster.context_bytes)}
        if mesh.pp * mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp > 1:
            found["NCCL"] = float(self.cluster.nccl_bytes)
        if reads_peers(mesh, sharding, self.cluster):
            found["symmetric memory"] = float(self.moments.bytes.exchange(mesh, sequences).symmetric_bytes())
        if sharding == "zero1" and mesh.dp_shard * mesh.dp_replicate > 1:
            elements = min(BUCKET_ELEMENTS, self._trained(mesh, sharding))
            found["buckets of the update"] = 4 * elements * (1 + 1 / mesh.dp_shard)
        return found

    def host_bytes(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> float:
        """Host memory of one rank's offloaded states."""
        if not formats.offload_optimizer:
            return 0.0
        return self._updated(mesh, sharding) * self._state_bytes(formats)

    def update_bytes(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> float:
        """Offloaded states visit the device tensor by tensor: those of the largest parameter that this rank holds."""
        if not formats.offload_optimizer:
            return 0.0
        config, ranks = self.workload.config, mesh.dp_shard * mesh.cp
        largest = config.vocab_size * config.hidden_size / (mesh.tp * ranks)
        if config.num_moe_layers:
            gate_up = 2 * config.expert_intermediate_size * config.hidden_size * (config.num_experts or 0)
            largest = max(largest, gate_up * gate_up_padding(config, mesh) / (mesh.tp * ranks))
        return largest * self._state_bytes(formats)

    def _state_bytes(self, formats: Formats) -> float:
        """Bytes of optimizer state of one weight; a weight in fp32, as adapters are, is its own master."""
        in_fp32 = self.request.compute_dtype == "fp32" or self.workload.lora is not None
        master = 0.0 if in_fp32 else MASTER_BYTES[formats.master_weight_format]
        return MOMENT_BYTES[formats.optimizer_state_dtype] + master

    def total_bytes(
        self,
        mesh: MeshShape,
        sequences: int,
        layers: tuple[LayerPlan, ...],
        formats: Formats,
        sharding: str = "fsdp",
    ) -> float:
        """The peak of :meth:`peak`, without its classes."""
        transient, _ = self.transient(mesh, sequences, layers, formats.gradient_dtype, sharding)
        at_least, resident = self._around_transient(mesh, sequences, formats, sharding)
        return max(sum(transient.values()), at_least) + resident

    def _around_transient(
        self, mesh: MeshShape, sequences: int, formats: Formats, sharding: str
    ) -> tuple[float, float]:
        """What a peak is at least because of the update, and what is there all the time: both without activations."""
        resident = sum(self.persistent(mesh, formats, sharding).values())
        resident += sum(self.outside_allocator(mesh, sequences, sharding).values())
        return self.update_bytes(mesh, formats, sharding), resident

    def _transient_uncached(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str, sharding: str
    ) -> tuple[dict[str, float], str]:
        moments = self.moments.breakdowns(mesh, sequences, layers, gradient, sharding)
        moment, breakdown = max(moments.items(), key=lambda item: sum(item[1].values()))
        breakdown["allocator slack"] = sum(breakdown.values()) * self.cluster.allocator_slack
        return breakdown, moment

    def _partly_recomputed_bytes_uncached(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], name: str, gradient: str, sharding: str
    ) -> tuple[float, ...]:
        layer = next(layer for layer in layers if layer.kind == name)
        nowhere, everywhere = (
            self.moments.breakdowns(mesh, sequences, changed, gradient, sharding)
            for changed in both_ends(layers, layer)
        )
        slack = 1 + self.cluster.allocator_slack
        count = next(kind.count for kind in self.workload.layers if kind.name == name)
        return tuple(
            slack
            * max(sum(parts.values()) for parts in self.moments.partly(name, nowhere, everywhere, number).values())
            for number in range(1, count)
        )

    def partly_recomputed_bytes(self, candidate: Candidate, kind: str) -> tuple[float, ...]:
        """The peak of ``candidate`` if only the first 1, 2, ... layers of ``kind`` did what all of them do."""
        mesh, formats, sharding = candidate.mesh, candidate.formats, candidate.dense_sharding
        sequences = candidate.micro_batch_sequences
        transient = self._partly_recomputed_bytes(
            mesh, sequences, candidate.layers, kind, formats.gradient_dtype, sharding
        )
        at_least, resident = self._around_transient(mesh, sequences, formats, sharding)
        return tuple(max(size, at_least) + resident for size in transient)
