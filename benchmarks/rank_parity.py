"""Compare losses and every gradient of a model on several GPUs with one GPU's, under natural and skewed routing.

    torchrun --nproc-per-node 2 benchmarks/rank_parity.py [--ep 2] [--dense-sharding zero1] [--gemms fp8]
        [--output parity.json]

Three of DeepSeek-Coder-V2-Lite's layers, bf16, 16 sequences a step. Both are compared with fp32 on one GPU, which every
rank works out for itself: several GPUs in bf16 may be twice as far from it as one GPU in bf16 is, and so with GEMMs in
fp8 on both. The routing is natural; ``skewed`` (one expert of 64 gets ten times its share), ``one rank`` (all rows to
the first rank's experts), ``one expert`` (top-1, all tokens). Forward and backward run with torch's synchronisation
debug mode set to error from the third micro-batch on, also unrecorded, and the time of a micro-batch is that of its
replayed graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/distributed", "benchmarks")]

from ranks import SIZES  # noqa: E402

import moescale.models.blocks.moe as moe  # noqa: E402
import plans  # noqa: E402
from moescale.runtime import session  # noqa: E402
from moescale.runtime.checkpoint_store import CheckpointStore  # noqa: E402
from moescale.runtime.join import Membership, join_ranks  # noqa: E402
from moescale.runtime.mapping import compile_layers, optimizer_format  # noqa: E402
from moescale.runtime.ranks import ONE_RANK, Ranks  # noqa: E402
from moescale.runtime.settings import TrainSettings  # noqa: E402
from moescale.runtime.train import Trainer  # noqa: E402
from moescale.tools.measurement import describe_measurement, write_result  # noqa: E402
from synchronisation import synchronisation_refused  # noqa: E402
from tiny import tiny_config  # noqa: E402

ROUTINGS = ("natural", "skewed", "one rank", "one expert")
SEQUENCE_LENGTH = 2048

router_logits = moe.router_logits

# Of each parameter: where a rank's part lies, and its gradient.
Gradients = dict[str, tuple[tuple[slice, ...], torch.Tensor]]


def bias_of(routing: str, num_experts: int, ranks: int) -> torch.Tensor:
    bias = torch.zeros(num_experts, device="cuda")
    if routing == "one rank":
        bias[: num_experts // ranks] = 100.0
    elif routing == "one expert":
        bias[3] = 100.0
    elif routing == "skewed":
        bias[3] = 100.0  # every token, that is 64 / 6 = 10.7 times an expert's share
    return bias


def make_trainer(
    routing: str, member: Membership, ranks: Ranks, dtype: str, accumulation: int, arguments: argparse.Namespace
) -> Trainer:
    plans.SEQUENCE_LENGTH, plans.SEQUENCES_PER_STEP = SEQUENCE_LENGTH, 16
    top_k = 1 if routing == "one expert" else 6
    config = tiny_config(**SIZES | dict(num_layers=3, top_k=top_k))
    world = member.ranks.size if ranks.size > 1 else 1
    axes: dict[str, Any] = {"dp_shard": world, "ep": arguments.ep if world > 1 else 1}
    plan = plans.make_plan(
        config,
        compute_dtype=dtype,
        dense_sharding=arguments.dense_sharding,
        accumulation=accumulation,
        **(dict(expert_gemms=arguments.gemms, dense_gemms=arguments.gemms) if dtype == "bf16" else {}),
        **axes,
    )
    bias = bias_of(routing, SIZES["num_experts"], member.ranks.size)
    moe.router_logits = lambda x, weight: router_logits(x, weight) + bias
    torch._dynamo.reset()
    placed = session.place_model(config, plan, ranks, member.device)
    placed.initialize(seed=0)
    with torch.no_grad():
        for parameter in placed.model.parameters():
            parameter.copy_(parameter.bfloat16())  # the same weights in fp32
    compile_layers(placed.model)
    source = plans.SyntheticSteps(plan, config.vocab_size, place=placed.coordinates)
    return Trainer(
        model=placed.model,
        settings=TrainSettings(learning_rate=1e-4, final_checkpoint=False),
        total_steps=1000,
        source=source,
        store=CheckpointStore(Path(tempfile.gettempdir()) / "never-written", keep=1),
        observer=plans.Recorder(),
        optimizer_format=optimizer_format(plan),
        ranks=ranks,
        parts=placed.parts,
        coordinates=placed.coordinates,
        on_progress=member.progress,
    )


def first_gradients(trainer: Trainer) -> tuple[float, Gradients]:
    """Loss and gradients of the first step, before its update: of each parameter the part that this rank updates."""
    found: Gradients = {}
    optimizer = trainer.optimizer

    def keep(learning_rate: float, norm: torch.Tensor) -> None:
        for name in optimizer.parameters:
            found[name] = (optimizer.parts[name].index, optimizer.gradient(name).float().clone())
        optimizer.zero_gradients()

    step, optimizer.step = optimizer.step, keep  # type: ignore[method-assign]
    metrics = trainer.train_step(next(iter(trainer.source)))
    optimizer.step = step  # type: ignore[method-assign]
    return metrics.loss, found


def time_of_micro_batch(trainer: Trainer, repeats: int = 5) -> float:
    """Milliseconds of a replayed or repeated micro-batch."""
    batches = next(iter(trainer.source))
    trainer.micro_batches.start_step(num_targets=1, num_micro_batches=1)
    batch = batches[0]
    for _ in range(3):
        trainer.micro_batches.run(batch.tokens, batch.targets)
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(repeats):
        trainer.micro_batches.run(batch.tokens, batch.targets)
    torch.cuda.synchronize()
    return 1e3 * (time.monotonic() - started) / repeats


def refuse_waits(trainer: Trainer) -> None:
    """Run unrecorded micro-batches with any wait of the host for the GPU an error."""
    batch = next(iter(trainer.source))[0]
    inputs = {"tokens": batch.tokens.cuda(), "targets": batch.targets.cuda()}
    trainer.micro_batches._run(inputs)
    torch.cuda.synchronize()
    with synchronisation_refused():
        trainer.micro_batches._run(inputs)
    torch.cuda.synchronize()
    trainer.optimizer.zero_gradients()


def distances(gradients: Gradients, reference: Gradients) -> dict[str, tuple[float, float, int]]:
    """Of this rank's part of every gradient: squared distance from the reference, its squared norm, elements."""
    found = {}
    for name, (index, value) in gradients.items():
        expected = reference[name][1][index]
        found[name] = (float((value - expected).square().sum()), float(expected.square().sum()), value.numel())
    return found


def errors(ranks: list[dict[str, tuple[float, float, int]]], reference: Gradients) -> dict[str, float]:
    """Relative distance of every gradient from the reference, not a number where the ranks do not cover it once."""
    found = {}
    for name, (_, value) in reference.items():
        squares, norms, elements = map(sum, zip(*(rank[name] for rank in ranks if name in rank), strict=True))
        found[name] = (squares / max(norms, 1e-40)) ** 0.5 if elements == value.numel() else float("nan")
    return found


def summary(several: dict[str, float], alone: dict[str, float]) -> dict[str, Any]:
    """The largest ratio of errors, with its parameter, and the largest error of each."""
    ratios = {name: several[name] / max(alone[name], 1e-12) for name in several}
    worst = max(ratios, key=lambda name: ratios[name] if ratios[name] == ratios[name] else float("inf"))
    return {
        "largest_ratio": ratios[worst],
        "parameter": worst,
        "its_errors": [several[worst], alone[worst]],
        "largest": max(several.values()),
        "largest_alone": max(alone.values()),
    }


def free(trainer: Trainer) -> None:
    """Give back what a trainer holds; a graph and hooks of the optimizer refer to each other."""
    trainer.micro_batches.forget()
    for parameter in trainer.optimizer.parameters.values():
        parameter.data = parameter.data.new_empty(0)
    for kept in (trainer.optimizer._gradients, trainer.optimizer.states, trainer.optimizer.weights):
        kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--dense-sharding", default="zero1")
    parser.add_argument("--gemms", choices=("compute", "fp8"), default="compute")
    parser.add_argument("--routings", nargs="*", default=ROUTINGS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with join_ranks(torch.device("cuda")) as member:
        for routing in arguments.routings:
            began = time.monotonic()
            trainer = make_trainer(routing, member, member.ranks, "bf16", 4, arguments)
            loss, mine = first_gradients(trainer)
            recorded = trainer.micro_batches._graph is not None
            if arguments.dense_sharding == "zero1":
                refuse_waits(trainer)
            milliseconds = time_of_micro_batch(trainer)
            peak = torch.cuda.max_memory_allocated()
            free(trainer)
            row = {"routing": routing, "recorded": recorded, "milliseconds": milliseconds, "peak_gib": peak / 2**30}
            alone = {}
            for dtype in ("fp32", "bf16"):
                trainer = make_trainer(routing, member, ONE_RANK, dtype, 8, arguments)
                alone[dtype] = first_gradients(trainer)
                if dtype == "bf16":
                    row["milliseconds_alone"] = time_of_micro_batch(trainer)
                free(trainer)
            reference = alone["fp32"][1]
            of_ranks = member.ranks.gather(distances(mine, reference))
            row |= {
                "loss": loss,
                "loss_alone": alone["bf16"][0],
                "loss_fp32": alone["fp32"][0],
                "gradient_errors": summary(
                    errors(of_ranks, reference),
                    errors([distances(alone["bf16"][1], reference)], reference),
                ),
            }
            del mine, alone, reference
            rows.append(row)
            if member.ranks.is_first:
                print(json.dumps(row | {"seconds": time.monotonic() - began}), flush=True)
    if member.ranks.is_first and arguments.output:
        write_result(
            arguments.output, describe_measurement() | {"ep": arguments.ep, "gemms": arguments.gemms, "rows": rows}
        )


if __name__ == "__main__":
    main()
