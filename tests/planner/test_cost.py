"""Predicted times against steps that were measured, where the parts of a step can be told apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moescale import operators
from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.lora import parse_lora
from moescale.models.qwen3_moe import operators as qwen3_operators
from moescale.planner.cluster import Link, load_cluster
from moescale.planner.cost import StepTime
from moescale.planner.request import PlanRequest
from moescale.planner.result import Evaluated
from moescale.planner.search import compile_plan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100x2"
QWEN3 = dataclasses.replace(read_model_config("qwen3-30b-a3b"), num_layers=8)
DEEPSEEK = read_model_config("deepseek-coder-v2-lite")


def evaluate(pins: dict[str, str], model: ModelConfig = QWEN3, **changes: float) -> Evaluated:
    """A model on two H100 whose memory excludes nothing."""
    cluster = dataclasses.replace(load_cluster("h100-sxm"), memory_bytes=2**38, **changes)
    request = PlanRequest(
        runtime_gpus=2,
        plan_gpus=2,
        tokens_per_step=131072,
        sequence_length=2048,
        fp8_gemms="fp8" in pins.values(),
        exact_weights="stochastic_bf16" not in pins.values(),
        pins=pins,
    )
    best = compile_plan(model, cluster, request, with_alternatives=False).best
    assert best is not None
    return best


def pins_of(row: dict) -> dict[str, str]:
    recompute = row["moe_recompute"]
    pins = {"ep": str(row["mesh"]["ep"]), "gradient_dtype": "bf16", "optimizer_state_dtype": "int8"}
    pins |= {"moe_recompute": recompute if isinstance(recompute, str) else ",".join(recompute)}
    exact = "stochastic rounding" not in row["case"]
    pins |= {"master_weight_format": "bf16_remainder" if exact else "stochastic_bf16"}
    gemms = row.get("gemms", {"experts": "compute", "dense": "compute"})
    pins |= {"expert_gemms": gemms["experts"], "dense_gemms": gemms["dense"]}
    pins |= {"dense_sharding": row["dense_sharding"]}
    pins |= {"moe_reshard": "false"} if row["dense_sharding"] == "fsdp" else {}
    pins |= {"moe_recompute_layers": str(row["moe_recompute_layers"])} if row.get("moe_recompute_layers") else {}
    return pins | {"micro_batch_sequences": str(row["micro_batch_sequences"])}


RESULT = json.loads((RESULTS / "qwen3.json").read_text())
ROWS = RESULT["rows"]
IN_FP8_AND_BF16 = json.loads((RESULTS / "prediction-fp8.json").read_text())["rows"]


@pytest.fixture
def norm_and_rotation_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention of the runs before the last: heads were normed in one pass and rotated in another."""
    monkeypatch.setattr(operators, "_REGISTRY", dict(operators._REGISTRY))
    norms = {}
    for side in "qk":
        now = operators.operator(f"gqa_{side}_norm_rope")
        heads = "n a" if side == "q" else "n g"
        saved = (*now.saved, operators.Saved(name=f"gqa_{side}_rstd", dims=heads, itemsize=4))
        norm = dataclasses.replace(now, name=f"gqa_{side}_norm", saved=saved, backward_bytes_ratio=2.0)
        norms[now.name] = operators.register(norm).name
    *before, attention = (norms.get(name, name) for name in qwen3_operators._ATTENTION)
    monkeypatch.setattr(qwen3_operators, "_ATTENTION", (*before, "gqa_rope", attention))


@pytest.mark.usefixtures("norm_and_rotation_apart")
@pytest.mark.parametrize("row", [*ROWS, *RESULT["blind"]], ids=lambda row: row["case"])
def test_the_peak_of_layers_with_large_micro_batches_is_as_measured(row: dict) -> None:
    best = evaluate(pins_of(row))
    assert best.memory.allocated == pytest.approx(row["peak_bytes"], rel=0.005)


@pytest.mark.usefixtures("norm_and_rotation_apart")
@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row["case"])  # the first thrashed, short of memory
def test_the_time_of_layers_on_two_gpus_is_as_measured(row: dict) -> None:
    best = evaluate(pins_of(row))
    assert best.time.total == pytest.approx(row["measured_seconds"], rel=0.05)


@pytest.mark.usefixtures("norm_and_rotation_apart")
@pytest.mark.parametrize("row", RESULT["blind"], ids=lambda row: row["case"])
def test_the_time_of_a_plan_that_nothing_was_fitted_to_is_near_what_was_measured(row: dict) -> None:
    assert evaluate(pins_of(row)).time.total == pytest.approx(row["measured_seconds"], rel=0.07)


@pytest.mark.parametrize("row", RESULT["again"], ids=lambda row: row["case"])
def test_the_plan_that_ran_again_is_predicted_near_what_was_measured(row: dict) -> None:
    """In time it is 6.6% fast, as FSDP2 was with the kernels before."""
    best = evaluate(pins_of(row))
    assert best.memory.allocated == pytest.approx(row["peak_bytes"], rel=0.005)
    assert best.time.total == pytest.approx(row["measured_seconds"], rel=0.07)


@pytest.mark.parametrize("row", IN_FP8_AND_BF16, ids=lambda row: row["case"])
def test_plans_in_fp8_and_bf16_on_two_gpus_take_the_time_and_memory_that_were_measured(row: dict) -> None:
    model = dataclasses.replace(DEEPSEEK, num_layers=9) if row["case"].startswith("nine layers") else DEEPSEEK
    best = evaluate(pins_of(row), model)
    assert best.memory.allocated == pytest.approx(row["peak_bytes"], rel=0.01)
    assert best.time.total == pytest.approx(row["measured_seconds"], rel=0.03)


def test_hidden_communication_costs_the_part_that_the_cluster_file_says() -> None:
    pins = pins_of(ROWS[1])
    free, half = evaluate(pins, overlap_cost=0.0).time, evaluate(pins, overlap_cost=0.5).time
    assert free.hidden == half.hidden and sum(free.hidden.values()) > 0.1
    assert half.total - free.total == pytest.approx(0.5 * sum(free.hidden.values()))
    assert half.exposed["slowed by communication"] == pytest.approx(half.total - free.total)


@pytest.mark.parametrize("recompute, passes", [("none", 2), ("block", 3)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_in_fp8_cost_their_bytes_in_every_pass(recompute: str, passes: int, ranks: int) -> None:
    """A byte of code is read and two of bf16 are written for an element, and four of scale read for 16,384."""
    cluster = dataclasses.replace(load_cluster("h100-sxm"), memory_bytes=2**38)

    def time_of(base: str) -> dict[str, float]:
        pins = {"moe_recompute": recompute, "micro_batch_sequences": "4", "ep": str(ranks), "dense_sharding": "zero1"}
        lora = parse_lora(f"rank=16,base={base}")
        request = PlanRequest(
            runtime_gpus=ranks, tokens_per_step=131072, sequence_length=2048, lora=lora, plan_gpus=ranks, pins=pins
        )
        best = compile_plan(QWEN3, cluster, request, with_alternatives=False).best
        assert best is not None and best.candidate.gradient_accumulation_steps == 16 / ranks
        return best.time.exposed

    in_fp8, whole = time_of("fp8"), time_of("compute")
    experts, others = 128 * 3 * 2048 * 768, 2048 * (2 * 4096 + 2 * 512)
    bytes_moved = 8 * (experts / ranks + others) * (1 + 2 + 4 / 128**2)
    once = bytes_moved / cluster.elementwise_bytes_per_second + 8 * 6 * cluster.launch_seconds
    added = sum(in_fp8.values()) - sum(whole.values())
    assert added == pytest.approx(16 / ranks * passes * once, rel=1e-6)
    assert in_fp8["compute weights from fp8"] == pytest.approx(16 / ranks * 2 * once, rel=1e-6)
    assert "compute weights from fp8" not in whole


def test_where_gpus_wait_for_their_host_faster_kernels_leave_as_much_to_hide_replicas_sums_beneath() -> None:
    slow_link = Link(latency_seconds=1e-5, bytes_per_second=5e9)
    cluster = dataclasses.replace(
        load_cluster("h100-sxm"), memory_bytes=2**40, host_layer_seconds=0.5, intra_node=slow_link
    )
    pins = {
        "dense_sharding": "fsdp",
        "dp_shard": "2",
        "ep": "1",
        "micro_batch_sequences": "16",
        "moe_recompute": "none",
    }
    request = PlanRequest(
        runtime_gpus=4,
        plan_gpus=2,
        tokens_per_step=16 * 4 * 2048,
        sequence_length=2048,
        pins=pins,
        compute_dtype="bf16",
    )

    def time_of(factor: float) -> StepTime:
        rates = {
            name: dataclasses.replace(
                getattr(cluster, name),
                flops_per_second=tuple(factor * rate for rate in getattr(cluster, name).flops_per_second),
            )
            for name in ("dense_gemm", "grouped_gemm", "attention")
        }
        found = compile_plan(QWEN3, dataclasses.replace(cluster, **rates), request, with_alternatives=False).best
        assert found is not None and found.candidate.mesh.dp_replicate == 2
        return found.time

    slow, fast = time_of(0.2), time_of(0.4)
    assert slow.exposed["host launches"] > 0 and slow.hidden["communication dp_replicate"] > 0
    assert fast.total <= slow.total * (1 + 1e-12)
