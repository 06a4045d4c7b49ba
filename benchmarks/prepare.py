"""Times `prepare` beside ``datasets.map`` on Python's standard library: same documents, tokenizer, cores and sequences.

    python benchmarks/prepare.py --output benchmarks/results/cpu/prepare.json [--workers 2] [--repetitions 3]

The documents are the library's source files as one JSON Lines file of their own text; the tokenizer is a byte-level BPE
trained on a part of them. Every run has a process of its own, and the variants take turns; times are medians.

- ``prepare``: moescale.data.prepare, from the JSON Lines file to a corpus on disk.
- ``prepare_by_tokenizer_alone``: the same without moescale/data/prepare/word_table.py, as it works with tokenizers
  that the table does not understand.
- ``datasets_map``: load_dataset("json"), a batched map that tokenises and appends the end token, a second batched map
  that concatenates and cuts into sequences (the ``group_texts`` of transformers' language-modelling examples), and
  save_to_disk. It keeps input_ids alone: attention masks and labels, which those examples add, would only slow it.
- ``datasets_map_as_in_examples``: the same with attention mask and labels, as the examples have it.

Both maps drop the remainder of every 1,000 documents; `prepare` drops one remainder in all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from moescale.data.prepare import encode, prepare
from moescale.data.prepare.settings import PrepareSettings
from moescale.tools.measurement import describe_measurement, write_result

END_TOKEN = "<|end_of_text|>"
VARIANTS = ("prepare", "prepare_by_tokenizer_alone", "datasets_map", "datasets_map_as_in_examples")
_WITHOUT_TABLE = "BENCHMARK_WITHOUT_TABLE"

if _WITHOUT_TABLE in os.environ:  # here, because worker processes import this file and inherit nothing else
    encode.word_encoder = lambda *_: None


def write_documents(path: Path) -> dict[str, int]:
    """Write every readable source file of the standard library as a JSON line."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = num_bytes = 0
    with path.open("w") as stream:
        for file in sorted(library.rglob("*.py")):
            if "site-packages" in file.parts:
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                stream.write(json.dumps({"text": text}) + "\n")
                documents += 1
                num_bytes += len(text.encode())
    return {"documents": documents, "text_bytes": num_bytes}


def train_tokenizer(documents: Path, folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with documents.open() as stream:
        texts = [json.loads(line)["text"] for number, line in enumerate(stream) if number % 4 == 0]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN).save_pretrained(folder)


def run_prepare(documents: Path, tokenizer: Path, folder: Path, sequence_length: int, workers: int) -> dict:
    settings = PrepareSettings(
        source=str(documents),
        tokenizer=str(tokenizer),
        sequence_length=sequence_length,
        output=folder / "corpus",
        num_workers=workers,
    )
    began = time.perf_counter()
    report = prepare(settings, progress=False)
    return {"seconds": time.perf_counter() - began, "tokens_packed": report.tokens_packed}


def run_datasets_map(
    documents: Path, tokenizer: Path, folder: Path, sequence_length: int, workers: int, as_in_examples: bool
) -> dict:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)
    end = fast.eos_token_id

    def tokenize(examples):
        encoded = fast(examples["text"], return_attention_mask=as_in_examples)
        columns = {"input_ids": [[*ids, end] for ids in encoded["input_ids"]]}
        if as_in_examples:
            columns["attention_mask"] = [[*mask, 1] for mask in encoded["attention_mask"]]
        return columns

    def group_texts(examples):
        columns = {}
        for name, values in examples.items():
            joined = [value for row in values for value in row]
            total = len(joined) // sequence_length * sequence_length
            columns[name] = [joined[first : first + sequence_length] for first in range(0, total, sequence_length)]
        if as_in_examples:
            columns["labels"] = columns["input_ids"].copy()
        return columns

    began = time.perf_counter()
    source = datasets.load_dataset("json", data_files=str(documents), split="train", cache_dir=str(folder / "cache"))
    loaded = time.perf_counter()
    tokenized = source.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    mapped = time.perf_counter()
    grouped = tokenized.map(group_texts, batched=True, num_proc=workers)
    packed = time.perf_counter()
    grouped.save_to_disk(str(folder / "corpus"), num_proc=workers)
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "seconds_of": {
            "load_dataset": loaded - began,
            "map_tokenize": mapped - loaded,
            "map_group_texts": packed - mapped,
            "save_to_disk": ended - packed,
        },
        "tokens_packed": len(grouped) * sequence_length,
    }


def run_variant(arguments: argparse.Namespace) -> dict:
    """Run one variant in this process and return its times and the largest memory of one of its processes."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        common = (arguments.folder / "documents.jsonl", arguments.folder / "tokenizer", Path(scratch))
        options = {"sequence_length": arguments.sequence_length, "workers": arguments.workers}
        if arguments.variant.startswith("prepare"):
            result = run_prepare(*common, **options)
        else:
            as_in_examples = arguments.variant == "datasets_map_as_in_examples"
            result = run_datasets_map(*common, **options, as_in_examples=as_in_examples)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return result | {"peak_bytes_parent": peaks[0] * 1024, "peak_bytes_largest_child": peaks[1] * 1024}


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    flags = ["--workers", arguments.workers, "--sequence-length", arguments.sequence_length, "--folder", folder]
    environment = os.environ | {"HF_HOME": str(folder / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(arguments.repetitions):
        for variant in VARIANTS:
            without = {_WITHOUT_TABLE: "1"} if variant == "prepare_by_tokenizer_alone" else {}
            command = [sys.executable, __file__, "--variant", variant, *map(str, flags)]
            output = subprocess.run(
                command, env=environment | without, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            runs[variant].append(json.loads(output.splitlines()[-1]))
            print(f"{variant}: {runs[variant][-1]['seconds']:.2f} s", file=sys.stderr)
    return runs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.variant:
        print(json.dumps(run_variant(arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_documents(folder / "documents.jsonl")
        train_tokenizer(folder / "documents.jsonl", folder / "tokenizer", arguments.vocabulary)
        runs = measure(arguments, folder)
    seconds = {variant: statistics.median(run["seconds"] for run in results) for variant, results in runs.items()}
    value = describe_measurement("tokenizers", "datasets", "transformers", "pyarrow", "numpy") | {
        "input": corpus,
        "sequence_length": arguments.sequence_length,
        "vocabulary": arguments.vocabulary,
        "workers": arguments.workers,
        "median_seconds": seconds,
        "times_as_fast_as": {
            variant: seconds[variant] / seconds["prepare"] for variant in VARIANTS if not variant.startswith("prepare")
        },
        "megabytes_of_text_per_second": {
            variant: corpus["text_bytes"] / 1e6 / time_taken for variant, time_taken in seconds.items()
        },
        "runs": runs,
    }
    print(json.dumps(value, indent=2))
    if arguments.output:
        write_result(arguments.output, value)


if __name__ == "__main__":
    main()
