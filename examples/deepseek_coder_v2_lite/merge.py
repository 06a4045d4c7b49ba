"""Merge the checkpoint of a run into one Hugging Face folder: the reference's merge step on moescale.

    python merge.py --ckpt_dir runs/deepseek-coder-v2-lite --output_fname merged

What is merged is the output folder of ``train.py``; experts are written under their original names, so there is nothing
left to split. Everything is done by ``moescale export``.
"""

from __future__ import annotations

import argparse

from moescale.cli import main as moescale


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir", default="runs/deepseek-coder-v2-lite", help="the --output_path of train.py")
    parser.add_argument("--output_fname", required=True, help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="step of the checkpoint to merge; default: the newest")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    return parser.parse_args()


def export_arguments(flags: argparse.Namespace) -> list[str]:
    """The ``moescale export`` command for these flags."""
    step = [] if flags.step is None else ["--step", str(flags.step)]
    return ["export", "--run", flags.ckpt_dir, "--output", flags.output_fname, "--dtype", flags.dtype, *step]


if __name__ == "__main__":
    moescale(export_arguments(parse()))
