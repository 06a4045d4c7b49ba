"""Train a small MoE on the GPUs at hand by one plan: losses, step time, memory, and host synchronisations.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --dp-shard 2 --ep 2 [--check-synchronisation]
    torchrun --nproc-per-node 1 benchmarks/ranks.py               # the distributed path at one rank
    python benchmarks/ranks.py                                    # the plain path

Losses are those of the same data whatever the plan. ``--check-synchronisation`` makes any wait of the host for the
GPU in forward and backward, from the fourth step on, an error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/distributed")]

import plans  # noqa: E402
from moescale.runtime import session  # noqa: E402
from moescale.runtime.checkpoint import CheckpointStore  # noqa: E402
from moescale.runtime.launch import Membership, join_ranks  # noqa: E402
from moescale.runtime.mapping import optimizer_format  # noqa: E402
from moescale.runtime.settings import TrainSettings  # noqa: E402
from moescale.runtime.train import Trainer  # noqa: E402
from tiny import tiny_config  # noqa: E402

SIZES = dict(
    vocab_size=32000,
    hidden_size=1024,
    num_layers=8,
    num_heads=8,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    dense_intermediate_size=4096,
    expert_intermediate_size=704,
    num_experts=32,
    num_shared_experts=2,
    top_k=6,
    max_sequence_length=1024,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("dp-shard", "dp-replicate", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--check-synchronisation", action="store_true")
    arguments = parser.parse_args()
    with join_ranks(torch.device("cuda")) as member:
        train(arguments, member)


def train(arguments: argparse.Namespace, member: Membership) -> None:
    plans.SEQUENCE_LENGTH = SIZES["max_sequence_length"]
    config = tiny_config(**SIZES)
    axes = {name: getattr(arguments, name) for name in ("dp_shard", "dp_replicate", "ep")}
    plan = plans.make_plan(config, compute_dtype="bf16", **axes)
    placed = session.place_model(config, plan, member.ranks, member.device)
    placed.initialize(seed=0)
    trainer = Trainer(
        model=placed.model,
        settings=TrainSettings(learning_rate=1e-3, warmup_steps=2, cuda_graphs=False),
        total_steps=arguments.steps,
        source=plans.SyntheticSteps(plan, config.vocab_size),
        store=CheckpointStore(Path(tempfile.gettempdir()) / "never-written", keep=1),
        observer=plans.Recorder(),
        optimizer_format=optimizer_format(plan),
        ranks=member.ranks,
        parts=placed.parts,
        on_progress=member.progress,
    )
    trainer._save = lambda: None
    if arguments.check_synchronisation:
        refuse_synchronisation(trainer)
    trainer.train()
    if member.ranks.is_first:
        times = [metrics.step_seconds for metrics in trainer.observer.metrics[4:]]
        losses = ", ".join(f"{loss:.4f}" for loss in trainer.observer.losses[::5])
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{axes}: {1e3 * statistics.median(times):.1f} ms a step, {peak:.2f} GiB; losses {losses}", flush=True)


def refuse_synchronisation(trainer: Trainer) -> None:
    run = trainer.micro_batches.run

    def checked(tokens: torch.Tensor, targets: torch.Tensor, document_ids: torch.Tensor | None) -> None:
        if trainer.step < 3:  # compilation and tuning may wait
            return run(tokens, targets, document_ids)
        tokens, targets = tokens.to(trainer.device), targets.to(trainer.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(tokens, targets, document_ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.micro_batches.run = checked


if __name__ == "__main__":
    main()
