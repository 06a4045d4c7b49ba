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
import sys
import time
from pathlib import Path

from moescale.cli import main as moescale

WAIT_SECONDS = 120


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


def call(arguments: list[str]) -> None:
    """Run a moescale command; leave with its status unless it succeeded."""
    try:
        moescale(arguments)
    except SystemExit as left:
        if left.code:
            raise


def wait_for_plan(path: Path) -> None:
    """On ranks but the first: until the first one has written the plan."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            sys.exit(f"{path}: not written by rank 0 within {WAIT_SECONDS} s; see its output")
        time.sleep(0.2)


def main() -> None:
    flags = parse()
    plan = Path(flags.plan_path)
    if flags.run_mode == "compile":
        call(compile_arguments(flags))
        return
    # The reference compiles on the first run where no plan is there yet; so does this, on the first rank only.
    if os.environ.get("RANK", "0") != "0":
        wait_for_plan(plan)
    elif not plan.is_file():
        call(compile_arguments(flags))
    call(run_arguments(flags))


if __name__ == "__main__":
    main()
