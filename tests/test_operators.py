import dataclasses

import pytest

from moescale import operators
from moescale.convert.hf_config import PRESETS, read_model_config
from moescale.errors import ConfigError
from moescale.operators import (
    Annotation,
    Operator,
    Recompute,
    Saved,
    Split,
    Tensor,
    forward_flops,
    is_routed,
    moved_bytes,
    splits,
)
from moescale.planner.axes.registry import meshes
from moescale.planner.cluster import load_cluster
from moescale.planner.explain import explain_text, group_time, model_text
from moescale.planner.remedies import find_remedies
from moescale.planner.request import PlanRequest, recompute_name
from moescale.planner.search import Search, compile_plan
from moescale.planner.timeline import step_timeline
from moescale.planner.workload import build_workload
from tiny import tiny_config

DIMS = {"n": 10, "h": 4, "f": 3, "e": 2, "k": 2, "a": 2, "q": 3, "v": 2, "x": 5}


@pytest.fixture
def own_operator(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """A user's low-rank adapter beside a layer, registered for this test only."""
    monkeypatch.setattr(operators, "_REGISTRY", dict(operators._REGISTRY))
    return operators.register(
        Operator(
            name="adapter",
            annotation="n h, 16h h -> n 16h",
            kind="dense_gemm",
            saved=(Saved(name="adapter_input", dims="n h"), Saved(name="adapter_scale", dims="n", itemsize=4)),
        )
    )


def test_an_annotation_names_operands_results_and_weights() -> None:
    annotation = Annotation.parse("n h, e 2f h, e h f -> n h")
    assert [tensor.is_weight for tensor in annotation.inputs] == [False, True, True]
    assert [tensor.size(DIMS) for tensor in annotation.weights] == [2 * 6 * 4, 2 * 4 * 3]


def test_a_product_has_two_flops_per_combination_of_its_dims() -> None:
    linear = Operator(name="linear", annotation="n h, 2f h -> n 2f", kind="dense_gemm")
    assert forward_flops(linear, DIMS) == 2 * 10 * 4 * 6
    assert moved_bytes(linear, DIMS, 2) == 2 * (10 * 4 + 6 * 4 + 10 * 6)


def test_what_may_be_split_and_what_it_costs_follow_from_the_annotation() -> None:
    found = set(splits(operators.operator("experts")))
    assert Split(dim="n", axis="dp", communication="gather_weights_reduce_gradients") in found
    assert Split(dim="e", axis="ep", communication="all_to_all") in found
    assert Split(dim="f", axis="tp", communication="all_reduce_output") in found
    assert Split(dim="a", axis="tp", communication="none") in splits(operators.operator("kv_up"))
    assert {split.communication for split in splits(operators.operator("dense_swiglu"))} == {"none"}


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("n h, f h", "must have the form 'inputs -> outputs'"),
        ("n h, f* h -> n f", r"annotation term 'f\*' must be a dim name"),
        ("n h, f h -> n g", "output dim 'g' is in no input"),
    ],
)
def test_a_wrong_annotation_is_refused(annotation: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        operators.register(Operator(name="wrong", annotation=annotation, kind="dense_gemm"))


def test_a_product_without_a_weight_must_say_its_flops() -> None:
    with pytest.raises(ConfigError, match="'wrong': needs `flops`"):
        operators.register(Operator(name="wrong", annotation="n h, n h -> n h", kind="attention"))


def test_a_name_is_taken_once(own_operator: Operator) -> None:
    assert operators.register(own_operator) is own_operator
    with pytest.raises(ConfigError, match="'adapter' is already registered"):
        operators.register(dataclasses.replace(own_operator, annotation="n h, h h -> n h"))
    with pytest.raises(ConfigError, match="'adaptor' is not registered; known are adapter, "):
        operators.operator("adaptor")


def test_a_registered_operator_is_planned_with_its_weights_memory_and_time(own_operator: Operator) -> None:
    config = tiny_config(hidden_size=256)
    plain, extended = build_workload(config), build_workload(config, extra={"moe": ("adapter",)})
    assert extended.parameters() - plain.parameters() == 2 * 16 * 256 * 256
    request = PlanRequest(runtime_gpus=2, tokens_per_step=4096, sequence_length=128)
    before, after = (
        Search(config, load_cluster("h100-sxm"), request, workload).run() for workload in (plain, extended)
    )
    assert before.best is not None and after.best is not None
    assert after.best.time.total > before.best.time.total
    assert "compute adapter" in after.best.time.exposed
    assert after.best.memory.breakdown["weights"] > before.best.memory.breakdown["weights"]
    assert after.best.memory.breakdown["activations moe"] > before.best.memory.breakdown["activations moe"]


@pytest.mark.parametrize("runtime_gpus", [2, 8])
def test_the_explanation_is_of_the_model_that_was_searched(own_operator: Operator, runtime_gpus: int) -> None:
    config = tiny_config(hidden_size=256)
    workload = build_workload(config, extra={"moe": ("adapter",) * 8})
    request = PlanRequest(runtime_gpus=runtime_gpus, tokens_per_step=16384, sequence_length=128)
    result = compile_plan(config, load_cluster("h100-sxm"), request, workload=workload)
    assert result.workload is workload and result.best is not None
    assert f"{workload.parameters() / 1e9:.3f} B parameters" in model_text(result)
    assert step_timeline(result, result.best).spans[-1].end == pytest.approx(result.best.time.total)
    assert sum(group_time(workload, result.best).values()) == pytest.approx(result.best.time.total)
    assert "adapter" in explain_text(result)


def test_what_would_fit_is_asked_of_the_model_that_was_searched(own_operator: Operator) -> None:
    config = tiny_config(hidden_size=256)
    workload = build_workload(config, extra={"moe": ("adapter",) * 64})
    request = PlanRequest(
        runtime_gpus=1,
        tokens_per_step=4096,
        sequence_length=128,
        memory_limit_bytes=2**30,
        pins={"optimizer_state_dtype": "int8", "gradient_dtype": "bf16"},  # each search tries a sixth of the formats
    )
    cluster = load_cluster("h100-sxm")
    assert compile_plan(config, cluster, request).best is not None
    result = compile_plan(config, cluster, request, workload=workload)
    assert result.best is None, "the limit leaves no room for the adapters"
    unlimited = compile_plan(config, cluster, dataclasses.replace(request, memory_limit_bytes=None), workload=workload)
    (remedy,) = (found for found in find_remedies(result) if "--memory-limit" in found.change)
    assert unlimited.best is not None and remedy.peak_bytes == round(unlimited.best.memory.total)


def test_tensor_parallelism_shards_no_norm() -> None:
    for kind in (*build_workload(tiny_config(q_lora_rank=8)).layers, build_workload(tiny_config()).outside):
        for op in kind.operators:
            axes = {split.axis for split in splits(op)}
            assert not (op.name.endswith("norm") and "tp" in axes), op.name
            assert op.kind != "dense_gemm" or op.name == "linear_cross_entropy" or "tp" in axes, op.name


def test_an_operator_says_what_it_overlaps_and_what_may_be_recomputed(own_operator: Operator) -> None:
    """An operator of one's own takes the place of the shared experts, and of the experts, by what it declares."""
    register = operators.register
    own = Recompute(drops=("own_hidden",), forward_share=0.5)
    saved = (Saved(name="own_hidden", dims="n 2f"),)
    register(Operator(name="own_shared", annotation="n h, s h, h s -> n h", kind="dense_gemm", overlaps="ep"))
    register(Operator(name="experts_2", annotation="n h, e f h, e h f -> n h", kind="grouped_gemm", recompute=own,
                      saved=saved))  # fmt: skip
    config = tiny_config(hidden_size=256, num_shared_experts=4)
    shared = ("shared_gate_up", "shared_swiglu", "shared_down")
    plain = build_workload(config, without=shared)
    overlapped = build_workload(config, extra={"moe": ("own_shared",)}, without=shared)
    (moe,) = (kind for kind in build_workload(config, extra={"moe": ("experts_2",)}).layers if kind.name == "moe")
    assert moe.is_routed and moe.dropped(("experts_2",)) == {"own_hidden"}
    assert moe.dropped(("experts",)) == {"expert_pre_activation"} and not moe.dropped(("router",))
    request = PlanRequest(
        runtime_gpus=2, tokens_per_step=4096, sequence_length=128, pins={"ep": "2", "dense_sharding": "fsdp"}
    )
    hidden = [
        compile_plan(config, load_cluster("h100-sxm"), request, workload=workload).best.time.hidden
        for workload in (plain, overlapped)
    ]
    assert hidden[0].get("communication ep", 0.0) == 0.0 < hidden[1]["communication ep"]


@pytest.mark.parametrize(
    ("annotation", "flops"),
    [
        ("n h, i h, h i -> n h", 2 * 2 * 10 * 4 * 7),  # up and down
        ("n h, i h, i h, h i -> n h", 3 * 2 * 10 * 4 * 7),  # gated
        ("n h, i h, f i, h f -> n h", 2 * 10 * (4 * 7 + 7 * 3 + 3 * 4)),
        ("n a q, f q, v f -> n a v", 2 * 10 * 2 * (3 * 3 + 3 * 2)),  # the same product for each head
        ("n a q, f q, h a f -> n h", 2 * 10 * 2 * (3 * 3 + 3 * 4)),
        ("n h, a q h, v q -> n a v", 2 * 10 * 2 * (3 * 4 + 3 * 2)),
        ("n h, e i h, e h i -> n h", 2 * 2 * 10 * 2 * 4 * 7),  # 2 experts per token
    ],
)
def test_products_with_several_weights_count_every_weight(annotation: str, flops: float) -> None:
    dims = DIMS | {"i": 7, "e": 5}
    assert forward_flops(Operator(name="chain", annotation=annotation, kind="dense_gemm"), dims) == flops


def test_experts_are_known_by_their_annotation_and_a_router_is_none(own_operator: Operator) -> None:
    own = operators.register(dataclasses.replace(operators.operator("experts"), name="own_mixture"))
    assert is_routed(own) and not is_routed(operators.operator("router")) and not is_routed(own_operator)
    config = tiny_config()
    plain = build_workload(config)
    replaced = build_workload(config, extra={"moe": ("own_mixture",)}, without=("experts",))
    assert [replaced.layer_parameters(kind) for kind in replaced.layers] == [
        plain.layer_parameters(kind) for kind in plain.layers
    ]
    # Recomputing is by operator: without one called so, 'experts' is no choice.
    request = PlanRequest(runtime_gpus=1, tokens_per_step=4096, sequence_length=128)
    search = Search(config, load_cluster("h100-sxm"), request, replaced)
    choices = {
        recompute_name(layers[-1]) for mesh in meshes(search.problem) for layers in search.layer_plans(mesh, "fsdp")
    }
    assert choices == {"none", "block"}


def test_context_parallelism_runs_beside_attention_of_any_name(own_operator: Operator) -> None:
    operators.register(dataclasses.replace(operators.operator("attention"), name="own_mixer"))
    config = tiny_config()
    request = PlanRequest(
        runtime_gpus=2, tokens_per_step=4096, sequence_length=128, allow_unsupported=True, pins={"cp": "2"}
    )
    plain, replaced = (
        Search(config, load_cluster("h100-sxm"), request, workload).run().best
        for workload in (
            build_workload(config),
            build_workload(config, extra={"dense": ("own_mixer",), "moe": ("own_mixer",)}, without=("attention",)),
        )
    )
    assert plain is not None and replaced is not None
    assert replaced.time.hidden["communication cp"] == plain.time.hidden["communication cp"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotation": "n h, z h -> n z"}, "operator 'odd': dim 'z' is not known to the workload; known are a, b, c"),
        ({"saved": (Saved(name="odd", dims="n y"),)}, "operator 'odd': dim 'y' is not known"),
        ({"flops": lambda dims: dims["m"]}, "operator 'odd': dim 'm' is not known"),
    ],
)
def test_a_dim_that_the_workload_lacks_is_refused(own_operator: Operator, changes: dict, message: str) -> None:
    operators.register(dataclasses.replace(own_operator, name="odd", **changes))
    with pytest.raises(ConfigError, match=message):
        build_workload(tiny_config(), extra={"moe": ("odd",)})


def test_kinds_layer_kinds_and_operators_that_are_not_known_are_refused(own_operator: Operator) -> None:
    with pytest.raises(ConfigError, match=r"operator 'odd': kind \('conv'\) must be one of dense_gemm, grouped_gemm"):
        operators.register(dataclasses.replace(own_operator, name="odd", kind="conv"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="extra: 'moee' is no layer kind; known are dense, moe, outside.*mean 'moe'"):
        build_workload(tiny_config(), extra={"moee": ("adapter",)})
    with pytest.raises(ConfigError, match="without: 'expert' is no operator of this model.*mean 'experts'"):
        build_workload(tiny_config(), without=("expert",))


def test_every_shipped_annotation_names_known_dims() -> None:
    shipped = {}
    presets = (read_model_config(name) for name in PRESETS)
    for config in (tiny_config(), tiny_config(q_lora_rank=8), *presets):
        workload = build_workload(config)
        for kind in (*workload.layers, workload.outside):
            shipped |= {op.name: (op, workload.dims(64, 32)) for op in kind.operators}
    assert shipped.keys() == operators._REGISTRY.keys()
    for registered, dims in shipped.values():
        for tensor in (*registered.parsed.inputs, *registered.parsed.outputs):
            assert tensor.size(dims) > 0, registered.name
        for saved in registered.saved:
            assert Tensor.parse(saved.dims).size(dims) > 0, registered.name
