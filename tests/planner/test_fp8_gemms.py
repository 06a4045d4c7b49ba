"""Plans whose GEMMs are in fp8: their copies, buffers and times by hand, and what the search makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moescale.convert.hf_config import read_model_config
from moescale.errors import ConfigError
from moescale.models.blocks.moe import GatedMLP, MixtureOfExperts
from moescale.models.blocks.norm import RMSNorm
from moescale.models.fp8_gemms import use_fp8
from moescale.models.transformer import build_on_meta
from moescale.operators import operator
from moescale.plan import LayerPlan, MeshShape, no_experts_in_fp8
from moescale.planner import layer_bytes
from moescale.planner.axes.registry import micro_batch
from moescale.planner.cluster import Rates, load_cluster
from moescale.planner.cost import CostModel
from moescale.planner.explain import alternative_text, explain_html, explain_json, explain_text, notes
from moescale.planner.fit import fit_text, fit_to_gpus
from moescale.planner.memory import MemoryModel
from moescale.planner.problem import Problem
from moescale.planner.request import IN_COMPUTE_DTYPE, Formats, Gemms, PlanRequest
from moescale.planner.result import PlanResult
from moescale.planner.search import compile_plan
from moescale.planner.workload import build_workload
from tests.models.test_frozen_fp8 import FAMILIES
from tiny import tiny_config

LITE = read_model_config("deepseek-coder-v2-lite")
H200 = load_cluster("h200")
REQUEST = PlanRequest(
    runtime_gpus=1, plan_gpus=1, tokens_per_step=131072, sequence_length=2048, fp8_gemms=True, exact_weights=False
)
BOTH = Gemms(expert_gemms="fp8", dense_gemms="fp8")
EXPERTS = Gemms(expert_gemms="fp8")
DENSE = Gemms(dense_gemms="fp8")
COPIES = ("copies", "gate_up_copies", "down_copies")
"""Attributes of modules that multiply in fp8."""
FORMATS = Formats(
    optimizer_state_dtype="int8", master_weight_format="stochastic_bf16", gradient_dtype="bf16", offload_optimizer=False
)


def problem_of(config=LITE, **changes) -> Problem:
    return Problem(build_workload(config), H200, dataclasses.replace(REQUEST, **changes))


def plan(**changes) -> PlanResult:
    return compile_plan(LITE, H200, dataclasses.replace(REQUEST, **changes))


def copies_of(config, gemms: Gemms) -> float:
    return MemoryModel(problem_of(config)).persistent(MeshShape(), FORMATS, gemms=gemms).get("fp8 copies", 0.0)


def test_two_bytes_of_copies_stand_for_every_element_and_a_scale_for_every_expert() -> None:
    experts = 26 * 64 * 3 * 2048 * 1408
    assert copies_of(LITE, EXPERTS) == 2 * experts + 26 * 64 * 2 * 4
    # Query, latents, keys and values (576 and 4,096 rows), output; shared experts; one dense MLP.
    q, kv_down, kv_up, output = 3072 * 2048, 576 * 2048, 4096 * 512, 2048 * 2048
    shared, mlp = 3 * 2048 * 2816, 3 * 2048 * 10944
    elements = 27 * (q + kv_down + kv_up + output) + 26 * shared + mlp
    padding = 27 * 64 * 2048 + 2 * 10944 % 128 * 2048  # 576 rows become 640; those of the MLP are 171 times 128
    weights = 27 * 4 + 26 * 2 + 2
    assert copies_of(LITE, DENSE) == 2 * elements + padding + 4 * weights
    assert copies_of(LITE, BOTH) == copies_of(LITE, EXPERTS) + copies_of(LITE, DENSE)
    assert copies_of(LITE, IN_COMPUTE_DTYPE) == 0


def test_rows_of_the_transposed_copy_are_padded_for_every_expert() -> None:
    config = tiny_config(expert_intermediate_size=48)  # gate and up have 96 rows, down 32; both become 128
    gate_up, down = 8 * 32 * (96 + 128), 8 * 48 * (32 + 128)
    assert copies_of(config, EXPERTS) == 2 * (gate_up + down + 2 * 8 * 4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_copies_have_the_bytes_of_those_of_the_real_model(family: str) -> None:
    config = dataclasses.replace(FAMILIES[family], dense_intermediate_size=72)
    experts = no_experts_in_fp8(config) is None
    with torch.device("meta"):
        model = build_on_meta(config, torch.bfloat16)
        use_fp8(model, experts=experts, dense=True)
    copies = [getattr(module, name, None) for module in model.modules() for name in COPIES]
    found = sum(tensor.nbytes for pair in copies if pair is not None for tensor in pair)
    assert copies_of(config, BOTH if experts else DENSE) == found > 0


@pytest.mark.parametrize("gemms", [BOTH, EXPERTS, DENSE], ids=["both", "experts", "dense"])
@pytest.mark.parametrize("changes", [{}, {"expert_intermediate_size": 24, "dense_intermediate_size": 72}])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_and_activations_are_priced_as_quantising_where_the_real_model_has_them_quantise(
    family: str, changes: dict[str, int], gemms: Gemms
) -> None:
    config = dataclasses.replace(FAMILIES[family], **changes)
    if no_experts_in_fp8(config) is not None:
        gemms = dataclasses.replace(gemms, expert_gemms="compute")
    with torch.device("meta"):
        model = build_on_meta(config, torch.bfloat16)
        use_fp8(model, experts=gemms.expert_gemms == "fp8", dense=gemms.dense_gemms == "fp8")
    problem = problem_of(config)
    kinds = {kind.is_routed: kind for kind in problem.workload.layers}
    for block in model.layers:
        kind = kinds[isinstance(block.feed_forward, MixtureOfExperts)]
        norms = {op.norm for op in kind.operators if problem.fp8_weights(op, gemms)} - {None}
        named = block.named_modules()
        assert norms == {
            name.split(".")[-1] for name, module in named if isinstance(module, RMSNorm) and module.quantizes
        }
        activations = [problem.quantises(op, gemms) for op in kind.operators if op.between is not None]
        mlps = [module for module in block.modules() if isinstance(module, GatedMLP)]
        assert activations == [mlp.gate_up.copies is not None and mlp.down.copies is not None for mlp in mlps]


def test_weights_whose_dims_are_no_multiples_of_16_stay_as_they_are() -> None:
    config = tiny_config(expert_intermediate_size=24, num_shared_experts=0, dense_intermediate_size=72)
    assert copies_of(config, EXPERTS) == 0
    attention = [(2 * 24, 32), (2 * 32, 16), (32, 2 * 16)]  # kv_down has 24 rows, and the MLP's down 72 columns
    of_attention = 3 * sum((rows + 128) * columns + 4 for rows, columns in attention)
    assert copies_of(config, DENSE) == of_attention + (144 + 256) * 32 + 4


@pytest.mark.parametrize("recompute, again", [("none", 0), (("experts",), 2 * 1408 * 2), ("block", 0)])
def test_the_backward_of_experts_has_a_byte_for_what_is_in_e4m3(recompute, again: int) -> None:
    batch = micro_batch(problem_of(), MeshShape(), 4, "fsdp", "bf16", EXPERTS)
    tokens, rows, padded = 8192, 8192 * 6, 8192 * 6 + 64 * 128
    hidden, width = 2048, 1408
    stays = rows * (2 * width + width) + 2 * tokens * hidden  # of the pre-activation, activation; both of tokens
    transposed = padded * (width + hidden + 2 * width)
    assert transposed > rows * 2 * hidden
    found = layer_bytes.expert_buffers(batch, LayerPlan(kind="moe", recompute=recompute))
    assert found == stays + transposed + again * rows
    bf16 = micro_batch(problem_of(), MeshShape(), 4, "fsdp", "bf16")
    assert layer_bytes.expert_buffers(bf16, LayerPlan(kind="moe", recompute=recompute)) - again * rows == (
        rows * (2 * hidden + 3 * width) * 2
    )


FLAT = dataclasses.replace(
    H200,
    dense_gemm=Rates(sizes=(1.0,), flops_per_second=(500e12,)),
    fp8_dense_gemm=Rates(sizes=(1.0,), flops_per_second=(1000e12,)),
    fp8_grouped_gemm=Rates(sizes=(384.0, 768.0), flops_per_second=(700e12, 800e12)),
    sustained_clock=1.0,
    elementwise_bytes_per_second=3e12,
    launch_seconds=1e-6,
)


def test_experts_in_fp8_take_their_flops_at_the_rate_for_their_rows() -> None:
    problem = Problem(build_workload(LITE), FLAT, REQUEST)
    for sequences, rate in ((2, 700e12), (4, 800e12)):
        dims = problem.dims(sequences)
        forward, backward = CostModel(problem).operator_seconds(operator("experts"), dims, gemms=EXPERTS)
        flops = 6 * 2048 * sequences * 6 * 2048 * 1408
        assert forward == pytest.approx(flops / rate + 5e-6, rel=1e-12)
        assert backward == pytest.approx(2 * flops / rate + 8e-6, rel=1e-12)


def test_a_linear_layer_in_fp8_has_two_fast_gemms_a_plain_one_and_two_passes_that_quantize() -> None:
    problem = Problem(build_workload(LITE), FLAT, REQUEST)
    forward, backward = CostModel(problem).operator_seconds(operator("attention_output"), problem.dims(4), gemms=DENSE)
    flops = 2 * 8192 * 2048 * 2048
    assert forward == pytest.approx(flops / 1000e12 + 8192 * 2048 * 3 / 3e12 + 2e-6, rel=1e-12)
    assert backward == pytest.approx(flops / 1000e12 + flops / 500e12 + 8192 * 2048 * 3 / 3e12 + 3e-6, rel=1e-12)


def test_what_a_norm_returns_is_written_in_fp8_once_and_read_so() -> None:
    problem = Problem(build_workload(LITE), FLAT, REQUEST)
    cost, dims = CostModel(problem), problem.dims(4)
    forward, backward = cost.operator_seconds(operator("q_proj"), dims, gemms=DENSE)
    flops = 2 * 8192 * 2048 * 3072
    assert forward == pytest.approx(flops / 1000e12 + 1e-6, rel=1e-12)
    assert backward == pytest.approx(flops / 1000e12 + flops / 500e12 + 8192 * 3072 * 3 / 3e12 + 3e-6, rel=1e-12)
    written = {"attention_norm": 2048, "kv_norm": 512, "feed_forward_norm": 2048}
    for kind, gemms, norms in (
        ("moe", DENSE, written.keys()),
        ("moe", EXPERTS, {"feed_forward_norm"}),
        ("dense", DENSE, written.keys()),
        ("dense", EXPERTS, set()),
    ):
        (layer,) = (layer for layer in problem.workload.layers if layer.name == kind)
        whole = cost.layer_seconds(layer, dims, 1, 1, gemms)
        for op, seconds in zip(layer.operators, whole, strict=True):
            alone = cost.operator_seconds(op, dims, gemms=gemms)
            more = 8192 * written[op.name] / 3e12 if op.name in norms else 0.0
            assert seconds == (pytest.approx(alone[0] + more, rel=1e-12), alone[1]), op.name


def test_an_activation_quantises_for_what_is_in_front_of_and_behind_it() -> None:
    problem = Problem(build_workload(LITE), FLAT, REQUEST)
    cost, dims = CostModel(problem), problem.dims(4)
    for name, width in (("dense", 10944), ("shared", 2816)):
        gate_up, swiglu, down = (operator(f"{name}_{part}") for part in ("gate_up", "swiglu", "down"))
        flops, element = 2 * 8192 * 2048 * width, 8192 * width / 3e12
        # Gate and up read, in bf16, and the result written in e4m3; of the backward their gradient read as well, and
        # written in both, and the result in bf16.
        forward, backward = cost.operator_seconds(swiglu, dims, gemms=DENSE)
        assert forward == pytest.approx((4 + 1) * element + 1e-6, rel=1e-12)
        assert backward == pytest.approx((2 + 4 + 2 + 4 + 2) * element + 1e-6, rel=1e-12)
        forward, backward = cost.operator_seconds(down, dims, gemms=DENSE)
        assert forward == pytest.approx(flops / 1000e12 + 1e-6, rel=1e-12)
        of_gradient = 8192 * 2048 * 3 / 3e12
        assert backward == pytest.approx(flops / 1000e12 + flops / 500e12 + of_gradient + 3e-6, rel=1e-12)
        forward, backward = cost.operator_seconds(gate_up, dims, gemms=DENSE)
        assert forward == pytest.approx(2 * flops / 1000e12 + 1e-6, rel=1e-12)
        assert backward == pytest.approx(2 * flops / 1000e12 + 2 * flops / 500e12 + 2e-6, rel=1e-12)
        plain = cost.operator_seconds(swiglu, dims)
        assert plain == pytest.approx((6 * element + 1e-6, 12 * element + 1e-6), rel=1e-12)
        assert cost.operator_seconds(swiglu, dims, gemms=EXPERTS) == plain


def test_an_activation_in_front_of_what_is_not_in_fp8_does_not_quantise() -> None:
    problem = Problem(build_workload(dataclasses.replace(LITE, dense_intermediate_size=10952)), FLAT, REQUEST)
    assert problem.fp8_weights(operator("dense_gate_up"), DENSE) and not problem.fp8_weights(
        operator("dense_down"), DENSE
    )
    cost, dims, swiglu = CostModel(problem), problem.dims(4), operator("dense_swiglu")
    assert cost.operator_seconds(swiglu, dims, gemms=DENSE) == cost.operator_seconds(swiglu, dims)
    dense, moe = problem.workload.layers
    assert problem.made_again(dense, DENSE) == set() and problem.made_again(moe, DENSE) == {"shared_activation"}
    assert problem.made_again(moe, EXPERTS) == set()
    flops = 2 * 8192 * 2048 * 2 * 10952
    _, backward = cost.operator_seconds(operator("dense_gate_up"), dims, gemms=DENSE)
    of_gradient = 8192 * 2 * 10952 * 3 / 3e12
    assert backward == pytest.approx(flops / 1000e12 + flops / 500e12 + of_gradient + 3e-6, rel=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_operators_that_read_a_norm_are_those_of_the_real_model(family: str) -> None:
    with torch.device("meta"):
        model = build_on_meta(FAMILIES[family], torch.bfloat16)
    for kind in build_workload(FAMILIES[family]).layers:
        block, found = model.layers[kind.indices[0]], {}
        names = {module: name for name, module in block.named_modules()}
        for norm, module in ((block.attention_norm, block.attention), (block.feed_forward_norm, block.feed_forward)):
            for inner, layer in module.norm_readers():
                found[names[layer]] = names[norm if inner is None else inner].split(".")[-1]
        assert found == {spot.module: op.norm for op in kind.operators if op.norm is not None for spot in op.adaptable}


def test_rows_are_gathered_in_a_byte_an_element() -> None:
    problem = Problem(build_workload(LITE), FLAT, REQUEST)
    cost, dims, gather = CostModel(problem), problem.dims(4), operator("expert_gather_combine")
    row = 8192 * 2048 / 3e12
    # Forward: a token read, six rows written, six read, one written; backward: the same, and six more in bf16.
    assert cost.operator_seconds(gather, dims)[0] == pytest.approx((2 + 12 + 12 + 2) * row + 1e-6, rel=1e-12)
    forward, backward = cost.operator_seconds(gather, dims, gemms=EXPERTS)
    assert forward == pytest.approx(3 / 4 * 28 * row + 1e-6, rel=1e-12)
    assert backward == pytest.approx(1 / 2 * 1.5 * 28 * row + 1e-6, rel=1e-12)


@pytest.mark.parametrize("name", ["router", "linear_cross_entropy", "attention", "attention_norm", "experts"])
def test_other_operators_take_their_time_in_the_compute_dtype(name: str) -> None:
    problem = problem_of()
    cost, dims = CostModel(problem), problem.dims(4)
    assert cost.operator_seconds(operator(name), dims, gemms=DENSE) == cost.operator_seconds(operator(name), dims)


def test_copies_are_written_once_a_step() -> None:
    pins = {"micro_batch_sequences": "4", "expert_gemms": "fp8", "dense_gemms": "compute"}
    in_fp8, whole = plan(pins=pins).best, plan(pins=pins | {"expert_gemms": "compute"}).best
    assert in_fp8 is not None and whole is not None
    experts = 26 * 64 * 3 * 2048 * 1408
    moved = 2 * 2 * experts + 2 * experts + 26 * 64 * 2 * 4
    assert in_fp8.time.exposed["fp8 copies"] == pytest.approx(moved / 3.3e12 + 26 * 2 * 2 * 1.8e-6, rel=1e-12)
    assert "fp8 copies" not in whole.time.exposed and "fp8 copies" not in whole.memory.breakdown


def test_the_16b_model_multiplies_in_fp8_on_one_h200_with_stochastic_rounding_alone() -> None:
    result = plan()
    found = result.plan()
    assert (found.expert_gemms, found.dense_gemms) == ("fp8", "fp8") and found.compute_dtype == "bf16"
    assert found.master_weight_format == "stochastic_bf16"
    assert found.prediction is not None
    assert found.prediction.breakdown_bytes["fp8 copies"] == copies_of(LITE, BOTH)
    texts = [alternative_text(result, other) for other in result.alternatives]
    (master,) = [text for text in texts if text.startswith("master_weight_format bf16_remainder")]
    assert "does not fit: exceeds GPU memory by" in master
    for name in ("expert_gemms", "dense_gemms"):
        (other,) = [text for text in texts if text.startswith(f"{name} compute instead of fp8: +")]
        assert "does not fit" not in other
    assert "fp8 copies" in explain_text(result)
    exact = plan(exact_weights=True).plan()
    assert exact.expert_gemms == "compute", "their copies do not fit next to exact master weights"


def test_without_the_option_nothing_is_in_fp8_and_no_alternative_is() -> None:
    result = plan(fp8_gemms=False)
    found = result.plan()
    assert (found.expert_gemms, found.dense_gemms) == ("compute", "compute")
    assert not {"expert_gemms", "dense_gemms"} & {other["decision"] for other in found.alternatives}
    without_rates = dataclasses.replace(H200, fp8_dense_gemm=None, fp8_grouped_gemm=None)
    request = dataclasses.replace(REQUEST, fp8_gemms=False)
    assert compile_plan(LITE, without_rates, request).plan() == found


@pytest.mark.parametrize("pins", [{"expert_gemms": "compute"}, {"dense_gemms": "compute"}])
def test_a_pin_decides_and_is_named_where_it_excludes(pins: dict[str, str]) -> None:
    result = plan(pins=pins)
    ((name, value),) = pins.items()
    assert getattr(result.plan(), name) == value
    other = next(other for other in result.plan().alternatives if other["decision"] == name)
    assert other["value"] == "fp8" and other["excluded_by"] == [f"--pin {name}=compute"]


def test_a_forbidden_value_is_not_planned() -> None:
    assert plan(forbidden=frozenset({("expert_gemms", "fp8")})).plan().expert_gemms == "compute"


@pytest.mark.parametrize(
    "name, pins",
    [
        ("fp8_grouped_gemm", {}),
        ("fp8_dense_gemm", {}),
        ("dense_gemm", {"dense_gemms": "fp8"}),
        ("grouped_gemm", {}),
        ("elementwise_bytes_per_second", {"expert_gemms": "fp8", "dense_gemms": "fp8"}),
        ("memory_bytes_per_second", {"expert_gemms": "fp8"}),
    ],
)
def test_faster_kernels_never_give_a_slower_plan(name: str, pins: dict[str, str]) -> None:
    before: float | None = None
    for factor in (0.5, 0.8, 1.0, 1.04):
        value = getattr(H200, name)
        if isinstance(value, Rates):
            faster = dataclasses.replace(value, flops_per_second=tuple(factor * r for r in value.flops_per_second))
        else:
            faster = factor * value
        request = dataclasses.replace(REQUEST, pins=pins)
        best = compile_plan(LITE, dataclasses.replace(H200, **{name: faster}), request, with_alternatives=False).best
        assert best is not None
        assert before is None or best.time.total <= before * (1 + 1e-12)
        before = best.time.total


@pytest.mark.parametrize("name", ["a100-80", "b200"])
def test_a_gpu_without_rates_of_fp8_is_refused_with_what_to_do(name: str) -> None:
    message = (
        rf"compile.precision \(fp8\) needs .* cluster '{name}' .* no \[fp8_dense_gemm\] and no \[fp8_grouped_gemm\]"
    )
    with pytest.raises(ConfigError, match=message + ".*; give a cluster with fp8 such as h200, .* --precision bf16"):
        compile_plan(LITE, load_cluster(name), REQUEST)


def test_on_several_gpus_weights_are_whole_and_it_is_said_that_nobody_has_measured_so_many() -> None:
    request = dataclasses.replace(REQUEST, runtime_gpus=8, plan_gpus=None)
    result = compile_plan(LITE, H200, request, with_alternatives=False)
    found = result.plan()
    assert (found.expert_gemms, found.dense_gemms, found.dense_sharding) == ("fp8", "fp8", "zero1")
    assert "on more, their speed and memory are predicted alone" in notes(result)[0]
    slower = compile_plan(LITE, H200, dataclasses.replace(request, fp8_gemms=False), with_alternatives=False)
    assert slower.best is not None and result.best is not None and result.best.time.total < slower.best.time.total


def test_a_plan_that_shards_its_weights_computes_in_bf16_and_says_why() -> None:
    request = dataclasses.replace(REQUEST, runtime_gpus=8, plan_gpus=None, pins={"dense_sharding": "fsdp"})
    result = compile_plan(LITE, H200, request)
    assert result.plan().expert_gemms == result.plan().dense_gemms == "compute"
    assert not {"expert_gemms", "dense_gemms"} & {other["decision"] for other in result.plan().alternatives}
    assert "this plan's, whose dense_sharding is fsdp, are in bf16" in explain_text(result)
    unwanted = request.pins | {"expert_gemms": "compute", "dense_gemms": "compute"}
    assert notes(compile_plan(LITE, H200, dataclasses.replace(request, pins=unwanted), with_alternatives=False)) == []
    pinned = dataclasses.replace(request, pins={"dense_sharding": "fsdp", "expert_gemms": "fp8"})
    with pytest.raises(ConfigError, match=r"expert_gemms=fp8: on several GPUs .* unless dense_sharding is zero1"):
        compile_plan(LITE, H200, pinned)


def test_experts_whose_rows_peers_cannot_read_are_planned_in_bf16() -> None:
    request = dataclasses.replace(
        REQUEST, runtime_gpus=16, plan_gpus=None, pins={"ep": "16", "dense_sharding": "zero1"}
    )
    result = compile_plan(LITE, H200, request, with_alternatives=False)
    assert (result.plan().expert_gemms, result.plan().dense_gemms) == ("compute", "fp8")
    assert notes(result)[1] == (
        "Experts are planned in fp8 where their ranks are in one node (ep 8 at most): "
        "this plan's, with ep 16, are in bf16."
    )


def test_a_rank_has_copies_of_its_own_experts() -> None:
    memory, cost = MemoryModel(problem_of(runtime_gpus=8)), CostModel(problem_of(runtime_gpus=8))
    mesh = MeshShape(dp_shard=8, ep=8)
    for model, whole in ((EXPERTS, 1 / 8), (DENSE, 1)):
        found = memory.persistent(mesh, FORMATS, "zero1", model)["fp8 copies"]
        assert found == copies_of(LITE, model) * whole
    assert cost._copy_seconds(mesh, EXPERTS) < cost._copy_seconds(MeshShape(), EXPERTS) / 4
    assert cost._copy_seconds(mesh, DENSE) == cost._copy_seconds(MeshShape(), DENSE)
    # In as many launches, two for each weight of its 26 layers of experts.
    shares = cost._copy_seconds(mesh, EXPERTS) - cost._copy_seconds(MeshShape(), EXPERTS) / 8
    assert shares == pytest.approx(26 * 2 * 2 * cost.cluster.launch_seconds * 7 / 8)


def test_where_copies_do_not_fit_beside_exact_masters_it_is_said_what_would_help() -> None:
    exact = dataclasses.replace(REQUEST, exact_weights=True)
    result = compile_plan(LITE, H200, exact, with_alternatives=False)
    assert result.best is not None and result.plan().expert_gemms == "compute"
    (note,) = notes(result)
    other = compile_plan(LITE, H200, dataclasses.replace(exact, exact_weights=False), with_alternatives=False).best
    assert other is not None and other.time.total < 0.9 * result.best.time.total
    assert note.endswith(f"With --allow-stochastic-rounding they do: {other.time.total:.3f} s a step.")
    assert note in explain_text(result) and explain_json(result)["notes"] == [note]
    assert note.split(".")[0].replace("'", "&#39;") in explain_html(result)
    for request in (REQUEST, dataclasses.replace(exact, pins={"expert_gemms": "compute"})):
        silent = compile_plan(LITE, H200, request, with_alternatives=False)
        assert notes(silent) == [] and "notes" not in explain_json(silent)


def test_fit_says_what_is_in_fp8() -> None:
    request = dataclasses.replace(REQUEST, plan_gpus=None)
    result = fit_to_gpus(LITE, H200, request, largest=2)
    decisions = [point.best.decisions for point in result.points if point.best is not None]
    assert [each["expert_gemms"] for each in decisions] == ["fp8", "fp8"]
    for line in fit_text(result).splitlines()[1:3]:
        assert line.rstrip().endswith("GEMMs in fp8: experts and dense")


@pytest.mark.parametrize("model", ["gpt-oss-20b", "tiny"])
def test_experts_that_cannot_multiply_in_fp8_do_not_and_linear_layers_do(model: str) -> None:
    config = tiny_config(num_experts=None) if model == "tiny" else read_model_config(model)
    request = dataclasses.replace(REQUEST, sequence_length=256, pins={"dense_gemms": "fp8"})
    result = compile_plan(config, dataclasses.replace(H200, memory_bytes=2**40), request, with_alternatives=False)
    assert (result.plan().expert_gemms, result.plan().dense_gemms) == ("compute", "fp8")
    with pytest.raises(ConfigError, match=r"expert_gemms must be compute: (the model has no|this version has no) "):
        compile_plan(config, H200, dataclasses.replace(request, pins={"expert_gemms": "fp8"}))
