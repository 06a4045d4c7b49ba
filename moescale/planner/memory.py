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
from moescale.planner.axes.registry import AXES, division_of, micro_batch
from moescale.planner.moments import Moments, both_ends
from moescale.planner.problem import Problem
from moescale.planner.request import IN_COMPUTE_DTYPE, Candidate, Formats, Gemms
from moescale.planner.shares import gate_up_padding

OUTSIDE_ALLOCATED = ("context", "NCCL", "symmetric memory", "buckets of the update", "allocator slack")
"""Classes that are on the device, but no part of what torch counts as allocated at the peak."""


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

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.workload = problem.workload
        self.cluster = problem.cluster
        self.moments = Moments(problem)
        self.transient = functools.cache(self._transient_uncached)
        self._partly_recomputed_bytes = functools.cache(self._partly_recomputed_bytes_uncached)
        self.outside_allocator = functools.cache(self._outside_allocator_uncached)
        self._fp8_copies_bytes = functools.cache(self._fp8_copies_bytes_uncached)

    def peak(self, candidate: Candidate) -> PeakMemory:
        """The peak of ``candidate``, by class."""
        transient, moment = self.transient(
            candidate.mesh, candidate.micro_batch_sequences, candidate.layers,
            candidate.formats.gradient_dtype, candidate.dense_sharding, candidate.gemms,
        )  # fmt: skip
        sharding = candidate.dense_sharding
        at_update = self.update_bytes(candidate.mesh, candidate.formats, sharding)
        if at_update > sum(transient.values()):
            transient, moment = {"states from the host": at_update}, "update"
        persistent = self.persistent(candidate.mesh, candidate.formats, sharding, candidate.gemms)
        outside = self.outside_allocator(
            candidate.mesh, candidate.micro_batch_sequences, candidate.formats.gradient_dtype, sharding, candidate.gemms
        )
        return PeakMemory(breakdown=persistent | outside | transient, moment=moment)

    def persistent(
        self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp", gemms: Gemms = IN_COMPUTE_DTYPE
    ) -> dict[str, float]:
        """Weights, adapters, copies of weights in fp8, gradients and optimizer state of one rank."""
        trained = self.problem.local_parameters(mesh, sharding)
        updated = self.problem.updated_parameters(mesh, sharding)
        adapters = {} if self.workload.lora is None else {"adapters": trained * DTYPE_BYTES["fp32"]}
        copies = {} if gemms == IN_COMPUTE_DTYPE else {"fp8 copies": self._fp8_copies_bytes(mesh, gemms)}
        return {
            "weights": self.problem.own_local_bytes(mesh, sharding),
            **adapters,
            **copies,
            "gradients": trained * DTYPE_BYTES[formats.gradient_dtype],
            "optimizer": 0.0 if formats.offload_optimizer else updated * self._state_bytes(formats),
        }

    def _fp8_copies_bytes_uncached(self, mesh: MeshShape, gemms: Gemms) -> float:
        """Copies of a rank's weights in e4m3, row by row and transposed, which stand through the step."""
        weights = self.problem.all_fp8_weights(gemms, mesh)
        return sum(count * weight.fp8_copies_bytes / ranks for count, ranks, weight in weights)

    def _outside_allocator_uncached(
        self, mesh: MeshShape, sequences: int, gradient: str, sharding: str, gemms: Gemms = IN_COMPUTE_DTYPE
    ) -> dict[str, float]:
        """What a rank's process takes of the GPU besides its tensors, and tensors after the micro-batches' graph."""
        found = {"context": float(self.cluster.context_bytes)}
        if mesh.gpus > 1:
            found["NCCL"] = float(self.cluster.nccl_bytes)
        batch = micro_batch(self.problem, mesh, sequences, sharding, gradient, gemms)
        for axis in AXES:
            found |= axis.outside_bytes(batch)
        return found

    def host_bytes(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> float:
        """Host memory of one rank's offloaded states."""
        if not formats.offload_optimizer:
            return 0.0
        return self.problem.updated_parameters(mesh, sharding) * self._state_bytes(formats)

    def update_bytes(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> float:
        """Offloaded states visit the device tensor by tensor: those of the largest parameter that this rank holds."""
        if not formats.offload_optimizer:
            return 0.0
        config, division = self.workload.config, division_of(mesh)
        shares = division.features * division.weights
        largest = config.vocab_size * config.hidden_size / shares
        if config.num_moe_layers:
            gate_up = 2 * config.expert_intermediate_size * config.hidden_size * (config.num_experts or 0)
            largest = max(largest, gate_up * gate_up_padding(config, mesh) / shares)
        return largest * self._state_bytes(formats)

    def _state_bytes(self, formats: Formats) -> float:
        """Bytes of optimizer state of one weight; a weight in fp32, as adapters are, is its own master."""
        in_fp32 = self.problem.request.compute_dtype == "fp32" or self.workload.lora is not None
        master = 0.0 if in_fp32 else MASTER_BYTES[formats.master_weight_format]
        return MOMENT_BYTES[formats.optimizer_state_dtype] + master

    def total_bytes(
        self,
        mesh: MeshShape,
        sequences: int,
        layers: tuple[LayerPlan, ...],
        formats: Formats,
        sharding: str = "fsdp",
        gemms: Gemms = IN_COMPUTE_DTYPE,
    ) -> float:
        """The peak of :meth:`peak`, without its classes."""
        transient, _ = self.transient(mesh, sequences, layers, formats.gradient_dtype, sharding, gemms)
        at_least, resident = self._around_transient(mesh, sequences, formats, sharding, gemms)
        return max(sum(transient.values()), at_least) + resident

    def _around_transient(
        self, mesh: MeshShape, sequences: int, formats: Formats, sharding: str, gemms: Gemms
    ) -> tuple[float, float]:
        """What a peak is at least because of the update, and what is there all the time: both without activations."""
        resident = sum(self.persistent(mesh, formats, sharding, gemms).values())
        resident += sum(self.outside_allocator(mesh, sequences, formats.gradient_dtype, sharding, gemms).values())
        return self.update_bytes(mesh, formats, sharding), resident

    def _transient_uncached(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str, sharding: str, gemms: Gemms
    ) -> tuple[dict[str, float], str]:
        moments = self.moments.breakdowns(mesh, sequences, layers, gradient, sharding, gemms)
        moment, breakdown = max(moments.items(), key=lambda item: sum(item[1].values()))
        breakdown["allocator slack"] = sum(breakdown.values()) * self.cluster.allocator_slack
        return breakdown, moment

    def _partly_recomputed_bytes_uncached(
        self,
        mesh: MeshShape,
        sequences: int,
        layers: tuple[LayerPlan, ...],
        name: str,
        gradient: str,
        sharding: str,
        gemms: Gemms,
    ) -> tuple[float, ...]:
        layer = next(layer for layer in layers if layer.kind == name)
        nowhere, everywhere = (
            self.moments.breakdowns(mesh, sequences, changed, gradient, sharding, gemms)
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
        sequences, gemms = candidate.micro_batch_sequences, candidate.gemms
        transient = self._partly_recomputed_bytes(
            mesh, sequences, candidate.layers, kind, formats.gradient_dtype, sharding, gemms
        )
        at_least, resident = self._around_transient(mesh, sequences, formats, sharding, gemms)
        return tuple(max(size, at_least) + resident for size in transient)
