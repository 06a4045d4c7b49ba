"""Layer kinds of any name: a family whose MoE layers are near, far and full, in turns, is planned as one of moe."""

from __future__ import annotations

import dataclasses

import pytest

from moescale.errors import ConfigError
from moescale.models import registry
from moescale.models.family import LayerList
from moescale.models.layer_plans import plan_of_layers
from moescale.plan import LayerPlan, ParallelPlan
from moescale.planner.cluster import load_cluster
from moescale.planner.request import PlanRequest
from moescale.planner.result import PlanResult
from moescale.planner.search import compile_plan
from tiny import tiny_config

CONFIG = tiny_config(num_layers=6, first_moe_layer=0, num_experts=8)
FAMILY = registry.family_of(CONFIG)
RECOMPUTE = ("none", "experts", "block")


# Without what does not depend on the plan: the model is far smaller than that.
CLUSTER = dataclasses.replace(load_cluster("h100-sxm"), context_bytes=0)
FORMATS = dict(optimizer_state_dtype="fp32", gradient_dtype="fp32", master_weight_format="fp32")
KINDS = ("near", "far", "full")


def near_far_full(config) -> tuple[LayerList, ...]:
    moe = next(kind for kind in FAMILY.layers(config) if kind.name == "moe")
    return tuple(
        LayerList(name=name, operators=moe.operators, indices=moe.indices[first::3]) for first, name in enumerate(KINDS)
    )


@pytest.fixture
def three_kinds(monkeypatch):
    def use() -> None:
        family = dataclasses.replace(FAMILY, layers=near_far_full)
        monkeypatch.setitem(registry.FAMILIES, CONFIG.model_type, family)

    return use


def search(gpus: int, memory_limit: int | None = None, **pins: str) -> PlanResult:
    request = PlanRequest(
        runtime_gpus=gpus,
        tokens_per_step=64 * 32,
        sequence_length=32,
        memory_limit_bytes=memory_limit,
        pins={"micro_batch_sequences": "16", "offload_optimizer": "false", **FORMATS, **pins},
    )
    return compile_plan(CONFIG, CLUSTER, request, with_alternatives=False)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("pins", [{}, {"dense_sharding": "zero1", "ep": "2"}, {"dense_sharding": "fsdp", "ep": "2"}])
def test_three_kinds_with_the_operators_of_one_cost_what_the_one_does(three_kinds, recompute, pins):
    gpus = 4 if pins else 1
    one = search(gpus, moe_recompute=recompute, **pins).best
    three_kinds()
    three = search(gpus, **{f"{kind}_recompute": recompute for kind in KINDS}, **pins).best
    assert one is not None and three is not None
    assert three.candidate.mesh == one.candidate.mesh
    assert three.time.total == pytest.approx(one.time.total)
    assert three.memory.total == pytest.approx(one.memory.total)
    assert three.memory.moment == one.memory.moment


def test_each_kind_has_decisions_of_its_own(three_kinds):
    three_kinds()
    pins = dict(near_recompute="experts", far_recompute="none", full_recompute="block")
    plan = search(1, **pins, full_recompute_layers="1").plan()
    assert [(layer.kind, layer.recompute, layer.recompute_layers) for layer in plan.layers] == [
        ("near", ("experts",), None),
        ("far", "none", None),
        ("full", "block", 1),
    ]
    assert ParallelPlan.from_json(plan.to_json()) == plan
    by_layer = plan_of_layers(plan, CONFIG)
    assert [layer.kind for layer in by_layer] == [*KINDS, *KINDS]
    assert [layer.recompute for layer in by_layer] == [("experts",), "none", "block", ("experts",), "none", "none"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "sharding"), [("experts", "zero1"), ("block", "fsdp")])
def test_a_kind_that_recomputes_in_some_layers_lies_between_none_and_all(three_kinds, kind, what, sharding):
    three_kinds()
    others = {f"{other}_recompute": "none" for other in KINDS if other != kind} | {"dense_sharding": sharding}
    kept = search(2, **others, **{f"{kind}_recompute": "none"}).best
    partly = search(2, **others, **{f"{kind}_recompute": what, f"{kind}_recompute_layers": "1"}).best
    everywhere = search(2, **others, **{f"{kind}_recompute": what}).best
    assert kept is not None and partly is not None and everywhere is not None
    seconds = [found.time.exposed.get("recompute", 0.0) for found in (kept, partly, everywhere)]
    assert seconds == pytest.approx([0.0, seconds[2] / 2, seconds[2]]) and seconds[2] > 0
    assert kept.memory.total > max(partly.memory.total, everywhere.memory.total)


def test_memory_decides_in_how_many_layers_each_kind_recomputes(three_kinds):
    three_kinds()
    peaks = {}
    for what in ("none", "block"):
        best = search(1, **{f"{kind}_recompute": what for kind in KINDS}).best
        assert best is not None
        peaks[what] = best.memory.total
    numbers = set()
    for share in (0.3, 0.6, 0.9):
        limit = round(peaks["block"] + share * (peaks["none"] - peaks["block"]))
        result = search(1, limit)
        assert result.best is not None and result.best.memory.total <= limit
        numbers |= {layer.recompute_layers for layer in result.best.candidate.layers if layer.recompute != "none"}
        plan = result.plan()
        assert len(plan_of_layers(plan, CONFIG)) == CONFIG.num_layers
    assert 1 in numbers, "some kind recomputes in one of its two layers"


def test_a_kind_that_the_family_lacks_is_refused(three_kinds):
    plan = search(1).plan()
    three_kinds()
    with pytest.raises(ConfigError, match="'moe_recompute' is not a decision of a plan for this model"):
        search(1, moe_recompute="block")
    with pytest.raises(ConfigError, match="'dense' is not a layer kind of deepseek_v2; its kinds are near, far, full"):
        plan_of_layers(plan, CONFIG)


def test_operators_that_a_kind_lacks_are_refused():
    plan = dataclasses.replace(search(1).plan(), layers=(LayerPlan(kind="dense", recompute=("experts",)),))
    with pytest.raises(ConfigError, match=r"plan\.layers\.dense\.recompute \('experts'\) must be none or block"):
        plan_of_layers(plan, CONFIG)


def test_more_layers_than_a_kind_has_are_refused(three_kinds):
    three_kinds()
    with pytest.raises(ConfigError, match=r"far_recompute_layers=3: far_recompute_layers must be all, or at most 2"):
        search(1, far_recompute="block", far_recompute_layers="3")
    plan = dataclasses.replace(search(1).plan(), layers=(LayerPlan(kind="far", recompute="block", recompute_layers=3),))
    with pytest.raises(ConfigError, match=r"plan\.layers\.far\.recompute_layers \(3\) must be at most the model's 2"):
        plan_of_layers(plan, CONFIG)
