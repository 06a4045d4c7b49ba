"""The registry of mesh axes: it has all of them, in an order that decides between equals, and each has its price."""

from __future__ import annotations

import dataclasses

import pytest

from moescale.operators import Operator
from moescale.plan import MeshShape
from moescale.planner.axes.axis import Division
from moescale.planner.axes.registry import AXES, BY_CLAIM, division_of, meshes
from moescale.planner.cluster import load_cluster
from moescale.planner.cost import CostModel
from moescale.planner.ledger import Ledger, Pass
from moescale.planner.problem import Problem
from moescale.planner.request import PlanRequest
from moescale.planner.search import compile_plan
from moescale.planner.workload import build_workload
from tiny import tiny_config

CONFIG = tiny_config(num_layers=4, num_heads=4, num_experts=8, expert_intermediate_size=24)
NAMES = {field.name for field in dataclasses.fields(MeshShape)}


def problem_of(gpus: int = 8, gpus_per_node: int = 8, config=CONFIG, **changes) -> Problem:
    fields = {"tokens_per_step": 64 * 2 * gpus, "sequence_length": 64, "allow_unsupported": True} | changes
    cluster = dataclasses.replace(load_cluster("h100-sxm"), gpus_per_node=gpus_per_node)
    return Problem(build_workload(config), cluster, PlanRequest(runtime_gpus=gpus, **fields))


@pytest.mark.parametrize("order", [AXES, BY_CLAIM])
def test_every_axis_of_a_mesh_is_in_both_orders_once(order) -> None:
    assert sorted(axis.name for axis in order) == sorted(NAMES)


def test_a_mesh_divides_by_its_axes() -> None:
    mesh = MeshShape(pp=2, dp_replicate=3, dp_shard=5, cp=7, tp=11, ep=35)
    assert division_of(mesh) == Division(sequences=15, layers=2, features=11, tokens=7, experts=35, weights=35)
    assert division_of(MeshShape()) == Division()


def test_every_axis_divides_something_and_every_part_is_divided() -> None:
    assert all(axis.divides for axis in AXES)
    assert {part for axis in AXES for part in axis.divides} == {field.name for field in dataclasses.fields(Division)}


def test_meshes_come_in_the_order_of_preference() -> None:
    """Fewer GPUs per copy, then smaller pp, tp, cp, ep."""
    found = list(meshes(problem_of()))
    keys = [(mesh.copy_gpus, mesh.pp, mesh.tp, mesh.cp, mesh.ep) for mesh in found]
    assert keys == sorted(set(keys)) and len(keys) > 50
    assert all(mesh.gpus == 8 and mesh.dp_shard * mesh.cp % mesh.ep == 0 for mesh in found)
    assert {name: max(getattr(mesh, name) for mesh in found) for name in NAMES} == {
        **{"dp_replicate": 8, "dp_shard": 8, "cp": 8, "ep": 8},
        **{"pp": 4, "tp": 4},  # layers; heads
    }


@pytest.mark.parametrize(
    ("axis", "changes", "sizes"),
    [
        ("pp", {"config": dataclasses.replace(CONFIG, num_layers=3)}, {1, 2}),
        ("tp", {"gpus_per_node": 2}, {1, 2}),
        ("tp", {"config": dataclasses.replace(CONFIG, expert_intermediate_size=15)}, {1}),
        ("cp", {"sequence_length": 4}, {1, 2}),
        ("cp", {"sequence_length": 5}, {1}),
        ("ep", {"config": dataclasses.replace(CONFIG, num_experts=6)}, {1, 2}),
        ("dp_replicate", {"plan_gpus": 4}, {2}),
        ("dp_shard", {"pins": {"dp_shard": "2"}}, {2}),
        ("dp_shard", {"forbidden": frozenset({("dp_shard", "4")})}, {1, 2, 8}),
        ("tp", {"allow_unsupported": False}, {1}),
    ],
)
def test_an_axis_has_the_sizes_that_model_machine_and_request_leave(axis: str, changes: dict, sizes: set) -> None:
    if length := changes.get("sequence_length"):
        changes = changes | {"tokens_per_step": 16 * length}
    assert {getattr(mesh, axis) for mesh in meshes(problem_of(**changes))} == sizes


@pytest.mark.parametrize("axis", sorted(NAMES))
def test_an_axis_costs_its_own_communication_once_it_is_larger_than_one(axis: str) -> None:
    pins = {name: "1" for name in NAMES - {"ep", "dp_shard"}} | {axis: "2", "dense_sharding": "fsdp"}
    if axis == "ep":
        pins["dp_shard"] = "2"
    request = problem_of(gpus=2, pins=pins).request
    best = compile_plan(CONFIG, load_cluster("h100-sxm"), request, with_alternatives=False).best
    assert best is not None
    times = best.time.exposed, best.time.hidden
    assert sum(time.get(f"communication {axis}", 0.0) for time in times) > 0


def test_a_second_of_compute_hides_one_second_of_communication() -> None:
    ledger, layers = Ledger(), Pass(count=2, compute={"attention": 1.0, "norm": 0.5})
    ledger.communicate("cp", layers, 3.0, layers.seconds_of({"attention"}))
    ledger.communicate("dp_shard", layers, 3.0, layers.free)
    assert layers.free == 0.0
    assert ledger.hidden == {"communication cp": 2.0, "communication dp_shard": 1.0}
    assert ledger.exposed == {"communication cp": 4.0, "communication dp_shard": 5.0}


@pytest.mark.parametrize("kind", ["dense_gemm", "elementwise"])
def test_work_that_an_operator_replicates_over_tp_is_not_divided(kind) -> None:
    cost = CostModel(problem_of())
    dims = cost.problem.dims(1)

    def seconds(tp, features: int) -> tuple[float, float]:
        op = Operator(name="mine", annotation="n h, e h -> n e", kind=kind, tp=tp)
        return cost.operator_seconds(op, dims, features=features)

    assert seconds("replicate", 4) == seconds("replicate", 1) == seconds("shard", 1)
    assert seconds("shard", 4) < seconds("shard", 1)
