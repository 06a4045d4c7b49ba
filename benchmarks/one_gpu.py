"""The 16B model on one GPU as a user runs it: prepare, compile, run; then what one would run instead, beside it.

    python benchmarks/one_gpu.py --cluster h200 --output step.json

Random weights of the public configuration, the sources of Python's standard library as text, and no setting beyond the
sequence length and the tokens of a step: micro-batch, recomputation and formats are the plan's. The figures are the
run's own in ``metrics.jsonl``, optimizer included, after two steps of warming up. The run is killed after the last
measured step, writes none of its 94 GB of checkpoint, and is started a second time for the time to the first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import kill, log_of, moescale, read_steps, start
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from moescale.tools.measurement import describe_measurement, write_result

WARM_UP_STEPS = 2


def prepare_corpus(folder: Path, sequence_length: int) -> Path:
    """The standard library's sources under a tokenizer trained on them."""
    sources = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(sources.glob("*.py"))], trainer)
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    options = ("--sequence-length", sequence_length, "--end-token", "<|end|>", "--json")
    options += ("--exclude", "site-packages", "--exclude", "dist-packages")  # whatever else is installed
    where = ("--source", sources, "--tokenizer", folder / "tokenizer", "--output", folder / "corpus")
    subprocess.run(moescale("prepare", *where, *options), check=True, stdout=subprocess.DEVNULL)
    return folder / "corpus"


def run_until(step: int, output: Path, *options: object) -> tuple[list[dict[str, Any]], float]:
    """Start the run and kill it after ``step`` steps; returns their records and the seconds to the end of the first."""
    started, to_first = time.monotonic(), float("nan")
    command = moescale("run", *options, "--output", output, "--steps", 1000, "--no-final-checkpoint", "--json")
    process = start(command, output)
    records: list[dict[str, Any]] = []
    try:
        while process.poll() is None and len(records) < step:
            time.sleep(0.1)
            records = read_steps(output)
            if records and to_first != to_first:
                to_first = time.monotonic() - started
    finally:
        kill(process)
    if len(records) < step:
        sys.exit(log_of(output).read_text()[-4000:])
    return records[:step], to_first


def parser_of_job(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """What to train, for which machine, and where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-coder-v2-lite")
    parser.add_argument("--cluster", default="h200")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--output", type=Path)
    return parser


def compile_plan(plan_file: Path, job: argparse.Namespace, *options: object) -> None:
    """The plan of a job of :func:`parser_of_job` for one GPU."""
    shape = ("--sequence-length", job.sequence_length, "--tokens-per-step", job.tokens_per_step)
    where = ("--model", job.model, "--cluster", job.cluster, "--plan-gpus", 1)
    subprocess.run(moescale("compile", *where, *shape, *options, "--output", plan_file), check=True)


def main() -> None:
    parser = parser_of_job(__doc__, steps=10)
    parser.add_argument("--data", type=Path, help="a corpus prepared before; default: the standard library's sources")
    parser.add_argument("--pin", action="append", default=[], help="a decision of the plan to fix, as name=value")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--no-second-start", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.data or prepare_corpus(folder, arguments.sequence_length)
        plan_file = folder / "plan.json"
        compile_plan(plan_file, arguments, *(word for pin in arguments.pin for word in ("--pin", pin)))
        options = ("--model", arguments.model, "--data", corpus, "--plan", plan_file, "--initialize", "random")
        records, first_start = run_until(arguments.steps + WARM_UP_STEPS, folder / "first", *options)
        second_start = None
        if not arguments.no_second_start:
            _, second_start = run_until(1, folder / "second", *options)
        plan = json.loads(plan_file.read_text())
    measured = records[WARM_UP_STEPS:]
    seconds = statistics.mean(record["step_seconds"] for record in measured)
    result = describe_measurement() | {
        "model": arguments.model,
        "tokens_per_second": arguments.tokens_per_step / seconds,
        "step_seconds": seconds,
        "step_seconds_each": [record["step_seconds"] for record in measured],
        "mfu": measured[-1].get("mfu"),
        "peak_bytes": max(record["peak_bytes"] for record in measured),
        "seconds_from_command_to_first_step_done": {"first": first_start, "second": second_start},
        "losses": [record["loss"] for record in measured],
        "plan": plan,
        "baseline_tokens_per_second": None,
    }
    if not arguments.no_baseline:
        script = Path(__file__).with_name("step_transformers.py")
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            result["baseline"] = json.loads(done.stdout[done.stdout.index("{") :])
            result["baseline_tokens_per_second"] = result["baseline"]["tokens_per_second"]
        else:
            print(done.stderr[-2000:], file=sys.stderr)
    print(json.dumps({key: value for key, value in result.items() if key != "plan"}, indent=1))
    if arguments.output:
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
