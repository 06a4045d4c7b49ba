"""Train four of DeepSeek-Coder-V2-Lite's layers on the GPUs at hand by one plan: losses, step time, memory.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --dp-shard 2 --ep 2 [--check-synchronisation]
    torchrun --nproc-per-node 1 benchmarks/ranks.py               # the distributed path at one rank
    python benchmarks/ranks.py                                    # the plain path

Losses are those of the same data whatever the plan. ``--check-synchronisation`` makes any wait of the host for the
GPU in forward and backward, from the fourth step on, an error. ``--output`` adds a line of JSON to a file.
``--device cpu`` takes a small model in fp32 instead. ``--profile`` writes the first rank's GPU time by kernel.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/distributed")]

from step import profile  # noqa: E402

import plans  # noqa: E402
from moescale.runtime import session  # noqa: E402
from moescale.runtime.checkpoint_store import CheckpointStore  # noqa: E402
from moescale.runtime.join import Membership, join_ranks, was_launched  # noqa: E402
from moescale.runtime.mapping import compile_layers, optimizer_format  # noqa: E402
from moescale.runtime.settings import TrainSettings  # noqa: E402
from moescale.runtime.train import Trainer  # noqa: E402
from moescale.tools.measurement import describe_measurement  # noqa: E402
from synchronisation import synchronisation_refused  # noqa: E402
from tiny import tiny_config  # noqa: E402

SIZES = dict(
    vocab_size=32000,
    hidden_size=2048,
    num_layers=4,
    num_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    dense_intermediate_size=10944,
    expert_intermediate_size=1408,
    num_experts=64,
    num_shared_experts=2,
    top_k=6,
    max_sequence_length=2048,
)

SMALL_SIZES = SIZES | dict(
    vocab_size=4096,
    hidden_size=256,
    num_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    dense_intermediate_size=1024,
    expert_intermediate_size=128,
    num_experts=16,
    max_sequence_length=128,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("dp-shard", "dp-replicate", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--check-synchronisation", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with join_ranks(torch.device(arguments.device)) as member:
        train(arguments, member)


def train(arguments: argparse.Namespace, member: Membership) -> None:
    on_gpu = member.device.type == "cuda"
    sizes = SIZES if on_gpu else SMALL_SIZES
    plans.SEQUENCE_LENGTH = sizes["max_sequence_length"]
    config = tiny_config(**sizes)
    axes = {name: getattr(arguments, name) for name in ("dp_shard", "dp_replicate", "ep")}
    plan = plans.make_plan(config, compute_dtype="bf16" if on_gpu else "fp32", **axes)
    placed = session.place_model(config, plan, member.ranks, member.device)
    placed.initialize(seed=0)
    if on_gpu and not arguments.eager:
        compile_layers(placed.model)
    trainer = Trainer(
        model=placed.model,
        settings=TrainSettings(learning_rate=1e-3, warmup_steps=2, cuda_graphs=False, final_checkpoint=False),
        total_steps=arguments.steps,
        source=plans.SyntheticSteps(plan, config.vocab_size),
        store=CheckpointStore(Path(tempfile.gettempdir()) / "never-written", keep=1),
        observer=plans.Recorder(),
        optimizer_format=optimizer_format(plan),
        ranks=member.ranks,
        parts=placed.parts,
        coordinates=placed.coordinates,
        on_progress=member.progress,
    )
    if arguments.check_synchronisation:
        refuse_synchronisation(trainer)
    trainer.train()
    if arguments.profile:
        batches = next(iter(trainer.source))
        if member.ranks.is_first:
            profile(trainer, batches, arguments.profile)
        else:
            trainer.train_step(batches)
    if member.ranks.is_first:
        report(arguments, axes, trainer.observer)


def report(arguments: argparse.Namespace, axes: dict[str, int], recorder: plans.Recorder) -> None:
    on_gpu = arguments.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = describe_measurement() | {
        "path": "distributed" if was_launched() else "plain",
        **axes,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "compiled": on_gpu and not arguments.eager,
        "synchronisation": "refused in forward and backward" if arguments.check_synchronisation else "not checked",
        "step_milliseconds": round(1e3 * statistics.median(m.step_seconds for m in recorder.metrics[4:]), 2),
        "peak_gib_first_rank": round(peak / 2**30, 3),
        "losses": [round(loss, 5) for loss in recorder.losses[::5]],
    }
    print(json.dumps(row), flush=True)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def refuse_synchronisation(trainer: Trainer) -> None:
    run = trainer.micro_batches.run

    def checked(tokens: torch.Tensor, targets: torch.Tensor, *marks: torch.Tensor | None) -> None:
        if trainer.step < 3:  # compilation and tuning may wait
            return run(tokens, targets, *marks)
        tokens, targets = tokens.to(trainer.device), targets.to(trainer.device)
        with synchronisation_refused():
            run(tokens, targets, *marks)

    trainer.micro_batches.run = checked


if __name__ == "__main__":
    main()
