"""What one would run instead: transformers' DeepSeek-V2 on one GPU, forward and backward, every layer compiled.

    python benchmarks/step_transformers.py --output step_transformers.json

Grouped products for the experts, sdpa attention, no gradient checkpointing, bf16 weights, gradients added up in bf16 by
autograd; no optimizer, no gradient norm. The model is the public configuration with random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from moescale.convert.hf_config import read_hf_config, resolve_model
from moescale.tools.measurement import describe_measurement, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-coder-v2-lite")
    parser.add_argument("--micro-batch-sequences", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    document = read_hf_config(resolve_model(arguments.model))
    document.pop("auto_map", None)
    config = DeepseekV2Config(**document)
    config._attn_implementation, config._experts_implementation, config.use_cache = "sdpa", "grouped_mm", False
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = fill(model)
    for layer in model.model.layers:
        layer.compile()
    shape = (arguments.micro_batch_sequences, arguments.sequence_length)
    batches = [torch.randint(config.vocab_size, shape, device="cuda") for _ in range(4)]

    def run(number: int) -> None:
        tokens = batches[number % len(batches)]
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    for number in range(3):
        run(number)
    times = []
    for _ in range(3):  # long enough for the clock to settle, as in a training run
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for number in range(arguments.micro_batches // 3):
            run(number)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (arguments.micro_batches // 3) / 1e3)
    seconds = statistics.median(times)
    result = describe_measurement("transformers") | {
        "micro_batch_tokens": shape[0] * shape[1],
        "seconds": seconds,
        "tokens_per_second": shape[0] * shape[1] / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_result(arguments.output, result)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model on the meta device random weights on the GPU; its rotary tables are computed again."""
    rotary = model.model.rotary_emb  # type: ignore[union-attr]
    model = model.to_empty(device="cuda")
    model.model.rotary_emb = type(rotary)(config=model.config, device="cuda")  # type: ignore[union-attr,assignment]
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


if __name__ == "__main__":
    main()
