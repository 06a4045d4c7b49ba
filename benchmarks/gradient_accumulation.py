"""What gradients lose when 16 micro-batches are added up in bf16 buffers: against fp32 buffers, on one GPU.

    python benchmarks/gradient_accumulation.py --output gradient_accumulation.json

The same model (the public configuration cut to a few layers), weights and batches three times: buffers in fp32; buffers
in bf16, as the planner's ``gradient_dtype bf16`` has it (a micro-batch's product is rounded, added, and the sum
rounded); and for scale the gradient of another step's batches: how much of a gradient is noise of the sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from moescale.convert.hf_config import read_model_config
from moescale.models.transformer import build_on_meta, initialize
from moescale.runtime.micro_batch import MicroBatches
from moescale.runtime.optimizer import AdamW, OptimizerFormat
from moescale.runtime.settings import TrainSettings
from moescale.tools.measurement import describe_measurement, write_result


def gradients(dtype: torch.dtype, layers: int, micro_batches: int, seed: int) -> dict[str, torch.Tensor]:
    """Accumulated gradients of one step, in fp32 on the CPU."""
    config = dataclasses.replace(read_model_config("deepseek-coder-v2-lite"), num_layers=layers)
    model = build_on_meta(config, torch.bfloat16).to_empty(device="cuda")
    initialize(model, seed=0)
    format = OptimizerFormat(moments="int8", master="stochastic_bf16", gradients=dtype)
    optimizer = AdamW(model.named_parameters(), TrainSettings(), format)
    optimizer.accumulate_in_gemms(model)
    generator = torch.Generator().manual_seed(seed)
    runner = MicroBatches(model, capture=False)
    runner.start_step(num_targets=micro_batches * 4 * 2047, num_micro_batches=micro_batches)
    for _ in range(micro_batches):
        tokens = torch.randint(config.vocab_size, (4, 2048), generator=generator)
        targets = torch.cat([tokens[:, 1:], torch.full((4, 1), -100)], dim=1)
        runner.run(tokens, targets, None)
    return {name: optimizer.gradient(name).float().cpu() for name in optimizer.parameters}


def relative_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm, by kind of parameter."""
    squares: dict[str, list[float]] = {}
    for name, gradient in wanted.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit()).removeprefix("layers.")
        entry = squares.setdefault(kind, [0.0, 0.0])
        entry[0] += float((got[name] - gradient).double().square().sum())
        entry[1] += float(gradient.double().square().sum())
    total = [sum(column) for column in zip(*squares.values(), strict=True)]
    errors = {kind: (a / b) ** 0.5 for kind, (a, b) in squares.items() if b}
    return {"all": (total[0] / total[1]) ** 0.5, **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    exact = gradients(torch.float32, arguments.layers, arguments.micro_batches, seed=1)
    rounded = gradients(torch.bfloat16, arguments.layers, arguments.micro_batches, seed=1)
    another = gradients(torch.float32, arguments.layers, arguments.micro_batches, seed=2)
    result = describe_measurement() | {
        "micro_batches": arguments.micro_batches,
        "bf16_buffers": relative_error(rounded, exact),
        "another_sample": relative_error(another, exact),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
