"""Plans across the space, as the planner predicts them and as one GPU runs them: step time and peak memory.

    python benchmarks/prediction.py --cluster h200 --output prediction.json        # on the GPU: compile, run, compare
    python benchmarks/prediction.py --cluster h200 --predict-again prediction.json # anywhere: another cluster file

Every case is a request to the planner with some decisions pinned; what it compiles is trained with random tokens by the
trainer, kernels and formats of ``moescale run``. Half a step compiles and warms up, the mean of the next steps counts.
Which cases may be used to correct the cluster file, and which only to check it, is fixed below, before any is run.
``measured_peak_bytes`` is what the device holds at the end, which the allocator never gives back during a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command line does

import torch
from step import RandomSteps, build, forward_backward_seconds, profile

from moescale.convert.hf_config import read_model_config
from moescale.models.blocks.moe import Router
from moescale.models.flops import flops_per_token, peak_flops
from moescale.plan import ParallelPlan
from moescale.planner.cluster import load_cluster
from moescale.planner.request import PlanRequest, recompute_name
from moescale.planner.search import compile_plan
from moescale.tools.measurement import describe_measurement, write_result

MODEL = "deepseek-coder-v2-lite"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request to the planner."""

    name: str
    pins: dict[str, str] = field(default_factory=dict)
    exact_weights: bool = True
    sequence_length: int = 2048
    used_for_calibration: bool = False
    skewed: bool = False
    """Popularity of the experts as uneven as ``SKEW`` makes it; no case of the planner's, who knows no such thing."""

    def request(self, tokens_per_step: int) -> PlanRequest:
        return PlanRequest(
            runtime_gpus=1,
            tokens_per_step=tokens_per_step,
            sequence_length=self.sequence_length,
            exact_weights=self.exact_weights,
            pins=self.pins,
        )


def _pins(**pins: object) -> dict[str, str]:
    return {name: str(value) for name, value in pins.items()}


STOCHASTIC = "stochastic_bf16"
CASES = (
    Case(name="chosen"),
    Case(name="chosen, skewed routing", skewed=True),
    Case(name="8,192-token sequences", sequence_length=8192),
    Case(name="32,768-token sequences", sequence_length=32768),
    Case(name="micro-batch 2", pins=_pins(micro_batch_sequences=2), used_for_calibration=True),
    Case(name="micro-batch 1", pins=_pins(micro_batch_sequences=1)),
    Case(name="experts recomputed", pins=_pins(moe_recompute="experts"), used_for_calibration=True),
    Case(
        name="micro-batch 8, blocks recomputed",
        pins=_pins(micro_batch_sequences=8, moe_recompute="block", dense_recompute="block"),
        used_for_calibration=True,
    ),
    Case(
        name="stochastic rounding, micro-batch 8",
        pins=_pins(micro_batch_sequences=8, master_weight_format=STOCHASTIC, moe_recompute="none"),
        exact_weights=False,
        used_for_calibration=True,
    ),
    Case(
        name="stochastic rounding, fp32 gradients",
        pins=_pins(master_weight_format=STOCHASTIC, gradient_dtype="fp32", moe_recompute="none"),
        exact_weights=False,
    ),
    Case(
        name="stochastic rounding, bf16 moments",
        pins=_pins(master_weight_format=STOCHASTIC, optimizer_state_dtype="bf16", gradient_dtype="bf16"),
        exact_weights=False,
        used_for_calibration=True,
    ),
    Case(
        name="stochastic rounding, micro-batch 8, experts recomputed",
        pins=_pins(micro_batch_sequences=8, master_weight_format=STOCHASTIC, moe_recompute="experts"),
        exact_weights=False,
    ),
    Case(
        name="stochastic rounding, micro-batch 16, blocks recomputed",
        pins=_pins(
            micro_batch_sequences=16, master_weight_format=STOCHASTIC, moe_recompute="block", dense_recompute="block"
        ),
        exact_weights=False,
    ),
    Case(
        name="micro-batch 4, blocks recomputed",
        pins=_pins(micro_batch_sequences=4, moe_recompute="block", dense_recompute="none"),
    ),
    Case(
        name="stochastic rounding, 8,192-token sequences, micro-batch 2",
        pins=_pins(micro_batch_sequences=2, master_weight_format=STOCHASTIC, moe_recompute="none"),
        exact_weights=False,
        sequence_length=8192,
        used_for_calibration=True,
    ),
)

SKEW = 0.7
"""Skewed routing: the popularity of the e-th expert is proportional to (e + 1) ** -SKEW, as in ``moescale bench``."""


class SkewedRouter(torch.nn.Module):
    """A router whose logits get a bias of its experts' popularity; every layer has its own order of experts."""

    def __init__(self, router: Router, layer: int) -> None:
        super().__init__()
        self.config, self.weight = router.config, router.weight
        number = router.weight.shape[0]
        order = torch.randperm(number, generator=torch.Generator().manual_seed(layer))
        bias = -2 * SKEW * torch.arange(1, number + 1).log()
        self.register_buffer("bias", bias[order].to(router.weight.device), persistent=False)

    def forward(self, x: torch.Tensor, num_sequences: int) -> Any:
        from moescale.kernels.router import route, router_logits

        config = self.config
        return route(
            router_logits(x, self.weight) + self.bias,
            top_k=config.top_k,
            group_limited=False,
            normalize_topk=config.normalize_topk,
            routed_scaling_factor=config.routed_scaling_factor,
            num_sequences=num_sequences if config.aux_loss_per_sequence else None,
        )


def skew_routers(model: torch.nn.Module) -> None:
    for layer, block in enumerate(model.layers):  # type: ignore[union-attr,arg-type]
        if hasattr(block.feed_forward, "router"):
            block.feed_forward.router = SkewedRouter(block.feed_forward.router, layer)


def run_case(
    case: Case, plan: ParallelPlan, layers: int | None, steps: int, profile_path: Path | None
) -> dict[str, Any]:
    """Train a few steps by the plan; returns what was measured. Raises torch.OutOfMemoryError."""
    config = read_model_config(MODEL)
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    started = time.perf_counter()
    trainer, model = build(config, plan, compiled=False)
    if case.skewed:
        skew_routers(model)
    for block in model.layers:
        block.compile(fullgraph=True)
    source = RandomSteps(plan, config.vocab_size)
    trainer.train_step(source.step(max(2, plan.gradient_accumulation_steps // 2)))
    warm = time.perf_counter()
    measured = [trainer.train_step(source.step()) for _ in range(steps)]
    free, total = torch.cuda.mem_get_info()
    seconds = statistics.mean(metrics.step_seconds for metrics in measured)
    loads = torch.tensor(measured[-1].expert_load)  # [MoE layers, E], relative to the mean
    result = {
        "measured_seconds": seconds,
        "measured_seconds_each": [metrics.step_seconds for metrics in measured],
        "tokens_per_second": plan.tokens_per_step / seconds,
        "mfu": plan.tokens_per_step
        / seconds
        * flops_per_token(config, plan.sequence_length)
        / (peak_flops(torch.device("cuda")) or 1),
        "measured_peak_bytes": total - free,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "expert_load_max_over_mean": loads.amax(-1).mean().item(),
        "build_and_first_step_seconds": warm - started,
        "out_of_memory": False,
    }
    if profile_path is not None:
        without_update = statistics.mean(forward_backward_seconds(trainer, source.step()) for _ in range(2))
        result["forward_backward_tokens_per_second"] = plan.tokens_per_step / without_update
        profile(trainer, source.step(2), profile_path)
    return result


def compile_case(case: Case, cluster_name: str, layers: int | None, tokens_per_step: int) -> ParallelPlan:
    config = read_model_config(MODEL)
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    return compile_plan(config, load_cluster(cluster_name), case.request(tokens_per_step)).plan()


def row_of(case: Case, plan: ParallelPlan) -> dict[str, Any]:
    assert plan.prediction is not None
    return {
        "name": case.name,
        "used_for_calibration": case.used_for_calibration,
        "counted": not case.skewed,
        "predicted_seconds": plan.prediction.step_seconds,
        "predicted_peak_bytes": plan.prediction.peak_bytes,
        "plan": json.loads(dataclasses.replace(plan, alternatives=()).to_json()),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all rows, and over those that no calibration has seen."""
    done = [row for row in rows if row["counted"] and row.get("measured_seconds")]
    result: dict[str, Any] = {"plans": len(done), "out_of_memory": sum(bool(row.get("out_of_memory")) for row in rows)}
    for name, part in (("all", done), ("not_calibrated", [row for row in done if not row["used_for_calibration"]])):
        if not part:
            continue
        for quantity in ("seconds", "peak_bytes"):
            errors = [abs(row[f"predicted_{quantity}"] / row[f"measured_{quantity}"] - 1) for row in part]
            result[f"{quantity}_error_{name}"] = {"median": statistics.median(errors), "max": max(errors)}
    # The same request, exactly fp32 weights: what the planner chose among.
    alike = [
        row
        for row in done
        if row["plan"]["sequence_length"] == 2048 and row["plan"]["master_weight_format"] != STOCHASTIC
    ]
    if alike and alike[0]["name"] == "chosen":
        best = min(row["measured_seconds"] for row in alike)
        result["regret"] = alike[0]["measured_seconds"] / best - 1
    return result


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if not row.get("measured_seconds"):
            print(f"{row['name']:60} {row.get('error', 'out of memory')}")
            continue
        seconds, memory = (row[f"predicted_{q}"] / row[f"measured_{q}"] - 1 for q in ("seconds", "peak_bytes"))
        print(
            f"{row['name']:60} {row['measured_seconds']:6.3f} s {seconds:+6.1%}  "
            f"{row['measured_peak_bytes'] / 2**30:6.1f} GiB {memory:+6.1%}  {row['tokens_per_second']:7.0f} tokens/s "
            f"MFU {row['mfu']:.3f} load {row['expert_load_max_over_mean']:.2f} "
            f"start {row['build_and_first_step_seconds']:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="h200")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so long")
    parser.add_argument("--cases", help="numbers of the cases to run, as 0,3,4; default: all")
    parser.add_argument("--profile", type=Path, help="of the first case")
    parser.add_argument("--predict-again", type=Path, help="a result whose predictions to replace")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one-case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_case is not None:
        run_one(arguments)
        return
    document = predicted_again(arguments) if arguments.predict_again else measured(arguments)
    document |= summary(document["rows"])
    print_table(document["rows"])
    print(json.dumps({key: value for key, value in document.items() if key not in ("rows", "versions")}, indent=1))
    if arguments.output:
        write_result(arguments.output, document)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cases, each in a process of its own; the next one imports torch and compiles its plan meanwhile."""
    numbers = [int(number) for number in arguments.cases.split(",")] if arguments.cases else list(range(len(CASES)))
    document: dict[str, Any] = describe_measurement("transformers") | {"model": MODEL, "rows": []}
    started = time.monotonic()
    waiting = _start_process(arguments, numbers[0], arguments.profile)
    for number, following in itertools.zip_longest(numbers, numbers[1:]):
        process = waiting
        if following is not None:
            waiting = _start_process(arguments, following, None)
        late = time.monotonic() - started > arguments.seconds
        output, _ = process.communicate("" if late else "go\n")
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if late:
            continue
        row = json.loads(lines[-1]) if lines else {"name": CASES[number].name, "error": output[-300:]}
        document["rows"].append(row)
        print_table([row])
        if arguments.output:
            write_result(arguments.output, document)
    return document


def _start_process(arguments: argparse.Namespace, number: int, profile_path: Path | None) -> subprocess.Popen:
    options = ["--one-case", number, "--cluster", arguments.cluster, "--steps", arguments.steps]
    options += ["--tokens-per-step", arguments.tokens_per_step]
    options += ["--layers", arguments.layers] if arguments.layers else []
    options += ["--profile", profile_path] if profile_path else []
    command = [sys.executable, __file__, *map(str, options)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_one(arguments: argparse.Namespace) -> None:
    """Compile a case's plan, wait for the word on standard input, run it, and print its row as JSON."""
    case = CASES[arguments.one_case]
    plan = compile_case(case, arguments.cluster, arguments.layers, arguments.tokens_per_step)
    row = row_of(case, plan)
    if sys.stdin.readline().strip() != "go":
        return
    try:
        row |= run_case(case, plan, arguments.layers, arguments.steps, arguments.profile)
    except torch.OutOfMemoryError as error:
        row |= {"out_of_memory": True, "error": str(error)[:300]}
    print(json.dumps(row), flush=True)


def predicted_again(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same plans and measurements, with what the planner now says of the plans."""
    document = json.loads(arguments.predict_again.read_text())
    cases = {case.name: case for case in CASES}
    for row in document["rows"]:
        case = cases[row["name"]]
        plan = ParallelPlan.from_json(json.dumps(row["plan"]))
        request = case.request(plan.tokens_per_step)
        request = dataclasses.replace(request, pins=predict_pins(plan), exact_weights=False)
        row.update(
            row_of(case, compile_plan(read_model_config(MODEL), load_cluster(arguments.cluster), request).plan())
        )
    return document


def predict_pins(plan: ParallelPlan) -> dict[str, str]:
    """Every decision of the plan as a pin: the only plan that then can be compiled is this one."""
    return _pins(
        micro_batch_sequences=plan.micro_batch_sequences,
        dense_recompute=recompute_name(plan.layer("dense")),
        moe_recompute=recompute_name(plan.layer("moe")),
        optimizer_state_dtype=plan.optimizer_state_dtype,
        master_weight_format=plan.master_weight_format,
        gradient_dtype=plan.gradient_dtype,
    )


if __name__ == "__main__":
    main()
