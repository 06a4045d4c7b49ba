"""The search against a naive enumerator written here, and the ways in which a plan may never get worse."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.errors import ConfigError
from moescale.formats import EXACT_MASTERS, PLANNED_GRADIENTS, PLANNED_MASTERS, PLANNED_MOMENTS
from moescale.lora import parse_lora
from moescale.plan import UNSUPPORTED_AXES, LayerPlan, MeshShape, ParallelPlan
from moescale.planner.cluster import Cluster, Link, load_cluster
from moescale.planner.cost import CostModel
from moescale.planner.explain import alternative_text, explain_html, explain_json, explain_text
from moescale.planner.memory import MemoryModel
from moescale.planner.problem import Problem as PlannerProblem
from moescale.planner.request import (
    Candidate,
    DenseSharding,
    Formats,
    Gemms,
    PlanRequest,
    decision_text,
)
from moescale.planner.result import PlanResult, usable_bytes
from moescale.planner.search import PARTLY_RECOMPUTED_MARGIN, compile_plan
from moescale.planner.workload import build_workload
from tiny import tiny_config

H100 = load_cluster("h100-sxm")
SLOW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
Point = tuple[float, float, Candidate]
"""Step seconds, bytes by which it exceeds the limit, and what it is."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The memory is a multiple, ``slack``, of the peak of one of its plans: of the ``size``-th part of them by size."""

    config: ModelConfig
    cluster: Cluster
    request: PlanRequest
    size: float
    slack: float

    def with_memory(self) -> Problem:
        """With the memory that ``size`` and ``slack`` say.

        It is not part of the strategy: hypothesis gives up most of what it draws, and this takes longer than a draw.
        """
        memory = MemoryModel(PlannerProblem(build_workload(self.config), self.cluster, self.request))
        candidates = every_candidate(self)
        some = candidates[:: math.ceil(len(candidates) / 500) or 1]
        if not some:
            return self
        peaks = sorted(memory.peak(candidate).total for candidate in some)
        limit = peaks[int(self.size * len(peaks))] * self.slack
        margin = H100.margin_bytes if self.request.runtime_gpus > 1 else 0
        cluster = dataclasses.replace(self.cluster, memory_bytes=max(1, round(limit)) + margin)
        return dataclasses.replace(self, cluster=cluster)

    def solve(self, **cluster_changes: Any) -> PlanResult:
        cluster = dataclasses.replace(self.cluster, **cluster_changes)
        return compile_plan(self.config, cluster, self.request, with_alternatives=False)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    experts = draw(st.sampled_from([None, 2, 4, 6]))
    config = tiny_config(
        num_layers=draw(st.integers(1, 4)),
        num_experts=experts,
        top_k=2,
        first_moe_layer=draw(st.integers(0, 2)),
        num_shared_experts=draw(st.integers(0, 1)),
        hidden_size=draw(st.sampled_from([32, 512])),
        vocab_size=draw(st.sampled_from([96, 4096])),
        expert_intermediate_size=draw(st.sampled_from([24, 128])),  # no multiple of 16, and one
    )
    gpus = draw(st.sampled_from([1, 2, 3, 4]))
    units = [unit for unit in range(1, gpus + 1) if gpus % unit == 0]
    sequences = gpus * draw(st.sampled_from([1, 2, 4]))
    length = draw(st.sampled_from([32, 128]))
    # Two decisions at least are pinned, or the naive enumeration takes minutes.
    choices = {
        "gradient_dtype": PLANNED_GRADIENTS,
        "optimizer_state_dtype": PLANNED_MOMENTS,
        "master_weight_format": EXACT_MASTERS,
        "moe_recompute": ("none", "block"),
        "micro_batch_sequences": ("1", "2"),
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), min_size=2, max_size=3, unique=True))
    pins = {name: draw(st.sampled_from(choices[name])) for name in names}
    request = PlanRequest(
        runtime_gpus=gpus,
        plan_gpus=draw(st.sampled_from([None, *units])),
        tokens_per_step=sequences * length,
        sequence_length=length,
        router_imbalance=draw(st.sampled_from([1.0, 1.3])),
        exact_weights=draw(st.booleans()),
        fp8_gemms=draw(st.booleans()),
        allow_unsupported=draw(st.booleans()) and gpus <= 4,
        pins=pins,
        forbidden=frozenset(draw(st.sets(st.sampled_from([("ep", "2"), ("dense_recompute", "block")])))),
    )
    link = st.builds(
        Link,
        latency_seconds=st.sampled_from([1e-6, 1e-4]),
        bytes_per_second=st.sampled_from([1e8, 1e10, 1e12]),
    )
    cluster = dataclasses.replace(
        H100,
        gpus_per_node=draw(st.sampled_from([1, 2, 4])),
        intra_node=draw(link),
        inter_node=draw(link),
        host=draw(link),
        context_bytes=0,
        launch_seconds=draw(st.sampled_from([0.0, 2e-6])),
    )
    size = draw(st.floats(0, 1, exclude_max=True))
    return Problem(config, cluster, request, size, draw(st.sampled_from([0.9, 1.0, 1.1])))


def every_candidate(problem: Problem) -> list[Candidate]:
    """The whole space, by trying every combination of numbers and keeping those that the rules allow."""
    config, cluster, request = problem.config, problem.cluster, problem.request
    gpus = range(1, request.runtime_gpus + 1)
    has_moe, has_dense = config.num_moe_layers > 0, config.num_moe_layers < config.num_layers
    found = []
    for pp, replicate, shard, cp, tp, ep in itertools.product(gpus, repeat=6):
        mesh = MeshShape(pp=pp, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp, ep=ep)
        unit = pp * shard * cp * tp
        sequences, rest = divmod(request.tokens_per_step // request.sequence_length, replicate * shard)
        if (
            unit * replicate != request.runtime_gpus
            or (request.plan_gpus is not None and unit != request.plan_gpus)
            or (not request.allow_unsupported and pp * cp * tp > 1)
            or (pp > config.num_layers or config.num_heads % tp or config.expert_intermediate_size % tp)
            or (tp > cluster.gpus_per_node or (cp > 1 and request.sequence_length % (2 * cp)))
            or ((shard * cp) % ep or (not has_moe and ep > 1) or (config.num_experts or 1) % ep)
            or rest
        ):
            continue
        gathered = (True, False) if shard * cp > 1 else (True,)
        plans: list[tuple[DenseSharding, list[LayerPlan], list[LayerPlan]]] = []
        ways: tuple[tuple[DenseSharding, tuple[bool, ...]], ...] = (("fsdp", gathered), ("zero1", (False,)))
        for sharding, reshards in ways:
            if sharding == "zero1" and (pp * cp * tp > 1 or shard * replicate == 1):
                continue
            # Of a kind of layer that the model lacks there is one plan.
            denses = layer_plans("dense", ("none", "block"), reshards) if has_dense else []
            moes = layer_plans("moe", ("none", ("experts",), "block"), reshards) if has_moe else []
            denses = denses or layer_plans("dense", ("none",), reshards[:1])
            moes = moes or layer_plans("moe", ("none",), reshards[:1])
            if pp == 1 and not {"moe_recompute", "moe_recompute_layers"} & request.pins.keys():
                moes += [
                    dataclasses.replace(moe, recompute_layers=number)
                    for moe in moes
                    if moe.recompute != "none"
                    for number in range(1, config.num_moe_layers)
                ]
            plans.append((sharding, denses, moes))
        for sharding, denses, moes in plans:
            in_fp8 = request.fp8_gemms and (request.runtime_gpus == 1 or sharding == "zero1")
            has_fp8_experts = in_fp8 and has_moe and config.expert_intermediate_size % 16 == 0
            if ep > problem.cluster.gpus_per_node:  # whose memory peers cannot read
                has_fp8_experts = False
            gemm_formats = [
                Gemms(expert_gemms=experts, dense_gemms=dense)
                for experts in (("compute", "fp8") if has_fp8_experts else ("compute",))
                for dense in (("compute", "fp8") if in_fp8 else ("compute",))
            ]
            for micro, dense, moe, formats, gemms in itertools.product(
                range(1, sequences + 1), denses, moes, every_format(), gemm_formats
            ):
                if sequences % micro:
                    continue
                candidate = Candidate(
                    mesh=mesh,
                    micro_batch_sequences=micro,
                    gradient_accumulation_steps=sequences // micro,
                    layers=(dense, moe),
                    formats=formats,
                    dense_sharding=sharding,
                    gemms=gemms,
                )
                if allowed(candidate, request):
                    found.append(candidate)
    return found


def layer_plans(kind: str, recompute: tuple[Any, ...], reshards: tuple[bool, ...]) -> list[LayerPlan]:
    return [
        LayerPlan(kind=kind, recompute=again, reshard_after_forward=reshard)
        for again in recompute
        for reshard in reshards
    ]


def every_format() -> list[Formats]:
    return [
        Formats(
            optimizer_state_dtype=moments,
            master_weight_format=master,
            gradient_dtype=gradient,
            offload_optimizer=offload,
        )
        for moments, master, gradient, offload in itertools.product(
            PLANNED_MOMENTS, PLANNED_MASTERS, PLANNED_GRADIENTS, (False, True)
        )
    ]


def allowed(candidate: Candidate, request: PlanRequest) -> bool:
    if request.exact_weights and candidate.formats.master_weight_format == "stochastic_bf16":
        return False
    texts = {name: decision_text(value) for name, value in candidate.decisions().items()}
    return all(texts[name] == value for name, value in request.pins.items()) and not any(
        texts[name] == value for name, value in request.forbidden
    )


def brute_force(problem: Problem) -> list[Point]:
    planned = PlannerProblem(build_workload(problem.config), problem.cluster, problem.request)
    cost, memory = CostModel(planned), MemoryModel(planned)
    points = []
    for candidate in every_candidate(problem):
        host = (
            memory.host_bytes(candidate.mesh, candidate.formats, candidate.dense_sharding)
            - problem.cluster.host_memory_bytes
        )
        limit = float(usable_bytes(problem.cluster, problem.request))
        if is_partly_recomputed((0.0, 0.0, candidate)):
            limit *= 1 - PARTLY_RECOMPUTED_MARGIN
        excess = max(memory.peak(candidate).total - limit, host)
        points.append((cost.step(candidate).total, excess, candidate))
    fitting = {candidate for _, excess, candidate in points if excess <= 0}
    return [point for point in points if not is_partly_recomputed(point) or in_all_layers(point[2]) in fitting]


def is_partly_recomputed(point: Point) -> bool:
    return any(layer.recompute_layers is not None for layer in point[2].layers)


def in_all_layers(candidate: Candidate) -> Candidate:
    """Fewer layers are looked at where all of them would fit."""
    layers = tuple(dataclasses.replace(layer, recompute_layers=None) for layer in candidate.layers)
    return dataclasses.replace(candidate, layers=layers)


def check_against_every_combination(problem: Problem) -> None:
    problem = problem.with_memory()
    points = brute_force(problem)
    if not points:
        with pytest.raises(ConfigError, match="divisible|together|must be a divisor"):
            problem.solve()
        return
    result = problem.solve()
    fitting = [point for point in points if point[1] <= 0]
    assert result.num_candidates == sum(not is_partly_recomputed(point) for point in points)
    if not fitting:
        assert result.best is None
        smallest = min(excess for _, excess, _ in points)
        assert result.near_misses[0].memory.total - result.limit_bytes == pytest.approx(smallest, abs=1)
        return
    assert result.best is not None
    fastest = min(time for time, _, _ in fitting)
    assert result.best.time.total == pytest.approx(fastest, rel=1e-12)
    assert result.best.candidate in [candidate for time, _, candidate in fitting if time <= fastest * (1 + 1e-12)]


@settings(SLOW, max_examples=20)
@given(problems())
def test_the_plan_is_that_of_trying_every_combination(problem: Problem) -> None:
    check_against_every_combination(problem)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SLOW)
@given(problems())
def test_the_plan_is_that_of_trying_every_combination_of_many_problems(problem: Problem) -> None:
    check_against_every_combination(problem)


def seconds(result: PlanResult) -> float:
    return result.best.time.total if result.best else float("inf")


BETTER = ["memory", "intra", "inter", "grouped", "dense", "attention", "bandwidth", "fp8 grouped", "fp8 dense"]


@settings(SLOW, max_examples=15)
@given(problems(), st.sampled_from(BETTER))
def test_more_memory_faster_links_and_kernels_never_give_a_slower_plan(problem: Problem, what: str) -> None:
    check_no_slower(problem, what)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(SLOW)
@given(problems(), st.sampled_from(BETTER))
def test_of_many_problems_none_has_a_slower_plan_where_the_machine_is_better(problem: Problem, what: str) -> None:
    check_no_slower(problem, what)


def check_no_slower(problem: Problem, what: str) -> None:
    problem = problem.with_memory()
    cluster = problem.cluster
    try:
        before = problem.solve()
    except ConfigError:
        return

    def faster(name: str) -> dict[str, Any]:
        rates = getattr(cluster, name)
        return {name: dataclasses.replace(rates, flops_per_second=tuple(2 * rate for rate in rates.flops_per_second))}

    def quicker(link: Link) -> Link:
        return Link(latency_seconds=link.latency_seconds / 2, bytes_per_second=link.bytes_per_second * 2)

    changes = {
        "memory": {"memory_bytes": cluster.memory_bytes * 2},
        "intra": {"intra_node": quicker(cluster.intra_node)},
        "inter": {"inter_node": quicker(cluster.inter_node)},
        "grouped": faster("grouped_gemm"),
        "dense": faster("dense_gemm"),
        "attention": faster("attention"),
        "fp8 grouped": faster("fp8_grouped_gemm"),
        "fp8 dense": faster("fp8_dense_gemm"),
        "bandwidth": {"elementwise_bytes_per_second": cluster.elementwise_bytes_per_second * 2},
    }[what]
    assert seconds(problem.solve(**changes)) <= seconds(before) * (1 + 1e-12)


REFERENCE = PlanRequest(
    runtime_gpus=8, plan_gpus=4, tokens_per_step=131072, sequence_length=2048, memory_limit_bytes=64 * 10**9
)


def coder_v2_lite() -> ModelConfig:
    from moescale.convert.hf_config import read_model_config

    return read_model_config("deepseek-coder-v2-lite")


def test_the_reference_command_gets_a_plan_the_runtime_can_read() -> None:
    result = compile_plan(coder_v2_lite(), H100, REFERENCE)
    plan = result.plan()
    assert plan.plan_gpus == 4 and plan.mesh.dp_replicate == 2
    assert plan.prediction is not None
    assert plan.prediction.peak_bytes <= 64e9
    assert plan.prediction.tokens_per_second == pytest.approx(131072 / plan.prediction.step_seconds)
    assert sum(plan.prediction.breakdown_seconds.values()) == pytest.approx(plan.prediction.step_seconds)
    assert sum(plan.prediction.breakdown_bytes.values()) == pytest.approx(plan.prediction.peak_bytes, abs=100)
    assert ParallelPlan.from_json(plan.to_json()) == plan
    plan.check_model(coder_v2_lite())


def test_equal_requests_give_equal_plans() -> None:
    first, second = (compile_plan(coder_v2_lite(), H100, REFERENCE).plan() for _ in range(2))
    assert first == second


def test_every_alternative_differs_in_one_decision_and_says_what_it_costs() -> None:
    plan = compile_plan(coder_v2_lite(), H100, REFERENCE).plan()
    assert {"ep", "gradient_dtype", "moe_recompute", "micro_batch_sequences"} <= {
        alternative["decision"] for alternative in plan.alternatives
    }
    for alternative in plan.alternatives:
        assert alternative["value"] != alternative["instead_of"]
        slower = alternative["slower_by"] >= -1e-9
        fits = not alternative["exceeds_memory_by_bytes"] and "exceeds_host_memory_by_bytes" not in alternative
        inexact = alternative["value"] == "stochastic_bf16"
        assert slower or not fits or not alternative["supported"] or inexact or alternative["excluded_by"]


@pytest.mark.slow
def test_where_only_host_memory_is_exceeded_that_is_the_memory_named() -> None:
    request = dataclasses.replace(REFERENCE, pins={"offload_optimizer": "true"}, memory_limit_bytes=None)
    cluster = dataclasses.replace(H100, host_memory_bytes=10**9, memory_bytes=3 * 10**11)
    result = compile_plan(coder_v2_lite(), cluster, request)
    assert result.best is None
    with pytest.raises(ConfigError, match=r"host memory: 0\.9 GiB.* nearest exceeds host memory by \d+\.\d GiB\. See"):
        result.plan()
    text, document = explain_text(result), explain_json(result)
    assert "exceeds host memory by" in text and "GPU memory by" not in text
    miss = document["near_misses"][0]
    assert document["host_limit_bytes"] == 10**9
    assert miss["exceeds_memory_by_bytes"] == 0
    assert miss["exceeds_host_memory_by_bytes"] == miss["host_bytes"] - 10**9 > 0
    free = compile_plan(coder_v2_lite(), cluster, dataclasses.replace(request, pins={}))
    offload = next(a for a in free.plan().alternatives if a["decision"] == "offload_optimizer")
    assert offload["exceeds_memory_by_bytes"] == 0 and offload["exceeds_host_memory_by_bytes"] > 0
    texts = [alternative_text(free, other) for other in free.alternatives]
    told = next(text for text in texts if text.startswith("offload_optimizer true instead of false"))
    assert "does not fit: exceeds host memory by" in told


def test_host_memory_in_use_is_told_beside_its_limit() -> None:
    result = compile_plan(coder_v2_lite(), H100, dataclasses.replace(REFERENCE, pins={"offload_optimizer": "true"}))
    assert result.best is not None
    assert "of the host's 232.8 GiB" in explain_text(result)
    assert explain_json(result)["prediction"]["host_bytes"] == round(result.best.host_bytes) > 0


def test_an_alternative_that_the_request_excludes_says_by_what() -> None:
    pinned = dataclasses.replace(
        REFERENCE, pins={"moe_recompute": "block"}, forbidden=frozenset({("optimizer_state_dtype", "bf16")})
    )
    result = compile_plan(coder_v2_lite(), H100, pinned)
    excluded = {(a["decision"], a["value"]): a["excluded_by"] for a in result.plan().alternatives}
    assert excluded["moe_recompute", "none"] == ["--pin moe_recompute=block"]
    assert excluded["optimizer_state_dtype", "bf16"] == ["--forbid optimizer_state_dtype=bf16"]
    assert excluded["dp_shard", "8"] == ["--plan-gpus 4"]
    assert excluded["gradient_dtype", "fp32"] == []
    for reason in ("--pin moe_recompute=block", "--forbid optimizer_state_dtype=bf16", "--plan-gpus 4"):
        assert any(alternative_text(result, other).endswith(f"(excluded by {reason})") for other in result.alternatives)


def test_text_and_page_say_which_model_and_how_many_tokens_they_are_about() -> None:
    result = compile_plan(coder_v2_lite(), H100, REFERENCE)
    head = f"model {coder_v2_lite().fingerprint()}: 27 layers, 64 experts, 15.706 B parameters; "
    head += "131,072 tokens a step, in sequences of 2,048"
    assert head in explain_text(result)
    assert head in explain_html(result)


def test_where_nothing_fits_the_plan_is_refused_and_the_nearest_miss_named() -> None:
    request = dataclasses.replace(REFERENCE, runtime_gpus=1, plan_gpus=1)
    result = compile_plan(coder_v2_lite(), H100, request)
    assert result.best is None
    with pytest.raises(
        ConfigError, match=r"no plan fits 59\.6 GiB per GPU .*the nearest exceeds GPU memory by \d+\.\d GiB"
    ):
        result.plan()


def test_adapters_are_planned_where_experts_lie_on_several_ranks_and_dense_blocks_are_recomputed():
    """Then memory has a moment at which the routed layers' activations are gone."""
    request = PlanRequest(
        runtime_gpus=8,
        tokens_per_step=1024,
        sequence_length=64,
        lora=parse_lora("rank=4,alpha=8,targets=attention+experts"),
        pins={"ep": "8", "dense_sharding": "zero1", "dense_recompute": "block"},
    )
    found = compile_plan(read_model_config("tiny"), H100, request).best
    assert found is not None and found.candidate.mesh.ep == 8


@pytest.mark.parametrize("axis", ["pp", "cp", "tp"])
def test_an_axis_that_this_version_runs_is_searched_without_asking(monkeypatch, axis):
    others = tuple(other for other in UNSUPPORTED_AXES if other != axis)
    monkeypatch.setattr("moescale.plan.UNSUPPORTED_AXES", others)
    request = PlanRequest(runtime_gpus=4, tokens_per_step=512, sequence_length=64, pins={axis: "2"})
    result = compile_plan(read_model_config("tiny"), H100, request)
    assert result.best is not None and result.best.supported
    assert getattr(result.best.candidate.mesh, axis) == 2 and result.best.candidate.dense_sharding == "fsdp"
    free = compile_plan(read_model_config("tiny"), H100, dataclasses.replace(request, pins={}))
    without = dataclasses.replace(request, pins={}, forbidden=frozenset({(axis, "2"), (axis, "4")}))
    assert free.num_candidates > compile_plan(read_model_config("tiny"), H100, without).num_candidates
