"""How much padding whole conversations leave at 4,096 tokens, beside the least that their lengths allow.

    python benchmarks/packing.py --output benchmarks/results/cpu/packing.json

Lengths alone matter, so tokens are zeros. The bound is Martello and Toth's L2 for bin packing (Discrete Applied
Mathematics 28, 1990): no packing has less padding, not even one of all documents at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from moescale.data.prepare import best_fit
from moescale.tools.measurement import describe_measurement, write_result

LENGTH = 4096
SEEDS = (0, 1, 2)
COUNTS = (3_000, 60_000)
SMALL_WINDOW = 1 << 20


def lengths_of(name: str, count: int, seed: int) -> np.ndarray:
    """Return int64 [count] lengths of documents in the order in which they come."""
    random = np.random.default_rng(seed)
    if name == "uniform 64..2048":
        return random.integers(64, 2049, count)
    if name == "uniform 1..4096":
        return random.integers(1, LENGTH + 1, count)
    if name.startswith("log-normal"):
        found = random.lognormal({"log-normal, median 400": 6.0, "log-normal, median 1,100": 7.0}[name], 1.0, 2 * count)
        return np.maximum(found[found <= LENGTH][:count], 1).astype(np.int64)  # too long: left out
    share = 0.1 if name == "bimodal, 10% long" else 0.3
    is_long = random.random(count) < share
    found = np.where(is_long, random.normal(3_300, 300, count), random.normal(300, 100, count))
    found = np.clip(found, 1, LENGTH).astype(np.int64)
    if name == "bimodal, 30% long, these first":
        return np.concatenate([found[is_long], found[~is_long]])
    return found


NAMES = (
    "uniform 64..2048",
    "uniform 1..4096",
    "log-normal, median 400",
    "log-normal, median 1,100",
    "bimodal, 10% long",
    "bimodal, 30% long",
    "bimodal, 30% long, these first",
)


def least_sequences(lengths: np.ndarray) -> int:
    """Return L2: for every k, documents above LENGTH - k stand alone; those from k on fill what others leave."""
    ordered = np.sort(lengths)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    half = int(np.searchsorted(ordered, LENGTH // 2, side="right"))
    least = 0
    for k in range(LENGTH // 2 + 1):
        small, alone = np.searchsorted(ordered, k), np.searchsorted(ordered, LENGTH - k, side="right")
        shared = int(alone) - half
        room = shared * LENGTH - (sums[alone] - sums[half])
        least = max(least, len(ordered) - half + max(0, -int(-(sums[half] - sums[small] - room) // LENGTH)))
    return least


def padding(lengths: np.ndarray, window_tokens: int | None) -> float:
    """Return the share of padding."""
    packing = best_fit.BestFitPacking(LENGTH, window_tokens)
    tokens, targets = np.zeros(LENGTH, np.uint16), np.zeros(LENGTH, bool)
    num_sequences = sum(len(packing.add(tokens[:length], targets[:length])) for length in lengths.tolist())
    num_sequences += sum(1 for _ in packing.rest())
    return 1 - int(lengths.sum()) / (LENGTH * num_sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = describe_measurement("numpy") | {
        "sequence_length": LENGTH,
        "window_tokens": best_fit._WINDOW_TOKENS,
        "small_window_tokens": SMALL_WINDOW,
        "seeds": SEEDS,
        "rows": [],
    }
    for name in NAMES:
        for count in COUNTS:
            samples = [lengths_of(name, count, seed) for seed in SEEDS]
            began = time.perf_counter()
            found = [padding(sample, None) for sample in samples]
            row = {
                "lengths": name,
                "documents": count,
                "padding": max(found),
                "padding_small_window": max(padding(sample, SMALL_WINDOW) for sample in samples),
                "bound": max(1 - int(s.sum()) / (LENGTH * least_sequences(s)) for s in samples),
                "tokens_per_second": sum(int(sample.sum()) for sample in samples) / (time.perf_counter() - began),
            }
            print(
                f"{name:32}{count:7,} documents: padding {row['padding']:.3%}, in a small window "
                f"{row['padding_small_window']:.3%}, bound {row['bound']:.3%}",
                flush=True,
            )
            result["rows"].append(row)
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
