"""Loss curves of every optimizer format against fp32 AdamW in a plain transformers loop: same data, same start.

    python benchmarks/loss_curves.py --output loss_curves.json

A small model of the same architecture learns the sources of Python's standard library for a few hundred steps. The
reference is transformers' DeepseekV2ForCausalLM in fp32 with torch's AdamW; its runs from other random weights show how
much two good runs differ. Every format starts from the reference's weights and sees the same batches; what is compared
is the mean loss of the last 50 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from moescale.config import ModelConfig
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.hf_config import read_model_config, to_hf_config
from moescale.convert.tensor_source import ModelWeights
from moescale.formats import MasterFormat, MomentFormat
from moescale.models.fp8_gemms import write_weight_copies
from moescale.models.transformer import Transformer, build_on_meta, initialize, named_weights
from moescale.runtime.micro_batch import MicroBatches
from moescale.runtime.optimizer import AdamW, OptimizerFormat
from moescale.runtime.settings import TrainSettings, learning_rate_at
from moescale.tools.measurement import describe_measurement, write_result

VOCABULARY, LENGTH, SEQUENCES = 4096, 256, 32
LAST = 50


def tokenize() -> torch.Tensor:
    """The standard library as one row of token ids."""
    texts = read_library()
    return encode(train_tokenizer(texts), texts)


def read_library() -> list[str]:
    """Sources of Python's standard library, 9 MB."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-k]*/*.py"))
    return [path.read_text(errors="ignore") for path in files]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of ``VOCABULARY`` tokens, of which 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids."""
    rows = [encoding.ids + [0] for encoding in tokenizer.encode_batch(texts)]
    return torch.tensor(list(itertools.chain.from_iterable(rows)))


def cut(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Sequences [N, length], without what is left at the end."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def batches(
    tokens: torch.Tensor,
    steps: int,
    device: torch.device,
    *,
    length: int = LENGTH,
    sequences: int = SEQUENCES,
    seed: int = 0,
) -> list[torch.Tensor]:
    """A batch [sequences, length] for every step, in an order that ``seed`` draws anew for each epoch."""
    rows = cut(tokens, length)
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * sequences / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    return [rows[order[i * sequences : (i + 1) * sequences]].to(device) for i in range(steps)]


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """The targets of ``tokens`` [B, S]: a sequence's last token has none."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)


def start_model(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    model = build_on_meta(config, torch.float32).to_empty(device=device)
    initialize(model, seed)
    return model


def train_reference(model: Transformer, settings: TrainSettings, data: list[torch.Tensor]) -> list[float]:
    """transformers and torch.optim.AdamW, all fp32, from ``model``'s weights."""
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(to_hf_config(model.config, "float32")))
        weights = ModelWeights(named_weights(model))
        export_checkpoint(model.config, weights, folder / "out", reference=folder, dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).to(device)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    losses = []
    for step, tokens in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step, len(data))
        loss = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_ours(
    model: Transformer, settings: TrainSettings, data: list[torch.Tensor], format: OptimizerFormat
) -> list[float]:
    """Weights in bf16 and what ``format`` keeps beside them."""
    return train(model.bfloat16(), settings, data, format)


def train(
    model: Transformer,
    settings: TrainSettings,
    data: list[torch.Tensor],
    format: OptimizerFormat,
    *,
    micro_batches: int = 2,
) -> list[float]:
    """The loss of every step of ``micro_batches``; trains what is not frozen."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    optimizer = AdamW(trained, settings, format)
    optimizer.accumulate_in_gemms(model)
    write_weight_copies(model)
    runner = MicroBatches(model, capture=True)
    losses = []
    for step, tokens in enumerate(data):
        targets = next_tokens(tokens)
        num_targets = targets.numel() - len(targets)
        runner.start_step(num_targets=num_targets, num_micro_batches=micro_batches)
        for inputs, outputs in zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            runner.run(inputs, outputs, None)
        losses.append(runner.loss_sum / num_targets)  # read at the end: small models would wait for the host
        optimizer.step(learning_rate_at(settings, step, len(data)), optimizer.gradient_norm())
        write_weight_copies(model)
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # transformers computes no auxiliary loss, so neither side has one.
    config = dataclasses.replace(
        read_model_config("tiny"), vocab_size=VOCABULARY, hidden_size=256, num_layers=6, aux_loss_alpha=0.0
    )
    settings = TrainSettings(learning_rate=2e-3, warmup_steps=20)
    data = batches(tokenize(), arguments.steps, device)
    reference = [train_reference(start_model(config, seed, device), settings, data) for seed in range(arguments.seeds)]
    finals = [statistics.mean(losses[-LAST:]) for losses in reference]
    noise = max(finals) - min(finals)
    result = describe_measurement("transformers") | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": arguments.steps,
        "reference_final_losses": finals,
        "run_to_run_noise": noise,
        "reference_losses": [[round(loss, 4) for loss in losses[::10]] for losses in reference],
        "formats": [],
    }
    print(json.dumps({key: result[key] for key in ("reference_final_losses", "run_to_run_noise")}), flush=True)
    for format in formats():
        losses = train_ours(start_model(config, 0, device), settings, data, format)
        final = statistics.mean(losses[-LAST:])
        assert math.isfinite(final)
        row = {
            "moments": format.moments,
            "master": format.master,
            "gradients": str(format.gradients).removeprefix("torch."),
            "final_loss": final,
            "difference": final - finals[0],
            "within_noise": abs(final - finals[0]) <= noise,
        }
        print(json.dumps(row), flush=True)
        result["formats"].append(row | {"losses": [round(loss, 4) for loss in losses[::10]]})
        if arguments.output:
            write_result(arguments.output, result)


def formats() -> Iterator[OptimizerFormat]:
    """Every format that a plan can name."""
    for moments, master in itertools.product(get_args(MomentFormat), get_args(MasterFormat)):
        for gradients in (torch.float32, torch.bfloat16):
            yield OptimizerFormat(moments=moments, master=master, gradients=gradients)


if __name__ == "__main__":
    main()
