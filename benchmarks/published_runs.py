"""Step times that others have published, as the planner's cost model predicts them: checks out of its sample.

    python benchmarks/published_runs.py --output benchmarks/results/cpu/published_runs.json

One rule for the rates, the same for every row: the shipped ``h100-sxm.toml``, and in it the grouped products that a
source states for itself where it does. Settings are those of the sources, linked below. What a source leaves open is
not chosen but predicted for every plausible value; nothing is fitted. Imports no torch. Prints the table that
``docs/planner.md`` shows.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.plan import MeshShape
from moescale.planner.cluster import Cluster, Rates, load_cluster
from moescale.planner.cost import CostModel, StepTime
from moescale.planner.problem import Problem
from moescale.planner.request import Candidate, Formats, GradientFormat, MomentFormat, PlanRequest, layer_plan
from moescale.planner.workload import build_workload
from moescale.tools.measurement import describe_measurement, write_result
from moescale.tools.reference_table.published import read_published

ROUTER_IMBALANCES = (1.0, 1.1)
"""No source states how even its routing was: balanced, and the planner's default."""
CODER_V2_LITE = read_model_config("deepseek-coder-v2-lite")
MOONLIGHT = read_model_config("moonlight-16b-a3b")
QWEN3 = read_model_config("qwen3-30b-a3b")
H100 = load_cluster("h100-sxm")
Exchange = Literal["beside shared experts", "beside other micro-batches", "by itself"]
EQUIVALENT_TOKENS_PER_GPU = 131072 // 8
"""The common measure: seconds in which 8 GPUs take 131,072 tokens."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The settings of a run, one value for each that the source does not state."""

    assumed: str
    """What the source does not state, in words; empty where it states all."""
    mesh: MeshShape
    sequence_length: int
    micro_batch_sequences: int
    gradient_accumulation_steps: int
    recompute: Literal["none", "experts", "block"]
    moments: MomentFormat
    gradients: GradientFormat
    exchange: Exchange = "beside shared experts"
    """What the experts' all-to-all runs beside; the first is what the planner assumes of its own runtime."""

    @property
    def tokens_per_step(self) -> int:
        sequences = self.micro_batch_sequences * self.gradient_accumulation_steps
        return sequences * self.sequence_length * self.mesh.dp_replicate * self.mesh.dp_shard

    @property
    def gpus(self) -> int:
        return self.mesh.dp_replicate * self.mesh.dp_shard


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A measured run of others."""

    name: str
    source: str
    config: ModelConfig
    cluster: Cluster
    published_seconds: float
    """Of one of its own optimizer steps."""
    variants: tuple[Variant, ...]


def rates_of_times(rows: tuple[tuple[int, int, float, float], ...], config: ModelConfig) -> Rates:
    """Rates of grouped products from published times: (tokens, experts, forward ms, backward ms).

    Rows with as many rows per expert are taken together, their FLOPs over their times.
    """
    totals: dict[float, tuple[float, float]] = {}
    for tokens, experts, forward, backward in rows:
        size = tokens * config.top_k / experts
        flops = 3 * 2 * 3 * tokens * config.top_k * config.hidden_size * config.expert_intermediate_size
        before = totals.get(size, (0.0, 0.0))
        totals[size] = before[0] + flops, before[1] + (forward + backward) * 1e-3
    return Rates(
        sizes=tuple(sorted(totals)),
        flops_per_second=tuple(totals[size][0] / totals[size][1] for size in sorted(totals)),
    )


NNSCALER = read_published()
REFERENCE_TIMES = tuple(
    (row.tokens, row.num_experts, row.forward_ms, row.backward_ms) for row in NNSCALER.grouped_gemm.rows
)

REFERENCE = PublishedRun(
    name="nnScaler's example, 8 x H100",
    source=NNSCALER.source,
    config=CODER_V2_LITE,
    cluster=dataclasses.replace(H100, grouped_gemm=rates_of_times(REFERENCE_TIMES, CODER_V2_LITE)),
    published_seconds=NNSCALER.step.seconds,
    variants=tuple(
        Variant(
            assumed=f"recompute {recompute}, ep {ep}",
            # A micro-batch of 4 sequences over the 4 GPUs of a copy is 1 for each.
            mesh=MeshShape(dp_replicate=2, dp_shard=4, ep=ep),
            sequence_length=2048,
            micro_batch_sequences=1,
            gradient_accumulation_steps=8,
            recompute=recompute,
            moments="fp32",
            gradients="bf16",
        )
        for recompute in ("none", "block")
        for ep in (1, 2, 4)
    ),
)  # fmt: skip

TORCHTITAN = PublishedRun(
    name="TorchTitan 16B, 8 x H100",
    # 11,254 to 11,758 tokens/s per GPU; 10 steps in 13.9 to 14.6 s by the log's clock, so 16,384 tokens per GPU a step.
    source="https://github.com/pytorch/torchtitan/issues/1789",
    config=CODER_V2_LITE,
    cluster=H100,
    published_seconds=16384 / ((11254 + 11758) / 2),
    variants=tuple(
        Variant(
            assumed=f"recompute {recompute}",
            mesh=MeshShape(dp_shard=8, ep=8),
            sequence_length=4096,
            micro_batch_sequences=4,
            gradient_accumulation_steps=1,
            recompute=recompute,
            moments="fp32",
            gradients="fp32",
        )
        for recompute in ("none", "experts", "block")
    ),
)  # fmt: skip

MEGATRON_CARD = "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/examples/model_verification_cards/moonlight-16b-a3b/card.yaml"
MEGATRON_PRETRAINING = PublishedRun(
    name="Megatron-Bridge Moonlight, pre-training, 16 x H100",
    source=MEGATRON_CARD,
    config=MOONLIGHT,
    cluster=H100,
    published_seconds=11.63635,
    variants=(
        Variant(
            assumed="",
            mesh=MeshShape(dp_replicate=2, dp_shard=8, ep=8),
            sequence_length=4096,
            micro_batch_sequences=2,
            gradient_accumulation_steps=32,
            recompute="none",
            moments="bf16",
            gradients="bf16",
            exchange="beside other micro-batches",
        ),
    ),
)
MEGATRON_FINE_TUNING = PublishedRun(
    name="Megatron-Bridge Moonlight, fine-tuning, 8 x H100",
    source=MEGATRON_CARD,
    config=MOONLIGHT,
    cluster=H100,
    published_seconds=0.56214,
    variants=tuple(
        Variant(
            assumed=f"documents of {length} tokens",
            mesh=MeshShape(dp_shard=8, ep=8),
            # A pack of 8,192 tokens holds 21.55 documents on average; how their lengths vary is not stated.
            sequence_length=length,
            micro_batch_sequences=8192 // length,
            gradient_accumulation_steps=1,
            recompute="none",
            moments="bf16",
            gradients="bf16",
            exchange="by itself",  # one micro-batch a step, and overlap with shared experts is off
        )
        for length in (512, 8192)
    ),
)  # fmt: skip
QWEN3_CARD = (
    "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/examples/model_verification_cards/qwen3-30b-a3b/card.yaml"
)


def _qwen3_pretraining(name: str, seconds: float, exchange: Exchange) -> PublishedRun:
    """Sixteen ranks in one group of experts, one sequence of 4,096 tokens a micro-batch, 64 of them a step."""
    return PublishedRun(
        name=name,
        source=QWEN3_CARD,
        config=QWEN3,
        cluster=H100,
        published_seconds=seconds,
        variants=tuple(
            Variant(
                assumed=f"recompute {recompute}",
                mesh=MeshShape(dp_shard=16, ep=16),
                sequence_length=4096,
                micro_batch_sequences=1,
                gradient_accumulation_steps=64,
                recompute=recompute,
                moments="fp32",
                gradients="fp32",
                exchange=exchange,
            )
            for recompute in ("none", "experts")
        ),
    )  # fmt: skip


RUNS = (
    REFERENCE,
    TORCHTITAN,
    MEGATRON_PRETRAINING,
    MEGATRON_FINE_TUNING,
    _qwen3_pretraining("Megatron-Bridge Qwen3-30B-A3B, natural routing, 16 x H100", 30.28955, "by itself"),
    _qwen3_pretraining(
        "Megatron-Bridge Qwen3-30B-A3B, tuned, routing forced even, 16 x H100", 20.14729, "beside other micro-batches"
    ),
)


def predict(run: PublishedRun, variant: Variant, router_imbalance: float) -> float:
    """Seconds of a step of ``run`` with the settings of ``variant``."""
    workload = build_workload(run.config)
    request = PlanRequest(
        runtime_gpus=variant.gpus,
        tokens_per_step=variant.tokens_per_step,
        sequence_length=variant.sequence_length,
        router_imbalance=router_imbalance,
    )
    candidate = Candidate(
        mesh=variant.mesh,
        micro_batch_sequences=variant.micro_batch_sequences,
        gradient_accumulation_steps=variant.gradient_accumulation_steps,
        layers=tuple(
            layer_plan(
                kind.name, "none" if variant.recompute == "experts" and not kind.is_routed else variant.recompute, False
            )
            for kind in workload.layers
        ),
        formats=Formats(
            optimizer_state_dtype=variant.moments,
            master_weight_format="fp32",
            gradient_dtype=variant.gradients,
            offload_optimizer=False,
        ),
    )
    time = CostModel(Problem(workload, run.cluster, request)).step(candidate)
    return time.total + _exchange_correction(time, variant)


def _exchange_correction(time: StepTime, variant: Variant) -> float:
    """Seconds by which a step differs where the exchange does not run beside the shared experts."""
    if variant.exchange == "beside other micro-batches":
        return -time.exposed.get("communication ep", 0.0)
    if variant.exchange == "by itself":
        return time.hidden.get("communication ep", 0.0)
    return 0.0


def rows() -> list[dict[str, Any]]:
    """One row for each run and each combination of what its source leaves open."""
    found = []
    for run in RUNS:
        for variant in run.variants:
            tokens_per_gpu = variant.tokens_per_step / variant.gpus
            for imbalance in ROUTER_IMBALANCES if variant.mesh.ep > 1 else (1.0,):
                seconds = predict(run, variant, imbalance)
                found.append(
                    {
                        "run": run.name,
                        "source": run.source,
                        "assumed": variant.assumed,
                        "router_imbalance": imbalance,
                        "tokens_per_step": variant.tokens_per_step,
                        "gpus": variant.gpus,
                        "predicted_seconds": seconds,
                        "published_seconds": run.published_seconds,
                        "predicted_equivalent_seconds": seconds * EQUIVALENT_TOKENS_PER_GPU / tokens_per_gpu,
                        "published_equivalent_seconds": run.published_seconds
                        * EQUIVALENT_TOKENS_PER_GPU
                        / tokens_per_gpu,
                        "error": seconds / run.published_seconds - 1,
                    }
                )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in equivalent seconds; balanced and unbalanced routing side by side."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        grouped.setdefault((row["run"], row["assumed"]), []).append(row)
    lines = [
        "| run | not stated, assumed | predicted, routing even / 10% off | published | error |",
        "|---|---|---|---|---|",
    ]
    for (run, assumed), group in grouped.items():
        predicted = " / ".join(f"{row['predicted_equivalent_seconds']:.2f}" for row in group)
        error = " / ".join(f"{row['error']:+.0%}" for row in group)
        published = f"{group[0]['published_equivalent_seconds']:.2f}"
        lines.append(f"| {run} | {assumed or 'nothing else'} | {predicted} | {published} | {error} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = rows()
    print(table(found))
    if arguments.output:
        document = {"cluster": H100.name, "cluster_fingerprint": H100.fingerprint(), "rows": found}
        write_result(arguments.output, describe_measurement() | document)


if __name__ == "__main__":
    main()
