"""Which plan a run gets from its inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moescale.api.run_checks import choose_plan
from moescale.api.train_request import RunInputs
from moescale.convert.hf_config import read_model_config
from moescale.data.corpus import open_corpus
from moescale.errors import ConfigError
from moescale.plan import ParallelPlan, one_device_plan, save_plan
from tiny import tiny_config

CPU = torch.device("cpu")


def chosen(config, corpus: Path, **fields) -> ParallelPlan:
    return choose_plan(RunInputs(model="tiny", data=corpus, output="run", **fields), config, open_corpus(corpus), CPU)


def test_fp8_is_bf16_with_gemms_of_experts_and_linear_layers_in_fp8(stdlib_corpus: Path) -> None:
    plan = chosen(read_model_config("deepseek-coder-v2-lite"), stdlib_corpus, precision="fp8")
    assert (plan.compute_dtype, plan.expert_gemms, plan.dense_gemms) == ("bf16", "fp8", "fp8")
    assert plan.runtime_gpus == 1


@pytest.mark.parametrize("precision, dtype", [("bf16", "bf16"), ("fp32", "fp32"), (None, "fp32")])
def test_no_other_precision_has_gemms_in_fp8(stdlib_corpus: Path, precision: str | None, dtype: str) -> None:
    plan = chosen(read_model_config("deepseek-coder-v2-lite"), stdlib_corpus, precision=precision)
    assert (plan.compute_dtype, plan.expert_gemms, plan.dense_gemms) == (dtype, "compute", "compute")


def test_experts_that_cannot_multiply_in_fp8_stay_in_bf16(stdlib_corpus: Path) -> None:
    plan = chosen(tiny_config(expert_intermediate_size=24), stdlib_corpus, precision="fp8")
    assert (plan.compute_dtype, plan.expert_gemms, plan.dense_gemms) == ("bf16", "compute", "fp8")


def test_a_plan_decides_the_formats_of_gemms(stdlib_corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(expert_intermediate_size=32)
    plan = one_device_plan(
        config,
        sequence_length=64,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="bf16",
        expert_gemms="fp8",
    )
    save_plan(plan, tmp_path / "plan.json")
    assert chosen(config, stdlib_corpus, plan=tmp_path / "plan.json") == plan
    with pytest.raises(ConfigError, match=r"run.precision \(fp8\) is decided by the plan .*plan.json; drop one"):
        chosen(config, stdlib_corpus, plan=tmp_path / "plan.json", precision="fp8")


def test_adapters_are_not_trained_with_gemms_in_fp8(stdlib_corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be compute where plan.lora .*; leave out --precision fp8, or --lora"):
        chosen(tiny_config(), stdlib_corpus, precision="fp8", lora="rank=4")
