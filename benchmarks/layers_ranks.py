"""Time nine of DeepSeek-Coder-V2-Lite's layers on the GPUs at hand, 4,096 tokens a GPU and micro-batch.

    python benchmarks/layers_ranks.py                                       # one GPU
    torchrun --nproc-per-node 2 benchmarks/layers_ranks.py --ep 2           # two

Prints one line of JSON: milliseconds of a micro-batch, the update of its step included (four micro-batches a step).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from step import RandomSteps, Silent

from moescale.convert.hf_config import read_model_config
from moescale.plan import MeshShape, ParallelPlan
from moescale.runtime import session
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.join import join_ranks
from moescale.runtime.mapping import compile_layers, optimizer_format
from moescale.runtime.settings import TrainSettings
from moescale.runtime.train import Trainer
from moescale.tools.measurement import describe_measurement

MICRO_BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--micro-batch-sequences", type=int, default=2)
    arguments = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = dataclasses.replace(read_model_config("deepseek-coder-v2-lite"), num_layers=arguments.layers)
    plan = ParallelPlan(
        model_fingerprint=config.fingerprint(),
        cluster_fingerprint="",
        plan_gpus=ranks,
        runtime_gpus=ranks,
        mesh=MeshShape(dp_shard=ranks, ep=arguments.ep),
        sequence_length=2048,
        tokens_per_step=2048 * arguments.micro_batch_sequences * MICRO_BATCHES * ranks,
        micro_batch_sequences=arguments.micro_batch_sequences,
        gradient_accumulation_steps=MICRO_BATCHES,
        layers=(),
        compute_dtype="bf16",
        optimizer_state_dtype="int8",
        master_weight_format="bf16_remainder",
        gradient_dtype="bf16",
        dense_sharding="zero1",
    )
    with join_ranks(torch.device("cuda")) as member:
        placed = session.place_model(config, plan, member.ranks, member.device)
        placed.initialize(seed=0)
        compile_layers(placed.model)
        source = RandomSteps(plan, config.vocab_size)
        trainer = Trainer(
            model=placed.model,
            settings=TrainSettings(learning_rate=1e-5, final_checkpoint=False),
            total_steps=1000,
            source=source,
            store=CheckpointStore(Path(tempfile.gettempdir()) / "never-written", keep=1),
            observer=Silent(),
            optimizer_format=optimizer_format(plan),
            ranks=member.ranks,
            parts=placed.parts,
            coordinates=placed.coordinates,
            on_progress=member.progress,
        )
        for _ in range(2):
            trainer.train_step(source.step())
        seconds = [trainer.train_step(source.step()).step_seconds for _ in range(5)]
        if member.ranks.is_first:
            row = describe_measurement() | {
                "ranks": ranks,
                "ep": arguments.ep,
                "milliseconds_per_micro_batch": 1e3 * statistics.median(seconds) / MICRO_BATCHES,
                "tokens_per_second_per_gpu": plan.tokens_per_step / statistics.median(seconds) / ranks,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
