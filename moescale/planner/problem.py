"""What a plan is searched for, and what holds of all plans for it: counts of weights, sizes of dims."""

from __future__ import annotations

import functools

from moescale.formats import DTYPE_BYTES, FP8_GEMM_MULTIPLE
from moescale.operators import Operator, is_routed, operator
from moescale.plan import MeshShape
from moescale.planner.cluster import Cluster
from moescale.planner.request import Gemms, PlanRequest
from moescale.planner.shares import local_parameters, rank_parameters, updated_parameters
from moescale.planner.workload import LayerKind, LinearWeight, Workload


class Problem:
    """A model on a cluster under a request."""

    def __init__(self, workload: Workload, cluster: Cluster, request: PlanRequest) -> None:
        self.workload = workload
        self.cluster = cluster
        self.request = request
        self.itemsize = DTYPE_BYTES[request.compute_dtype]
        """Bytes of a weight or an activation as it is computed with."""
        self.trained_itemsize = self.itemsize if workload.lora is None else DTYPE_BYTES["fp32"]
        """Bytes of a weight that is trained, and of its gradient as autograd makes it."""
        self.own_bytes = {kind.name: workload.layer_bytes(kind, self.itemsize) for kind in workload.layers}
        """By kind, of one layer's own weights: (without routed experts, routed experts)."""
        self.made_plain = {kind.name: self._plain_bytes(kind) for kind in workload.layers}
        """By kind, sizes of weights in fp8 once made plain: of the routed experts in their order, and the largest other
        one."""
        # By kind, how many weights a layer has: (without routed experts, routed experts).
        self.adapters = {kind.name: workload.adapter_parameters(kind) for kind in workload.layers}
        self.trained_parameters = {kind.name: workload.trained_parameters(kind) for kind in workload.layers}
        self.outside_parameters = workload.outside_parameters()
        self.trained = workload.trained
        """Weights with gradients and optimizer state, of the whole model."""
        self._rank_parameters = functools.cache(functools.partial(rank_parameters, self.trained))
        self._own_local_bytes = functools.cache(functools.partial(local_parameters, workload.stored(self.itemsize)))
        self._local_parameters = functools.cache(functools.partial(local_parameters, self.trained))
        self._activations_in_fp8 = functools.cache(self._activations_in_fp8_uncached)
        self._updated_parameters = functools.cache(functools.partial(updated_parameters, self.trained))

    def fp8_weights(self, op: Operator, gemms: Gemms) -> list[LinearWeight]:
        """Weights of ``op`` whose GEMMs are in fp8: all of them or none."""
        if (gemms.expert_gemms if is_routed(op) else gemms.dense_gemms) == "compute":
            return []
        weights = self.workload.linear_weights(op)
        sizes = (size for weight in weights for size in (weight.rows, weight.columns))
        return [] if any(size % FP8_GEMM_MULTIPLE for size in sizes) else weights

    def quantises(self, op: Operator, gemms: Gemms) -> bool:
        """Whether ``op`` is an activation between two operators in fp8, for which it quantises."""
        return op.between is not None and all(self.fp8_weights(operator(name), gemms) for name in op.between)

    def quantised_by_activation(self, op: Operator, gemms: Gemms) -> tuple[bool, bool]:
        """Whether an activation quantises the input of ``op``, and whether one does the gradient of its result."""
        pairs = self._activations_in_fp8(gemms)
        return any(op.name == behind for _, behind in pairs), any(op.name == front for front, _ in pairs)

    def _activations_in_fp8_uncached(self, gemms: Gemms) -> frozenset[tuple[str, str]]:
        """The operators in front of each activation that quantises and behind it."""
        operators = (op for kind in self.workload.layers for op in kind.operators)
        return frozenset(op.between for op in operators if op.between is not None and self.quantises(op, gemms))

    def made_again(self, kind: LayerKind, gemms: Gemms) -> frozenset[str]:
        """Saved tensors that a layer does not keep because they are results of activations that quantise."""
        behind = (operator(op.between[1]) for op in kind.operators if op.between and self.quantises(op, gemms))
        return frozenset(saved.name for op in behind for saved in op.saved)

    def all_fp8_weights(self, gemms: Gemms, mesh: MeshShape) -> list[tuple[int, int, LinearWeight]]:
        """Those of the model: the number of layers that have one, the ranks that divide its experts, or 1, and it."""
        return [
            (kind.count, mesh.ep if is_routed(op) else 1, weight)
            for kind in self.workload.layers
            for op in kind.operators
            for weight in self.fp8_weights(op, gemms)
        ]

    def _plain_bytes(self, kind: LayerKind) -> tuple[list[int], int]:
        found: tuple[list[int], list[int]] = ([], [0])
        for op in kind.operators:
            sizes = [weight.elements * self.itemsize for weight in self.workload.in_fp8(op)]
            found[0 if is_routed(op) else 1].extend(sizes)
        return found[0], max(found[1])

    def is_outside(self, kind: LayerKind) -> bool:
        """Whether ``kind`` stands for what is in no layer."""
        return kind is self.workload.outside

    def dims(self, sequences: int, shards: int = 1) -> dict[str, int]:
        """Dim sizes of a micro-batch of ``sequences``, of whose tokens a rank has one of ``shards``."""
        length = self.request.sequence_length
        return self.workload.dims(sequences * length // shards, length)

    def rank_parameters(self, mesh: MeshShape) -> float:
        """Trained weights whose state the fullest rank keeps where all weights are sharded."""
        return self._rank_parameters(mesh)

    def own_local_bytes(self, mesh: MeshShape, sharding: str) -> float:
        """Bytes of the model's own weights in the fullest rank's memory."""
        return self._own_local_bytes(mesh, sharding)

    def local_parameters(self, mesh: MeshShape, sharding: str) -> float:
        """Trained weights in the fullest rank's memory."""
        return self._local_parameters(mesh, sharding)

    def updated_parameters(self, mesh: MeshShape, sharding: str) -> float:
        """Trained weights whose optimizer state the fullest rank keeps."""
        return self._updated_parameters(mesh, sharding)
