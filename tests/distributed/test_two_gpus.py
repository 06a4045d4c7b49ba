"""Two GPUs of one host, as a user starts them: gradients of one GPU, killed ranks, resumed and exported runs, links."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.plan import MeshShape, one_device_plan, save_plan

ROOT = Path(__file__).parents[2]
STEPS = 14

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def on_two_ranks(*arguments: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=380, env=environment
    )


@pytest.mark.parametrize(
    ("sharding", "routings"), [("zero1", ["natural", "skewed", "one rank", "one expert"]), ("fsdp", ["natural"])]
)
def test_every_gradient_is_as_exact_as_on_one_gpu(tmp_path: Path, sharding: str, routings: list[str]) -> None:
    output = tmp_path / "parity.json"
    script = ROOT / "benchmarks" / "rank_parity.py"
    done = on_two_ranks(script, "--dense-sharding", sharding, "--routings", *routings, "--output", output)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(output.read_text())["rows"]
    assert [row["routing"] for row in rows] == routings
    for row in rows:
        assert row["gradient_errors"]["largest_ratio"] <= 2, row
        assert abs(row["loss"] - row["loss_fp32"]) <= 2 * abs(row["loss_alone"] - row["loss_fp32"]) + 5e-4, row
        assert row["recorded"] == (sharding == "zero1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The tests' small model, wide enough for the kernels."""
    folder = tmp_path_factory.mktemp("wide")
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 512, "kv_lora_rank": 64}
    config |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    return folder


def command(folder: Path, model: Path, corpus: Path) -> list[str]:
    """A run of two GPUs with divided experts; the output folder is still to come."""
    config: ModelConfig = read_model_config(model)
    plan = one_device_plan(
        config,
        sequence_length=64,
        micro_batch_sequences=2,
        gradient_accumulation_steps=2,
        compute_dtype="bf16",
    )
    fields: dict[str, Any] = dict(plan_gpus=2, runtime_gpus=2, tokens_per_step=8 * 64, gradient_dtype="bf16")
    fields |= dict(optimizer_state_dtype="int8", master_weight_format="bf16_remainder")
    plan = dataclasses.replace(plan, mesh=MeshShape(dp_shard=2, ep=2), dense_sharding="zero1", **fields)
    save_plan(plan, folder / "plan.json")
    inputs = ("--model", model, "--data", corpus, "--plan", folder / "plan.json", "--initialize", "random", "--json")
    schedule = ("--steps", STEPS, "--checkpoint-every", 4, "--learning-rate", 1e-3)
    return [sys.executable, "-m", "moescale", "run", *map(str, (*inputs, *schedule)), "--output"]


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").is_file() else []
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_a_rank_killed_while_a_graph_replays_is_named_and_the_run_resumes_as_if_nothing_had_been(
    tmp_path: Path, model: Path, stdlib_corpus: Path
) -> None:
    arguments = command(tmp_path, model, stdlib_corpus)
    undisturbed = subprocess.run([*arguments, str(tmp_path / "whole")], capture_output=True, text=True, timeout=300)
    assert undisturbed.returncode == 0, undisturbed.stderr[-4000:]
    output = tmp_path / "killed"
    process = subprocess.Popen([*arguments, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(losses(output)) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 4, errors[-4000:]
    assert "rank 1 was ended by SIGKILL" in errors
    resumed = subprocess.run([*arguments, str(output)], capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert losses(output) == losses(tmp_path / "whole")
    exported = tmp_path / "exported"
    export = [sys.executable, "-m", "moescale", "export", "--run", str(output), "--model", str(model)]
    done = subprocess.run([*export, "--output", str(exported)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(exported.glob("*.safetensors"))


def test_links_are_measured_between_the_gpus(tmp_path: Path) -> None:
    script = tmp_path / "links.py"
    script.write_text(
        "import json, os, torch, torch.distributed as dist\n"
        "from moescale.runtime.gpu_clock import seconds_of\n"
        "from moescale.runtime.calibrate_links import measure_links\n"
        "device = torch.device('cuda', int(os.environ['LOCAL_RANK']))\n"
        "torch.cuda.set_device(device)\n"
        "dist.init_process_group('nccl', device_id=device)\n"
        "tables, _ = measure_links(device, seconds_of)\n"
        f"dist.get_rank() == 0 and open({str(tmp_path / 'links.json')!r}, 'w').write(json.dumps(tables))\n"
        "dist.destroy_process_group()\n"
    )
    done = on_two_ranks(script)
    assert done.returncode == 0, done.stderr[-4000:]
    tables = json.loads((tmp_path / "links.json").read_text())
    for name, latency in (("intra_node", 200e-6), ("exchange", 50e-6)):
        assert 0 < tables[name]["latency_seconds"] < latency, tables
        assert 20e9 < tables[name]["bytes_per_second"] < 1e12, tables
