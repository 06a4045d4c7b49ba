"""`run --profile` leaves a trace and a table of kernels; how kernels are sorted and laid beside the plan."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest

from moescale.cli import main
from moescale.models.flops import flops_per_token
from moescale.planner.cluster import load_cluster
from moescale.planner.request import PlanRequest
from moescale.planner.search import compile_plan
from moescale.report.kernel_kinds import kind_of
from moescale.tools.profile_table import Kernel, Profile, flops, measured_seconds, planned_seconds, table
from tiny import tiny_config
from warm_start import run_warm

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def plan():
    request = PlanRequest(runtime_gpus=1, tokens_per_step=4096, sequence_length=256)
    return compile_plan(CONFIG, load_cluster("h100-sxm"), request).plan()


def test_a_run_leaves_a_trace_and_a_table_of_what_took_its_time(tmp_path, model_folder, stdlib_corpus):
    inputs = ("--model", model_folder, "--data", stdlib_corpus, "--device", "cpu", "--output", tmp_path / "run")
    shape = ("--tokens-per-step", 128, "--micro-batch-sequences", 1, "--steps", 6, "--profile", 2)
    done = run_warm(["run", *inputs, *shape, "--no-final-checkpoint"], timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "profile"
    document = json.loads((folder / "kernels.json").read_text())
    assert (document["first_step"], document["steps"]) == (4, 2)
    assert any("mm" in kernel["name"] for kernel in document["kernels"])
    with gzip.open(folder / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert "2 steps from step 4 on, cpu" in done.stderr
    assert (folder / "table.txt").read_text().strip() in done.stderr


def test_a_run_too_short_to_be_profiled_says_so(tmp_path, model_folder, stdlib_corpus, capsys):
    inputs = ("--model", model_folder, "--data", stdlib_corpus, "--device", "cpu", "--output", tmp_path / "run")
    shape = ("--tokens-per-step", 128, "--micro-batch-sequences", 1, "--steps", 4, "--profile", 2)
    with pytest.raises(SystemExit) as caught:
        main(["run", *map(str, (*inputs, *shape)), "--no-final-checkpoint"])
    assert not caught.value.code
    assert "nothing was profiled: --profile 2 needs 5 steps" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_rows_kernel", "experts"),
        ("_quantize_rows_kernel", "rows to fp8"),
        ("_swiglu_kernel", "experts"),
        ("_swiglu_backward_kernel", "experts"),
        ("_transpose_kernel", "experts"),
        ("_copies_kernel", "fp8 copies"),
        ("_combine_kernel", "gather and combine"),
        ("_pull_kernel", "communication"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "dense GEMMs"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x192", "attention"),
        ("triton_poi_fused_add_rms_norm_backward_1", "element-wise"),
        ("_adamw_kernel", "optimizer"),
        ("an unknown thing", "other"),
        ("attention_forward_kernel", "attention"),
        ("attention_delta_kernel", "attention"),
        ("attention_backward_keys_kernel", "attention"),
        ("attention_backward_queries_kernel", "attention"),
    ],
)
def test_kernels_are_sorted_by_what_they_serve(name, kind):
    assert kind_of(name) == kind


def test_times_are_of_one_step_and_add_up(plan):
    kernels = (
        Kernel(name="_rows_kernel", launches=8, microseconds=4000.0),
        Kernel(name="_up_kernel", launches=8, microseconds=2000.0),
        Kernel(name="nvjet", launches=2, microseconds=1000.0),
    )
    profile = Profile(device="a GPU", first_step=4, steps=2, kernels=kernels)
    assert measured_seconds(profile) == {"experts": 3e-3, "dense GEMMs": 0.5e-3}
    planned = planned_seconds(plan, CONFIG)
    assert sum(planned.values()) == pytest.approx(plan.prediction.step_seconds)
    assert {"experts", "dense GEMMs", "attention", "element-wise", "optimizer"} <= set(planned)
    lines = table(profile, plan, CONFIG, 1e15).splitlines()
    assert lines[0].endswith("3.5 ms of kernels each")
    experts = next(line for line in lines if line.startswith("experts"))
    rate = flops(CONFIG, plan)["experts"] / 3e-3
    assert experts.split()[1:] == ["3.0", "86%", f"{1e3 * planned['experts']:.1f}", f"{rate / 1e12:.0f}", "0%"]
    assert any("_rows_kernel" in line and " 4 x" in line for line in lines)


def test_flops_are_those_of_the_model_and_shared_by_devices(plan):
    total = flops_per_token(CONFIG, plan.sequence_length) * plan.tokens_per_step
    assert sum(flops(CONFIG, plan).values()) == pytest.approx(total)
    assert flops(CONFIG, dataclasses.replace(plan, runtime_gpus=1)) == flops(CONFIG, plan)


def test_a_plan_without_a_prediction_gives_a_table_all_the_same(plan):
    profile = Profile(
        device="a GPU", first_step=4, steps=1, kernels=(Kernel(name="nvjet", launches=1, microseconds=5.0),)
    )
    lines = table(profile, dataclasses.replace(plan, prediction=None), CONFIG, None).splitlines()
    assert lines[2].startswith("dense GEMMs") and "in all" not in "\n".join(lines)
