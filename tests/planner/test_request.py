from __future__ import annotations

import dataclasses

import pytest

from moescale.errors import ConfigError
from moescale.lora import parse_lora
from moescale.planner.cluster import load_cluster
from moescale.planner.request import PlanRequest, format_choices, layer_plan, recompute_name
from moescale.planner.search import compile_plan
from tiny import tiny_config

REQUEST = PlanRequest(runtime_gpus=4, tokens_per_step=4096, sequence_length=256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime_gpus": 0}, r"compile.runtime_gpus \(0\) must be at least 1"),
        ({"plan_gpus": 0}, r"compile.plan_gpus \(0\) must be at least 1, or auto"),
        ({"plan_gpus": 3}, r"compile.runtime_gpus \(4\) must be a multiple of compile.plan_gpus \(3\)"),
        (
            {"sequence_length": 512},
            r"compile.sequence_length \(512\) must not exceed model.max_sequence_length \(256\)",
        ),
        ({"tokens_per_step": 1000}, r"compile.tokens_per_step \(1000\) must be a multiple of .*\(256\)"),
        ({"tokens_per_step": 256}, r"compile.tokens_per_step \(256\) is 1 sequences, which must be divisible"),
        ({"memory_limit_bytes": -5}, r"compile.memory_limit \(-5 bytes\) must be positive"),
        ({"router_imbalance": 0.5}, r"compile.router_imbalance \(0.5\) must be a number of at least 1"),
        ({"router_imbalance": float("nan")}, r"compile.router_imbalance \(nan\) must be a number of at least 1"),
        ({"router_imbalance": float("inf")}, r"compile.router_imbalance \(inf\) must be a number of at least 1"),
        ({"pins": {"epp": "2"}}, "'epp' is not a decision of a plan for this model"),
        ({"forbidden": frozenset({("mesh", "1")})}, "'mesh' is not a decision of a plan"),
        (
            {"pins": {"ep": "3"}},
            r"--pin ep=3: ep must be a divisor of .*runtime_gpus \(4\) and of model.num_experts \(8\): one of 1, 2, 4$",
        ),
        ({"pins": {"ep": "banana"}}, r"--pin ep=banana: ep must be one whole number of at least 1"),
        ({"pins": {"ep": "02"}}, r"--pin ep=02: ep must be one whole number of at least 1"),
        ({"pins": {"dp_shard": "8"}}, r"--pin dp_shard=8: dp_shard must be a divisor .* one of 1, 2, 4$"),
        ({"pins": {"micro_batch_sequences": "3"}}, r"must be a divisor of the 16 sequences .* one of 1, 2, 4, 8, 16$"),
        ({"pins": {"optimizer_state_dtype": "fp8"}}, r"--pin optimizer_state_dtype=fp8: .* one of fp32, bf16, int8$"),
        ({"pins": {"moe_reshard": "yes"}}, r"--pin moe_reshard=yes: moe_reshard must be one of true, false$"),
        (
            {"pins": {"pp": "2"}},
            r"--pin pp=2: this version's runtime has no pp, so pp must be 1; .*--allow-unsupported",
        ),
        (
            {"pins": {"master_weight_format": "bf16_remainder"}, "compute_dtype": "fp32"},
            "must be fp32 where compile.precision is fp32",
        ),
        (
            {"forbidden": frozenset({("ep", "1,2")})},
            r"--forbid ep=1,2: ep must be one whole number .*repeat the option",
        ),
        ({"forbidden": frozenset({("gradient_dtype", "fp8")})}, r"--forbid gradient_dtype=fp8: .* one of fp32, bf16$"),
        (
            {"pins": {"expert_gemms": "fp8"}},
            r"--pin expert_gemms=fp8: expert_gemms must be compute without --precision fp8; add that option",
        ),
        (
            {"pins": {"dense_gemms": "fp8", "dense_sharding": "fsdp"}, "fp8_gemms": True},
            r"--pin dense_gemms=fp8: on several GPUs dense_gemms must .* unless dense_sharding is zero1: .* be zero1$",
        ),
        (
            {"pins": {"expert_gemms": "fp8"}, "fp8_gemms": True, "runtime_gpus": 1},
            r"--pin expert_gemms=fp8: .* compute: model.expert_intermediate_size \(24\) is no multiple of 16; drop",
        ),
        ({"pins": {"dense_gemms": "fp16"}}, r"--pin dense_gemms=fp16: dense_gemms must be one of compute, fp8$"),
        ({"fp8_gemms": True, "compute_dtype": "fp32"}, r"compile.precision \(fp8\) computes .* not fp32; leave one"),
        (
            {"fp8_gemms": True, "lora": parse_lora("rank=4")},
            r"compile.precision \(fp8\) is for weights that are trained, and compile.lora \(rank=4.*base=fp8",
        ),
        ({"pins": {"ep": "2"}, "forbidden": frozenset({("ep", "2")})}, r"no plan satisfies the pins \(ep=2\) and"),
    ],
)
def test_nonsense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_plan(tiny_config(), load_cluster("h100-sxm"), dataclasses.replace(REQUEST, **change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ep", "2"),
        ("dp_replicate", "2"),
        ("micro_batch_sequences", "2"),
        ("moe_recompute", "block"),
        ("moe_recompute", "experts"),
        ("dense_reshard", "false"),
        ("optimizer_state_dtype", "fp32"),
        ("master_weight_format", "stochastic_bf16"),
        ("gradient_dtype", "fp32"),
    ],
)
def test_a_pinned_decision_is_kept_and_a_forbidden_one_avoided(name: str, value: str) -> None:
    cluster, config = load_cluster("h100-sxm"), tiny_config()
    pinned = compile_plan(config, cluster, dataclasses.replace(REQUEST, pins={name: value})).best
    assert pinned is not None and str(pinned.decisions[name]).lower() == value
    forbidden = frozenset({(name, value)})
    free = compile_plan(config, cluster, dataclasses.replace(REQUEST, forbidden=forbidden)).best
    assert free is not None and str(free.decisions[name]).lower() != value


def test_axes_the_runtime_lacks_are_only_offered_where_asked_for() -> None:
    cluster, config = load_cluster("h100-sxm"), tiny_config()
    with pytest.raises(ConfigError, match="pp=2"):
        compile_plan(config, cluster, dataclasses.replace(REQUEST, pins={"pp": "2"}))
    result = compile_plan(config, cluster, dataclasses.replace(REQUEST, pins={"pp": "2"}, allow_unsupported=True))
    assert result.best is not None and not result.best.supported


def test_inexact_weights_are_only_used_where_allowed() -> None:
    assert {choice.master_weight_format for choice in format_choices(REQUEST)} == {"fp32", "bf16_remainder"}
    inexact = dataclasses.replace(REQUEST, exact_weights=False)
    assert "stochastic_bf16" in {choice.master_weight_format for choice in format_choices(inexact)}
    fp32 = dataclasses.replace(REQUEST, compute_dtype="fp32")
    assert {(choice.master_weight_format, choice.gradient_dtype) for choice in format_choices(fp32)} == {
        ("fp32", "fp32")
    }


@pytest.mark.parametrize("name", ["none", "block", "experts", "experts+router"])
def test_recompute_choices_have_one_name(name: str) -> None:
    assert recompute_name(layer_plan("moe", name, True)) == name
