"""Adapters on the whole 16B model on one GPU as a user trains them: prepare, compile, run; then PEFT, beside it.

    python benchmarks/lora.py --cluster h100-sxm --output benchmarks/results/h100/lora.json
    python benchmarks/lora.py --cluster h100-sxm --base fp8 --memory-limit 48GB 24GB --output lora_fp8.json

Rank 16 on attention, shared and routed experts, packs of 4,096 tokens, random weights of the public configuration made
on the GPU. Ours runs twice: in 48 GB, and with whatever the GPU has. Micro-batch and recomputation are the plan's; the
figures are the run's own in ``metrics.jsonl``, optimizer included, after two steps of warming up. ``--base fp8`` keeps
frozen weights in fp8; the run in the compute dtype within the first limit then takes the peer's place. The peer is
transformers with PEFT (packages ``peft`` and ``accelerate``), every layer compiled if that runs, with what suits it
best: adapters in bf16, grouped GEMMs for the experts, shared experts as layers, not as parameters, fused AdamW. What
does not fit or compile is said in its place. Parts are left out that would begin after ``--seconds``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from one_gpu import WARM_UP_STEPS, prepare_corpus, run_until
from processes import moescale

from moescale.tools.measurement import describe_measurement, write_result

TARGETS = "attention+shared+experts"

PEER_MODULES = r".*\.(q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|shared_experts\.(gate|up|down)_proj)"
PEER_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""The same targets, as PEFT names them in transformers' DeepSeek-V2."""


def ours(
    folder: Path, corpus: Path, arguments: argparse.Namespace, memory_limit: str | None, base: str
) -> dict[str, Any]:
    """Plan within ``memory_limit`` and run."""
    folder.mkdir()
    plan_file = folder / "plan.json"
    lora = f"rank={arguments.rank},alpha={2 * arguments.rank},targets={TARGETS},base={base}"
    shape = ("--sequence-length", arguments.sequence_length, "--tokens-per-step", arguments.tokens_per_step)
    limit = ("--memory-limit", memory_limit) if memory_limit else ()
    where = ("--model", arguments.model, "--cluster", arguments.cluster, "--plan-gpus", 1, "--lora", lora)
    precision = ("--precision", arguments.precision)
    subprocess.run(
        moescale("compile", *where, *shape, *limit, *precision, "--output", plan_file),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    options = ("--model", arguments.model, "--data", corpus, "--plan", plan_file, "--initialize", "random")
    device = ("--device", arguments.device, "--learning-rate", 1e-4)
    records, first_start = run_until(arguments.steps + WARM_UP_STEPS, folder / "run", *options, *device)
    plan = json.loads(plan_file.read_text())
    measured = records[WARM_UP_STEPS:]
    seconds = statistics.median(record["step_seconds"] for record in measured)
    peak, predicted = max(record["peak_bytes"] for record in measured), plan["prediction"]["allocated_bytes"]
    return {
        "base": base,
        "errors_in_fp8": json.loads((folder / "run" / "run.json").read_text()).get("errors_in_fp8"),
        "memory_limit": memory_limit,
        "tokens_per_second": arguments.tokens_per_step / seconds,
        "step_seconds": seconds,
        "step_seconds_each": [record["step_seconds"] for record in measured],
        "predicted_step_seconds": plan["prediction"]["step_seconds"],
        "peak_bytes": peak,
        "predicted_peak_bytes": predicted,
        "predicted_peak_error": predicted / peak - 1 if peak else None,
        "predicted_device_bytes": plan["prediction"]["peak_bytes"],
        "seconds_from_command_to_first_step_done": first_start,
        "losses": [record["loss"] for record in measured],
        "micro_batch_sequences": plan["micro_batch_sequences"],
        "plan": plan,
    }


ATTEMPTS = (
    dict(compiled=True, recompute=False),
    dict(compiled=True, recompute=True),
    dict(compiled=False, recompute=False),
    dict(compiled=False, recompute=True),
)
"""The ways in which the peer is run: the next where one fails or does not end."""


def peer_step(arguments: argparse.Namespace, *, compiled: bool, recompute: bool) -> dict[str, Any]:
    import peft
    import transformers
    from peft.utils import transformers_weight_conversion
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    config = DeepseekV2Config(**peer_config(arguments.model))
    config._attn_implementation, config._experts_implementation, config.use_cache = "sdpa", "grouped_mm", False
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype) if arguments.device == "cpu" else None
    if model is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = fill(model)
    # PEFT takes shared experts for routed ones where they are named as modules (huggingface/peft#3711).
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=PEER_MODULES,
            target_parameters=list(PEER_PARAMETERS),
        ),
        autocast_adapter_dtype=False,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=arguments.device.startswith("cuda"))
    shape = (arguments.peer_sequences, arguments.sequence_length)
    batches = [torch.randint(config.vocab_size, shape, device=arguments.device) for _ in range(4)]

    def step() -> None:
        for number in range(arguments.peer_micro_batches):
            tokens = batches[number % len(batches)]
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, arguments)
    tokens_of_step = shape[0] * shape[1] * arguments.peer_micro_batches
    return {
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
        "compiled": compiled,
        "recompute": recompute,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "micro_batch_sequences": shape[0],
        "step_seconds": seconds,
        "tokens_per_second": tokens_of_step / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device.startswith("cuda") else 0,
    }


def peer_config(model: str) -> dict[str, Any]:
    """The model's ``config.json`` as transformers' own class takes it, without the checkpoint's code."""
    from moescale.convert.hf_config import read_hf_config, resolve_model

    document = read_hf_config(resolve_model(model))
    document.pop("auto_map", None)
    return document


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights on the GPU for a model on the meta device; its rotary tables are computed again."""
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    model = model.to_empty(device="cuda")
    model.model.rotary_emb = type(rotary)(config=model.config, device="cuda")  # type: ignore[union-attr,assignment]
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def timed(step: Callable[[], None], arguments: argparse.Namespace) -> float:
    """Median seconds of the steps after two of warming up."""
    on_gpu = arguments.device.startswith("cuda")
    seconds = []
    for number in range(WARM_UP_STEPS + arguments.peer_steps):
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peer(folder: Path, left: Callable[[], float]) -> dict[str, Any]:
    """Train the same adapters with transformers and PEFT, in processes of their own: they need the GPU to themselves.

    Compiled in two thirds of the seconds that are left, else as it is; both also with recomputation.
    """
    failures: list[str] = []
    for number, attempt in enumerate(ATTEMPTS):
        output = folder / f"peer-{number}.json"
        seconds = left() * (2 / 3 if attempt["compiled"] else 1)
        if seconds < 20:
            failures.append(f"{attempt}: no time left")
            continue
        result = attempt_apart(__file__, number, output, seconds, {})
        if isinstance(result, dict):
            return result | {"failed_before": failures}
        failures.append(f"{attempt}: {result}")
    return {"error": failures}


def attempt_apart(
    script: str, number: int, output: Path, seconds: float, environment: dict[str, str]
) -> dict[str, Any] | str:
    """Run one way of the peer in a process of its own: its result from ``output``, or the end of what it says."""
    command = [sys.executable, script, *sys.argv[1:], "--peer-to", str(output), "--peer-attempt", str(number)]
    variables = os.environ | environment
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=variables)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    if output.is_file():
        return json.loads(output.read_text())
    return re.sub(r'File "[^"]*/', 'File "', done.stderr)[-600:]


def without_plans(value: Any) -> Any:
    """What is printed of a result: plans are long."""
    if isinstance(value, dict):
        return {key: without_plans(part) for key, part in value.items() if key != "plan"}
    return [without_plans(part) for part in value] if isinstance(value, list) else value


def parser_of_run(description: str | None) -> argparse.ArgumentParser:
    """What is trained on both sides, for how long, and where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-coder-v2-lite")
    parser.add_argument("--cluster", default="h100-sxm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peer-steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=450, help="after which no further part begins")
    parser.add_argument("--data", type=Path, help="a corpus prepared before; default: the standard library's sources")
    parser.add_argument("--peer-to", type=Path, help="run the peer alone, and write its result here")
    parser.add_argument("--peer-attempt", type=int, default=0, help="which of the ways to run the peer")
    parser.add_argument("--output", type=Path)
    return parser


def main() -> None:
    parser = parser_of_run(__doc__)
    parser.add_argument("--base", default="compute", choices=("compute", "fp8"), help="format of the frozen weights")
    parser.add_argument("--memory-limit", default=["48GB"], nargs="+", help="of our runs but the last, in order")
    parser.add_argument("--peer-sequences", type=int, default=1, help="of a micro-batch of the peer's")
    parser.add_argument("--peer-micro-batches", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.peer_to:
        arguments.peer_to.write_text(json.dumps(peer_step(arguments, **ATTEMPTS[arguments.peer_attempt])))
        return
    started = time.monotonic()

    def left() -> float:
        return arguments.seconds - (time.monotonic() - started)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.data or prepare_corpus(folder, arguments.sequence_length)
        print(f"corpus after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        limit, *others = arguments.memory_limit
        first = ours(folder / "limited", corpus, arguments, limit, arguments.base)
        print(f"first run after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        if arguments.base == "fp8":
            peers = {"ours in the compute dtype": ours(folder / "whole", corpus, arguments, limit, "compute")}
        else:
            peers = {"transformers + PEFT": peer(folder, left)}
        print(f"peer after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        other_limits = [
            ours(folder / other, corpus, arguments, other, arguments.base) for other in others if left() > 100
        ]
        unlimited = ours(folder / "unlimited", corpus, arguments, None, arguments.base) if left() > 100 else None
    result = describe_measurement("transformers", "peft") | {
        "model": arguments.model,
        "lora": {"rank": arguments.rank, "targets": TARGETS, "base": arguments.base},
        "sequence_length": arguments.sequence_length,
        "tokens_per_step": arguments.tokens_per_step,
        **first,
        "other_limits": other_limits,
        "without_a_limit": unlimited,
        "peers": peers,
    }
    print(json.dumps(without_plans(result), indent=1))
    if arguments.output:
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
