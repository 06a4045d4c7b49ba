"""Attention in Triton and, where it is installed, in CuTe, beside PyTorch's kernels, at the shapes of the families.

    python benchmarks/attention.py --output interval_attention.json

Milliseconds of a forward and of a backward, by events on the device behind a queue long enough to hide the host. The
lengths of documents are exponential with the mean given; 0 is plain causal attention. PyTorch has no sinks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moescale.kernels.attention import Documents, attention
from moescale.kernels.backends import runs_cute
from moescale.runtime.gpu_clock import seconds_of
from moescale.tools.measurement import describe_measurement, write_result

SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": dict(batch=4, length=2048, heads=16, kv_heads=16, widths=(192, 128)),
    "gpt-oss-20b": dict(batch=2, length=4096, heads=64, kv_heads=8, widths=(64, 64), window=128, sinks=True),
    "qwen3-30b-a3b": dict(batch=4, length=2048, heads=32, kv_heads=4, widths=(128, 128)),
    "glm-4.7-flash": dict(batch=4, length=2048, heads=20, kv_heads=20, widths=(256, 256)),
}
MEAN_DOCUMENTS = (0, 2000, 600, 100)


def milliseconds(run: Callable[[], object]) -> float:
    return 1e3 * seconds_of(run, repeats=9, warm_up=3, ahead_cycles=6_000_000)


def documents_of(batch: int, length: int, mean: int) -> Documents:
    generator = torch.Generator().manual_seed(1)
    starts = torch.zeros(batch, length, dtype=torch.bool)
    for row in starts:
        position = 0
        while position < length:
            row[position] = True
            position += 1 + int(torch.empty(1).exponential_(1 / mean, generator=generator))
    return Documents.from_starts(starts, torch.device("cuda"))


def measure(shape: dict[str, Any], mean: int, backend: str) -> dict[str, float]:
    generator = torch.Generator("cuda").manual_seed(0)
    batch, length, (width, v_width) = shape["batch"], shape["length"], shape["widths"]

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", generator=generator).bfloat16().requires_grad_()

    inputs = [random(batch, length, shape["heads"], width), random(batch, length, shape["kv_heads"], width)]
    inputs.append(random(batch, length, shape["kv_heads"], v_width))
    sinks = random(shape["heads"]) if shape.get("sinks") else None
    options = dict(documents=documents_of(batch, length, mean) if mean else None, window=shape.get("window"))
    grad = torch.randn(batch, length, shape["heads"], v_width, device="cuda", generator=generator).bfloat16()

    def forward() -> torch.Tensor:
        return attention(*inputs, softmax_scale=width**-0.5, sinks=sinks, backend=backend, **options)

    out, wanted = forward(), [*inputs, *([] if sinks is None else [sinks])]
    backward = milliseconds(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True))
    return {"forward_ms": milliseconds(forward), "backward_ms": backward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean-documents", type=int, nargs="*", default=MEAN_DOCUMENTS, help="0: plain causal")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    has_cute = runs_cute("attention", torch.device("cuda"), torch.bfloat16)
    backends = ("torch", "triton", "cute") if has_cute else ("torch", "triton")
    rows = []
    for name, shape in SHAPES.items():
        for mean in arguments.mean_documents:
            for backend in backends:
                if backend == "torch" and shape.get("sinks"):
                    continue
                row = {"shape": name, "mean_document": mean, "backend": backend} | measure(shape, mean, backend)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.output:
        write_result(arguments.output, describe_measurement() | {"shapes": SHAPES, "rows": rows})


if __name__ == "__main__":
    main()
