"""Compile a plan for DeepSeek-Coder-V2-Lite, or train by it: the reference document's command line on moescale.

    python train.py --run_mode compile --model_id deepseek-ai/DeepSeek-Coder-V2-Lite-Base \\
        --dataset_path ./bookcorpus_2k --plan_ngpus=4 --runtime_ngpus=8
    torchrun --nproc_per_node=8 train.py --model_id deepseek-ai/DeepSeek-Coder-V2-Lite-Base \\
        --dataset_path ./bookcorpus_2k --plan_ngpus=4 --runtime_ngpus=8

The first five flags are the reference's; the others set what it hard-codes. Everything is done by ``moescale compile``
and ``moescale run``. A plan that is there already is used again; a flag that contradicts it is refused. Checkpoints are
merged by ``merge.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from moescale.cli import main as moescale
from moescale.errors import MoescaleError
from moescale.plan import load_plan
from moescale.planner.cluster import load_cluster

WAIT_SECONDS = 120
PLAN_FLAGS = {
    "plan_ngpus": "plan_gpus",
    "runtime_ngpus": "runtime_gpus",
    "sequence_length": "sequence_length",
    "tokens_per_step": "tokens_per_step",
}
"""Flags that a plan answers, and the fields in which it does."""
PLAN_DEFAULTS = {
    "plan_ngpus": 4,
    "runtime_ngpus": 8,
    "sequence_length": 2048,
    "tokens_per_step": 131072,
    "cluster": "h100-sxm",
}
"""For compiling. When running, a flag that is not given is what the plan says, so the parser has no defaults."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_mode", choices=("compile", "run"), default="run")
    parser.add_argument("--model_id", default="deepseek-ai/DeepSeek-Coder-V2-Lite-Base", help="hub name or folder")
    parser.add_argument("--dataset_path", default="./bookcorpus_2k", help="corpus written by bookcorpus.py")
    parser.add_argument("--plan_ngpus", type=int, help="GPUs that hold one full copy of the weights (4)")
    parser.add_argument("--runtime_ngpus", type=int, help="GPUs in all, a multiple of plan_ngpus (8)")
    parser.add_argument("--cluster", help="cluster file or shipped name (h100-sxm)")
    parser.add_argument("--sequence_length", type=int, help="tokens of a sequence (2048)")
    parser.add_argument("--tokens_per_step", type=int, help="tokens of an optimizer step (131072)")
    parser.add_argument("--plan_path", default="plan.json", help="written by compile, read by run")
    parser.add_argument("--output_path", default="runs/deepseek-coder-v2-lite")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; default: one epoch")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    return parser.parse_args()


def compile_arguments(flags: argparse.Namespace) -> list[str]:
    """The ``moescale compile`` command for these flags."""
    values = {
        name: str(default if getattr(flags, name) is None else getattr(flags, name))
        for name, default in PLAN_DEFAULTS.items()
    }
    return [
        *("compile", "--model", flags.model_id, "--cluster", values["cluster"], "--output", flags.plan_path),
        *("--plan-gpus", values["plan_ngpus"], "--runtime-gpus", values["runtime_ngpus"]),
        *("--sequence-length", values["sequence_length"], "--tokens-per-step", values["tokens_per_step"]),
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


def contradiction(flags: argparse.Namespace, path: Path) -> str | None:
    """What of the flags given differs from the plan; None where nothing does. The model is compared by the run."""
    plan = load_plan(path)
    for flag, field in PLAN_FLAGS.items():
        given, planned = getattr(flags, flag), getattr(plan, field)
        if given is not None and given != planned:
            return f"--{flag} ({given}) contradicts {field} ({planned}) of {path}"
    if flags.cluster is not None and load_cluster(flags.cluster).fingerprint() != plan.cluster_fingerprint:
        return f"--cluster ({flags.cluster}) is not the one {path} was made for ({plan.cluster_fingerprint})"
    return None


def check_plan(flags: argparse.Namespace, path: Path) -> None:
    """Leave with status 2 unless the plan is the one the flags ask for; one rank says why."""
    try:
        problem = contradiction(flags, path)
    except MoescaleError as error:
        problem = str(error)
    if problem is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {problem}; compile it again with --run_mode compile, or leave the flag out", file=sys.stderr)
        sys.exit(MoescaleError.exit_status)


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
    check_plan(flags, plan)
    call(run_arguments(flags))


if __name__ == "__main__":
    main()
