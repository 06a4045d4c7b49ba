"""What verifying a corpus costs: its time against reading the files, and the check of a batch against its reading.

    python benchmarks/verification.py --output benchmarks/results/cpu/verification.json

Rounds of the variants alternate, so that what else the machine does meets all of them; figures are medians of ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moescale.data import batch
from moescale.data.corpus import open_corpus, verify
from moescale.data.corpus.manifest import Manifest, SplitCounts
from moescale.data.prepare.shard_writer import SplitWriter
from moescale.tools.measurement import describe_measurement, write_result

SEQUENCE_LENGTH = 2048
NUM_SEQUENCES = 1 << 16
VOCABULARY = 102_400
BATCH_SEQUENCES = 64


def write_corpus(folder: Path) -> None:
    """Write random tokens as `prepare` would; 0.5 GB."""
    writer = SplitWriter(
        folder, "train", sequence_length=SEQUENCE_LENGTH, dtype=np.dtype("<u4"), document_boundaries=True
    )
    generator = np.random.default_rng(0)
    for _ in range(NUM_SEQUENCES // 512):
        tokens = generator.integers(0, VOCABULARY, 512 * SEQUENCE_LENGTH, dtype=np.uint32)
        writer.add(tokens, np.full(512, SEQUENCE_LENGTH), continues=False)
    counts: SplitCounts = writer.close()
    Manifest(
        made_from={},
        sequence_length=SEQUENCE_LENGTH,
        vocabulary_size=VOCABULARY,
        dtype="<u4",
        document_boundaries=True,
        bad={},
        skipped={},
        read={},
        counts={"train": counts},
        shards={"train": writer.shards},
    ).write(folder)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_files(folder: Path) -> None:
    for path in folder.glob("train-*"):
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        corpus = open_corpus(folder)
        ids = np.random.default_rng(1).integers(0, NUM_SEQUENCES, BATCH_SEQUENCES)
        checked = batch._check_ids
        rows = []
        for _ in range(arguments.rounds + 1):  # the first one warms up
            row = {"read_files": seconds(lambda: read_files(folder)), "verify": seconds(lambda: verify(corpus))}
            row["read_batch"] = seconds(lambda: [batch.read_batch(corpus, ids) for _ in range(20)])
            batch._check_ids = lambda *_, **__: None
            row["read_batch_unchecked"] = seconds(lambda: [batch.read_batch(corpus, ids) for _ in range(20)])
            batch._check_ids = checked
            rows.append(row)
        rows = rows[1:]
        num_bytes = corpus.num_bytes
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result = describe_measurement("numpy") | {
        "tokens": NUM_SEQUENCES * SEQUENCE_LENGTH,
        "bytes": num_bytes,
        "rounds_seconds": rows,
        "verify_bytes_per_second": num_bytes / medians["verify"],
        "verify_tokens_per_second": NUM_SEQUENCES * SEQUENCE_LENGTH / medians["verify"],
        "verify_over_read_files": statistics.median(row["verify"] / row["read_files"] for row in rows),
        "checked_over_unchecked_batch": statistics.median(
            row["read_batch"] / row["read_batch_unchecked"] for row in rows
        ),
    }
    write_result(arguments.output, result)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds_seconds"}, indent=2))


if __name__ == "__main__":
    main()
