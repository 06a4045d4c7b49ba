from __future__ import annotations

import dataclasses

import pytest

from moescale.convert.hf_config import read_model_config
from moescale.lora import parse_lora
from moescale.planner.cluster import load_cluster
from moescale.planner.fit import fit_json, fit_text, fit_to_gpus
from moescale.planner.remedies import find_remedies
from moescale.planner.request import PlanRequest
from moescale.planner.search import compile_plan
from tiny import tiny_config

CONFIG = tiny_config(vocab_size=4096, hidden_size=256)
REQUEST = PlanRequest(runtime_gpus=4, plan_gpus=1, tokens_per_step=1024, sequence_length=256)


def cluster_with(memory_bytes: float):
    """An H100 without what several GPUs take and leave free whatever they train: the model is far smaller."""
    fixed = dict.fromkeys(("context_bytes", "nccl_bytes", "margin_bytes"), 0)
    return dataclasses.replace(load_cluster("h100-sxm"), memory_bytes=round(memory_bytes), **fixed)


def peak_with(**changes) -> float:
    """The smallest peak of all plans of a changed request."""
    result = compile_plan(CONFIG, cluster_with(1), dataclasses.replace(REQUEST, **changes))
    return result.near_misses[0].memory.total


def test_a_remedy_is_offered_exactly_where_its_plan_fits() -> None:
    one_copy_per_gpu, one_copy_on_two = peak_with(), peak_with(plan_gpus=2)
    assert one_copy_on_two < one_copy_per_gpu
    memory = (one_copy_on_two + one_copy_per_gpu) / 2
    result = compile_plan(CONFIG, cluster_with(memory), REQUEST)
    assert result.best is None
    remedies = {remedy.change: remedy for remedy in find_remedies(result)}
    larger_unit = remedies["--plan-gpus 2: fewer whole copies of the weights"]
    assert larger_unit.peak_bytes <= memory
    applied = compile_plan(CONFIG, cluster_with(memory), dataclasses.replace(REQUEST, plan_gpus=2))
    assert applied.best is not None and applied.best.time.total == larger_unit.step_seconds


@pytest.mark.slow
def test_pins_prohibitions_and_limits_are_dropped_before_gpus_are_added() -> None:
    pins = {"optimizer_state_dtype": "fp32"}
    forbidden = frozenset({("master_weight_format", "bf16_remainder")})
    request = dataclasses.replace(REQUEST, pins=pins, forbidden=forbidden, memory_limit_bytes=100)
    result = compile_plan(CONFIG, cluster_with(peak_with() * 1.01), request)
    assert result.best is None
    assert [remedy.change for remedy in find_remedies(result)] == []  # each alone is not enough
    only_limited = dataclasses.replace(REQUEST, memory_limit_bytes=100)
    found = find_remedies(compile_plan(CONFIG, cluster_with(80e9), only_limited))
    assert [remedy.change for remedy in found] == [
        "raise --memory-limit to 74.5 GiB, what a plan may take of a NVIDIA H100 80GB HBM3"
    ]
    in_memory = frozenset({("offload_optimizer", "true")})
    only_pinned = dataclasses.replace(REQUEST, pins=pins, plan_gpus=4, forbidden=in_memory)
    limit = sum(peak_with(plan_gpus=4, forbidden=in_memory, **more) for more in ({}, {"pins": pins})) / 2
    found = find_remedies(compile_plan(CONFIG, cluster_with(limit), only_pinned))
    assert found[0].change == "drop --pin optimizer_state_dtype=fp32"


def test_frozen_weights_in_fp8_are_offered_where_they_fit() -> None:
    lora = parse_lora("rank=4,alpha=8")
    in_fp8 = dataclasses.replace(lora, base="fp8")
    whole, coded = (peak_with(runtime_gpus=1, plan_gpus=1, lora=settings) for settings in (lora, in_fp8))
    cluster = cluster_with((whole + coded) / 2)
    request = dataclasses.replace(REQUEST, runtime_gpus=1, lora=lora)
    remedies = {remedy.change: remedy for remedy in find_remedies(compile_plan(CONFIG, cluster, request))}
    change = "--lora rank=4,alpha=8,targets=all,base=fp8: frozen weights in fp8"
    applied = compile_plan(CONFIG, cluster, dataclasses.replace(request, lora=in_fp8))
    assert applied.best is not None and applied.best.time.total == remedies[change].step_seconds


def test_adapters_of_the_16b_model_fit_on_one_gpu_of_24_gib_in_fp8_alone() -> None:
    config, pins = read_model_config("deepseek-coder-v2-lite"), {"moe_recompute": "block", "micro_batch_sequences": "1"}
    request = PlanRequest(
        runtime_gpus=1, tokens_per_step=65536, sequence_length=4096, memory_limit_bytes=24 * 2**30, pins=pins
    )

    def fewest_gpus(base: str) -> int:
        lora = parse_lora(f"rank=16,targets=attention+shared+experts,base={base}")
        smallest = fit_to_gpus(config, load_cluster("h100-sxm"), dataclasses.replace(request, lora=lora), 2).smallest
        assert smallest is not None
        return smallest.gpus

    assert (fewest_gpus("compute"), fewest_gpus("fp8")) == (2, 1)


def test_the_smallest_number_of_gpus_is_one_that_fits_where_fewer_do_not() -> None:
    cluster = cluster_with(peak_with(plan_gpus=None, runtime_gpus=3, tokens_per_step=768) * 1.0001)
    result = fit_to_gpus(CONFIG, cluster, REQUEST, largest=16)
    assert result.smallest is not None and result.smallest.gpus == 3
    assert [point.best is not None for point in result.points] == [False, False, True, True, True]
    document = fit_json(result)
    assert document["smallest_gpus"] == 3
    assert [point["gpus"] for point in document["points"]] == [1, 2, 4, 8, 16]
    assert document["points"][4]["tokens_per_step"] == 16 * 256  # one sequence for every GPU
    assert "fits on 3 GPUs" in fit_text(result) and "does not fit" in fit_text(result)


def test_where_not_even_the_largest_number_fits_that_is_said() -> None:
    result = fit_to_gpus(CONFIG, cluster_with(1000), REQUEST, largest=4)
    assert result.smallest is None
    assert fit_json(result)["smallest_gpus"] is None
    assert fit_text(result).endswith("does not fit on 4 GPUs")


def test_a_plan_the_runtime_cannot_run_is_marked_with_the_axes_it_lacks() -> None:
    request = dataclasses.replace(REQUEST, allow_unsupported=True, forbidden=frozenset({("pp", "1"), ("pp", "3")}))
    result = fit_to_gpus(CONFIG, cluster_with(80e9), request, largest=4)
    text, document = fit_text(result), fit_json(result)
    assert document["smallest_gpus"] == 2 and document["smallest_supported"] is False
    assert [point.get("supported") for point in document["points"]] == [None, False, False]
    assert text.endswith("fits on 2 GPUs, by a plan that this version's runtime cannot run (pp 2)")
    assert "not supported by this version's runtime: pp 2" in " ".join(text.split())
    runnable = fit_json(fit_to_gpus(CONFIG, cluster_with(80e9), REQUEST, largest=2))
    assert runnable["smallest_supported"] is True and all(point["supported"] for point in runnable["points"])


def test_a_pin_that_one_gpu_cannot_have_is_kept_on_more() -> None:
    result = fit_to_gpus(CONFIG, cluster_with(80e9), dataclasses.replace(REQUEST, pins={"ep": "2"}), largest=4)
    assert result.smallest is not None and result.smallest.gpus == 2
