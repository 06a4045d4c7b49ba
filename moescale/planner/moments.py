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
from moescale.planner import layer_bytes
from moescale.planner.axes.axis import Division, MicroBatch
from moescale.planner.axes.registry import AXES, DP_SHARD, EP, micro_batch
from moescale.planner.exchange import reads_peers
from moescale.planner.problem import Problem
from moescale.planner.request import IN_COMPUTE_DTYPE, Gemms, recompute_name, replace_layer
from moescale.planner.workload import LayerKind


class Moments:
    """What lives beside weights, gradients and states, moment by moment, for one model, cluster and request."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.workload = problem.workload

    def breakdowns(
        self,
        mesh: MeshShape,
        sequences: int,
        layers: tuple[LayerPlan, ...],
        gradient: str,
        sharding: str = "fsdp",
        gemms: Gemms = IN_COMPUTE_DTYPE,
    ) -> dict[str, dict[str, float]]:
        """What lives beside weights, gradients and states, at every moment that can be the peak, by class."""
        partly = next((layer for layer in layers if layer.recompute_layers is not None), None)
        if partly is not None:
            nowhere, everywhere = (
                self.breakdowns(mesh, sequences, changed, gradient, sharding, gemms)
                for changed in both_ends(layers, partly)
            )
            assert partly.recompute_layers is not None
            return self.partly(partly.kind, nowhere, everywhere, partly.recompute_layers)
        batch = micro_batch(self.problem, mesh, sequences, sharding, gradient, gemms)
        plans = {layer.kind: layer for layer in layers}
        return self._whole_moments(batch, plans) if sharding == "zero1" else self._moments(batch, plans)

    def _moments(self, batch: MicroBatch, plans: dict[str, LayerPlan]) -> dict[str, dict[str, float]]:
        """With weights sharded by FSDP2, or on one GPU."""
        kept = {
            f"activations {kind.name}": kind.count * layer_bytes.kept(batch, kind, plans[kind.name])
            for kind in self.workload.layers
        }
        first = min(self.workload.layers, key=lambda kind: kind.indices[0])
        if self.workload.lora is not None and recompute_name(plans[first.name]) != "block":
            # Nothing before the first layer is trained, so its norm has no backward.
            kept[f"activations {first.name}"] -= batch.hidden_bytes
        gathered = DP_SHARD.staying_bytes(batch, plans)
        moments = {
            "loss": kept | self._at_loss(batch) | {"communication": gathered},
            "gradient of the loss": kept | self._at_loss_gradient(batch, plans, gathered),
            "backward of the last layers": self._at_backward(batch, kept, plans, gathered),
        }
        if self.workload.lora is not None:  # else the gradients of weights make other moments larger
            moments |= self._in_feed_forwards(batch, kept, plans, gathered)
        if batch.division.experts > 1:
            moments |= {name: kept | parts for name, parts in self._in_divided_experts(batch, plans, gathered).items()}
        elif self._last_kind().is_routed:
            moments["gradient of the last experts"] = kept | self._in_own_experts(batch, plans, gathered)
        for axis in AXES:
            throughout = axis.micro_batch_bytes(batch)
            for breakdown in moments.values():
                breakdown |= throughout
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

    def _whole_moments(self, batch: MicroBatch, plans: dict[str, LayerPlan]) -> dict[str, dict[str, float]]:
        """With whole weights: those of one GPU, whose experts' rows lie in the exchange's workspaces where ep > 1."""
        alone = dataclasses.replace(batch, mesh=MeshShape(), division=Division(), sharding="fsdp")
        moments = self._moments(alone, plans)
        if batch.division.experts == 1:
            return moments
        routed = sorted((kind for kind in self.workload.layers if kind.is_routed), key=lambda kind: kind.indices[-1])
        for kind in routed:
            self._add_exchanged_rows(moments, batch, kind, plans, is_last=kind is routed[-1])
        last = plans[routed[-1].name]
        # The last layer's experts run while every layer's activations are still there.
        kept = {key: size for key, size in moments["loss"].items() if key.startswith("activations")}
        hidden = 4 * batch.hidden_bytes + layer_bytes.recomputed(alone, routed[-1], last)
        inside = self._inside_exchange(batch, plans, last)
        moments["gradient of the last experts"] = kept | {"temporary buffers": hidden, "inside operators": inside}
        return moments

    def _add_exchanged_rows(
        self,
        moments: dict[str, dict[str, float]],
        batch: MicroBatch,
        kind: LayerKind,
        plans: dict[str, LayerPlan],
        *,
        is_last: bool,
    ) -> None:
        """Add what the exchange keeps for the layers of ``kind``, and what its last layer's backward needs at once."""
        name = recompute_name(plans[kind.name])
        keeps = "experts" not in name.split("+")
        if reads_peers(batch.mesh, batch.sharding, self.problem.cluster):
            rows = batch.dims["r"] * 2 * batch.dims["f"] * self.problem.itemsize if keeps else 0
            more: float = EP.peer_exchange(batch).kept_bytes(keeps_pre_activation=keeps) - rows
        else:
            more = EP.exchanged_rows(batch) + EP.padding(batch, keeps_pre_activation=keeps)
        layers = int(is_last) if name == "block" else kind.count  # a block recomputes its rows in its own backward
        for moment, breakdown in moments.items():
            if f"activations {kind.name}" not in breakdown:  # the backward has passed these layers
                continue
            given_back = is_last and moment == "backward of the last layers" and name != "block"
            own = layers - 1 if given_back else layers
            breakdown[f"activations {kind.name}"] += own * more
        last = moments["backward of the last layers"]
        last["inside operators"] = max(last["inside operators"], self._inside_exchange(batch, plans, plans[kind.name]))

    def _inside_exchange(self, batch: MicroBatch, plans: dict[str, LayerPlan], plan: LayerPlan) -> float:
        """What the backward of experts makes and gives back, in layers of ``plan``."""
        if reads_peers(batch.mesh, batch.sharding, self.problem.cluster):
            keeps = "experts" not in recompute_name(plan).split("+")
            size = EP.peer_exchange(batch).backward_bytes(keeps_pre_activation=keeps)
            return size + max(layer_bytes.experts_made_plain(batch, plan.kind))
        return layer_bytes.operator_buffers(batch, plans)

    def _at_loss(self, batch: MicroBatch) -> dict[str, float]:
        tokens = min(batch.dims["n"], logit_chunk_tokens(batch.dims["n"]))
        logits = tokens * batch.dims["w"] * self.problem.itemsize / batch.division.features
        return {"loss": layer_bytes.loss(batch), "inside operators": logits}

    def _at_loss_gradient(self, batch: MicroBatch, plans: dict[str, LayerPlan], gathered: float) -> dict[str, float]:
        last = self._last_kind()
        ahead = DP_SHARD.gathered_again_bytes(batch, last, plans[last.name])
        in_buffer = DP_SHARD.is_whole(batch) and self.problem.request.compute_dtype == "bf16"
        weight = 0.0 if in_buffer else layer_bytes.output_gradient(batch)
        return {
            "loss": layer_bytes.loss(batch),
            "temporary buffers": weight + batch.hidden_bytes,
            "communication": gathered + ahead,
        }

    def _in_feed_forwards(
        self, batch: MicroBatch, kept: dict[str, float], plans: dict[str, LayerPlan], gathered: float
    ) -> dict[str, dict[str, float]]:
        """The gradient of the activation in the dense MLP of a kind's last layer, whose result was its first gradient.

        Also the moment before the last layer, when its weights are copied out of what was gathered of them.
        """
        moments = {}
        last = self._last_kind()
        there = dict(kept)
        dims, itemsize = batch.dims, self.problem.itemsize
        for kind in reversed(self.workload.layers):
            if kind is not last and recompute_name(plans[kind.name]) != "block":
                continue  # later layers have given back more than this one makes
            width = (dims["s"] if kind.is_routed else dims["i"]) / batch.division.features
            gradients = dims["n"] * (dims["h"] + 3 * width) * itemsize
            name = "shared_activation" if kind.is_routed else "dense_activation"
            if any(tensor.name == name for op in kind.operators for tensor in op.saved):
                gradients -= dims["n"] * width * itemsize  # given back by then
            if recompute_name(plans[kind.name]) == "block":
                again = layer_bytes.full_layer(batch, kind) - batch.hidden_bytes
                gradients += again  # without its input, which the block keeps
            ahead = DP_SHARD.gathered_again_bytes(batch, kind, plans[kind.name])
            moments[f"gradient of the last {kind.name} activation"] = there | {
                "temporary buffers": gradients,
                "inside operators": layer_bytes.made_plain(batch, kind),
                "communication": gathered + ahead,
            }
            if kind is last and ahead:
                moments["weights of the last layer"] = there | {
                    "temporary buffers": batch.hidden_bytes,
                    "communication": gathered + 2 * ahead,
                }
            there = {key: size for key, size in there.items() if key != f"activations {kind.name}"}
        return moments

    def _in_own_experts(self, batch: MicroBatch, plans: dict[str, LayerPlan], gathered: float) -> dict[str, float]:
        """The backward of the last layer's experts, all of which the rank computes itself."""
        last = self._last_kind()
        plan = plans[last.name]
        again = layer_bytes.recomputed(batch, last, plan)
        ahead = DP_SHARD.gathered_again_bytes(batch, last, plan)
        return {
            # Of the residual stream: what entered the last norm, its gradients, and those of the layer's two branches.
            "temporary buffers": again + 6 * batch.hidden_bytes + DP_SHARD.expert_gradient_bytes(batch, last),
            "inside operators": layer_bytes.expert_buffers(batch, plan),
            "communication": gathered
            + ahead
            + (0.0 if DP_SHARD.is_whole(batch) else layer_bytes.output_gradient(batch)),
        }

    def _in_divided_experts(
        self, batch: MicroBatch, plans: dict[str, LayerPlan], gathered: float
    ) -> dict[str, dict[str, float]]:
        """The two moments in the backward of the last layer's experts."""
        last = self._last_kind()
        plan, dims, division = plans[last.name], batch.dims, batch.division
        again = layer_bytes.recomputed(batch, last, plan)
        hidden = batch.hidden_bytes
        rows = dims["k"] * hidden * (EP.row_factor(batch) if division.experts == 2 else 1.0)
        ahead = DP_SHARD.gathered_again_bytes(batch, last, plan)
        communication = gathered + ahead + layer_bytes.output_gradient(batch)
        in_experts: float = 2 * rows + DP_SHARD.expert_gradient_bytes(batch, last)
        if "experts" in recompute_name(plan).split("+"):
            in_experts += dims["n"] * dims["k"] * 2 * dims["f"] * self.problem.itemsize / division.features
        return {
            "gradient of the last combination": {
                "temporary buffers": again + 3 * hidden + 3 * rows,
                "communication": communication,
            },
            "gradient of the last experts": {
                "temporary buffers": again + 3 * hidden + in_experts,
                "inside operators": max(layer_bytes.experts_made_plain(batch, last.name)),
                "communication": communication,
            },
        }

    def _at_backward(
        self, batch: MicroBatch, kept: dict[str, float], plans: dict[str, LayerPlan], gathered: float
    ) -> dict[str, float]:
        kind = self._last_kind()
        plan = plans[kind.name]
        activations = dict(kept)
        if kind.count > 1:
            activations[f"activations {kind.name}"] -= kept[f"activations {kind.name}"] / kind.count
        again = layer_bytes.recomputed(batch, kind, plan)
        communication = gathered + 2 * DP_SHARD.gathered_again_bytes(batch, kind, plan)
        if DP_SHARD.layer_bytes(batch, kind):
            made = DP_SHARD.gradient_bytes(batch, kind, self.problem.trained_itemsize)
            reduced = DP_SHARD.gradient_bytes(batch, kind, DTYPE_BYTES[batch.gradient])
            communication += made + reduced + layer_bytes.output_gradient(batch)
        return activations | {
            "temporary buffers": again + 4 * batch.hidden_bytes,
            "inside operators": layer_bytes.operator_buffers(batch, plans),
            "communication": communication,
        }

    def _last_kind(self) -> LayerKind:
        return max(self.workload.layers, key=lambda kind: kind.indices[-1])


def both_ends(layers: tuple[LayerPlan, ...], partly: LayerPlan) -> tuple[tuple[LayerPlan, ...], tuple[LayerPlan, ...]]:
    """``layers`` with the recomputation of ``partly`` in none of its kind's layers, and in all of them."""
    everywhere = dataclasses.replace(partly, recompute_layers=None)
    nowhere = dataclasses.replace(everywhere, recompute="none")
    return replace_layer(layers, nowhere), replace_layer(layers, everywhere)
