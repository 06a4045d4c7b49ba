"""Plans as ``moescale compile`` writes them, for random wishes: each trains as one device does.

The planner is asked for 2, 4 and 8 GPUs with random pins, prohibitions and memory limits, so that meshes, formats,
recomputing, resharding and accumulation vary.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import typing
from collections.abc import Iterator
from functools import cache

import pytest

from gloo_ranks import GlooRanks
from moescale.errors import ConfigError
from moescale.formats import PLANNED_GRADIENTS, PLANNED_MASTERS, PLANNED_MOMENTS
from moescale.plan import MeshShape, ParallelPlan
from moescale.planner.cluster import load_cluster
from moescale.planner.request import RECOMPUTE_CHOICES, PlanRequest
from moescale.planner.search import compile_plan
from plans import SEQUENCE_LENGTH
from recorded_runs import FP32_ERROR, Run, assert_as_near_to_fp32, assert_same_run, loss_noise, record_run
from tiny import tiny_config

FEW_STEPS, STEPS = 4, 10
SEQUENCES = 16
NUM_PLANS = 20
ORDINARY = (1, 4)
"""Numbers of the plans that are run without ``-m slow`` too, for FEW_STEPS."""

WISHES: dict[str, tuple[object, ...]] = {
    "dense_recompute": ("none", "block"),
    "moe_recompute": RECOMPUTE_CHOICES,
    "dense_reshard": ("true", "false"),
    "moe_reshard": ("true", "false"),
    "optimizer_state_dtype": PLANNED_MOMENTS,
    "gradient_dtype": PLANNED_GRADIENTS,
    "master_weight_format": PLANNED_MASTERS,
    "micro_batch_sequences": (1, 2, 4),
    "ep": (1, 2, 4, 8),
    "dp_replicate": (1, 2, 4),
    "dense_sharding": ("zero1", "fsdp"),
}


LAYOUTS: tuple[tuple[int, dict[str, str]], ...] = (
    (8, {"ep": "2", "dp_replicate": "2"}),
    (2, {"ep": "2", "dense_sharding": "zero1"}),
    (4, {"ep": "2", "dense_sharding": "zero1"}),
    (4, {"ep": "4", "dense_sharding": "fsdp"}),
    (8, {"ep": "2", "dp_replicate": "2", "dense_sharding": "fsdp"}),
    (8, {"ep": "4", "dense_sharding": "zero1"}),
    (4, {"dp_replicate": "2"}),
    (8, {"dp_replicate": "4", "dense_sharding": "zero1"}),
    (2, {"dp_replicate": "2", "dense_sharding": "fsdp"}),
)
"""GPUs and pins of the first plans: layouts that a tiny model's fastest plan seldom has."""


def random_plan(chance: random.Random, gpus: int, layout: dict[str, str]) -> ParallelPlan | None:
    """Compile for wishes and a memory limit drawn at random; None where they contradict each other."""
    pins, forbidden = {}, set()
    for name, values in WISHES.items():
        wish = chance.random()
        if wish < 0.35:
            pins[name] = str(chance.choice(values))
        elif wish < 0.5:
            forbidden.add((name, str(chance.choice(values))))
    request = PlanRequest(
        runtime_gpus=gpus,
        tokens_per_step=SEQUENCES * SEQUENCE_LENGTH,
        sequence_length=SEQUENCE_LENGTH,
        compute_dtype=chance.choice(("fp32", "bf16")),
        pins=pins | layout,
        forbidden=frozenset((name, value) for name, value in forbidden if name not in layout),
    )
    config, cluster = tiny_config(), load_cluster("h100-sxm")
    try:
        fastest = compile_plan(config, cluster, request).plan()
        assert fastest.prediction is not None
        # What a process takes before it holds a single weight dwarfs the tiny model: the limit is set above it.
        context = fastest.prediction.breakdown_bytes["context"]
        limit = context + round(chance.uniform(0.3, 1.2) * (fastest.prediction.peak_bytes - context))
        plan = compile_plan(config, cluster, dataclasses.replace(request, memory_limit_bytes=limit)).plan()
    except ConfigError:
        return None
    return ParallelPlan.from_json(plan.to_json())


def compile_plans() -> Iterator[ParallelPlan]:
    """Different plans of a seed that gives many kinds; predictions make no difference."""
    chance = random.Random(9)
    found: set[str] = set()
    while True:
        gpus, layout = LAYOUTS[len(found)] if len(found) < len(LAYOUTS) else (chance.choice((2, 4, 8)), {})
        plan = random_plan(chance, gpus, layout)
        if plan is not None:
            plan = dataclasses.replace(plan, prediction=None, alternatives=())
            if plan.to_json() not in found:
                found.add(plan.to_json())
                yield plan


COMPILED: list[ParallelPlan] = []
MORE_PLANS = compile_plans()


def compiled_plan(number: int) -> ParallelPlan:
    """Plan ``number``; it and those before it are compiled when first asked for."""
    COMPILED.extend(itertools.islice(MORE_PLANS, max(0, number + 1 - len(COMPILED))))
    return COMPILED[number]


def on_one_device(plan: ParallelPlan, micro_batch_sequences: int) -> ParallelPlan:
    """The same training in the same formats, undivided, with nothing recomputed."""
    return dataclasses.replace(
        plan,
        plan_gpus=1,
        runtime_gpus=1,
        mesh=MeshShape(),
        micro_batch_sequences=micro_batch_sequences,
        gradient_accumulation_steps=SEQUENCES // micro_batch_sequences,
        layers=(),
        dense_sharding="fsdp",
    )


@cache
def run_alone(plan: ParallelPlan, micro_batch_sequences: int, steps: int) -> Run:
    return record_run(steps, {"plan": on_one_device(plan, micro_batch_sequences)})


@cache
def first_step_in_fp32() -> Run:
    """Of a bf16 model's weights."""
    formats = dict(compute_dtype="fp32", master_weight_format="fp32", gradient_dtype="fp32")
    plan = dataclasses.replace(on_one_device(compiled_plan(0), SEQUENCES), **formats)
    return record_run(1, {"plan": plan, "round_weights": True})


@pytest.fixture(scope="module")
def groups():
    """Ranks by their number, started when first asked for."""
    started: dict[int, GlooRanks] = {}

    def start(size: int) -> GlooRanks:
        if size not in started:
            started[size] = GlooRanks(size)
        return started[size]

    yield start
    for group in started.values():
        group.close()


@pytest.mark.parametrize(
    ("number", "steps"),
    [
        pytest.param(ORDINARY[-1], FEW_STEPS, id=f"{ORDINARY[-1]}-{FEW_STEPS} steps"),
        *(pytest.param(number, STEPS, id=str(number), marks=pytest.mark.slow) for number in range(NUM_PLANS)),
    ],
)
def test_a_compiled_plan_trains_as_one_device_does(groups, number, steps):
    plan = compiled_plan(number)
    runs = groups(plan.runtime_gpus).run(record_run, steps, {"plan": plan})
    undivided = on_one_device(plan, SEQUENCES)
    rounds = plan.compute_dtype == "bf16" or plan.optimizer_state_dtype != "fp32"
    alone = [run_alone(undivided, size, steps) for size in ((SEQUENCES, 8, 4, 2, 1) if rounds else (SEQUENCES,))]
    if plan.compute_dtype == "bf16":
        assert_as_near_to_fp32(runs, alone, first_step_in_fp32())
    elif plan.optimizer_state_dtype != "fp32":
        # Short moments round a difference of 1e-7 up to one of a code, which later losses show.
        assert_same_run(runs, alone[0], max(FP32_ERROR, 2 * loss_noise(alone)))
    else:
        assert_same_run(runs, alone[0])


@pytest.mark.slow
def test_the_compiled_plans_are_of_many_kinds():
    """Else the test above would run one plan twenty times."""
    plans = [compiled_plan(number) for number in range(NUM_PLANS)]
    assert len(plans) == len(set(plans)) == NUM_PLANS
    meshes = {plan.mesh for plan in plans}
    assert len(meshes) >= 8
    assert {plan.runtime_gpus for plan in plans} == {2, 4, 8}
    assert sum(plan.mesh.ep > 1 for plan in plans) >= 5
    assert sum(plan.mesh.dp_replicate > 1 for plan in plans) >= 5
    assert any(mesh.ep > 1 and mesh.dp_shard > mesh.ep and mesh.dp_replicate > 1 for mesh in meshes)
    for name in ("compute_dtype", "dense_sharding"):
        formats = typing.get_args(typing.get_type_hints(ParallelPlan)[name])
        assert {getattr(plan, name) for plan in plans} == set(formats), name
    for name in ("optimizer_state_dtype", "master_weight_format", "gradient_dtype"):
        formats = WISHES[name]
        assert {getattr(plan, name) for plan in plans} == set(formats), name
    assert {plan.layer("dense").recompute for plan in plans} == {"none", "block"}
    assert {plan.layer("moe").recompute for plan in plans} == {"none", ("experts",), "block"}
    assert {plan.layer("moe").reshard_after_forward for plan in plans} == {True, False}
    assert {plan.offload_optimizer for plan in plans} == {True, False}
    assert len({plan.gradient_accumulation_steps for plan in plans}) >= 3


def test_the_ordinary_plans_are_of_more_than_one_kind():
    plans = [compiled_plan(number) for number in ORDINARY]
    assert {plan.compute_dtype for plan in plans} == {"bf16", "fp32"}
    assert any(plan.mesh.ep > 1 for plan in plans) and any(plan.mesh.dp_replicate > 1 for plan in plans)
    assert {plan.dense_sharding for plan in plans} == {"zero1", "fsdp"}
