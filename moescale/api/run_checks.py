"""Chooses the plan of a run, and checks that plan, model, corpus and devices fit together."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from moescale import __version__
from moescale.api.train_request import RunInputs
from moescale.api.vocabulary import check_vocabulary
from moescale.config import ModelConfig
from moescale.convert.adapter_folder import read_adapter_settings
from moescale.convert.hf_config import PRESETS
from moescale.convert.weight_files import has_weights
from moescale.data.corpus import Corpus
from moescale.errors import ConfigError
from moescale.formats import ComputeFormat
from moescale.lora import LoraSettings, parse_lora
from moescale.models.layer_plans import plan_of_layers
from moescale.plan import ParallelPlan, load_plan, no_experts_in_fp8, one_device_plan
from moescale.runtime.join import was_launched

MIN_CPU_RANKS = 16
CPU_RANKS_PER_CORE = 4
"""Ranks on a CPU are for trying out a plan; more of them only compete for memory."""


def choose_plan(inputs: RunInputs, config: ModelConfig, corpus: Corpus, device: torch.device) -> ParallelPlan:
    """Load the plan of ``inputs``, or make the plan for a single device that they describe.

    Raises:
        ConfigError: the plan is for another version or model, or contradicts the other inputs.
    """
    by_hand: dict[str, int | str | None] = {
        "tokens_per_step": inputs.tokens_per_step,
        "micro_batch_sequences": inputs.micro_batch_sequences,
        "precision": inputs.precision,
    }
    given = [name for name, value in by_hand.items() if value is not None]
    if inputs.plan is not None:
        if given:
            raise ConfigError(f"run.{given[0]} ({by_hand[given[0]]}) is decided by the plan {inputs.plan}; drop one")
        plan = load_plan(inputs.plan)
        if plan.moescale_version != __version__:
            raise ConfigError(
                f"{inputs.plan}: plan.moescale_version ({plan.moescale_version}) must be this version's "
                f"({__version__}): what a plan decides, and its predictions, hold for the runtime it was made for; "
                "compile it again"
            )
        plan.check_model(config)
        plan_of_layers(plan, config)  # raises where the model has other layers
        _check_lora(inputs.lora, plan, inputs.plan)
        _check_adapter(inputs.adapter, config, plan.lora)
        return plan
    sequences = inputs.micro_batch_sequences or 1
    tokens_per_step = inputs.tokens_per_step or sequences * corpus.sequence_length
    micro_batch_tokens = sequences * corpus.sequence_length
    if tokens_per_step <= 0 or tokens_per_step % micro_batch_tokens:
        raise ConfigError(
            f"run.tokens_per_step ({tokens_per_step}) must be a multiple of {micro_batch_tokens}: "
            f"run.micro_batch_sequences ({sequences}) sequences of {corpus.sequence_length} tokens"
        )
    lora = None if inputs.lora is None else parse_lora(inputs.lora)
    if inputs.adapter is not None and lora is None:
        lora = read_adapter_settings(inputs.adapter, config)
    _check_adapter(inputs.adapter, config, lora)
    in_fp8 = inputs.precision == "fp8"
    default: ComputeFormat = "bf16" if device.type == "cuda" else "fp32"
    return one_device_plan(
        config,
        sequence_length=corpus.sequence_length,
        micro_batch_sequences=sequences,
        gradient_accumulation_steps=tokens_per_step // micro_batch_tokens,
        compute_dtype="bf16" if inputs.precision == "fp8" else inputs.precision or default,
        expert_gemms="fp8" if in_fp8 and no_experts_in_fp8(config) is None else "compute",
        dense_gemms="fp8" if in_fp8 else "compute",
        lora=lora,
    )


def _check_adapter(folder: Path | None, config: ModelConfig, lora: LoraSettings | None) -> None:
    """Raise ConfigError if the adapters to continue have another rank or scale."""
    if folder is None:
        return
    if lora is None:
        raise ConfigError(f"run.adapter ({folder}) needs a plan that trains adapters; compile it with --lora")
    found = read_adapter_settings(folder, config)
    for name, has, wanted in (("rank", found.rank, lora.rank), ("scale", found.scale, lora.scale)):
        if has != wanted:
            raise ConfigError(
                f"run.adapter ({folder}) has adapters of {name} {has:g}, run.lora ({lora.text()}) says {wanted:g}; "
                "give the same rank and alpha"
            )


def _check_lora(given: str | None, plan: ParallelPlan, path: Path) -> None:
    """Raise ConfigError if --lora differs from the plan's adapters, for which it predicts memory."""
    if given is None or parse_lora(given) == plan.lora:
        return
    planned = "all weights are trained" if plan.lora is None else plan.lora.text()
    raise ConfigError(
        f"run.lora ({given}) must be that of the plan {path} ({planned}); compile it with --lora {given}, or drop it "
        "here"
    )


def check_corpus(config: ModelConfig, corpus: Corpus, plan: ParallelPlan) -> None:
    """Raise ConfigError unless the corpus has the plan's sequence length and the model's vocabulary."""
    if corpus.sequence_length != plan.sequence_length:
        raise ConfigError(
            f"plan.sequence_length ({plan.sequence_length}) must equal the corpus's ({corpus.sequence_length}); "
            "prepare the corpus or compile the plan again"
        )
    check_vocabulary(corpus.vocabulary_size, config)
    if plan.sequence_length > config.max_sequence_length:
        raise ConfigError(
            f"plan.sequence_length ({plan.sequence_length}) must not exceed model.max_sequence_length "
            f"({config.max_sequence_length})"
        )


def is_pretrained(inputs: RunInputs, folder: Path) -> bool:
    """Return True if a run starts from the weights in ``folder``, the model's, and not from random ones.

    ``auto`` chooses random weights only if nothing hints at weights: an interrupted download or a folder of .bin files
    is an error.
    """
    if inputs.initialize != "auto":
        return inputs.initialize == "pretrained"
    is_fetched = inputs.model not in PRESETS and not Path(inputs.model).exists()
    return is_fetched or has_weights(folder)


def check_weights(inputs: RunInputs, folder: Path, plan: ParallelPlan) -> None:
    """Raise ConfigError if adapters would be trained on random weights without ``--initialize random``."""
    if plan.lora is not None and inputs.initialize == "auto" and not is_pretrained(inputs, folder):
        raise ConfigError(
            f"run.model ({inputs.model}) has no weights ({folder} holds no *.safetensors), and run.lora "
            f"({plan.lora.text()}) trains adapters on frozen ones, which would be random; give a model with weights, "
            "or --initialize random if that is meant"
        )


def check_devices(inputs: RunInputs, plan: ParallelPlan, device: torch.device) -> None:
    """Raise ConfigError unless this machine, or the launcher, provides the devices of the plan."""
    if plan.runtime_gpus == 1:
        return
    if inputs.device == "auto" and device.type == "cpu":
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) needs GPUs, and torch sees none here; pass --device cpu if the "
            "plan is to run on as many CPU processes"
        )
    most = max(MIN_CPU_RANKS, CPU_RANKS_PER_CORE * (os.cpu_count() or 1))
    if device.type == "cpu" and not was_launched() and plan.runtime_gpus > most:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) exceeds the {most} processes that --device cpu starts on this "
            "machine's cores; start them on several machines with torchrun, or compile a plan for fewer"
        )
    if device.type == "cuda" and not was_launched() and torch.cuda.device_count() < plan.runtime_gpus:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) exceeds this machine's {torch.cuda.device_count()} GPUs; start "
            "it on all machines with torchrun, or compile a plan for fewer"
        )


def out_of_memory(plan: ParallelPlan, device: torch.device, step: int) -> ConfigError:
    """Return the error for a step that ran out of device memory, with planned and actual memory and a remedy."""
    peak = torch.cuda.max_memory_allocated(device)
    text = f"step {step + 1}: out of memory on {device}, {peak / 2**30:.1f} GiB allocated at the peak"
    if plan.prediction is not None:
        classes = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.prediction.breakdown_bytes.items())
        text += f"; the plan predicted {plan.prediction.peak_bytes / 2**30:.1f} GiB on the GPU ({classes})"
    device_bytes = torch.cuda.get_device_properties(device).total_memory
    pin = ", or --pin micro_batch_sequences=1" if plan.micro_batch_sequences > 1 else ""
    return ConfigError(f"{text}. Compile with --memory-limit {lower_limit_gib(plan, device_bytes)}{pin}")


def lower_limit_gib(plan: ParallelPlan, device_bytes: int) -> int:
    """Return a --memory-limit that rules out ``plan``, which ran out of memory.

    It is a twentieth of the GPU's memory below the prediction, so that repeated attempts terminate.
    """
    predicted = device_bytes if plan.prediction is None else min(plan.prediction.peak_bytes, device_bytes)
    return max(1, math.floor((predicted - 0.05 * device_bytes) / 2**30))
