from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.cli import main
from moescale.plan import load_plan
from moescale.report.style import STYLE

REFERENCE = (
    "compile --model deepseek-ai/DeepSeek-Coder-V2-Lite-Base --cluster h100-sxm --plan-gpus 4 --runtime-gpus 8 "
    "--tokens-per-step 131072 --sequence-length 2048 --memory-limit 64"
).split()


def compile_(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 0


def test_json_has_the_plan_its_prediction_and_its_alternatives(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compile_(*REFERENCE, "--output", str(tmp_path / "plan.json"), "--json")
    document = json.loads(capsys.readouterr().out)
    prediction = document["prediction"]
    assert prediction["step_seconds"] == pytest.approx(131072 / prediction["tokens_per_second"])
    assert sum(prediction["breakdown_seconds"].values()) == pytest.approx(prediction["step_seconds"])
    assert sum(prediction["breakdown_bytes"].values()) == pytest.approx(prediction["peak_bytes"], abs=100)
    assert document["alternatives"]
    plan = load_plan(tmp_path / "plan.json")
    assert plan.prediction is not None and plan.prediction.step_seconds == prediction["step_seconds"]
    assert (plan.plan_gpus, plan.runtime_gpus, plan.tokens_per_step) == (4, 8, 131072)


def test_text_names_decisions_time_memory_and_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    compile_(*REFERENCE)
    text = capsys.readouterr().out
    for part in ("Plan", "Step time", "experts", "optimizer", "activations moe", "micro_batch_sequences", "instead of"):
        assert part in text


def test_the_page_needs_nothing_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_(*REFERENCE, "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page and "micro_batch_sequences" in page
    assert not any(outside in page for outside in ('src="http', 'href="http', "@import", "<link"))
    assert STYLE in page and 'name="viewport"' in page


def test_where_nothing_fits_the_nearest_misses_and_remedies_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    one_gpu = "compile --model deepseek-coder-v2-lite --cluster a100-80 --plan-gpus 1 --json".split()
    with pytest.raises(SystemExit) as stopped:
        main([*one_gpu, "--forbid", "offload_optimizer=true"])
    assert stopped.value.code == 2
    streams = capsys.readouterr()
    document = json.loads(streams.out)
    assert document["fits"] is False
    assert document["near_misses"][0]["exceeds_memory_by_bytes"] > 0
    for change in ("--runtime-gpus 2", "drop --forbid offload_optimizer=true"):
        assert any(change in suggestion for suggestion in document["suggestions"])
    assert "no plan fits" in streams.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "h100"], "cluster 'h100' is not known"),
        (["--plan-gpus", "many"], "must be a number of GPUs, or auto"),
        (["--plan-gpus", "3", "--runtime-gpus", "8"], "must be a multiple"),
        (["--pin", "ep"], "must have the form name=value"),
        (["--pin", "ep=4", "--pin", "ep=2"], "--pin ep=4 and --pin ep=2 contradict each other"),
        (["--pin", "epp=4"], "'epp' is not a decision of a plan for this model"),
        (["--memory-limit", "-3"], "must be positive"),
        (["--memory-limit", "nan"], "compile.memory_limit (nan) must be a finite number of GiB"),
        (["--memory-limit", "inf"], "compile.memory_limit (inf) must be a finite number of GiB"),
        (["--router-imbalance", "nan"], "compile.router_imbalance (nan) must be"),
        (["--router-imbalance", "inf"], "compile.router_imbalance (inf) must be"),
        (["--router-imbalance", "0"], "compile.router_imbalance (0.0) must be"),
        (["--router-imbalance", "-1"], "compile.router_imbalance (-1.0) must be"),
        (["--output", "."], "--output (.) is a folder"),
        (["--html", "/"], "--html (/) is a folder"),
        (["--output", f"{__file__}/plan.json"], "test_compile.py is not a folder"),
        (["--output", "/proc/none/plan.json"], "plan.json) cannot be written"),
        (["--html", "/proc/none/plan.html"], "plan.html) cannot be written"),
        (["--output", "/tmp/same", "--html", "/tmp/same"], "must be two files"),
        (["--fit", "--output", "plan.json"], "--output (plan.json) cannot be written with --fit"),
        (["--fit", "--html", "plan.html"], "--html (plan.html) cannot be written with --fit"),
        (["--precision", "fp8", "--cluster", "a100-80"], "cluster 'a100-80' (NVIDIA A100-SXM4-80GB) has no [fp8_dense"),
        (["--precision", "fp8", "--lora", "rank=4"], "compile.precision (fp8) is for weights that are trained"),
        (["--pin", "dense_gemms=fp8"], "dense_gemms must be compute without --precision fp8"),
        (["--sequence-length", "1000000"], "must not exceed model.max_sequence_length"),
    ],
)
def test_nonsense_is_refused_with_exit_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    length = [] if "--sequence-length" in options else ["--sequence-length", "256"]
    with pytest.raises(SystemExit) as stopped:
        main(["compile", "--model", "tiny", *length, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


IN_FP8 = "compile --model deepseek-coder-v2-lite --cluster h200 --precision fp8".split()


def test_gemms_in_fp8_are_planned_where_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_(*IN_FP8, "--allow-stochastic-rounding", "--output", str(tmp_path / "plan.json"))
    text = capsys.readouterr().out
    assert "fp8 copies" in text and "expert_gemms compute instead of fp8: +" in text
    (other,) = [line for line in text.splitlines() if "bf16_remainder instead of stochastic_bf16" in line]
    assert "does not fit: exceeds GPU memory by" in other
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.compute_dtype, plan.expert_gemms, plan.dense_gemms) == ("bf16", "fp8", "fp8")


def test_exact_weights_leave_no_room_for_copies_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    compile_(*IN_FP8, "--json")
    document = json.loads(capsys.readouterr().out)
    assert (document["expert_gemms"], document["dense_gemms"]) == ("compute", "fp8")
    (other,) = [other for other in document["alternatives"] if other["decision"] == "expert_gemms"]
    assert other["slower_by"] < 0 and other["exceeds_memory_by_bytes"] > 0


def test_fit_plans_gemms_in_fp8_on_every_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--precision fp8 --fit --json --sequence-length 256 --pin micro_batch_sequences=1 --pin dense_gemms=fp8"
    compile_(*"compile --model tiny --cluster h200".split(), *options.split())
    points = json.loads(capsys.readouterr().out)["points"]
    assert all(point["fits"] for point in points)
    assert {point["decisions"]["dense_gemms"] for point in points} == {"fp8"}
    assert {point["decisions"]["dense_sharding"] for point in points[1:]} == {"zero1"}


def test_fit_tells_the_smallest_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    compile_(*"compile --model tiny --cluster h200 --sequence-length 256 --fit --json".split())
    document = json.loads(capsys.readouterr().out)
    assert document["smallest_gpus"] == 1
    assert [point["gpus"] for point in document["points"]] == [2**power for power in range(11)]


def test_compile_imports_no_torch_and_stays_under_300_mb() -> None:
    # VmHWM and not ru_maxrss: the latter starts with what the parent held.
    program = (
        "import atexit, sys; from moescale.cli import main;"
        "lines = lambda: open('/proc/self/status').read().splitlines();"
        "peak = lambda: next(int(line.split()[1]) // 1024 for line in lines() if line.startswith('VmHWM'));"
        "atexit.register(lambda: print('torch' in sys.modules, peak())); main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", program, *REFERENCE], capture_output=True, text=True, check=True)
    imported, megabytes = done.stdout.split()[-2:]
    assert imported == "False"
    assert int(megabytes) < 300


def test_adapters_are_planned_and_the_plan_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A 16B model's adapters fit on one 80 GB GPU, on which the whole model does not."""
    size = ("--sequence-length", "4096", "--tokens-per-step", "65536", "--plan-gpus", "1")
    arguments = ["compile", "--model", "deepseek-coder-v2-lite", "--cluster", "h100-sxm", *size]
    lora = ("--lora", "rank=16,targets=attention+shared+experts")
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *lora, "--memory-limit", "48GB", "--output", str(tmp_path / "plan.json")])
    assert not caught.value.code
    assert "adapters" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["lora"] == {
        "rank": 16,
        "alpha": 32,
        "targets": ["attention", "shared", "experts"],
        "dropout": 0,
        "rank_stabilised": False,
        "base": "compute",
    }
    assert plan["prediction"]["peak_bytes"] < 48e9
    with pytest.raises(SystemExit):
        main([*arguments, *lora, "--fit", "--json"])
    assert json.loads(capsys.readouterr().out)["smallest_gpus"] == 1
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *lora, "--pin", "optimizer_state_dtype=int8"])
    assert caught.value.code == 2
    assert "must be fp32 with --lora" in " ".join(capsys.readouterr().err.split())
