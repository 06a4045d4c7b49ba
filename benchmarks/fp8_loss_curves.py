"""Training with products in fp8 and in bf16: loss curves from several seeds.

    python benchmarks/fp8_loss_curves.py --parts 1 --output fp8_loss.json
    python benchmarks/fp8_loss_curves.py --parts 2 --merge fp8_loss.json --output fp8_loss.json

Part 1 is a model of the demo's kind, wider; part 2 the first four layers of DeepSeek-Coder-V2-Lite. Both learn Python
from the sources of the standard library and of PyTorch, from random weights. A seed draws weights and order of batches,
and with each one the model is trained twice: with every product in bf16, and with those of routed experts and linear
layers in fp8. The rest is the same, and what a plan for one GPU has: weights in bf16 with the exact remainder, moments
in 8 bits, gradients in bf16, recorded CUDA graphs. Layers are not compiled.

Compared by seed are the mean loss of the last steps, the loss on held-out files, and the same with every product of the
trained weights in bf16, as after an export. Beside these differences is how far the seeds in bf16 are apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from loss_curves import VOCABULARY, batches, cut, encode, next_tokens, read_library, start_model, train, train_tokenizer

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.coordinates import ONE_DEVICE
from moescale.data.batch import Batch
from moescale.models.fp8_gemms import use_fp8
from moescale.models.transformer import Transformer, build_on_meta
from moescale.runtime.optimizer import OptimizerFormat
from moescale.runtime.ranks import ONE_RANK
from moescale.runtime.settings import TrainSettings
from moescale.runtime.validation import validation_loss
from moescale.tools.measurement import describe_measurement, write_result

FORMAT = OptimizerFormat(moments="int8", master="bf16_remainder", gradients=torch.bfloat16)
PRECISIONS = ("bf16", "fp8")
COMPARED = ("final_loss", "validation_loss", "validation_loss_in_bf16")
HELD_OUT = 50
"""One file in so many is for validation."""
POINTS = 150
"""Of a curve, at most about so many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A model and how it is trained."""

    number: int
    what: str
    config: ModelConfig
    steps: int
    last: int
    """Steps at the end whose mean loss is compared."""
    learning_rate: float
    length: int
    """Tokens of a sequence."""
    sequences: int
    """Of a step."""
    micro_batches: int
    validation_tokens: int = 131072

    @property
    def settings(self) -> TrainSettings:
        """The product's defaults, a cosine to a tenth, after a warm-up."""
        return TrainSettings(learning_rate=self.learning_rate, warmup_steps=self.steps // 15)

    def describe(self, corpus: dict[str, Any]) -> dict[str, Any]:
        """What runs must have in common to be compared."""
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "dense_intermediate_size", "num_experts")
        names += ("expert_intermediate_size", "num_shared_experts", "top_k", "kv_lora_rank", "aux_loss_alpha")
        return {
            "part": self.number,
            "what": self.what,
            "model": {name: getattr(self.config, name) for name in names},
            "parameters": sum(p.numel() for p in build_on_meta(self.config, torch.bfloat16).parameters()),
            "steps": self.steps,
            "last": self.last,
            "tokens_per_step": self.length * self.sequences,
            "sequence_length": self.length,
            "micro_batches": self.micro_batches,
            "learning_rate": self.learning_rate,
            "validation_tokens": self.validation_tokens,
            "warmup_steps": self.settings.warmup_steps,
            "optimizer": {"moments": FORMAT.moments, "master": FORMAT.master, "gradients": "bf16"},
            "corpus": corpus,
        }


def wide_part(steps: int, small: bool) -> Part:
    config = dataclasses.replace(
        read_model_config("tiny"),
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_layers=6,
        num_heads=8,
        dense_intermediate_size=1536,
        expert_intermediate_size=256,
    )
    part = Part(
        number=1,
        what="the demo's kind, wider",
        config=config,
        steps=steps,
        last=100,
        learning_rate=1e-3,
        length=512,
        sequences=32,
        micro_batches=2,
    )
    return shrink(part) if small else part


def layers_part(steps: int, small: bool) -> Part:
    """The vocabulary is the tokenizer's: other rows would get no token, and the loss is not in fp8."""
    config = dataclasses.replace(read_model_config("deepseek-coder-v2-lite"), vocab_size=VOCABULARY, num_layers=4)
    part = Part(
        number=2,
        what="four layers of DeepSeek-Coder-V2-Lite",
        config=config,
        steps=steps,
        last=30,
        learning_rate=3e-4,
        length=2048,
        sequences=4,
        micro_batches=1,
    )
    return shrink(part) if small else part


def shrink(part: Part) -> Part:
    """The same at sizes for a dry run on a CPU."""
    config = dataclasses.replace(
        part.config,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        dense_intermediate_size=128,
        num_experts=4,
        top_k=2,
        expert_intermediate_size=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
    return dataclasses.replace(part, config=config, last=2, length=32, sequences=4, validation_tokens=512)


def read_corpus(small: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Token ids to train on, those of the held-out files, and what tells this corpus from others."""
    library = read_library()
    if small:
        library = library[:HELD_OUT]
    tokenizer = train_tokenizer(library)
    sources = [] if small else sorted(Path(torch.__file__).parent.rglob("*.py"))
    texts = library + [path.read_text(errors="ignore") for path in sources]
    kept = [text for number, text in enumerate(texts, start=1) if number % HELD_OUT]
    # In pieces: an encoding takes far more memory than its ids.
    tokens = torch.cat([encode(tokenizer, kept[i : i + 200]) for i in range(0, len(kept), 200)])
    held_out = encode(tokenizer, texts[HELD_OUT - 1 :: HELD_OUT])
    digest = hashlib.sha256(torch.cat([tokens, held_out]).to(torch.int16).numpy().tobytes())
    about = {"files": len(texts), "tokens": len(tokens), "held_out_tokens": len(held_out)}
    return tokens, held_out, about | {"sha256": digest.hexdigest()[:16]}


def held_out_loss(model: Transformer, held_out: torch.Tensor, part: Part) -> float:
    """Mean loss over the first held-out sequences, the same for every run of a part."""
    rows = cut(held_out, part.length)[: part.validation_tokens // part.length]
    pieces = rows.split(part.sequences // part.micro_batches)
    loss = validation_loss(
        model,
        [
            Batch(
                tokens=piece,
                targets=next_tokens(piece),
                sequence_ids=torch.arange(len(piece)),
                document_starts=None,
                padding=None,
            )
            for piece in pieces
        ],
        ONE_RANK,
        ONE_DEVICE,
    )
    assert loss is not None
    return loss


def run(
    part: Part, precision: str, seed: int, tokens: torch.Tensor, held_out: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    """Train one model, and return what it has learned; all its memory is free again."""
    started = time.perf_counter()
    model = start_model(part.config, seed, device).bfloat16()
    if precision == "fp8":
        use_fp8(model, experts=True, dense=True)
    data = batches(tokens, part.steps, device, length=part.length, sequences=part.sequences, seed=seed)
    losses = train(model, part.settings, data, FORMAT, micro_batches=part.micro_batches)
    seconds = time.perf_counter() - started
    validation = held_out_loss(model, held_out, part)
    in_bf16 = validation
    if precision == "fp8":
        plain = build_on_meta(part.config, torch.bfloat16).to_empty(device=device)
        plain.load_state_dict(model.state_dict())
        in_bf16 = held_out_loss(plain, held_out, part)
        del plain
    if not all(math.isfinite(value) for value in (*losses, validation, in_bf16)):
        first = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), "validation")
        raise SystemExit(f"part {part.number}, seed {seed} in {precision}: the loss is not finite at step {first}")
    del model, data
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    every = max(1, part.steps // POINTS)
    return {
        "seed": seed,
        "precision": precision,
        "first_loss": losses[0],
        "final_loss": statistics.mean(losses[-part.last :]),
        "validation_loss": validation,
        "validation_loss_in_bf16": in_bf16,
        "seconds": round(seconds, 1),
        "every": every,
        "losses": [round(statistics.mean(losses[i : i + every]), 4) for i in range(0, len(losses), every)],
    }


def compare(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """fp8 against bf16 by seed, beside the spread of the seeds; of the seeds that have both."""
    values = {(found["precision"], found["seed"]): found[key] for found in runs}
    seeds = sorted(seed for precision, seed in values if precision == "fp8" and ("bf16", seed) in values)
    by = {precision: [values[precision, seed] for seed in seeds] for precision in PRECISIONS}
    differences = [fp8 - bf16 for bf16, fp8 in zip(by["bf16"], by["fp8"], strict=True)]
    if len(seeds) < 2:
        return {"seeds": seeds, **by, "differences": differences}  # one seed has no spread
    spread = max(by["bf16"]) - min(by["bf16"])
    return {
        "seeds": seeds,
        **by,
        "differences": differences,
        "mean_difference": statistics.mean(differences),
        "standard_deviation_of_differences": statistics.stdev(differences),
        "spread_of_seeds": spread,
        "spread_of_seeds_in_fp8": max(by["fp8"]) - min(by["fp8"]),
        "standard_deviation_of_seeds": statistics.stdev(by["bf16"]),
        "mean_within_spread": abs(statistics.mean(differences)) <= spread,
        "within_spread": all(abs(difference) <= spread for difference in differences),
    }


def read_earlier(path: Path | None, wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """An earlier result to go on from; its runs of the parts that are ``wanted`` must have been made alike."""
    if path is None:
        return {"parts": []}
    earlier = json.loads(path.read_text())
    for part in wanted:
        for found in earlier["parts"]:
            differ = [name for name, value in part.items() if found.get(name) != value]
            if found["part"] == part["part"] and differ:
                name = differ[0]
                raise SystemExit(
                    f"--merge {path}: part {part['part']} has {name} {found.get(name)} there and {part[name]} here; "
                    "take the same, or leave --merge out"
                )
    return earlier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--steps-1", type=int, default=1500, help="of each run of part 1")
    parser.add_argument("--steps-2", type=int, default=300, help="of each run of part 2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small models and little text: a dry run")
    parser.add_argument("--merge", type=Path, help="an earlier result, whose runs are kept and not made again")
    parser.add_argument("--output", type=Path, help="written after each run")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tokens, held_out, corpus = read_corpus(arguments.small)
    print(json.dumps(corpus), flush=True)
    all_parts = [wide_part(arguments.steps_1, arguments.small), layers_part(arguments.steps_2, arguments.small)]
    parts = [part for part in all_parts if part.number in arguments.parts]
    described = [part.describe(corpus) for part in parts]
    earlier = read_earlier(arguments.merge, described)
    call = describe_measurement("tokenizers")
    result = call | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "earlier_calls": [*earlier.get("earlier_calls", []), *([only_call(earlier, call)] if arguments.merge else [])],
        "parts": [part for part in earlier["parts"] if part["part"] not in arguments.parts],
    }
    for part, about in zip(parts, described, strict=True):
        runs = [found for old in earlier["parts"] if old["part"] == part.number for found in old["runs"]]
        result["parts"] = sorted([*result["parts"], about], key=lambda part: part["part"])
        about["runs"] = runs
        for seed, precision in itertools.product(range(arguments.seeds), PRECISIONS):
            if not any((found["seed"], found["precision"]) == (seed, precision) for found in runs):
                runs.append(run(part, precision, seed, tokens, held_out, device))
                shown = {name: value for name, value in runs[-1].items() if name != "losses"}
                print(json.dumps({"part": part.number} | shown), flush=True)
            about["comparisons"] = {key: compare(runs, key) for key in COMPARED}
            if arguments.output:  # after each: the last may be cut off
                write_result(arguments.output, result)
        print(json.dumps({"part": part.number} | about["comparisons"]), flush=True)


def only_call(earlier: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """How the earlier result was made, which the new one says of itself alone."""
    return {name: earlier[name] for name in (*call, "device") if name in earlier}


if __name__ == "__main__":
    main()
