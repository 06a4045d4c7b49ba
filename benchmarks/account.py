"""Where a step's time goes, and what lies between it and its arithmetic at a given rate: an account that adds up.

    python benchmarks/account.py benchmarks/results/h200/step-profile.txt --step benchmarks/results/h200/step.json

Reads the table of kernels that ``benchmarks/step.py --profile`` writes (two micro-batches and one update), sorts the
kernels by what they serve, and sets each kind's time beside its FLOPs at ``--rate``, which a dense expert through
cuBLAS reaches. Milliseconds are of one micro-batch; the update is shared out over the step's micro-batches.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from moescale.convert.hf_config import read_model_config
from moescale.models.flops import flops_per_token

PROFILED_MICRO_BATCHES = 2
KINDS: tuple[tuple[str, str], ...] = (
    ("experts: products, SwiGLU", r"_rows_kernel|_weight_gradient_kernel|_up_kernel|_swiglu_backward_kernel|quack"),
    ("experts: gather, combine", r"_gather_kernel|_combine_kernel"),
    ("update: AdamW, gradient norm, clearing", r"_adamw_kernel|LpNorm|FillFunctor<c10::BFloat16>|lpnorm"),
    ("attention", r"cudnn|flash_attn"),
    ("dense products", r"nvjet|splitK"),
    ("loss: softmax", r"_softmax_kernel|_scale_kernel"),
    ("norms, RoPE, SwiGLU outside the experts", r"_forward_kernel|_backward_kernel|reduce_kernel"),
    ("dense gradients into their buffers", r"CUDAFunctor_add<c10::BFloat16>"),
    ("residuals and casts (compiled)", r"triton_poi|bfloat16_copy"),
)
OTHER = "router and everything else"
LINE = re.compile(r"^\s*([\d.]+) ms\s+(\d+) x\s+(.*)$")


def read_profile(path: Path) -> dict[str, float]:
    """Milliseconds by kind, of everything profiled."""
    kinds = dict.fromkeys([*(name for name, _ in KINDS), OTHER, "gaps"], 0.0)
    for line in path.read_text().splitlines():
        if line.startswith("gaps:"):
            kinds["gaps"] = float(line.split()[1])
            break
        match = LINE.match(line)
        if match:
            milliseconds, _, kernel = match.groups()
            name = next((name for name, pattern in KINDS if re.search(pattern, kernel)), OTHER)
            kinds[name] += float(milliseconds)
    return kinds


def micro_batch_flops(tokens: int, sequence_length: int) -> dict[str, float]:
    """FLOPs, forward and backward, of the kinds that have any."""
    config = read_model_config("deepseek-coder-v2-lite")
    per_token = config.num_moe_layers * 18.0 * config.top_k * config.hidden_size * config.expert_intermediate_size
    attention = flops_per_token(config, sequence_length) - flops_per_token(config, 0)
    dense = flops_per_token(config, 0) - per_token
    figures = {KINDS[0][0]: per_token, "attention": attention, "dense products": dense}
    return {name: flops * tokens for name, flops in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--step", type=Path, required=True, help="result of benchmarks/one_gpu.py")
    parser.add_argument("--rate", type=float, default=650e12, help="FLOP/s")
    arguments = parser.parse_args()
    step = json.loads(arguments.step.read_text())
    plan = step["plan"]
    micro_batches = plan["gradient_accumulation_steps"]
    tokens = plan["micro_batch_sequences"] * plan["sequence_length"]
    flops = micro_batch_flops(tokens, plan["sequence_length"])
    print("| | ms | TFLOP | TFLOP/s | ms at the rate | lost, ms |\n|---|---|---|---|---|---|")
    total = ideal = 0.0
    for name, milliseconds in read_profile(arguments.profile).items():
        once_a_step = name.startswith("update") or name == "gaps"
        milliseconds /= micro_batches if once_a_step else PROFILED_MICRO_BATCHES
        work = flops.get(name, 0.0)
        least = work / arguments.rate * 1e3
        total, ideal = total + milliseconds, ideal + least
        figures = (f"{work / 1e12:.1f}", f"{work / milliseconds / 1e9:.0f}", f"{least:.1f}") if work else ("", "", "")
        print(f"| {name} | {milliseconds:.1f} | {' | '.join(figures)} | {milliseconds - least:.1f} |")
    measured = step["step_seconds"] * 1e3 / micro_batches
    rest, lost = measured - total, measured - ideal
    print(f"| lower clock under lasting load (the rest) | {rest:.1f} | | | | {rest:.1f} |")
    print(f"| **sum: the step measured, of {micro_batches}** | {measured:.1f} | | | {ideal:.1f} | {lost:.1f} |")
    print(f"\n{tokens / measured * 1e3:.0f} tokens/s; at the rate {tokens / ideal * 1e3:.0f}")


if __name__ == "__main__":
    main()
