"""Peak memory of a plan per rank, by class, and the moment of the step at which it falls.

What lives through the step: weights, gradient buffers, optimizer state. On top of it, the largest of

- **loss**: activations of every layer, the loss's gradients and a chunk of logits;
- **backward**: activations of every layer and the temporary buffers of the last layer's backward, which starts while
  nothing has been given back yet;
- **optimizer**: nothing more (states are updated in place, in one pass).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moescale.plan import LayerPlan, MeshShape
from moescale.planner.cluster import Cluster
from moescale.planner.cost import DTYPE_BYTES, MASTER_BYTES, MOMENT_BYTES
from moescale.planner.request import Candidate, Formats, PlanRequest, recompute_name
from moescale.planner.workload import LayerKind, Workload, saved_bytes

LOGIT_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at one time (``kernels.cross_entropy``)."""


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of one rank at the peak."""

    breakdown: dict[str, float]
    moment: str

    @property
    def total(self) -> float:
        return sum(self.breakdown.values())


class MemoryModel:
    """Peaks of candidates for one model, cluster and request; partial results are kept."""

    def __init__(self, workload: Workload, cluster: Cluster, request: PlanRequest) -> None:
        self.workload = workload
        self.cluster = cluster
        self.request = request
        self.itemsize = DTYPE_BYTES[request.compute_dtype]
        self._parameters = workload.parameters()
        self._layer_parameters = {kind.name: workload.layer_parameters(kind) for kind in workload.layers}
        self._outside_parameters = workload.outside_parameters()
        self.transient = functools.cache(self._transient_uncached)

    def peak(self, candidate: Candidate) -> PeakMemory:
        """The peak of ``candidate``, by class."""
        transient, moment = self.transient(
            candidate.mesh, candidate.micro_batch_sequences, candidate.dense_layers, candidate.moe_layers,
            candidate.formats.gradient_dtype,
        )  # fmt: skip
        return PeakMemory(breakdown=self.persistent(candidate.mesh, candidate.formats) | transient, moment=moment)

    def persistent(self, mesh: MeshShape, formats: Formats) -> dict[str, float]:
        """Weights, gradients and optimizer state of one rank."""
        share = self._parameters / (mesh.pp * mesh.tp * mesh.dp_shard * mesh.cp)
        master = 0.0 if self.request.compute_dtype == "fp32" else MASTER_BYTES[formats.master_weight_format]
        on_gpu = 0.0 if formats.offload_optimizer else 1.0
        return {
            "weights": share * self.itemsize,
            "gradients": share * DTYPE_BYTES[formats.gradient_dtype],
            "optimizer": share * (MOMENT_BYTES[formats.optimizer_state_dtype] + master) * on_gpu,
            "context": float(self.cluster.context_bytes),
        }

    def host_bytes(self, mesh: MeshShape, formats: Formats) -> float:
        """Host memory of one rank's offloaded states."""
        if not formats.offload_optimizer:
            return 0.0
        share = self._parameters / (mesh.pp * mesh.tp * mesh.dp_shard * mesh.cp)
        return share * (MOMENT_BYTES[formats.optimizer_state_dtype] + MASTER_BYTES[formats.master_weight_format])

    def transient_bytes(
        self, mesh: MeshShape, sequences: int, dense: LayerPlan, moe: LayerPlan, gradient: str
    ) -> float:
        """Everything at the peak that is not :meth:`persistent`."""
        return sum(self.transient(mesh, sequences, dense, moe, gradient)[0].values())

    def _transient_uncached(
        self, mesh: MeshShape, sequences: int, dense: LayerPlan, moe: LayerPlan, gradient: str
    ) -> tuple[dict[str, float], str]:
        tokens = sequences * self.request.sequence_length // mesh.cp
        dims = self.workload.dims(tokens, self.request.sequence_length)
        plans = {"dense": dense, "moe": moe}
        breakdown: dict[str, float] = {}
        # The first pipeline stage holds the activations of as many micro-batches as there are stages: of pp times
        # 1 / pp of the layers, so of all of them.
        for kind in self.workload.layers:
            kept = self._kept_bytes(kind, plans[kind.name], dims, mesh)
            breakdown[f"activations {kind.name}"] = kind.count * kept
        outside = saved_bytes(self.workload.outside, dims, self.itemsize) / mesh.tp
        logits = min(tokens, LOGIT_CHUNK_TOKENS) * dims["w"] * self.itemsize / mesh.tp
        at_loss = {"loss": outside, "temporary buffers": logits}
        at_backward = {"temporary buffers": self._backward_bytes(plans, dims, mesh)}
        moment, extra = max(
            (("loss", at_loss), ("backward of the last layer", at_backward)), key=lambda pair: sum(pair[1].values())
        )
        breakdown |= extra
        breakdown["communication"] = self._communication_bytes(plans, mesh, gradient)
        loose = sum(breakdown.values())
        breakdown["allocator slack"] = loose * self.cluster.allocator_slack
        return breakdown, moment

    def _kept_bytes(self, kind: LayerKind, plan: LayerPlan, dims: dict[str, int], mesh: MeshShape) -> float:
        """What one layer keeps from its forward to its backward."""
        name = recompute_name(plan)
        if name == "block":
            return dims["n"] * dims["h"] * self.itemsize
        dropped = frozenset({"expert_pre_activation"}) if "experts" in name.split("+") else frozenset()
        kept = saved_bytes(kind, dims, self.itemsize, dropped) / mesh.tp
        if kind.name == "moe" and mesh.ep > 1:
            kept += self._exchange_bytes(dims)
        return kept

    def _exchange_bytes(self, dims: dict[str, int]) -> float:
        """Behind an all-to-all the experts' input rows and their returned results are kept: they exist only as rows."""
        rows = dims["n"] * dims["k"] * dims["h"] * self.itemsize
        return rows * (1 + self.request.router_imbalance)

    def _backward_bytes(self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape) -> float:
        """Buffers of the largest backward among the layer kinds, its recomputed activations included."""
        largest = 0.0
        for kind in self.workload.layers:
            if kind.name == "moe":
                # Gathered rows and their gradients, the gradient of the pre-activation, the activation.
                rows = dims["n"] * dims["k"] * (self.request.router_imbalance if mesh.ep > 1 else 1.0)
                size = rows * (2 * dims["h"] + 3 * dims["f"] / mesh.tp) * self.itemsize
                if "experts" in recompute_name(plans["moe"]).split("+"):
                    size += rows * 2 * dims["f"] * self.itemsize / mesh.tp
            else:
                size = dims["n"] * 5 * dims["i"] * self.itemsize / mesh.tp
            if recompute_name(plans[kind.name]) == "block":
                size += saved_bytes(kind, dims, self.itemsize) / mesh.tp
                if kind.name == "moe" and mesh.ep > 1:
                    size += self._exchange_bytes(dims)
            largest = max(largest, size)
        return largest

    def _communication_bytes(self, plans: dict[str, LayerPlan], mesh: MeshShape, gradient: str) -> float:
        """Gathered weights and unreduced gradients where weights are sharded."""
        ranks = mesh.dp_shard * mesh.cp
        if ranks == 1:
            return 0.0
        gathered = self._outside_parameters * self.itemsize / mesh.tp
        largest = 0.0
        for kind in self.workload.layers:
            dense, routed = self._layer_parameters[kind.name]
            edp = ranks // mesh.ep
            layer = (dense + (routed / mesh.ep if edp > 1 else 0.0)) / mesh.tp
            if plans[kind.name].reshard_after_forward:
                largest = max(largest, layer)
            else:
                gathered += kind.count / mesh.pp * layer * self.itemsize
        # The layer at work and the one gathered ahead; the gradients of one, in their own and in the reduced dtype.
        return gathered + largest * (2 * self.itemsize + self.itemsize + DTYPE_BYTES[gradient])
