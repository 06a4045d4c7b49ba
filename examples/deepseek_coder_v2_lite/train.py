"""Compile a plan for DeepSeek-Coder-V2-Lite, or train by it: the reference document's command line on moescale.

    python train.py --run_mode compile --model_id deepseek-ai/DeepSeek-Coder-V2-Lite-Base \\
        --dataset_path ./bookcorpus_2k --plan_ngpus=4 --runtime_ngpus=8
    torchrun --nproc_per_node=8 train.py --model_id deepseek-ai/DeepSeek-Coder-V2-Lite-Base \\
        --dataset_path ./bookcorpus_2k --plan_ngpus=4 --runtime_ngpus=8

The first five flags are the reference's; the others set what it hard-codes. Everything is done by ``moescale compile``
and ``moescale run``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moescale.cli import main as moescale


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_mode", choices=("compile", "run"), default="run")
    parser.add_argument("--model_id", default="deepseek-ai/DeepSeek-Coder-V2-Lite-Base", help="hub name or folder")
    parser.add_argument("--dataset_path", default="./bookcorpus_2k", help="corpus written by bookcorpus.py")
    parser.add_argument("--plan_ngpus", type=int, default=4, help="GPUs that hold one full copy of the weights")
    parser.add_argument("--runtime_ngpus", type=int, default=8, help="GPUs in all, a multiple of plan_ngpus")
    parser.add_argument("--cluster", default="h100-sxm", help="cluster file or shipped name (compile)")
    parser.add_argument("--sequence_length", type=int, default=2048)
    parser.add_argument("--tokens_per_step", type=int, default=131072)
    parser.add_argument("--plan_path", default="plan.json", help="written by compile, read by run")
    parser.add_argument("--output_path", default="runs/deepseek-coder-v2-lite")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; default: one epoch")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    return parser.parse_args()


def compile_arguments(flags: argparse.Namespace) -> list[str]:
    """The ``moescale compile`` command for these flags."""
    return [
        *("compile", "--model", flags.model_id, "--cluster", flags.cluster, "--output", flags.plan_path),
        *("--plan-gpus", str(flags.plan_ngpus), "--runtime-gpus", str(flags.runtime_ngpus)),
        *("--sequence-length", str(flags.sequence_length), "--tokens-per-step", str(flags.tokens_per_step)),
    ]


def run_arguments(flags: argparse.Namespace) -> list[str]:
    """The ``moescale run`` command for these flags."""
    steps = [] if flags.steps is None else ["--steps", str(flags.steps)]
    return [
        *("run", "--model", flags.model_id, "--data", flags.dataset_path, "--plan", flags.plan_path),
        *("--output", flags.output_path, "--learning-rate", str(flags.learning_rate), *steps),
    ]


def main() -> None:
    flags = parse()
    if flags.run_mode == "compile":
        moescale(compile_arguments(flags))
        return
    # The reference compiles on the first run where no plan is there yet; so does this, on the first rank only.
    if not Path(flags.plan_path).is_file() and os.environ.get("RANK", "0") == "0":
        moescale(compile_arguments(flags))
    moescale(run_arguments(flags))


if __name__ == "__main__":
    main()
