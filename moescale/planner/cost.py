"""Step time of a plan: compute by operator, communication by axis, what of it stays exposed, optimizer, bubbles.

Every term is monotone in the cluster's rates: a faster link or kernel never makes a plan slower.

Compute. A GEMM takes ``FLOPs / rate``, the rate read from the cluster file's table (dense GEMMs by their FLOPs,
routed experts by rows per expert, attention by sequence length), element-wise work ``bytes / bandwidth``; all at the
clock that lasts under load, and each kernel a launch more.

Communication (:mod:`moescale.planner.axes`, :mod:`moescale.planner.links`). Every axis says what it communicates and
which compute hides it: weights are gathered while the layer before computes (FSDP's prefetch), gradients reduced during
the backward of the next; rows go to their experts while the shared experts run; replicas are summed during the last
backward. Only what compute does not cover is exposed.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass

from moescale.formats import DTYPE_BYTES, MASTER_BYTES, MOMENT_BYTES
from moescale.operators import Operator, forward_flops, is_routed, moved_bytes
from moescale.plan import LayerPlan, MeshShape
from moescale.planner.axes.axis import LayerPasses, MicroBatch
from moescale.planner.axes.registry import BY_CLAIM, micro_batch
from moescale.planner.exchange import is_recorded
from moescale.planner.ledger import SLOWED, Ledger, Pass
from moescale.planner.problem import Problem
from moescale.planner.request import IN_COMPUTE_DTYPE, Candidate, Formats, Gemms
from moescale.planner.workload import LayerKind

KERNELS_PER_OPERATOR = {"dense_gemm": (1, 2), "grouped_gemm": (5, 8), "attention": (1, 3), "elementwise": (1, 1)}
"""Launches of an operator's forward and backward."""
COPIED = "fp8 copies"
"""Writing the copies of weights that GEMMs in fp8 read, once a step."""
MADE_PLAIN = "weights from fp8"
"""What makes frozen weights plain for their GEMMs, in every forward and backward."""


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


class CostModel:
    """Times of candidates for one model, cluster and request; partial results are kept."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.workload = problem.workload
        self.cluster = problem.cluster
        self.request = problem.request
        self._kinds = {kind.name: kind for kind in (*problem.workload.layers, problem.workload.outside)}
        self._micro_batch = functools.cache(self._micro_batch_uncached)
        self._layer_time = functools.cache(self._layer_time_uncached)
        self.without_optimizer = functools.cache(self._without_optimizer_uncached)

    def step(self, candidate: Candidate) -> StepTime:
        """The whole step of ``candidate``."""
        without = self.without_optimizer(
            candidate.mesh, candidate.micro_batch_sequences, candidate.gradient_accumulation_steps,
            candidate.layers, candidate.formats.gradient_dtype,
            candidate.dense_sharding, candidate.gemms,
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
        gemms: Gemms = IN_COMPUTE_DTYPE,
    ) -> StepTime:
        """Forward, backward and communication of all micro-batches; once a step, the copies of weights in fp8."""
        ledger = self._micro_batch(mesh, sequences, layers, gradient, sharding, gemms)
        total = {name: seconds * accumulation for name, seconds in ledger.exposed.items()}
        covered = {name: seconds * accumulation for name, seconds in ledger.hidden.items()}
        batch = micro_batch(self.problem, mesh, sequences, sharding, gradient, gemms)
        for axis in BY_CLAIM:
            axis.communicate_once(batch, ledger, total, covered)
        if gemms != IN_COMPUTE_DTYPE:
            total[COPIED] = self._copy_seconds(mesh, gemms)
        total["step overhead"] = self.cluster.step_overhead_seconds
        return StepTime(exposed=total, hidden=covered)

    def _copy_seconds(self, mesh: MeshShape, gemms: Gemms) -> float:
        """Both copies in fp8 of a rank's weights, after the update: read for the largest element and again, written."""
        seconds = 0.0
        for count, ranks, weight in self.problem.all_fp8_weights(gemms, mesh):
            moved = (2 * weight.elements * self.problem.itemsize + weight.fp8_copies_bytes) / ranks
            seconds += count * (moved / self.cluster.elementwise_bytes_per_second + 2 * self.cluster.launch_seconds)
        return seconds

    def optimizer_seconds(self, mesh: MeshShape, formats: Formats, sharding: str = "fsdp") -> dict[str, float]:
        """One pass over this rank's states, the gradient norm before it and the clearing after it."""
        weights = self.problem.updated_parameters(mesh, sharding)
        gradient = DTYPE_BYTES[formats.gradient_dtype]
        state = MOMENT_BYTES[formats.optimizer_state_dtype] + self.master_bytes(formats)
        moved = 2 * self.problem.trained_itemsize + gradient
        seconds = (
            (weights + self.problem.local_parameters(mesh, sharding)) * gradient / self.cluster.memory_bytes_per_second
        )  # norm, clearing
        if formats.offload_optimizer:
            seconds += weights * state * 2 / self.cluster.host.bytes_per_second
            seconds += weights * (moved + 2 * state) / self.cluster.optimizer_bytes_per_second
        else:
            seconds += weights * (moved + 2 * state) / self.cluster.optimizer_bytes_per_second
        return {"optimizer": seconds}

    def master_bytes(self, formats: Formats) -> float:
        """Bytes beside each weight that is trained; one in fp32 is its own master."""
        return 0.0 if self.problem.trained_itemsize == 4 else MASTER_BYTES[formats.master_weight_format]

    def _micro_batch_uncached(
        self, mesh: MeshShape, sequences: int, layers: tuple[LayerPlan, ...], gradient: str, sharding: str, gemms: Gemms
    ) -> Ledger:
        """Forward and backward of one micro-batch on one rank."""
        ledger = Ledger()
        batch = micro_batch(self.problem, mesh, sequences, sharding, gradient, gemms)
        division = batch.division
        plans = {layer.kind: layer for layer in layers}
        plans[self.workload.outside.name] = LayerPlan(kind=self.workload.outside.name, reshard_after_forward=False)
        for kind in (*self.workload.layers, self.workload.outside):
            plan = plans[kind.name]
            # A stage has its share of the layers; the loss comes on top of one of them.
            count = kind.count if kind is self.workload.outside else kind.count / division.layers
            shares = division.features, division.tokens, division.experts
            time = self._layer_time(kind.name, *shares, sequences, plan.recompute, gemms)
            forward = Pass(count=count, compute=time.forward)
            again = time.recompute * plan.recomputed_share(kind.count)
            backward = Pass(count=count, compute=time.backward, recompute=again)
            ledger.add_compute(forward, backward)
            passes = LayerPasses(kind=kind, plan=plan, forward=forward, backward=backward)
            for axis in BY_CLAIM:
                axis.communicate(batch, passes, ledger)
            ledger.free_backward += count * backward.free
        if any(ledger.hidden.values()):
            ledger.exposed[SLOWED] = self.cluster.overlap_cost * sum(ledger.hidden.values())
        if not is_recorded(mesh, sharding, self.cluster, self.request.compute_dtype):
            host = self._host_seconds(batch, plans)
            waits = max(0.0, host - sum(ledger.exposed.values()))
            ledger.exposed["host launches"] = waits
            # Links work while a GPU waits for its host. What it waits for in the forward counts, too, a third at most:
            # else a faster kernel, which lengthens the waits, would leave less to hide beneath, and slow the step.
            ledger.free_backward += waits
        return ledger

    def _host_seconds(self, batch: MicroBatch, plans: dict[str, LayerPlan]) -> float:
        """In which the host launches a micro-batch's kernels; the GPU waits for it where that takes longer."""
        total = 0.0
        for kind in self.workload.layers:
            plan = plans[kind.name]
            again = plan.recomputed_share(kind.count) if plan.recompute == "block" else 0.0
            seconds = self.cluster.host_layer_seconds * (1 + again / 3)
            seconds += self.cluster.host_sharding_seconds if batch.sharding == "fsdp" else 0.0
            seconds += self.cluster.host_exchange_seconds if kind.is_routed and batch.division.experts > 1 else 0.0
            total += kind.count / batch.division.layers * seconds
        return total

    def _layer_time_uncached(
        self,
        kind: str,
        features: int,
        tokens: int,
        experts: int,
        sequences: int,
        recompute: str | tuple[str, ...],
        gemms: Gemms,
    ) -> _LayerTime:
        """``features``, ``tokens`` and ``experts``: into how many shares each is divided."""
        dims = self.problem.dims(sequences, tokens)
        forward: dict[str, float] = defaultdict(float)
        backward: dict[str, float] = defaultdict(float)
        again = 0.0
        operators = self._kinds[kind].operators  # one that occurs several times takes its time several times
        times = self.layer_seconds(self._kinds[kind], dims, features, experts, gemms)
        for op, seconds in zip(operators, times, strict=True):
            plain = self._plain_seconds(op, features, experts)
            for part, of_part in ((forward, seconds[0]), (backward, seconds[1])):
                part[op.name] += of_part - plain
                if plain:
                    part[MADE_PLAIN] += plain
            if recompute == "block":
                again += seconds[0]
            elif op.recompute is not None and op.name in recompute:
                again += seconds[0] * op.recompute.forward_share
        return _LayerTime(forward=forward, backward=backward, recompute=again)

    def layer_seconds(
        self, kind: LayerKind, dims: dict[str, int], features: int, experts: int, gemms: Gemms
    ) -> list[tuple[float, float]]:
        """Forward and backward of a layer's operators, as of :meth:`operator_seconds`.

        A norm whose result a product reads in fp8 writes it so, too.
        """
        found = []
        read_in_fp8 = {op.norm for op in kind.operators if self.problem.fp8_weights(op, gemms)}
        for op in kind.operators:
            forward, backward = self.operator_seconds(op, dims, features, experts, gemms)
            if op.name in read_in_fp8:
                forward += op.parsed.outputs[0].size(dims) / self.cluster.elementwise_bytes_per_second
            found.append((forward, backward))
        return found

    def operator_seconds(
        self,
        op: Operator,
        dims: dict[str, int],
        features: int = 1,
        experts: int = 1,
        gemms: Gemms = IN_COMPUTE_DTYPE,
    ) -> tuple[float, float]:
        """Forward and backward of one operator on one rank, which has one of so many shares of features and experts."""
        shares = features if op.tp == "shard" else 1
        launches = KERNELS_PER_OPERATOR[op.kind]
        cluster = self.cluster
        in_fp8 = self.problem.fp8_weights(op, gemms)
        if in_fp8 and op.kind == "dense_gemm":
            return self._fp8_dense_seconds(op, dims, gemms)
        if op.kind == "elementwise":
            seconds = moved_bytes(op, self._without_table(op, dims), self.problem.itemsize) / shares
            seconds /= cluster.elementwise_bytes_per_second
            ratio = op.backward_bytes_ratio
            if self.problem.quantises(op, gemms) or (op.between is None and gemms.expert_gemms == "fp8"):
                ratio *= op.fp8_bytes_shares[1] / op.fp8_bytes_shares[0]
                seconds *= op.fp8_bytes_shares[0]
        else:
            flops = forward_flops(op, dims) / shares
            if op.kind == "dense_gemm":
                rate = cluster.dense_gemm.at(flops)
            elif op.kind == "grouped_gemm":
                rates = cluster.fp8_grouped_gemm if in_fp8 else cluster.grouped_gemm
                assert rates is not None, "checked before the search"
                rate = rates.at(dims["n"] * dims["k"] * experts / max(1, dims["e"]))
                rate /= cluster.sustained_clock if in_fp8 else 1.0  # which slows GEMMs in bf16 alone
                flops *= self.request.router_imbalance if experts > 1 else 1.0
            else:
                rate = cluster.attention.at(dims["x"])
            if self.request.compute_dtype == "fp32":
                rate /= 8  # no tensor cores in full fp32
            seconds = flops / (rate * cluster.sustained_clock)
            ratio = op.backward_flops_ratio
        plain = self._plain_seconds(op, features, experts)
        forward, backward = (number * cluster.launch_seconds + plain for number in launches)
        return seconds + forward, seconds * ratio + backward

    def _fp8_dense_seconds(self, op: Operator, dims: dict[str, int], gemms: Gemms) -> tuple[float, float]:
        """Forward and backward of a linear layer in fp8, of which a rank has all features.

        The result and the gradient of the input are GEMMs in fp8, whose input and gradient of the result are read in
        bf16 and written in fp8 first, unless what makes them, a norm or an activation, does it; other gradients are
        GEMMs in bf16.
        """
        cluster, flops = self.cluster, forward_flops(op, dims)
        assert cluster.fp8_dense_gemm is not None, "checked before the search"
        fast = flops / cluster.fp8_dense_gemm.at(flops)
        plain = flops * (op.backward_flops_ratio - 1) / (cluster.dense_gemm.at(flops) * cluster.sustained_clock)
        quantized = [
            tensor.size(dims) * (self.problem.itemsize + 1) / cluster.elementwise_bytes_per_second
            for tensor in (op.parsed.inputs[0], op.parsed.outputs[0])
        ]
        forward, backward = ((number + 1) * cluster.launch_seconds for number in KERNELS_PER_OPERATOR[op.kind])
        made_in_fp8 = self.problem.quantised_by_activation(op, gemms)
        if made_in_fp8[0] or op.norm is not None:
            quantized[0], forward = 0.0, forward - cluster.launch_seconds
        if made_in_fp8[1]:
            quantized[1], backward = 0.0, backward - cluster.launch_seconds
        return fast + quantized[0] + forward, fast + plain + quantized[1] + backward

    def _plain_seconds(self, op: Operator, features: int, experts: int) -> float:
        """Making the weights of ``op`` in fp8 plain for one pass: codes and scales are read, weights written, once."""
        weights = self.workload.in_fp8(op)
        moved: float = sum(weight.frozen_fp8_bytes + weight.elements * self.problem.itemsize for weight in weights)
        moved /= features * (experts if is_routed(op) else 1)
        return moved / self.cluster.elementwise_bytes_per_second + len(weights) * self.cluster.launch_seconds

    @staticmethod
    def _without_table(op: Operator, dims: dict[str, int]) -> dict[str, int]:
        """A look-up reads the rows it needs, not the table."""
        return dims | {"w": dims["n"]} if op.is_lookup else dims
