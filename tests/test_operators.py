import dataclasses

import pytest

from moescale import operators
from moescale.errors import ConfigError
from moescale.operators import Annotation, Operator, Saved, Split, Tensor, forward_flops, moved_bytes, splits
from moescale.planner.cluster import load_cluster
from moescale.planner.request import PlanRequest
from moescale.planner.search import Search
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


def test_every_shipped_annotation_names_known_dims() -> None:
    dims = build_workload(tiny_config(q_lora_rank=8)).dims(64, 32)
    for registered in operators._REGISTRY.values():
        for tensor in (*registered.parsed.inputs, *registered.parsed.outputs):
            assert tensor.size(dims) > 0, registered.name
        for saved in registered.saved:
            assert Tensor.parse(saved.dims).size(dims) > 0, registered.name
