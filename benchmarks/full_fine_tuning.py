"""Training the whole 16B model on packed conversations, beside the same on plain text, on one GPU as a user does both.

    python benchmarks/full_fine_tuning.py --cluster h200 --output benchmarks/results/h200/full_fine_tuning.json

Random weights of the public configuration. Both corpora are the sources of Python's standard library under one
tokenizer: as text, and as conversations in which each turn asks for a function or a class and the answer is its
source. Conversations are packed whole, with loss on answers alone, and attention stays within one. All else is the
plan's: micro-batch, recomputation and formats, the same plan for both. A figure is the median of the steps after two
of warming up, optimizer included.
"""

from __future__ import annotations

import ast
import json
import random
import statistics
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from one_gpu import WARM_UP_STEPS, compile_plan, parser_of_job, prepare_corpus, run_until
from processes import moescale

from moescale.tools.measurement import describe_measurement, write_result

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MOST_TURNS = 6


def turns_of(path: Path) -> Iterator[list[dict[str, str]]]:
    """A question and its answer for each function and class at the top of a source file."""
    try:
        source = path.read_text()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            answer = ast.get_source_segment(source, node)
            if answer:
                question = f"Show me the {kind} {node.name} of the module {path.stem}."
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sources_of_python() -> list[Path]:
    """Python's own library without its tests and without what is installed beside it."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    return [path for path in stdlib.rglob("*.py") if not left_out & set(path.relative_to(stdlib).parts)]


def write_conversations(file: Path) -> None:
    """JSON Lines of conversations of one to six turns, each about one source file."""
    chance = random.Random(0)
    with file.open("w") as lines:
        for path in sorted(sources_of_python()):
            turns = list(turns_of(path))
            while turns:
                count = chance.randint(1, MOST_TURNS)
                taken, turns = turns[:count], turns[count:]
                lines.write(json.dumps({"messages": [message for turn in taken for message in turn]}) + "\n")


def prepare_conversations(folder: Path, sequence_length: int) -> tuple[Path, dict[str, Any]]:
    """The conversations as a corpus next to that of the text, with its tokenizer; and the report of ``prepare``."""
    settings = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    write_conversations(folder / "conversations.jsonl")
    where = ("--source", folder / "conversations.jsonl", "--tokenizer", folder / "tokenizer")
    options = ("--output", folder / "packed", "--sequence-length", sequence_length, "--format", "chat", "--json")
    done = subprocess.run(moescale("prepare", *where, *options), check=True, capture_output=True, text=True)
    return folder / "packed", json.loads(done.stdout)


def measure(steps: int, tokens_per_step: int, output: Path, *options: object) -> dict[str, Any]:
    records, _ = run_until(steps + WARM_UP_STEPS, output, *options)
    seconds = [record["step_seconds"] for record in records[WARM_UP_STEPS:]]
    return {
        "tokens_per_second": tokens_per_step / statistics.median(seconds),
        "step_seconds_each": seconds,
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "losses": [record["loss"] for record in records],
    }


def main() -> None:
    parser = parser_of_job(__doc__, steps=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--corpora", type=Path, help="a folder in which to keep the corpora, or that has them")
    parser.add_argument("--prepare-only", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = arguments.corpora or folder / "corpora"
        if not corpora.is_dir():
            prepare_corpus(corpora, arguments.sequence_length)
            _, report = prepare_conversations(corpora, arguments.sequence_length)
            (corpora / "packed-report.json").write_text(json.dumps(report))
        if arguments.prepare_only:
            return
        plan_file = folder / "plan.json"
        compile_plan(plan_file, arguments)
        options = ("--model", arguments.model, "--plan", plan_file, "--initialize", "random")
        rows = {
            kind: measure(
                arguments.steps,
                arguments.tokens_per_step,
                folder / kind,
                *options,
                *("--data", corpora / corpus, "--device", arguments.device),
            )
            for kind, corpus in (("text", "corpus"), ("conversations", "packed"))
        }
        ratio = rows["conversations"]["tokens_per_second"] / rows["text"]["tokens_per_second"]
        result = describe_measurement("quack-kernels", "flash-attn-4") | {
            "model": arguments.model,
            "sequence_length": arguments.sequence_length,
            "conversations_to_text": ratio,
            "prepared": json.loads((corpora / "packed-report.json").read_text()),
            **rows,
            "plan": json.loads(plan_file.read_text()),
        }
    print(json.dumps({key: value for key, value in result.items() if key != "plan"}, indent=1))
    if arguments.output:
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
