"""The products of routed experts in CuTe, tile by tile, beside what the launch table says for Triton.

    python benchmarks/expert_tiles.py --output benchmarks/results/h200/expert_tiles.json

At the shapes of Qwen3-30B-A3B, GLM-4.7-Flash and gpt-oss-20b, 8,192 tokens, experts chosen uniformly at random, with
the biases and the activation of the model. What is at least 3% faster than the tile of ``TILES`` is an entry of
``TILES_BY_WEIGHT`` (``moescale/kernels/experts/cute.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.kernels.experts import SwigluClamp
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
    Tile(m=128, n=192, cluster_n=2, pingpong=True),
    Tile(m=128, n=128, cluster_m=2, pingpong=True),
]
TOGETHER = [Tile(m=128, n=256, cluster_m=2), Tile(m=256, n=128, cluster_m=2)]
TILES = {kernel: IN_TURN + TOGETHER for kernel in KERNELS} | {"down_dgrad": IN_TURN}
"""Tiles to try; one 256 wide of ``down_dgrad``, which reads the pre-activation, spills registers."""


def operand(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, dtype=torch.bfloat16, device="cuda") * 0.1


def measure(config: ModelConfig, kernel: str, shape: ExpertShape) -> list[dict[str, Any]]:
    ends, (n, k) = random_ends(shape), product_shape(kernel, shape)
    row = {"kernel": kernel, "rows": shape.rows, "num_experts": shape.num_experts, "n": n, "k": k}
    launch = find_launch(kernel, torch.device("cuda"), torch.bfloat16, shape.rows, shape.num_experts, n, k)
    clamp = None if config.swiglu_clamp is None else SwigluClamp(*config.swiglu_clamp)
    options: dict[str, Any] = {"clamp": clamp, "has_biases": config.has_expert_biases}
    in_triton = make_call(kernel, shape, ends, operand, **options)
    in_cute = make_call(kernel, shape, ends, operand, backend="cute", **options)
    calls = [("triton", launch, in_triton), *(("cute", tile, in_cute) for tile in TILES[kernel])]
    found = []
    for backend, tile, call in calls:
        ms = min(measure_ms(lambda call=call, tile=tile: call(tile)) for _ in range(2))
        tflops = 2.0 * shape.rows * n * k / ms / 1e9
        found.append(row | {"backend": backend, "tile": dataclasses.asdict(tile), "milliseconds": ms, "tflops": tflops})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kernel in KERNELS:
        for model in options.models:
            config = read_model_config(model)
            shape = next(s for s in shapes_of_model(config) if s.tokens == TOKENS)
            found = [{"model": model} | row for row in measure(config, kernel, shape)]
            best = min(found, key=lambda row: row["milliseconds"])
            print(f"{model:14} {kernel:10} best {best['milliseconds']:.3f} ms {best['tile']}", flush=True)
            rows += found
    if options.output is not None:
        write_result(options.output, describe_measurement("quack-kernels") | {"rows": rows})


if __name__ == "__main__":
    main()
