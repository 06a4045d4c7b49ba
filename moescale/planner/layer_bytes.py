"""Bytes of the parts that a layer's memory is made of on one rank: kept activations, buffers, gathered weights."""

from __future__ import annotations

from moescale.formats import DTYPE_BYTES
from moescale.operators import is_routed
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.exchange import PeerExchange, row_factor
from moescale.planner.request import PlanRequest, recompute_name
from moescale.planner.shares import expert_padding
from moescale.planner.workload import LayerKind, Workload, saved_bytes


class LayerBytes:
    """Sizes of a model's layers under a request; ``dims`` are those of a micro-batch (``Workload.dims``)."""

    def __init__(self, workload: Workload, request: PlanRequest) -> None:
        self.workload = workload
        self.request = request
        self.itemsize = DTYPE_BYTES[request.compute_dtype]
        self._gradient_itemsize = self.itemsize if workload.lora is None else DTYPE_BYTES["fp32"]
        self._layer_bytes = {kind.name: workload.layer_bytes(kind, self.itemsize) for kind in workload.layers}
        self._adapters = {kind.name: workload.adapter_parameters(kind) for kind in workload.layers}
        self._trained_parameters = {kind.name: workload.trained_parameters(kind) for kind in workload.layers}
        self._outside_parameters = workload.outside_parameters()
        self._made_plain = {kind.name: self._plain_bytes(kind) for kind in workload.layers}

    def _plain_bytes(self, kind: LayerKind) -> tuple[list[int], int]:
        """Sizes of weights in fp8 once made plain: of the routed experts in their order, and the largest other one."""
        found: tuple[list[int], list[int]] = ([], [0])
        for op in kind.operators:
            sizes = [weight.elements * self.itemsize for weight in self.workload.in_fp8(op)]
            found[0 if is_routed(op) else 1].extend(sizes)
        return found[0], max(found[1])

    def made_plain(self, kind: LayerKind, mesh: MeshShape) -> float:
        """The largest weight of a layer that is no routed expert, made plain from fp8 for its product."""
        return self._made_plain[kind.name][1] / mesh.tp

    def experts_made_plain(self, kind: str, mesh: MeshShape) -> tuple[float, float]:
        """A rank's routed experts of a layer, made plain from fp8 one after the other: gate and up, and down."""
        sizes = [size / (mesh.tp * mesh.ep) for size in self._made_plain[kind][0]]
        return (sizes[0], sizes[1]) if sizes else (0.0, 0.0)

    def exchange(self, mesh: MeshShape, sequences: int) -> PeerExchange:
        dims = self.workload.dims(sequences * self.request.sequence_length, self.request.sequence_length)
        return PeerExchange.of(self.workload.config, dims, mesh.ep, self.itemsize)

    def row_factor(self, mesh: MeshShape) -> float:
        """Rows of the fullest rank behind an all-to-all, as :func:`moescale.planner.exchange.row_factor`."""
        return row_factor(self.workload.config, mesh, self.request.router_imbalance)

    def kept(self, kind: LayerKind, plan: LayerPlan, dims: dict[str, int], mesh: MeshShape) -> float:
        """What one layer keeps from its forward to its backward."""
        name = recompute_name(plan)
        if name == "block":
            return dims["n"] * dims["h"] * self.itemsize
        return self.full_layer(kind, dims, mesh, kind.dropped(name.split("+")))

    def full_layer(
        self, kind: LayerKind, dims: dict[str, int], mesh: MeshShape, dropped: frozenset[str] = frozenset()
    ) -> float:
        """What one layer keeps where its block is not recomputed."""
        kept = saved_bytes(kind, dims, self.itemsize, dropped) / mesh.tp
        if kind.is_routed and mesh.ep > 1:
            kept += self.exchanged_rows(dims, mesh)
            kept += self.padding(dims, mesh, keeps_pre_activation=not dropped)
        return kept

    def recomputed(self, kind: LayerKind, plan: LayerPlan, dims: dict[str, int], mesh: MeshShape) -> float:
        """What the backward of one layer has there again because its block is recomputed."""
        return self.full_layer(kind, dims, mesh) if recompute_name(plan) == "block" else 0.0

    def exchanged_rows(self, dims: dict[str, int], mesh: MeshShape) -> float:
        """Behind an all-to-all the experts' input rows and their returned results are kept: they exist only as rows."""
        rows = dims["n"] * dims["k"] * dims["h"] * self.itemsize
        # The exchange of two ranks returns padded slots too, others what was sent.
        returned = self.row_factor(mesh) if mesh.ep == 2 else 1.0
        return rows * (returned + self.row_factor(mesh))

    def padding(self, dims: dict[str, int], mesh: MeshShape, keeps_pre_activation: bool) -> float:
        """Pre-activations of slots that hold no row, or of rows beyond an equal share."""
        more = dims["n"] * dims["k"] * (self.row_factor(mesh) - 1)
        return more * 2 * dims["f"] * self.itemsize / mesh.tp if keeps_pre_activation else 0.0

    def loss(self, dims: dict[str, int], mesh: MeshShape) -> float:
        return saved_bytes(self.workload.outside, dims, self.itemsize) / mesh.tp

    def output_gradient(self, mesh: MeshShape) -> float:
        if self.workload.lora is not None:
            return 0.0
        config = self.workload.config
        return config.vocab_size * config.hidden_size * self.itemsize / mesh.tp

    def operator_buffers(self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape) -> float:
        """Largest buffers that an operator's backward makes and gives back before it returns."""
        return max(
            self.expert_buffers(plans[kind.name], dims, mesh)
            if kind.is_routed
            else dims["n"] * 5 * dims["i"] * self.itemsize / mesh.tp + self.made_plain(kind, mesh)
            for kind in self.workload.layers
        )

    def expert_buffers(self, plan: LayerPlan, dims: dict[str, int], mesh: MeshShape) -> float:
        """Gathered rows and their gradients, the gradient of the pre-activation, the activation; and a plain weight.

        The activation is gone when the gradient of the rows is made, with gate and up.
        """
        rows = dims["n"] * dims["k"] * (self.row_factor(mesh) if mesh.ep > 1 else 1.0)
        size = rows * (2 * dims["h"] + 3 * dims["f"] / mesh.tp) * self.itemsize
        if "experts" in recompute_name(plan).split("+"):
            size += rows * 2 * dims["f"] * self.itemsize / mesh.tp
        gate_up, down = self.experts_made_plain(plan.kind, mesh)
        at_last = rows * (3 * dims["h"] + 2 * dims["f"] / mesh.tp) * self.itemsize + gate_up if gate_up else 0.0
        return max(size + down, at_last)

    def expert_gradients(self, kind: LayerKind, mesh: MeshShape) -> float:
        """A layer's gradients of its own experts, unless the product adds to their buffers itself."""
        own_experts = mesh.dp_shard * mesh.cp // mesh.ep * mesh.dp_replicate == 1
        if own_experts and self.request.compute_dtype == "bf16":
            return 0.0
        _, routed = self._trained_parameters[kind.name]
        return routed * self._gradient_itemsize / (mesh.tp * mesh.ep)

    def layer_gathered(self, kind: LayerKind, mesh: MeshShape) -> float:
        """A layer's weights as a rank gathers them; 0 for what no other rank holds.

        FSDP2 keeps a gathered copy also of weights that are only replicated, not sharded.
        """
        own = self._gathered_layer(self._layer_bytes[kind.name], mesh)
        return own + self._gathered_layer(self._adapters[kind.name], mesh) * DTYPE_BYTES["fp32"]

    def gathered_again(self, kind: LayerKind, plan: LayerPlan, mesh: MeshShape) -> float:
        """A layer's weights as the backward gathers them again, where the forward freed them."""
        return self.layer_gathered(kind, mesh) if plan.reshard_after_forward else 0.0

    def layer_gradients(self, kind: LayerKind, mesh: MeshShape) -> float:
        """A layer's gradients as the backward makes them, before they are reduced."""
        return self._gathered_layer(self._trained_parameters[kind.name], mesh) * self._gradient_itemsize

    def reduced_layer(self, kind: LayerKind, mesh: MeshShape, gradient: str) -> float:
        """A layer's gradients as they are reduced, whole."""
        return self._gathered_layer(self._trained_parameters[kind.name], mesh) * DTYPE_BYTES[gradient]

    def _gathered_layer(self, weights: tuple[int, int], mesh: MeshShape) -> float:
        """Of a layer's weights or bytes (without routed experts, routed experts) those that a rank gathers."""
        ranks = mesh.dp_shard * mesh.cp
        if ranks * mesh.dp_replicate == 1:
            return 0.0
        dense, routed = weights
        shared = ranks * mesh.dp_replicate > mesh.ep
        gathered = routed * expert_padding(self.workload.config, mesh) / mesh.ep if shared else 0.0
        return (dense + gathered) / mesh.tp

    def gathered(self, plans: dict[str, LayerPlan], mesh: MeshShape) -> float:
        """Weights that stay gathered from their forward to their backward: those outside layers, and as planned."""
        if mesh.dp_shard * mesh.cp * mesh.dp_replicate == 1:
            return 0.0
        gathered = self._outside_parameters * self.itemsize / mesh.tp
        for kind in self.workload.layers:
            if not plans[kind.name].reshard_after_forward:
                gathered += kind.count / mesh.pp * self.layer_gathered(kind, mesh)
        return gathered
