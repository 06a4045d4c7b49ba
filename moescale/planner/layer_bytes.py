"""Bytes of a layer's activations and operators' buffers on one rank; of its weights in ``axes.dp_shard``."""

from __future__ import annotations

from moescale.formats import FP8_COPY_ROWS
from moescale.plan import LayerPlan
from moescale.planner.axes.axis import MicroBatch
from moescale.planner.axes.registry import AXES, EP
from moescale.planner.request import recompute_name
from moescale.planner.workload import LayerKind, saved_bytes


def kept(batch: MicroBatch, kind: LayerKind, plan: LayerPlan) -> float:
    """What one layer keeps from its forward to its backward."""
    name = recompute_name(plan)
    if name == "block":
        return batch.hidden_bytes
    return full_layer(batch, kind, kind.dropped(name.split("+")))


def full_layer(batch: MicroBatch, kind: LayerKind, dropped: frozenset[str] = frozenset()) -> float:
    """What one layer keeps where its block is not recomputed."""
    made_again = batch.problem.made_again(kind, batch.gemms)
    size = saved_bytes(kind, batch.dims, batch.problem.itemsize, dropped | made_again) / batch.division.features
    for axis in AXES:
        for more in axis.kept_bytes(batch, kind, dropped):
            size += more
    return size


def recomputed(batch: MicroBatch, kind: LayerKind, plan: LayerPlan) -> float:
    """What the backward of one layer has there again because its block is recomputed."""
    return full_layer(batch, kind) if recompute_name(plan) == "block" else 0.0


def loss(batch: MicroBatch) -> float:
    """What the loss keeps, embedding and last norm with it."""
    return saved_bytes(batch.problem.workload.outside, batch.dims, batch.problem.itemsize) / batch.division.features


def output_gradient(batch: MicroBatch) -> float:
    """The gradient of the output weight, where that is trained."""
    if batch.problem.workload.lora is not None:
        return 0.0
    config = batch.problem.workload.config
    return config.vocab_size * config.hidden_size * batch.problem.itemsize / batch.division.features


def operator_buffers(batch: MicroBatch, plans: dict[str, LayerPlan]) -> float:
    """Largest buffers that an operator's backward makes and gives back before it returns."""
    return max(
        expert_buffers(batch, plans[kind.name]) if kind.is_routed else dense_buffers(batch) + made_plain(batch, kind)
        for kind in batch.problem.workload.layers
    )


def dense_buffers(batch: MicroBatch) -> float:
    """A dense MLP's activation and gradients; with GEMMs in fp8 also the gradient of gate and up in e4m3.

    Where that is one operator (``kernels.fp8.mlp``), the activation and all gradients are there at once, two bytes an
    element of them in e4m3: as many bytes as without fp8.
    """
    operators = (op for kind in batch.problem.workload.layers if not kind.is_routed for op in kind.operators)
    is_fused = any(batch.problem.quantises(op, batch.gemms) for op in operators)
    size = 5 * batch.problem.itemsize + (2 if batch.gemms.dense_gemms == "fp8" and not is_fused else 0)
    return batch.dims["n"] * size * batch.dims["i"] / batch.division.features


def fp8_expert_buffers(batch: MicroBatch, plan: LayerPlan) -> float:
    """The same of experts in fp8 whose rows come from the rank's own tokens, in bytes (``kernels.fp8.routed``).

    At most, when the gradient of gate and up is computed: the gradient of the pre-activation and the activation, their
    transposed copies and that of the rows; tokens and their gradients, which transposed rows are read from. Later, when
    the gradient of the rows is there, in bf16, the transposed copies are gone.
    """
    dims = batch.dims
    rows = dims["n"] * dims["k"]
    # Each expert's rows are padded, and memory is there for any routing.
    transposed = (rows // FP8_COPY_ROWS + dims["e"]) * FP8_COPY_ROWS
    stays = rows * 3 * dims["f"] + 2 * dims["n"] * dims["h"]
    gate_up = transposed * (dims["h"] + 3 * dims["f"])
    of_rows = rows * 2 * dims["h"]
    again = rows * 2 * dims["f"] * batch.problem.itemsize if "experts" in recompute_name(plan).split("+") else 0
    return float(stays + max(gate_up, of_rows) + again)


def expert_buffers(batch: MicroBatch, plan: LayerPlan) -> float:
    """Gathered rows and their gradients, the gradient of the pre-activation, the activation; and a plain weight.

    The activation is gone when the gradient of the rows is made, with gate and up.
    """
    if batch.gemms.expert_gemms == "fp8":
        return fp8_expert_buffers(batch, plan)
    dims, division, itemsize = batch.dims, batch.division, batch.problem.itemsize
    rows = dims["n"] * dims["k"] * (EP.row_factor(batch) if division.experts > 1 else 1.0)
    size = rows * (2 * dims["h"] + 3 * dims["f"] / division.features) * itemsize
    if "experts" in recompute_name(plan).split("+"):
        size += rows * 2 * dims["f"] * itemsize / division.features
    gate_up, down = experts_made_plain(batch, plan.kind)
    at_last = rows * (3 * dims["h"] + 2 * dims["f"] / division.features) * itemsize + gate_up if gate_up else 0.0
    return max(size + down, at_last)


def made_plain(batch: MicroBatch, kind: LayerKind) -> float:
    """The largest weight of a layer that is no routed expert, made plain from fp8 for its GEMM."""
    return batch.problem.made_plain[kind.name][1] / batch.division.features


def experts_made_plain(batch: MicroBatch, kind: str) -> tuple[float, float]:
    """A rank's routed experts of a layer, made plain from fp8 one after the other: gate and up, and down."""
    division = batch.division
    sizes = [size / (division.features * division.experts) for size in batch.problem.made_plain[kind][0]]
    return (sizes[0], sizes[1]) if sizes else (0.0, 0.0)
