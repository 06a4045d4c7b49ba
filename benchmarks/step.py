"""The whole training step on one GPU: tokens/s, peak memory, and where the time goes.

    python benchmarks/step.py --model deepseek-coder-v2-lite --output step.json --profile profile.txt

Random weights of the public configuration and random tokens; forward, backward, gradient norm and optimizer, through
the same trainer, plan and kernels as `moescale run`. Nothing is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.models.flops import flops_per_token, peak_flops
from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.plan import LayerPlan, ParallelPlan, one_device_plan
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.mapping import apply_plan, compile_layers, optimizer_format
from moescale.runtime.settings import TrainSettings
from moescale.runtime.train import Trainer
from moescale.tools.measurement import describe_measurement, write_result


@dataclasses.dataclass
class RandomBatch:
    tokens: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    document_starts: torch.Tensor | None = None
    padding: torch.Tensor | None = None


class RandomSteps:
    """Steps of random tokens: micro-batches as the plan cuts them."""

    def __init__(self, plan: ParallelPlan, vocab_size: int) -> None:
        self.plan = plan
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(0)

    def step(self, micro_batches: int | None = None) -> list[RandomBatch]:
        shape = (self.plan.micro_batch_sequences, self.plan.sequence_length)
        batches = []
        for _ in range(micro_batches or self.plan.gradient_accumulation_steps):
            tokens = torch.randint(self.vocab_size, shape, generator=self.generator)
            targets = torch.cat([tokens[:, 1:], torch.full((shape[0], 1), -100)], dim=1)
            batches.append(RandomBatch(tokens.pin_memory(), targets.pin_memory(), torch.arange(shape[0])))
        return batches

    def __iter__(self) -> Any:
        while True:
            yield self.step()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a benchmark is not resumed")


class Silent:
    """An observer that shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def make_plan(config: ModelConfig, arguments: argparse.Namespace) -> ParallelPlan:
    micro_batch_tokens = arguments.micro_batch_sequences * arguments.sequence_length
    plan = one_device_plan(
        config,
        sequence_length=arguments.sequence_length,
        micro_batch_sequences=arguments.micro_batch_sequences,
        gradient_accumulation_steps=arguments.tokens_per_step // micro_batch_tokens,
        compute_dtype="bf16",
    )
    return dataclasses.replace(
        plan,
        layers=tuple(LayerPlan(kind=kind, recompute=arguments.recompute) for kind in ("dense", "moe")),
        optimizer_state_dtype=arguments.optimizer_state,
        master_weight_format=arguments.master_weights,
        gradient_dtype=arguments.gradients,
    )


def build(config: ModelConfig, plan: ParallelPlan, compiled: bool) -> tuple[Trainer, Transformer]:
    model = build_on_meta(config, torch.bfloat16).to_empty(device="cuda")
    initialize(model, seed=0)
    apply_plan(model, plan)
    if compiled:
        compile_layers(model)
    trainer = Trainer(
        model=model,
        settings=TrainSettings(learning_rate=1e-5),
        total_steps=1000,
        source=RandomSteps(plan, config.vocab_size),
        store=CheckpointStore(Path("never-written"), 1),
        observer=Silent(),
        optimizer_format=optimizer_format(plan),
    )
    return trainer, model


def forward_backward_seconds(trainer: Trainer, batches: list[RandomBatch]) -> float:
    """Seconds of a step's micro-batches alone, gradients added up, without norm and update."""
    num_targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
    torch.cuda.synchronize()
    started = time.perf_counter()
    trainer.micro_batches.start_step(num_targets=num_targets, num_micro_batches=len(batches))
    for batch in batches:
        trainer.micro_batches.run(batch.tokens, batch.targets)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def profile(trainer: Trainer, batches: list[RandomBatch], path: Path) -> None:
    """GPU time by kernel over one short step, as a table with totals and shares."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        trainer.train_step(batches)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = sorted(
        (e for e in recorded.events() if e.device_type == on_gpu and not e.is_user_annotation),
        key=lambda kernel: kernel.time_range.start,
    )
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        totals[kernel.name][0] += kernel.device_time_total / 1e3
        totals[kernel.name][1] += 1
    busy = sum(milliseconds for milliseconds, _ in totals.values())
    span = (max(kernel.time_range.end for kernel in kernels) - kernels[0].time_range.start) / 1e3
    rows = sorted(totals.items(), key=lambda item: -item[1][0])
    lines = [f"{len(batches)} micro-batches and one update: {span:.1f} ms, GPU busy {busy:.1f} ms"]
    lines += [f"{milliseconds:9.2f} ms {count:6d} x  {name[:150]}" for name, (milliseconds, count) in rows[:110]]
    gaps = sorted(
        ((b.time_range.start - a.time_range.end) / 1e3, a.name[:60], b.name[:60])
        for a, b in itertools.pairwise(kernels)
        if b.time_range.start > a.time_range.end
    )
    lines.append(f"gaps: {sum(gap for gap, *_ in gaps):.1f} ms in all; the longest, with the kernels around them:")
    lines += [f"{gap:9.2f} ms  {before}  ->  {after}" for gap, before, after in reversed(gaps[-12:])]
    lines[1:1] = _collectives(kernels)
    path.write_text("\n".join(lines) + "\n")


def _collectives(kernels: list[Any]) -> list[str]:
    """How long collectives took, and for how much of that nothing else ran; ``kernels`` in order of their start."""
    total = alone = 0.0
    others = [kernel.time_range for kernel in kernels if "nccl" not in kernel.name]
    for kernel in kernels:
        if "nccl" in kernel.name:
            start, end = kernel.time_range.start, kernel.time_range.end
            total += end - start
            for other in others:
                if other.end > start and other.start < end:
                    alone += max(0.0, other.start - start)
                    start = max(start, other.end)
            alone += max(0.0, end - start)
    return [f"collectives: {total / 1e3:.1f} ms, for {alone / 1e3:.1f} ms of which nothing else ran"] if total else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-coder-v2-lite")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch-sequences", type=int, default=4)
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--recompute", choices=("none", "block"), default="none")
    parser.add_argument("--optimizer-state", choices=("fp32", "bf16", "int8"), default="int8")
    parser.add_argument(
        "--master-weights", choices=("fp32", "bf16_remainder", "stochastic_bf16"), default="bf16_remainder"
    )
    parser.add_argument("--gradients", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = read_model_config(arguments.model)
    if arguments.layers:
        config = dataclasses.replace(config, num_layers=arguments.layers)
    plan = make_plan(config, arguments)
    started = time.perf_counter()
    trainer, _ = build(config, plan, not arguments.eager)
    torch.cuda.synchronize()
    built = time.perf_counter()
    source: Any = trainer.source
    trainer.train_step(source.step(2))  # the second micro-batch is recorded as a CUDA graph
    warm = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    measured = [trainer.train_step(source.step()) for _ in range(arguments.steps)]
    seconds = [metrics.step_seconds for metrics in measured]
    mean = statistics.mean(seconds)
    rate = plan.tokens_per_step / mean
    without_update = statistics.mean(forward_backward_seconds(trainer, source.step()) for _ in range(3))
    result = describe_measurement() | {
        "model": arguments.model,
        "layers": config.num_layers,
        "tokens_per_second": rate,
        "step_seconds": mean,
        "step_seconds_each": seconds,
        "forward_backward_tokens_per_second": plan.tokens_per_step / without_update,
        "mfu": rate * flops_per_token(config, plan.sequence_length) / (peak_flops(torch.device("cuda")) or 1),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "build_seconds": built - started,
        "first_step_seconds": warm - built,
        "losses": [metrics.loss for metrics in measured],
        "gradient_norms": [metrics.gradient_norm for metrics in measured],
        "plan": json.loads(plan.to_json()),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "plan"}, indent=1))
    if arguments.output:
        write_result(arguments.output, result)
    if arguments.profile:
        profile(trainer, source.step(2), arguments.profile)


if __name__ == "__main__":
    main()
