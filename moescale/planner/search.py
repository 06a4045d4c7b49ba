"""The exact search: of all plans that fit, the one predicted fastest; ties go to the first in a fixed order.

The space is the product of meshes, micro-batches, formats of GEMMs, what each layer kind recomputes and reshards, and
formats of states. Times add up from parts that depend on few of these each, so a part is computed once. Meshes,
micro-batches and formats of GEMMs are visited in the order of a bound: their time with nothing recomputed, nothing
gathered twice and no optimizer. Where the bound exceeds the best plan found, so does every plan behind it, and the
search ends. The result is that of trying every point, which a test does.

Order among equals: that of the meshes (:mod:`moescale.planner.axes.registry`), fewer GPUs per copy first, then smaller
pp, tp, cp, ep; larger micro-batches; GEMMs in the compute dtype; less recomputation; more precise formats.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from moescale.config import ModelConfig
from moescale.errors import ConfigError
from moescale.models.registry import family_of
from moescale.plan import LayerPlan, MeshShape, fsdp_sizes, has_whole_weights, unsupported_sizes
from moescale.planner.axes.axis import divisors
from moescale.planner.axes.registry import division_of, meshes
from moescale.planner.cluster import Cluster
from moescale.planner.cost import CostModel
from moescale.planner.decisions import check_fp8, check_request
from moescale.planner.exchange import can_divide_fp8
from moescale.planner.memory import MemoryModel
from moescale.planner.problem import Problem
from moescale.planner.request import (
    IN_COMPUTE_DTYPE,
    Candidate,
    DenseSharding,
    Formats,
    Gemms,
    PlanRequest,
    format_choices,
    gemm_choices,
    layer_plan,
    recompute_choices,
)
from moescale.planner.result import Evaluated, PlanResult, changes, usable_bytes
from moescale.planner.workload import Workload, build_workload, with_adapters

PARTLY_RECOMPUTED_MARGIN = 0.004
"""Fraction of the limit that a plan leaves free whose number of recomputed layers is the least that fits. Such plans
are as large as they can be, others only by chance, and predicted memory was up to 0.3% too small."""


def compile_plan(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    *,
    workload: Workload | None = None,
    with_alternatives: bool = True,
) -> PlanResult:
    """Search the space of ``request``. Raises ConfigError where the request contradicts itself or the model.

    ``workload``: what :func:`~moescale.planner.workload.build_workload` makes of ``config``, with operators of the
    user's own; None: the model as it is.
    """
    check_request(request, config)
    check_fp8(request, cluster)
    return Search(config, cluster, request, workload).run(with_alternatives=with_alternatives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """Plans of one mesh, micro-batch and format of GEMMs, none of which takes less time than ``bound``."""

    bound: float
    order: int
    mesh: MeshShape
    sharding: DenseSharding
    sequences: int
    accumulation: int
    gemms: Gemms

    def candidate(self, layers: tuple[LayerPlan, ...], formats: Formats) -> Candidate:
        return Candidate(
            mesh=self.mesh,
            micro_batch_sequences=self.sequences,
            gradient_accumulation_steps=self.accumulation,
            layers=layers,
            formats=formats,
            dense_sharding=self.sharding,
            gemms=self.gemms,
        )


class Search:
    """One search; keeps the cost and memory models."""

    def __init__(
        self, config: ModelConfig, cluster: Cluster, request: PlanRequest, workload: Workload | None = None
    ) -> None:
        self.config = config
        self.cluster = cluster
        self.request = request
        self.workload = workload or build_workload(config)
        if request.lora is not None:
            self.workload = with_adapters(self.workload, request.lora)
        # A plan names what is run again by operator, so a layer without that operator has nothing to gain from it.
        operators = {kind.name: frozenset(op.name for op in kind.operators) for kind in self.workload.layers}
        self._kinds = tuple((kind.name, operators.get(kind.name)) for kind in family_of(config).layers(config))
        self.problem = Problem(self.workload, cluster, request)
        self.cost = CostModel(self.problem)
        self.memory = MemoryModel(self.problem)
        # Who pins what is recomputed means all layers, unless they say in how many.
        self._partly_recomputed = tuple(
            kind.name
            for kind in self.workload.layers
            if kind.is_routed
            and kind.count > 1
            and not {f"{kind.name}_recompute", f"{kind.name}_recompute_layers"} & request.pins.keys()
        )
        self.limit = float(min(usable_bytes(cluster, request), request.memory_limit_bytes or cluster.memory_bytes))

    def run(self, *, with_alternatives: bool = True) -> PlanResult:
        """Visit the space; see the module's docstring."""
        formats = format_choices(self.request)
        groups = self._bounded_groups(formats)
        best: tuple[float, tuple[int, int, int], Candidate] | None = None
        misses: dict[MeshShape, tuple[float, Candidate]] = {}
        for group in groups:
            if best is not None and group.bound > best[0]:
                break
            for inner, layers in enumerate(self.layer_plans(group.mesh, group.sharding)):
                for number, choice, time, excess in self._formats(group, layers, formats):
                    if excess > 0:
                        if best is None and (group.mesh not in misses or excess < misses[group.mesh][0]):
                            misses[group.mesh] = excess, group.candidate(layers, choice)
                        continue
                    candidate = group.candidate(layers, choice)
                    partly = self._least_recomputed(candidate, best and best[0])
                    if partly is not None:
                        candidate, time = partly, self.cost.step(partly).total
                    if best is None or (time, (group.order, inner, number)) < best[:2]:
                        best = time, (group.order, inner, number), candidate
        found = self.evaluate(best[2]) if best else None
        nearest = sorted(misses.values(), key=lambda item: item[0])[:3]
        return PlanResult(
            request=self.request,
            config=self.config,
            workload=self.workload,
            cluster=self.cluster,
            limit_bytes=self.limit,
            num_candidates=sum(len(list(self.layer_plans(group.mesh, group.sharding))) for group in groups)
            * len(formats),
            best=found,
            alternatives=self._alternatives(found) if found and with_alternatives else (),
            near_misses=() if found else tuple(self.evaluate(candidate) for _, candidate in nearest),
        )

    def _least_recomputed(self, candidate: Candidate, fastest: float | None) -> Candidate | None:
        """Of the plans that do in the first layers of a kind what ``candidate``, which fits, does in all: the fastest.

        That is the one with the fewest such layers; several kinds of layers with routed experts are reduced one after
        another, in the family's order. None where no number fits, or none is faster than ``fastest``.
        """
        if candidate.mesh.pp > 1:  # stages have other layers
            return None
        reducible = [
            layer
            for layer in candidate.layers
            if layer.kind in self._partly_recomputed and layer.recompute != "none" and layer.recompute_layers is None
        ]
        nowhere = candidate
        for layer in reducible:
            nowhere = nowhere.with_layer(dataclasses.replace(layer, recompute="none"))
        if not reducible or (fastest is not None and self.cost.step(nowhere).total > fastest):
            return None
        limit = self.limit * (1 - PARTLY_RECOMPUTED_MARGIN)
        found = candidate
        for layer in reducible:
            sizes = self.memory.partly_recomputed_bytes(found, layer.kind)
            number = next((number for number, size in enumerate(sizes, start=1) if size <= limit), None)
            if number is not None:
                found = found.with_layer(dataclasses.replace(layer, recompute_layers=number))
        if found is candidate or (fastest is not None and self.cost.step(found).total > fastest):
            return None
        return found

    def _bounded_groups(self, formats: list[Formats]) -> list[_Group]:
        """Meshes, micro-batches and formats of GEMMs, by the time that none of their plans goes below."""
        gemm_formats = gemm_choices(self.request, self.config)
        groups: list[_Group] = []
        free = tuple(LayerPlan(kind=name, reshard_after_forward=False) for name, _ in self._kinds)
        for mesh, sharding in ((m, sharding) for m in meshes(self.problem) for sharding in self.shardings(m)):
            if not any(True for _ in self.layer_plans(mesh, sharding)):
                continue
            for sequences, gemms in itertools.product(self._micro_batches(mesh), gemm_formats):
                if not self._runs(mesh, sharding, gemms):
                    continue
                accumulation = self._sequences_per_rank(mesh) // sequences
                bound = min(
                    (
                        self.cost.without_optimizer(
                            mesh, sequences, accumulation, free, gradient, sharding, gemms
                        ).total
                        for gradient in {choice.gradient_dtype for choice in formats}
                    ),
                    default=0.0,
                )
                groups.append(
                    _Group(
                        bound=bound,
                        order=len(groups),
                        mesh=mesh,
                        sharding=sharding,
                        sequences=sequences,
                        accumulation=accumulation,
                        gemms=gemms,
                    )
                )
        if not groups or not formats:
            raise ConfigError(self._why_empty())
        return sorted(groups, key=lambda group: (group.bound, group.order))

    def _formats(
        self, group: _Group, layers: tuple[LayerPlan, ...], formats: list[Formats]
    ) -> Iterator[tuple[int, Formats, float, float]]:
        """Of every format its number, step time, and bytes by which it exceeds the memory (at most 0: it fits)."""
        mesh, sharding, sequences, gemms = group.mesh, group.sharding, group.sequences, group.gemms
        for number, choice in enumerate(formats):
            gradient = choice.gradient_dtype
            time = self.cost.without_optimizer(
                mesh, sequences, group.accumulation, layers, gradient, sharding, gemms
            ).total
            time += sum(self.cost.optimizer_seconds(mesh, choice, sharding).values())
            memory = self.memory.total_bytes(mesh, sequences, layers, choice, sharding, gemms)
            host = self.memory.host_bytes(mesh, choice, sharding) - self.cluster.host_memory_bytes
            yield number, choice, time, max(memory - self.limit, host)

    def _runs(self, mesh: MeshShape, sharding: DenseSharding, gemms: Gemms) -> bool:
        """Whether GEMMs in fp8 are planned there: of whole weights, and of experts whose rows are read from peers."""
        if gemms == IN_COMPUTE_DTYPE:
            return True
        experts_can = gemms.expert_gemms == "compute" or can_divide_fp8(mesh, sharding, self.cluster)
        return has_whole_weights(mesh, sharding) and experts_can

    def shardings(self, mesh: MeshShape) -> Iterator[DenseSharding]:
        """How weights outside the experts may be kept on ``mesh``; on one GPU there is nothing to decide."""
        request = self.request
        if not fsdp_sizes(mesh):
            several = mesh.gpus > 1
            if request.allows("dense_sharding", "zero1") and (several or not request.allows("dense_sharding", "fsdp")):
                yield "zero1"
        if request.allows("dense_sharding", "fsdp"):
            yield "fsdp"

    def layer_plans(self, mesh: MeshShape, sharding: DenseSharding) -> Iterator[tuple[LayerPlan, ...]]:
        """What the layers of each kind may do on ``mesh``: recompute, and reshard where weights are sharded.

        The first kind varies fastest. A kind that the model lacks has one plan, which costs nothing.
        """
        choices = []
        for name, operators in reversed(self._kinds):
            reshards: tuple[bool, ...] = (False,) if sharding == "zero1" else (True,)
            if sharding == "fsdp" and operators is not None and division_of(mesh).weights > 1:
                reshards = (True, False)
            recompute = ("none",) if operators is None else recompute_choices(operators)
            choices.append(tuple(self._choices(name, recompute, reshards)))
        for layers in itertools.product(*choices):
            yield layers[::-1]

    def evaluate(self, candidate: Candidate) -> Evaluated:
        """Time and memory of one candidate, by their parts."""
        mesh = candidate.mesh
        return Evaluated(
            candidate=candidate,
            time=self.cost.step(candidate),
            memory=self.memory.peak(candidate),
            host_bytes=self.memory.host_bytes(mesh, candidate.formats, candidate.dense_sharding),
            supported=not unsupported_sizes(mesh),
        )

    def _sequences_per_rank(self, mesh: MeshShape) -> int:
        return self.request.tokens_per_step // self.request.sequence_length // division_of(mesh).sequences

    def _micro_batches(self, mesh: MeshShape) -> Iterator[int]:
        total = self.request.tokens_per_step // self.request.sequence_length
        if total % division_of(mesh).sequences:
            return
        for sequences in reversed(divisors(self._sequences_per_rank(mesh))):
            if self.request.allows("micro_batch_sequences", sequences):
                yield sequences

    def _choices(self, kind: str, recompute: tuple[str, ...], reshards: tuple[bool, ...]) -> Iterator[LayerPlan]:
        for choice in recompute:
            for reshard in reshards:
                if self.request.allows(f"{kind}_recompute", choice) and self.request.allows(f"{kind}_reshard", reshard):
                    number = self.request.pins.get(f"{kind}_recompute_layers", "all")
                    if number == "all":
                        yield layer_plan(kind, choice, reshard)
                    elif choice != "none":
                        yield dataclasses.replace(layer_plan(kind, choice, reshard), recompute_layers=int(number))

    def _alternatives(self, best: Evaluated) -> tuple[Evaluated, ...]:
        """The best plan with one decision changed: its neighbours in the space, pinned or not."""
        free = dataclasses.replace(self.request, pins={}, forbidden=frozenset(), exact_weights=False, plan_gpus=None)
        around = Search(self.config, self.cluster, free, self.workload)
        chosen = best.candidate
        found = []
        for mesh in meshes(around.problem):
            per_rank = around._sequences_per_rank(mesh)
            whole = per_rank * division_of(mesh).sequences * free.sequence_length
            if whole == free.tokens_per_step and per_rank % chosen.micro_batch_sequences == 0:
                steps = per_rank // chosen.micro_batch_sequences
                changed_mesh = dataclasses.replace(chosen, mesh=mesh, gradient_accumulation_steps=steps)
                if chosen.dense_sharding not in around.shardings(mesh):
                    changed_mesh = dataclasses.replace(changed_mesh, dense_sharding="fsdp")
                found.append(changed_mesh)
        for sequences in around._micro_batches(chosen.mesh):
            steps = around._sequences_per_rank(chosen.mesh) // sequences
            found.append(
                dataclasses.replace(chosen, micro_batch_sequences=sequences, gradient_accumulation_steps=steps)
            )
        for layers in around.layer_plans(chosen.mesh, chosen.dense_sharding):
            found.append(dataclasses.replace(chosen, layers=layers))
            partly = _recomputing_as_often(layers, chosen.layers)
            if partly != layers:
                found.append(dataclasses.replace(chosen, layers=partly))
        found += [other for other in (around._other_sharding(chosen),) if other is not None]
        for formats in format_choices(free):
            found.append(dataclasses.replace(chosen, formats=formats))
        for gemms in gemm_choices(free, self.config):
            found.append(dataclasses.replace(chosen, gemms=gemms))
        mine = best.decisions
        unit = chosen.mesh.copy_gpus
        neighbours = []
        for other in found:
            if not around._runs(other.mesh, other.dense_sharding, other.gemms):
                continue
            changed = changes(mine, other.decisions())
            if len(changed) == 1 and (other.mesh.copy_gpus == unit or changed == ["dp_shard"]):
                neighbours.append(around.evaluate(other))
        return tuple(sorted(neighbours, key=lambda item: item.time.total))

    def _other_sharding(self, chosen: Candidate) -> Candidate | None:
        """``chosen`` with dense weights kept in the other way: of its plans that fit the fastest, else the fastest."""
        others = [
            dataclasses.replace(chosen, dense_sharding=sharding, layers=_recomputing_as_often(layers, chosen.layers))
            for sharding in self.shardings(chosen.mesh)
            if sharding != chosen.dense_sharding and self._runs(chosen.mesh, sharding, chosen.gemms)
            for layers in self.layer_plans(chosen.mesh, sharding)
            if [layer.recompute for layer in layers] == [layer.recompute for layer in chosen.layers]
        ]
        if not others:
            return None
        return min(others, key=lambda c: (self.memory.peak(c).total > self.limit, self.cost.step(c).total))

    def _why_empty(self) -> str:
        request = self.request
        if request.pins or request.forbidden:
            pins = ", ".join(f"{name}={value}" for name, value in request.pins.items())
            bans = ", ".join(f"{name}={value}" for name, value in sorted(request.forbidden))
            return (
                f"no plan satisfies the pins ({pins or 'none'}) and prohibitions ({bans or 'none'}) together; drop some"
            )
        sequences = request.tokens_per_step // request.sequence_length
        return (
            f"compile.tokens_per_step ({request.tokens_per_step}) is {sequences} sequences, which must be divisible by "
            f"the data-parallel ranks of compile.runtime_gpus ({request.runtime_gpus}); change one of the two"
        )


def _recomputing_as_often(layers: tuple[LayerPlan, ...], others: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
    """``layers``, of which those that recompute do so in as many layers of their kind as ``others``."""
    numbers = {other.kind: other.recompute_layers for other in others}
    return tuple(
        layer if layer.recompute == "none" else dataclasses.replace(layer, recompute_layers=numbers[layer.kind])
        for layer in layers
    )
