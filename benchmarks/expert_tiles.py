"""The products of routed experts in CuTe, tile by tile, beside what the launch table says for Triton.

    python benchmarks/expert_tiles.py --output benchmarks/results/h200/expert_tiles.json

At the shapes of Qwen3-30B-A3B, GLM-4.7-Flash and gpt-oss-20b, 8,192 tokens, experts chosen uniformly at random. What is
at least 3% faster than the tile of ``TILES`` is an entry of ``TILES_BY_WEIGHT``
(``moescale/kernels/experts/cute.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moescale.convert.hf_config import read_model_config
from moescale.kernels.experts import cute
from moescale.kernels.experts.cute import Tile
from moescale.kernels.experts.launch_config import KERNELS, find_launch
from moescale.tools.measurement import describe_measurement, write_result
from moescale.tools.tune_experts import ExpertShape, make_call, measure_ms, product_shape, random_ends, shapes_of_model

MODELS = ("qwen3-30b-a3b", "glm-4.7-flash", "gpt-oss-20b")
TOKENS = 8192
IN_TURN = [
    Tile(m=128, n=128, cluster_n=2, pingpong=True),
    Tile(m=192, n=128, cluster_n=2, pingpong=True),
    Tile(m=128, n=192, cluster_m=2, pingpong=True),
    Tile(m=128, n=128, cluster_m=2, pingpong=True),
]
TOGETHER = [Tile(m=128, n=256, cluster_m=2), Tile(m=256, n=128, cluster_m=2)]
TILES = {kernel: IN_TURN + TOGETHER for kernel in KERNELS} | {"down_dgrad": IN_TURN[2:]}
"""Tiles to try; a wider one of ``down_dgrad``, which reads the pre-activation, spills registers."""


def operand(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, device="cuda") * 0.1


def cute_call(kernel: str, shape: ExpertShape, ends: torch.Tensor) -> Callable[[Tile], object]:
    """A function that runs ``kernel`` once with a tile."""
    groups = cute.group_rows(ends, shape.rows)
    rows, hidden, ffn = shape.rows, shape.hidden_size, shape.intermediate_size
    gate_up, down = operand(shape.num_experts, 2 * ffn, hidden), operand(shape.num_experts, hidden, ffn)
    x, act, pre = operand(rows, hidden), operand(rows, ffn), operand(rows, 2 * ffn)
    weights = torch.rand(rows, device="cuda")
    calls: dict[str, Callable[[Tile], object]] = {
        "up": lambda tile: cute.multiply_up(x, gate_up, groups, write_pre=True, write_act=True, tile=tile),
        "down": lambda tile: cute.multiply_rows(act, down, groups, tile=tile),
        "up_dgrad": lambda tile: cute.multiply_rows(pre, gate_up, groups, transposed=True, kernel=kernel, tile=tile),
        "down_dgrad": lambda tile: cute.multiply_down_dgrad(x, down, pre, groups, weights, tile=tile),
        "up_wgrad": lambda tile: cute.weight_gradient(pre, x, groups, kernel=kernel, tile=tile),
        "down_wgrad": lambda tile: cute.weight_gradient(x, act, groups, kernel=kernel, tile=tile),
    }
    return calls[kernel]


def measure(model: str, kernel: str, shape: ExpertShape) -> list[dict[str, Any]]:
    ends, (n, k) = random_ends(shape), product_shape(kernel, shape)
    row = {"model": model, "kernel": kernel, "rows": shape.rows, "num_experts": shape.num_experts, "n": n, "k": k}
    launch = find_launch(kernel, torch.device("cuda"), torch.bfloat16, shape.rows, shape.num_experts, n, k)
    run = make_call(kernel, shape, ends, operand)
    times = [("triton", dataclasses.asdict(launch), measure_ms(lambda: run(launch)))]
    call = cute_call(kernel, shape, ends)
    for tile in TILES[kernel]:
        times.append(("cute", dataclasses.asdict(tile), measure_ms(lambda tile=tile: call(tile))))
    flops = 2.0 * shape.rows * n * k
    return [
        row | {"backend": backend, "tile": tile, "milliseconds": ms, "tflops": flops / ms / 1e9}
        for backend, tile, ms in times
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kernel in KERNELS:
        for model in MODELS:
            shape = next(s for s in shapes_of_model(read_model_config(model)) if s.tokens == TOKENS)
            found = measure(model, kernel, shape)
            best = min(found, key=lambda row: row["milliseconds"])
            print(f"{model:14} {kernel:10} best {best['milliseconds']:.3f} ms {best['tile']}", flush=True)
            rows += found
    if options.output is not None:
        write_result(options.output, describe_measurement("quack-kernels") | {"rows": rows})


if __name__ == "__main__":
    main()
