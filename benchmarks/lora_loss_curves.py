"""Adapters on frozen weights in bf16 and in fp8: loss curves from several seeds, and the same model before adapting.

    python benchmarks/lora_loss_curves.py --output lora_loss_curves.json --plot lora_loss_curves.svg

A model of DeepSeek-V2's kind learns Python from the sources of the standard library, all weights trained. Then adapters
of rank 16 on every linear layer and expert learn C++ from PyTorch's headers, on the same frozen weights as they are and
in fp8, from the same adapters, on the same batches. A seed draws adapters and the order of batches. What is compared is
the mean loss of the last 50 steps: fp8 against bf16 by seed, beside how far the seeds are apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from loss_curves import LAST, SEQUENCES, VOCABULARY, batches, encode, read_library, start_model, train, train_tokenizer

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.formats import FrozenFormat
from moescale.lora import LoraSettings
from moescale.models.frozen_fp8 import quantize_into, weights_in_fp8
from moescale.models.lora import add_adapters, is_adapter
from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.runtime.optimizer import OptimizerFormat
from moescale.runtime.settings import TrainSettings
from moescale.tools.measurement import describe_measurement, write_result

FORMAT = OptimizerFormat(moments="fp32", master="fp32", gradients=torch.float32)
BASES: tuple[FrozenFormat, ...] = ("compute", "fp8")


def read_texts() -> tuple[list[str], list[str]]:
    """Python and C++."""
    headers = sorted((Path(torch.__file__).parent / "include").rglob("*.h"))[:1500]
    return read_library(), [path.read_text(errors="ignore") for path in headers]


def adapted(
    config: ModelConfig, weights: dict[str, torch.Tensor], base: FrozenFormat, seed: int, device: torch.device
) -> Transformer:
    """A model with the frozen ``weights`` kept as ``base`` says, and adapters drawn by ``seed``."""
    model = build_on_meta(config, torch.bfloat16)
    add_adapters(model, LoraSettings(rank=16, alpha=32.0, base=base))
    model = model.to_empty(device=device)
    initialize(model, seed)
    in_fp8 = weights_in_fp8(model)
    assert bool(in_fp8) == (base == "fp8")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in in_fp8:
                scales, weight = model.get_parameter(in_fp8[name]), weights[name]
                boxes = [tuple(slice(0, size) for size in part.shape) for part in (parameter, scales)]
                quantize_into(parameter, boxes[0], scales, boxes[1], tuple(weight.shape), lambda box, w=weight: w[box])
            elif not is_adapter(name) and name not in in_fp8.values():
                parameter.copy_(weights[name])
    return model


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for row in result["runs"]:
        style = {"compute": ("#0072b2", "-", "bf16"), "fp8": ("#d55e00", "--", "fp8")}[row["base"]]
        label = f"frozen weights in {style[2]}" if row["seed"] == 0 else None
        steps = [number * result["every"] for number in range(len(row["losses"]))]
        axes.plot(steps, row["losses"], color=style[0], linestyle=style[1], linewidth=0.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of each run, and of the model before")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="the curves as .svg, .png or .pdf; needs matplotlib")
    parser.add_argument("--plot-from", type=Path, help="draw a result that is there, and measure nothing")
    arguments = parser.parse_args()
    if arguments.plot_from:
        plot(json.loads(arguments.plot_from.read_text()), arguments.plot)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(
        read_model_config("tiny"),
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden_size,
        expert_intermediate_size=arguments.hidden_size // 2,
        num_layers=arguments.layers,
    )
    texts = read_texts()
    tokenizer = train_tokenizer(texts[0] + texts[1])
    python, cpp = (encode(tokenizer, of_language) for of_language in texts)
    before = start_model(config, 0, device).bfloat16()
    settings = TrainSettings(learning_rate=1e-3, warmup_steps=50)
    learned = train(before, settings, batches(python, arguments.steps, device), FORMAT)
    weights = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    every = max(1, arguments.steps // 150)
    result = describe_measurement() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": arguments.steps,
        "tokens_per_step": SEQUENCES * batches(python, 1, device)[0].shape[1],
        "parameters": sum(weight.numel() for weight in weights.values()),
        "python_losses": [round(loss, 4) for loss in learned[::every]],
        "every": every,
        "runs": [],
    }
    print(f"Python: {statistics.mean(learned[-LAST:]):.4f}", flush=True)
    for seed in range(arguments.seeds):
        order = torch.randperm(len(cpp) // 256, generator=torch.Generator().manual_seed(seed))
        text = cpp[: len(order) * 256].view(-1, 256)[order].flatten()
        for base in BASES:
            model = adapted(config, weights, base, seed, device)
            undecayed = dataclasses.replace(settings, weight_decay=0.0)
            losses = train(model, undecayed, batches(text, arguments.steps, device), FORMAT)
            row = {"base": base, "seed": seed, "first_loss": losses[0], "final_loss": statistics.mean(losses[-LAST:])}
            print(json.dumps(row), flush=True)
            result["runs"].append(row | {"losses": [round(loss, 4) for loss in losses[::every]]})
            if arguments.output:  # after each: the last may be cut off
                write_result(arguments.output, result)
    finals = {base: [row["final_loss"] for row in result["runs"] if row["base"] == base] for base in BASES}
    result["differences"] = [fp8 - plain for plain, fp8 in zip(finals["compute"], finals["fp8"], strict=True)]
    result["spread_of_seeds"] = max(finals["compute"]) - min(finals["compute"])
    print(json.dumps({key: result[key] for key in ("differences", "spread_of_seeds")}))
    if arguments.output:
        write_result(arguments.output, result)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
