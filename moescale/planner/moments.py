"""The moments of a step that can be its peak of memory, and what lives in each of them.

In all of them FSDP2 keeps the weights outside the layers gathered:

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
"""

from __future__ import annotations

import dataclasses

from moescale.formats import DTYPE_BYTES, logit_chunk_tokens
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.cluster import Cluster
from moescale.planner.exchange import reads_peers
from moescale.planner.layer_bytes import LayerBytes
from moescale.planner.request import PlanRequest, recompute_name, replace_layer
from moescale.planner.shares import rank_parameters
from moescale.planner.workload import LayerKind, Workload


class Moments:
    """What lives beside weights, gradients and states, moment by moment, for one model, cluster and request."""

    def __init__(self, workload: Workload, cluster: Cluster, request: PlanRequest) -> None:
        self.workload = workload
        self.cluster = cluster
        self.request = request
        self.bytes = LayerBytes(workload, request)
        self.itemsize = self.bytes.itemsize

    def breakdowns(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str, sharding: str = "fsdp"
    ) -> dict[str, dict[str, float]]:
        """What lives beside weights, gradients and states, at every moment that can be the peak, by class."""
        partly = next((layer for layer in layers if layer.recompute_layers is not None), None)
        if partly is not None:
            nowhere, everywhere = (
                self.breakdowns(mesh, sequences, changed, gradient, sharding) for changed in both_ends(layers, partly)
            )
            assert partly.recompute_layers is not None
            return self.partly(partly.kind, nowhere, everywhere, partly.recompute_layers)
        if sharding == "zero1":
            return self._whole_moments(mesh, sequences, layers, gradient)
        tokens = sequences * self.request.sequence_length // mesh.cp
        dims = self.workload.dims(tokens, self.request.sequence_length)
        plans = {layer.kind: layer for layer in layers}
        # The first pipeline stage holds the activations of as many micro-batches as there are stages: of pp times
        # 1 / pp of the layers, so of all of them.
        kept = {
            f"activations {kind.name}": kind.count * self.bytes.kept(kind, plans[kind.name], dims, mesh)
            for kind in self.workload.layers
        }
        first = min(self.workload.layers, key=lambda kind: kind.indices[0])
        if self.workload.lora is not None and recompute_name(plans[first.name]) != "block":
            # Nothing before the first layer is trained, so its norm has no backward.
            kept[f"activations {first.name}"] -= dims["n"] * dims["h"] * self.itemsize
        gathered = self.bytes.gathered(plans, mesh)
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
            share = rank_parameters(self.workload.trained, mesh)
            for breakdown in moments.values():
                breakdown["sums for replicas"] = share * DTYPE_BYTES[gradient]
        return moments

    def partly(
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

    def _whole_moments(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str
    ) -> dict[str, dict[str, float]]:
        """With whole weights: those of one GPU, whose experts' rows lie in the exchange's workspaces where ep > 1."""
        moments = self.breakdowns(MeshShape(), sequences, layers, gradient)
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
        exchange = self.bytes.exchange(mesh, sequences)
        dims = self.workload.dims(sequences * self.request.sequence_length, self.request.sequence_length)
        if reads_peers(mesh, "zero1", self.cluster):
            rows = dims["r"] * 2 * dims["f"] * self.itemsize if keeps else 0
            more: float = exchange.kept_bytes(keeps_pre_activation=keeps) - rows
            inside: float = exchange.backward_bytes(keeps_pre_activation=keeps)
            inside += max(self.bytes.experts_made_plain(kind.name, mesh))
        else:
            more = self.bytes.exchanged_rows(dims, mesh) + self.bytes.padding(dims, mesh, keeps)
            inside = self.bytes.operator_buffers(plans, dims, mesh)
        layers = int(is_last) if name == "block" else kind.count  # a block recomputes its rows in its own backward
        for moment, breakdown in moments.items():
            if f"activations {kind.name}" not in breakdown:  # the backward has passed these layers
                continue
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
        hidden += self.bytes.recomputed(kind, plans[kind.name], dims, MeshShape())
        moments["gradient of the last experts"] = kept | {"temporary buffers": hidden, "inside operators": inside}

    def _at_loss(self, dims: dict[str, int], mesh: MeshShape) -> dict[str, float]:
        tokens = min(dims["n"], logit_chunk_tokens(dims["n"]))
        logits = tokens * dims["w"] * self.itemsize / mesh.tp
        return {"loss": self.bytes.loss(dims, mesh), "inside operators": logits}

    def _at_loss_gradient(
        self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape, gathered: float
    ) -> dict[str, float]:
        last = self._last_kind()
        ahead = self.bytes.gathered_again(last, plans[last.name], mesh)
        undivided = mesh.dp_shard * mesh.cp * mesh.dp_replicate == 1
        in_buffer = undivided and self.request.compute_dtype == "bf16"
        weight = 0.0 if in_buffer else self.bytes.output_gradient(mesh)
        return {
            "loss": self.bytes.loss(dims, mesh),
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
                again = self.bytes.full_layer(kind, dims, mesh) - dims["n"] * dims["h"] * self.itemsize
                gradients += again  # without its input, which the block keeps
            ahead = self.bytes.gathered_again(kind, plans[kind.name], mesh)
            moments[f"gradient of the last {kind.name} activation"] = there | {
                "temporary buffers": gradients,
                "inside operators": self.bytes.made_plain(kind, mesh),
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
        again = self.bytes.recomputed(last, plan, dims, mesh)
        ahead = self.bytes.gathered_again(last, plan, mesh)
        ranks = mesh.dp_shard * mesh.cp * mesh.dp_replicate
        return {
            # Of the residual stream: what entered the last norm, its gradients, and those of the layer's two branches.
            "temporary buffers": again
            + 6 * dims["n"] * dims["h"] * self.itemsize
            + self.bytes.expert_gradients(last, mesh),
            "inside operators": self.bytes.expert_buffers(plan, dims, mesh),
            "communication": gathered + ahead + (self.bytes.output_gradient(mesh) if ranks > 1 else 0.0),
        }

    def _in_divided_experts(
        self, plans: dict[str, LayerPlan], dims: dict[str, int], mesh: MeshShape, gathered: float
    ) -> dict[str, dict[str, float]]:
        """The two moments in the backward of the last layer's experts."""
        last = self._last_kind()
        plan = plans[last.name]
        again = self.bytes.recomputed(last, plan, dims, mesh)
        hidden = dims["n"] * dims["h"] * self.itemsize
        rows = dims["k"] * hidden * (self.bytes.row_factor(mesh) if mesh.ep == 2 else 1.0)
        ahead = self.bytes.gathered_again(last, plan, mesh)
        communication = gathered + ahead + self.bytes.output_gradient(mesh)
        in_experts: float = 2 * rows + self.bytes.expert_gradients(last, mesh)
        if "experts" in recompute_name(plan).split("+"):
            in_experts += dims["n"] * dims["k"] * 2 * dims["f"] * self.itemsize / mesh.tp
        return {
            "gradient of the last combination": {
                "temporary buffers": again + 3 * hidden + 3 * rows,
                "communication": communication,
            },
            "gradient of the last experts": {
                "temporary buffers": again + 3 * hidden + in_experts,
                "inside operators": max(self.bytes.experts_made_plain(last.name, mesh)),
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
        again = self.bytes.recomputed(kind, plan, dims, mesh)
        in_flight = 4 * dims["n"] * dims["h"] * self.itemsize
        communication = gathered + 2 * self.bytes.gathered_again(kind, plan, mesh)
        if self.bytes.layer_gathered(kind, mesh):
            reduced = self.bytes.reduced_layer(kind, mesh, gradient)
            communication += self.bytes.layer_gradients(kind, mesh) + reduced + self.bytes.output_gradient(mesh)
        return activations | {
            "temporary buffers": again + in_flight,
            "inside operators": self.bytes.operator_buffers(plans, dims, mesh),
            "communication": communication,
        }

    def _accumulates(self, mesh: MeshShape, sequences: int) -> bool:
        """Whether a step has several micro-batches: their gradients are summed before replicas add theirs."""
        request = self.request
        return request.tokens_per_step > request.sequence_length * sequences * mesh.dp_replicate * mesh.dp_shard

    def _last_kind(self) -> LayerKind:
        return max(self.workload.layers, key=lambda kind: kind.indices[-1])


def both_ends(layers: tuple[LayerPlan, ...], partly: LayerPlan) -> tuple[tuple[LayerPlan, ...], tuple[LayerPlan, ...]]:
    """``layers`` with the recomputation of ``partly`` in none of its kind's layers, and in all of them."""
    everywhere = dataclasses.replace(partly, recompute_layers=None)
    nowhere = dataclasses.replace(everywhere, recompute="none")
    return replace_layer(layers, nowhere), replace_layer(layers, everywhere)
