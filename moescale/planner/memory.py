"""Peak memory of a plan per rank, by class, and the moment of the step at which it falls.

What lives through the step: weights, gradient buffers, optimizer state. On top of it, the largest of these moments, in
all of which FSDP2 keeps the weights outside the layers gathered:

- **loss**: every layer's activations, the gradients that the loss computes with it, and a chunk of logits;
- **gradient of the loss**: the same without logits, with the output weight's gradient beside what it is multiplied from
  (on one device, in bf16, it is added to its buffer instead) and the last layer's weights on their way;
- **gradient of the last combination**, where experts lie on several ranks: every layer's activations, and the
  gradients of the rows that came back, those that travel, and those that arrive;
- **gradient of the last experts**: every layer's activations, rows and gradients inside the operator (behind an
  exchange, two of those three gradients of rows), the experts' weight gradients unless these go straight into their
  buffers, and the pre-activation where it is computed again;
- **gradient of the last activation** in a dense MLP: where no weight has a gradient, of the last layer, or of the last
  one of a kind whose blocks are recomputed;
- **weights of the last layer**: when they have arrived again and are copied out of the buffer that they arrived in;
- **backward of the last layers**: the second to last of them, with the activations of all but the last; gathered are
  its weights and those of the layer before, and there are its own gradients and what the last layer's are being
  reduced from. Earlier layers find less, for every layer gives back what it kept.

The optimizer updates states in place; only those kept in host memory visit the device for it (**update**).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from moescale.formats import DTYPE_BYTES, MASTER_BYTES, MOMENT_BYTES, logit_chunk_tokens
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.cluster import Cluster
from moescale.planner.exchange import PeerExchange, reads_peers, row_factor
from moescale.planner.request import Candidate, Formats, PlanRequest, recompute_name, replace_layer
from moescale.planner.shares import (
    expert_padding,
    gate_up_padding,
    local_parameters,
    rank_parameters,
    updated_parameters,
)
from moescale.planner.workload import LayerKind, Workload, saved_bytes

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
        self._layer_parameters = {kind.name: workload.layer_parameters(kind) for kind in workload.layers}
        self._adapters = {kind.name: workload.adapter_parameters(kind) for kind in workload.layers}
        self._trained_parameters = {kind.name: workload.trained_parameters(kind) for kind in workload.layers}
        self._outside_parameters = workload.outside_parameters()
        self.transient = functools.cache(self._transient_uncached)
        self._partly_recomputed_bytes = functools.cache(self._partly_recomputed_bytes_uncached)
        self._share = functools.cache(functools.partial(rank_parameters, workload.trained))
        self._own = functools.cache(functools.partial(local_parameters, workload.weights))
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
            "weights": self._own(mesh, sharding) * self.itemsize,
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
            found["symmetric memory"] = float(self._exchange(mesh, sequences).symmetric_bytes())
        if sharding == "zero1" and mesh.dp_shard * mesh.dp_replicate > 1:
            elements = min(BUCKET_ELEMENTS, self._trained(mesh, sharding))
            found["buckets of the update"] = 4 * elements * (1 + 1 / mesh.dp_shard)
        return found

    def _exchange(self, mesh: MeshShape, sequences: int) -> PeerExchange:
        dims = self.workload.dims(sequences * self.request.sequence_length, self.request.sequence_length)
        return PeerExchange.of(self.workload.config, dims, mesh.ep, self.itemsize)

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
        moments = self.moments(mesh, sequences, layers, gradient, sharding)
        moment, breakdown = max(moments.items(), key=lambda item: sum(item[1].values()))
        breakdown["allocator slack"] = sum(breakdown.values()) * self.cluster.allocator_slack
        return breakdown, moment

    def moments(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str, sharding: str = "fsdp"
    ) -> dict[str, dict[str, float]]:
        """What lives beside weights, gradients and states, at every moment that can be the peak, by class."""
        partly = next((layer for layer in layers if layer.recompute_layers is not None), None)
        if partly is not None:
            nowhere, everywhere = (
                self.moments(mesh, sequences, changed, gradient, sharding) for changed in _both_ends(layers, partly)
            )
            assert partly.recompute_layers is not None
            return self._partly(partly.kind, nowhere, everywhere, partly.recompute_layers)
        if sharding == "zero1":
            return self._whole_moments(mesh, sequences, layers, gradient)
        tokens = sequences * self.request.sequence_length // mesh.cp
        dims = self.workload.dims(tokens, self.request.sequence_length)
        plans = {layer.kind: layer for layer in layers}
        # The first pipeline stage holds the activations of as many micro-batches as there are stages: of pp times
        # 1 / pp of the layers, so of all of them.
        kept = {
            f"activations {kind.name}": kind.count * self._kept_bytes(kind, plans[kind.name], dims, mesh)
            for kind in self.workload.layers
        }
        first = min(self.workload.layers, key=lambda kind: kind.indices[0])
        if self.workload.lora is not None and recompute_name(plans[first.name]) != "block":
            # Nothing before the first layer is trained, so its norm has no backward.
            kept[f"activations {first.name}"] -= dims["n"] * dims["h"] * self.itemsize
        gathered = self._gathered_bytes(plans, mesh)
        moments = {
            "loss": kept | self._at_loss(dims, mesh) | {"communication": gathered},
            "gradient of the loss": kept | self._at_loss_gradient(plans, dims, mesh, gathered),
            "backward of the last layers": self._at_backward(kept, plans, dims, mesh, gradient, gathered),
        }
        if self.workload.lora is not None:  # else the gradients of weights make other moments larger
            moments |= self._in_feed_forwards(kept, plans, dims, mesh, gathered)
        if mesh.ep > 1:
            moments |= {
                name: kept | parts for name, parts in self._in_divided_experts(plans, dims, mesh, gathered).items()
            }
        elif self._last_kind().is_routed:
            moments["gradient of the last experts"] = kept | self._in_own_experts(plans, dims, mesh, gathered)
        if mesh.dp_replicate > 1 and self._accumulates(mesh, sequences):
            share = self._share(mesh)
            for breakdown in moments.values():
                breakdown["sums for replicas"] = share * DTYPE_BYTES[gradient]
        return moments

    def _partly(
        self, name: str, nowhere: dict[str, dict[str, float]], everywhere: dict[str, dict[str, float]], number: int
    ) -> dict[str, dict[str, float]]:
        """Moments where ``number`` layers of a kind recompute, from those where none and where all of them do.

        Where the model's last layer is of the kind, it does not recompute, and the last of the first ones is another
        moment. Layers of another kind find what all of it keep, and the largest buffers that one of it needs.
        """
        kind = next(kind for kind in self.workload.layers if kind.name == name)
        key = f"activations {name}"
        less = (nowhere["loss"][key] - everywhere["loss"][key]) / kind.count
        if kind is not self._last_kind():
            more = (kind.count - number) * less
            return {
                moment: parts | ({key: parts[key] + more} if key in parts else {})
                for moment, parts in everywhere.items()
            }
        moments = {  # at some, no activations live
            moment: parts | ({key: parts[key] - number * less} if key in parts else {})
            for moment, parts in nowhere.items()
        }
        for moment, parts in everywhere.items():
            if "last" in moment and key in parts:  # by then the backward of the others has freed theirs
                left = {key: parts[key] - (kind.count - number) * everywhere["loss"][key] / kind.count}
                for other in self.workload.layers:
                    later = sum(index > kind.indices[number - 1] for index in other.indices)
                    of_other = f"activations {other.name}"
                    if other is not kind and later and of_other in parts:
                        left[of_other] = parts[of_other] - later * everywhere["loss"][of_other] / other.count
                moments[moment.replace("last", "last recomputed")] = parts | left
        return moments

    def _partly_recomputed_bytes_uncached(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], name: str, gradient: str, sharding: str
    ) -> tuple[float, ...]:
        layer = next(layer for layer in layers if layer.kind == name)
        nowhere, everywhere = (
            self.moments(mesh, sequences, changed, gradient, sharding) for changed in _both_ends(layers, layer)
        )
        slack = 1 + self.cluster.allocator_slack
        count = next(kind.count for kind in self.workload.layers if kind.name == name)
        return tuple(
            slack * max(sum(parts.values()) for parts in self._partly(name, nowhere, everywhere, number).values())
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

    def _whole_moments(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str
    ) -> dict[str, dict[str, float]]:
        """With whole weights: those of one GPU, whose experts' rows lie in the exchange's workspaces where ep > 1."""
        moments = self.moments(MeshShape(), sequences, layers, gradient)
        if mesh.ep == 1:
            return moments
        plans = {layer.kind: layer for layer in layers}
        routed = sorted((kind for kind in self.workload.layers if kind.is_routed), key=lambda kind: kind.indices[-1])
        for kind in routed:
            self._add_exchanged_rows(moments, kind, plans, mesh, sequences, is_last=kind is routed[-1])
        return moments

    def _add_exchanged_rows(
        self,
        moments: dict[str, dict[str, float]],
        kind: LayerKind,
        plans: dict[str, LayerPlan],
        mesh: MeshShape,
        sequences: int,
        *,
        is_last: bool,
    ) -> None:
        """Add what the exchange keeps for the layers of ``kind``, and what its last layer's backward needs at once."""
        name = recompute_name(plans[kind.name])
        keeps = "experts" not in name.split("+")
        exchange = self._exchange(mesh, sequences)
        dims = self.workload.dims(sequences * self.request.sequence_length, self.request.sequence_length)
        if reads_peers(mesh, "zero1", self.cluster):
            rows = dims["r"] * 2 * dims["f"] * self.itemsize if keeps else 0
            more: float = exchange.kept_bytes(keeps_pre_activation=keeps) - rows
            inside: float = exchange.backward_bytes(keeps_pre_activation=keeps)
        else:
            more = self._exchange_bytes(dims, mesh) + self._padding_bytes(dims, mesh, keeps)
            inside = self._operator_buffers(plans, dims, mesh)
        layers = int(is_last) if name == "block" else kind.count  # a block recomputes its rows in its own backward
        for moment, breakdown in moments.items():
            given_back = is_last and moment == "backward of the last layers" and name != "block"
            own = layers - 1 if given_back else layers
            breakdown[f"activations {kind.name}"] += own * more
        last = moments["backward of the last layers"]
        last["inside operators"] = max(last["inside operators"], inside)
        if not is_last:
            return
        # The last layer's experts run while every layer's activations are still there.
        hidden: float = 4 * dims["n"] * dims["h"] * self.itemsize
        kept = {key: size for key, size in moments["loss"].items() if key.startswith("activations")}
        if name == "block":
            hidden += self._full_layer_bytes(kind, dims, MeshShape())
        moments["gradient of the last experts"] = kept | {"temporary buffers": hidden, "inside operators": inside}

    def _padding_bytes(self, dims: dict[str, int], mesh: MeshShape, keeps_pre_activation: bool) -> float:
        """Pre-activations of slots that hold no row, or of rows beyond an equal share."""
        more = dims["n"] * dims["k"] * (self.row_factor(mesh) - 1)
        return more * 2 * dims["f"] * self.itemsize / mesh.tp if keeps_pre_activation else 0.0

    def row_factor(self, mesh: MeshShape) -> float:
        """Rows of the fullest rank behind an all-to-all, as :func:`moescale.planner.exchange.row_factor`."""
        return row_factor(self.workload.config, mesh, self.request.router_imbalance)

    def _at_loss(self, dims: dict[str, int], mesh: MeshShape) -> dict[str, float]:
        tokens = min(dims["n"], logit_chunk_tokens(dims["n"]))
        logits = tokens * dims["w"] * self.itemsize / mesh.tp
        return {"loss": self._loss_bytes(dims, mesh), "inside operators": logits}

    def _at_loss_gradient(
        self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape, gathered: float
    ) -> dict[str, float]:
        last = self._last_kind()
        ahead = self._layer_gathered_bytes(last, mesh) if plans[last.name].reshard_after_forward else 0.0
        undivided = mesh.dp_shard * mesh.cp * mesh.dp_replicate == 1
        in_buffer = undivided and self.request.compute_dtype == "bf16"
        weight = 0.0 if in_buffer else self._output_gradient_bytes(mesh)
        return {
            "loss": self._loss_bytes(dims, mesh),
            "temporary buffers": weight + dims["n"] * dims["h"] * self.itemsize,
            "communication": gathered + ahead,
        }

    def _in_feed_forwards(
        self,
        kept: dict[str, float],
        plans: dict[str, LayerPlan],
        dims: dict[str, int],
        mesh: MeshShape,
        gathered: float,
    ) -> dict[str, dict[str, float]]:
        """The gradient of the activation in the dense MLP of a kind's last layer, whose result was its first gradient.

        Also the moment before the last layer, when its weights are copied out of what was gathered of them.
        """
        moments = {}
        last = self._last_kind()
        there = dict(kept)
        for kind in reversed(self.workload.layers):
            if kind is not last and recompute_name(plans[kind.name]) != "block":
                continue  # later layers have given back more than this one makes
            width = (dims["s"] if kind.is_routed else dims["i"]) / mesh.tp
            gradients = dims["n"] * (dims["h"] + 3 * width) * self.itemsize
            name = "shared_activation" if kind.is_routed else "dense_activation"
            if any(tensor.name == name for op in kind.operators for tensor in op.saved):
                gradients -= dims["n"] * width * self.itemsize  # given back by then
            if recompute_name(plans[kind.name]) == "block":
                again = self._full_layer_bytes(kind, dims, mesh) - dims["n"] * dims["h"] * self.itemsize
                gradients += again  # without its input, which the block keeps
            ahead = self._layer_gathered_bytes(kind, mesh) if plans[kind.name].reshard_after_forward else 0.0
            moments[f"gradient of the last {kind.name} activation"] = there | {
                "temporary buffers": gradients,
                "communication": gathered + ahead,
            }
            if kind is last and ahead:
                moments["weights of the last layer"] = there | {
                    "temporary buffers": dims["n"] * dims["h"] * self.itemsize,
                    "communication": gathered + 2 * ahead,
                }
            there = {key: size for key, size in there.items() if key != f"activations {kind.name}"}
        return moments

    def _in_own_experts(
        self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape, gathered: float
    ) -> dict[str, float]:
        """The backward of the last layer's experts, all of which the rank computes itself."""
        last = self._last_kind()
        plan = plans[last.name]
        again = self._full_layer_bytes(last, dims, mesh) if recompute_name(plan) == "block" else 0.0
        ahead = self._layer_gathered_bytes(last, mesh) if plan.reshard_after_forward else 0.0
        ranks = mesh.dp_shard * mesh.cp * mesh.dp_replicate
        return {
            # Of the residual stream: what entered the last norm, its gradients, and those of the layer's two branches.
            "temporary buffers": again + 6 * dims["n"] * dims["h"] * self.itemsize + self._expert_gradients(last, mesh),
            "inside operators": self._expert_buffers(plan, dims, mesh),
            "communication": gathered + ahead + (self._output_gradient_bytes(mesh) if ranks > 1 else 0.0),
        }

    def _expert_gradients(self, kind: LayerKind, mesh: MeshShape) -> float:
        """A layer's gradients of its own experts, unless the product adds to their buffers itself."""
        own_experts = mesh.dp_shard * mesh.cp // mesh.ep * mesh.dp_replicate == 1
        if own_experts and self.request.compute_dtype == "bf16":
            return 0.0
        _, routed = self._trained_parameters[kind.name]
        size = self.itemsize if self.workload.lora is None else DTYPE_BYTES["fp32"]
        return routed * size / (mesh.tp * mesh.ep)

    def _in_divided_experts(
        self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape, gathered: float
    ) -> dict[str, dict[str, float]]:
        """The two moments in the backward of the last layer's experts."""
        last = self._last_kind()
        plan = plans[last.name]
        again = self._full_layer_bytes(last, dims, mesh) if recompute_name(plan) == "block" else 0.0
        hidden = dims["n"] * dims["h"] * self.itemsize
        rows = dims["k"] * hidden * (self.row_factor(mesh) if mesh.ep == 2 else 1.0)
        ahead = self._layer_gathered_bytes(last, mesh) if plan.reshard_after_forward else 0.0
        communication = gathered + ahead + self._output_gradient_bytes(mesh)
        in_experts: float = 2 * rows + self._expert_gradients(last, mesh)
        if "experts" in recompute_name(plan).split("+"):
            in_experts += dims["n"] * dims["k"] * 2 * dims["f"] * self.itemsize / mesh.tp
        return {
            "gradient of the last combination": {
                "temporary buffers": again + 3 * hidden + 3 * rows,
                "communication": communication,
            },
            "gradient of the last experts": {
                "temporary buffers": again + 3 * hidden + in_experts,
                "communication": communication,
            },
        }

    def _at_backward(
        self,
        kept: dict[str, float],
        plans: dict[str, LayerPlan],
        dims: dict[str, int],
        mesh: MeshShape,
        gradient: str,
        gathered: float,
    ) -> dict[str, float]:
        kind = self._last_kind()
        plan = plans[kind.name]
        activations = dict(kept)
        if kind.count > 1:
            activations[f"activations {kind.name}"] -= kept[f"activations {kind.name}"] / kind.count
        again = self._full_layer_bytes(kind, dims, mesh) if recompute_name(plan) == "block" else 0.0
        in_flight = 4 * dims["n"] * dims["h"] * self.itemsize
        layer = self._layer_gathered_bytes(kind, mesh)
        communication = gathered + (2 * layer if plan.reshard_after_forward else 0.0)
        if layer:
            reduced = self._gathered_layer(self._trained_parameters[kind.name], mesh) * DTYPE_BYTES[gradient]
            communication += self._layer_gradient_bytes(kind, mesh) + reduced + self._output_gradient_bytes(mesh)
        return activations | {
            "temporary buffers": again + in_flight,
            "inside operators": self._operator_buffers(plans, dims, mesh),
            "communication": communication,
        }

    def _accumulates(self, mesh: MeshShape, sequences: int) -> bool:
        """Whether a step has several micro-batches: their gradients are summed before replicas add theirs."""
        request = self.request
        return request.tokens_per_step > request.sequence_length * sequences * mesh.dp_replicate * mesh.dp_shard

    def _last_kind(self) -> LayerKind:
        return max(self.workload.layers, key=lambda kind: kind.indices[-1])

    def _loss_bytes(self, dims: dict[str, int], mesh: MeshShape) -> float:
        return saved_bytes(self.workload.outside, dims, self.itemsize) / mesh.tp

    def _output_gradient_bytes(self, mesh: MeshShape) -> float:
        if self.workload.lora is not None:
            return 0.0
        config = self.workload.config
        return config.vocab_size * config.hidden_size * self.itemsize / mesh.tp

    def _kept_bytes(self, kind: LayerKind, plan: LayerPlan, dims: dict[str, int], mesh: MeshShape) -> float:
        """What one layer keeps from its forward to its backward."""
        name = recompute_name(plan)
        if name == "block":
            return dims["n"] * dims["h"] * self.itemsize
        return self._full_layer_bytes(kind, dims, mesh, kind.dropped(name.split("+")))

    def _full_layer_bytes(
        self, kind: LayerKind, dims: dict[str, int], mesh: MeshShape, dropped: frozenset[str] = frozenset()
    ) -> float:
        """What one layer keeps where its block is not recomputed."""
        kept = saved_bytes(kind, dims, self.itemsize, dropped) / mesh.tp
        if kind.is_routed and mesh.ep > 1:
            kept += self._exchange_bytes(dims, mesh)
            kept += self._padding_bytes(dims, mesh, keeps_pre_activation=not dropped)
        return kept

    def _exchange_bytes(self, dims: dict[str, int], mesh: MeshShape) -> float:
        """Behind an all-to-all the experts' input rows and their returned results are kept: they exist only as rows."""
        rows = dims["n"] * dims["k"] * dims["h"] * self.itemsize
        # The exchange of two ranks returns padded slots too, others what was sent.
        returned = self.row_factor(mesh) if mesh.ep == 2 else 1.0
        return rows * (returned + self.row_factor(mesh))

    def _operator_buffers(self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape) -> float:
        """Largest buffers that an operator's backward makes and gives back before it returns."""
        return max(
            self._expert_buffers(plans[kind.name], dims, mesh)
            if kind.is_routed
            else dims["n"] * 5 * dims["i"] * self.itemsize / mesh.tp
            for kind in self.workload.layers
        )

    def _expert_buffers(self, plan: LayerPlan, dims: dict[str, int], mesh: MeshShape) -> float:
        """Gathered rows and their gradients, the gradient of the pre-activation, the activation."""
        rows = dims["n"] * dims["k"] * (self.row_factor(mesh) if mesh.ep > 1 else 1.0)
        size = rows * (2 * dims["h"] + 3 * dims["f"] / mesh.tp) * self.itemsize
        if "experts" in recompute_name(plan).split("+"):
            size += rows * 2 * dims["f"] * self.itemsize / mesh.tp
        return size

    def _layer_gathered_bytes(self, kind: LayerKind, mesh: MeshShape) -> float:
        """A layer's weights as a rank gathers them; 0 for what no other rank holds.

        FSDP2 keeps a gathered copy also of weights that are only replicated, not sharded.
        """
        own = self._gathered_layer(self._layer_parameters[kind.name], mesh) * self.itemsize
        return own + self._gathered_layer(self._adapters[kind.name], mesh) * DTYPE_BYTES["fp32"]

    def _layer_gradient_bytes(self, kind: LayerKind, mesh: MeshShape) -> float:
        """A layer's gradients as the backward makes them, before they are reduced."""
        size = self.itemsize if self.workload.lora is None else DTYPE_BYTES["fp32"]
        return self._gathered_layer(self._trained_parameters[kind.name], mesh) * size

    def _gathered_layer(self, weights: tuple[int, int], mesh: MeshShape) -> float:
        """Of a layer's weights (without routed experts, routed experts) those that a rank gathers."""
        ranks = mesh.dp_shard * mesh.cp
        if ranks * mesh.dp_replicate == 1:
            return 0.0
        dense, routed = weights
        shared = ranks * mesh.dp_replicate > mesh.ep
        gathered = routed * expert_padding(self.workload.config, mesh) / mesh.ep if shared else 0.0
        return (dense + gathered) / mesh.tp

    def _gathered_bytes(self, plans: dict[str, LayerPlan], mesh: MeshShape) -> float:
        """Weights that stay gathered from their forward to their backward: those outside layers, and as planned."""
        if mesh.dp_shard * mesh.cp * mesh.dp_replicate == 1:
            return 0.0
        gathered = self._outside_parameters * self.itemsize / mesh.tp
        for kind in self.workload.layers:
            if not plans[kind.name].reshard_after_forward:
                gathered += kind.count / mesh.pp * self._layer_gathered_bytes(kind, mesh)
        return gathered


def _both_ends(layers: tuple[LayerPlan, ...], partly: LayerPlan) -> tuple[tuple[LayerPlan, ...], tuple[LayerPlan, ...]]:
    """``layers`` with the recomputation of ``partly`` in none of its kind's layers, and in all of them."""
    everywhere = dataclasses.replace(partly, recompute_layers=None)
    nowhere = dataclasses.replace(everywhere, recompute="none")
    return replace_layer(layers, nowhere), replace_layer(layers, everywhere)
