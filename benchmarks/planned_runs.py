"""Compile plans for two GPUs and run each through the command line: predicted against measured time and memory.

    python benchmarks/planned_runs.py --data CORPUS --documents CORPUS_WITH_BOUNDARIES --output prediction.json

Predictions are made before the runs, by the cluster file alone. Cases are whole models, nine of their layers (which
leave room for plans that keep every expert on every GPU), and eight of Qwen3-30B-A3B's layers; some with GEMMs in fp8,
or without exact master weights. A step's time is the median from the third step on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from processes import moescale, read_steps

from moescale.tools.measurement import describe_measurement, write_result

MODEL = "deepseek-coder-v2-lite"
NINE = f"{MODEL}/9"  # so many of the preset's layers
STOCHASTIC = ("--allow-stochastic-rounding",)
CASES: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "whole": (MODEL, False, ()),
    "whole, documents": (MODEL, True, ()),
    "whole, 70 GiB": (MODEL, False, ("--memory-limit", "70GiB")),
    "whole, 60 GiB": (MODEL, False, ("--memory-limit", "60GiB")),
    "whole, experts recomputed": (MODEL, False, ("--pin", "moe_recompute=experts")),
    "nine layers": (NINE, False, ()),
    "nine layers, zero1, ep 2": (NINE, False, ("--pin", "ep=2", "--pin", "dense_sharding=zero1")),
    "nine layers, zero1, ep 1": (NINE, False, ("--pin", "ep=1", "--pin", "dense_sharding=zero1")),
    "nine layers, fsdp, ep 2": (NINE, False, ("--pin", "ep=2", "--pin", "dense_sharding=fsdp")),
    "nine layers, fsdp, ep 1": (NINE, False, ("--pin", "ep=1", "--pin", "dense_sharding=fsdp")),
    "Qwen3-30B-A3B, eight layers": ("qwen3-30b-a3b/8", False, ()),
    "whole, stochastic rounding": (MODEL, False, STOCHASTIC),
    "whole, stochastic rounding, fp8": (MODEL, False, (*STOCHASTIC, "--precision", "fp8")),
    "nine layers, fp8": (NINE, False, ("--precision", "fp8")),
}


def model_folder(name: str, folder: Path) -> str:
    """The preset ``name``, or of ``preset/layers`` a folder with the configuration of so many of its layers."""
    preset, _, layers = name.partition("/")
    if not layers:
        return preset
    config = json.loads((files("moescale") / "presets" / preset / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": int(layers)}))
    return str(folder)


def find_plan(path: Path, model: str, *options: object) -> dict[str, Any]:
    """The plan that ``moescale compile`` writes to ``path``; where it finds none, what it says of that."""
    compiled = subprocess.run(
        moescale("compile", "--model", model, "--output", path, *options), capture_output=True, text=True
    )
    if compiled.returncode:
        return {"compile": compiled.returncode, "error": compiled.stderr[-4000:]}
    return json.loads(path.read_text())


def describe_run(plan: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plan is, what it predicted, and what its run measured: times are medians from the third step on."""
    seconds = statistics.median(row["step_seconds"] for row in steps[2:]) if len(steps) > 2 else None
    prediction = plan["prediction"]
    moe = next(layer for layer in plan["layers"] if layer["kind"] == "moe")
    return {
        "mesh": plan["mesh"],
        "dense_sharding": plan["dense_sharding"],
        "gemms": {"experts": plan["expert_gemms"], "dense": plan["dense_gemms"]},
        "micro_batch_sequences": plan["micro_batch_sequences"],
        "moe_recompute": moe["recompute"],
        "moe_recompute_layers": moe["recompute_layers"],
        "predicted_seconds": prediction["step_seconds"],
        "measured_seconds": seconds,
        "tokens_per_second": seconds and plan["tokens_per_step"] / seconds,
        "predicted_peak_bytes": prediction["allocated_bytes"],
        "peak_bytes": max((row["peak_bytes"] for row in steps), default=None),
        "losses": [round(row["loss"], 4) for row in steps],
        "each_step_seconds": [round(row["step_seconds"], 3) for row in steps],
    }


def run_case(folder: Path, model: str, data: Path, cluster: str, steps: int, pins: tuple[str, ...]) -> dict[str, Any]:
    plan_file, output = folder / "plan.json", folder / "run"
    plan = find_plan(plan_file, model, "--cluster", cluster, "--plan-gpus", 2, "--tokens-per-step", 131072, *pins)
    if "error" in plan:
        return plan
    run_of = ("--plan", plan_file, "--model", model, "--data", data, "--output", output)
    command = moescale("run", *run_of, "--steps", steps, "--no-final-checkpoint")
    run = subprocess.run(command, capture_output=True, text=True)
    failure = {"status": run.returncode, "error": None if run.returncode == 0 else run.stderr[-4000:]}
    return describe_run(plan, read_steps(output)) | failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--cluster", default="h100-sxm")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(arguments.cases):
            model, with_documents, pins = CASES[name]
            data = arguments.documents if with_documents else arguments.data
            place = Path(folder) / str(number)
            place.mkdir()
            row = {"case": name} | run_case(
                place, model_folder(model, place / "model"), data, arguments.cluster, arguments.steps, pins
            )
            print(json.dumps(row), flush=True)
            rows.append(row)
            write_result(arguments.output, describe_measurement("torch") | {"rows": rows})


if __name__ == "__main__":
    main()
