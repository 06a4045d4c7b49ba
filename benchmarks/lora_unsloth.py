"""Adapters on the whole 16B model on one GPU beside Unsloth's kernels for experts, in one call.

    python benchmarks/lora_unsloth.py --cluster h100-sxm --data CORPUS --output lora_unsloth.json

Ours is the run of ``lora.py``: rank 16 on attention, shared and routed experts, packs of 4,096 tokens, prepare, compile
and run, without a limit of memory. The peer is loaded with Unsloth's ``FastModel``, which compiles transformers' model
and sends routed experts with adapters through its own grouped GEMMs; only the reading of a checkpoint is left out, for
random weights made on the GPU. It trains as Unsloth's trainer sets it up: adapters in fp32, bf16 autocast; with fused
AdamW and as many tokens in a step as ours. Each way of WAYS runs in a process of its own while there is time, with
Unsloth's recomputation where it does not fit without; the fastest is quoted, and every failure is told in its words.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lora import (
    PEER_MODULES,
    PEER_PARAMETERS,
    TARGETS,
    attempt_apart,
    fill,
    ours,
    parser_of_run,
    peer_config,
    timed,
    without_plans,
)
from one_gpu import prepare_corpus

from moescale.tools.measurement import describe_measurement, write_result

PACKAGES = ("unsloth", "unsloth_zoo", "transformers", "peft", "trl", "bitsandbytes")

WAYS = (
    dict(backend="grouped_mm", sequences=1, tuned=False),
    dict(backend="unsloth_triton", sequences=1, tuned=False),
    dict(backend="grouped_mm", sequences=2, tuned=False),
    dict(backend="unsloth_triton", sequences=1, tuned=True),
)
"""How the peer computes experts, and sequences of a micro-batch.

``grouped_mm`` is its default on an H100; ``unsloth_triton`` is its Triton kernels for the frozen weights, with launches
from its table, or tuned when they are first used, which compiles hundreds of kernels one after another.
"""

CHECKPOINTING = (False, "unsloth")
"""Of each way: the next where one fails."""

ATTEMPTS = tuple(way | {"checkpointing": checkpointing} for way in WAYS for checkpointing in CHECKPOINTING)

SECONDS_OF_AN_ATTEMPT = 45
"""With fewer left, none is begun."""


def peer_step(
    arguments: argparse.Namespace, *, backend: str, sequences: int, tuned: bool, checkpointing: bool | str
) -> dict[str, Any]:
    import unsloth  # before transformers and peft, which it patches
    from unsloth_zoo.temporary_patches.moe_utils import select_moe_backend

    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), arguments.model)
        model, _ = unsloth.FastModel.from_pretrained(
            folder,
            max_seq_length=arguments.sequence_length,
            dtype=dtype,
            load_in_4bit=False,
            load_in_16bit=True,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,
            fix_tokenizer=False,
            local_files_only=True,
            auto_model=random_weights(arguments.device),
        )
    model = unsloth.FastModel.get_peft_model(
        model,
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=PEER_MODULES,
        target_parameters=list(PEER_PARAMETERS),
        use_gradient_checkpointing=checkpointing,
    )
    unsloth.FastModel.for_training(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=arguments.device.startswith("cuda"))
    micro_batches = max(1, arguments.tokens_per_step // (sequences * arguments.sequence_length))
    shape = (sequences, arguments.sequence_length)
    batches = [torch.randint(model.config.vocab_size, shape, device=arguments.device) for _ in range(4)]
    losses: list[torch.Tensor] = []

    def step() -> None:
        for number in range(micro_batches):
            tokens = batches[number % len(batches)]
            with torch.autocast(arguments.device.split(":")[0], torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, arguments)
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": select_moe_backend(),
        "backend_asked_for": backend,
        "launches_tuned": tuned,
        "experts_implementation": getattr(model.config, "_experts_implementation", None),
        "layers_whose_experts_read_adapters": layers_that_read_adapters(model),
        "checkpointing": checkpointing,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "adapter_dtypes": sorted({str(parameter.dtype) for parameter in trained}),
        "micro_batch_sequences": sequences,
        "micro_batches": micro_batches,
        "losses": [float(loss) for loss in losses],
        "step_seconds": seconds,
        "tokens_per_second": micro_batches * sequences * arguments.sequence_length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device.startswith("cuda") else 0,
    }


def write_model_folder(folder: Path, model: str) -> None:
    """What Unsloth reads of a checkpoint beside its weights: the configuration and some tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = {word: number for number, word in enumerate(special.values())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(peer_config(model)))


def random_weights(device: str) -> type:
    """Return what stands in for transformers' ``AutoModelForCausalLM``: its ``from_pretrained`` reads no checkpoint."""

    class RandomWeights:
        @classmethod
        def from_pretrained(
            cls, folder: str, *, config: Any, dtype: torch.dtype, attn_implementation: str | None = None, **_: Any
        ) -> torch.nn.Module:
            from transformers import AutoModelForCausalLM

            config.use_cache = False
            with torch.device("meta" if device.startswith("cuda") else device):
                options = {"dtype": dtype, "attn_implementation": attn_implementation}
                model = AutoModelForCausalLM.from_config(config, **options)
            return fill(model) if device.startswith("cuda") else model

    return RandomWeights


def layers_that_read_adapters(model: torch.nn.Module) -> int:
    """Layers whose experts took both adapters apart from their weights, by the marks that Unsloth leaves on them."""
    marks = [vars(module).get("_unsloth_moe_lora_stash_read") or {} for module in model.modules()]
    return sum(mark.get("gate_up_proj") is True and mark.get("down_proj") is True for mark in marks)


def peer(folder: Path, left: Callable[[], float]) -> dict[str, Any]:
    """Every way that there is time for, each without recomputation if it fits; the fastest first."""
    done: list[dict[str, Any]] = []
    failures: list[str] = []
    for way in WAYS:
        for checkpointing in CHECKPOINTING:
            attempt = way | {"checkpointing": checkpointing}
            seconds = left()
            if seconds < SECONDS_OF_AN_ATTEMPT:
                failures.append(f"{attempt}: no time left")
                break
            number, output = ATTEMPTS.index(attempt), folder / f"peer-{ATTEMPTS.index(attempt)}.json"
            result = attempt_apart(__file__, number, output, seconds, environment_of(way, folder))
            if isinstance(result, dict):
                done.append(result)
                break
            failures.append(f"{attempt}: {result}")
            if "ImportError" in result or "ModuleNotFoundError" in result:  # no other way would help
                return {"error": failures}
    done.sort(key=lambda result: result["tokens_per_second"], reverse=True)
    if not done:
        return {"error": failures}
    return done[0] | {"other_ways": done[1:], "failed": failures}


def environment_of(way: dict[str, Any], folder: Path) -> dict[str, str]:
    """The choice of Unsloth's kernels; the allocator as Unsloth sets it, in time; no network, no files elsewhere."""
    return {
        "UNSLOTH_MOE_BACKEND": way["backend"],
        "UNSLOTH_MOE_DISABLE_AUTOTUNE": "0" if way["tuned"] else "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth_compiled_cache"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
    }


def table(first: dict[str, Any], beside: dict[str, Any]) -> str:
    """Tokens per second and peak memory of ours and of each way of the peer that ran."""
    rows = [("moescale", first)]
    for result in [beside, *beside.get("other_ways", ())] if "error" not in beside else ():
        how = [result["backend"], f"{result['micro_batch_sequences']} x"]
        how += ["tuned"] * result["launches_tuned"] + ["recomputing"] * bool(result["checkpointing"])
        rows.append((", ".join(["Unsloth", *how]), result))
    lines = [
        f"{name:<48} {result['tokens_per_second']:>9,.0f} tokens/s {result['peak_bytes'] / 2**30:>6.1f} GiB"
        for name, result in rows
    ]
    return "\n".join([*lines, *(f"failed: {line}" for line in beside.get("error", beside.get("failed", ())))])


def main() -> None:
    parser = parser_of_run(__doc__)
    parser.set_defaults(seconds=400)
    parser.add_argument("--memory-limit", help="of our run; default: what the GPU has")
    arguments = parser.parse_args()
    if arguments.peer_to:
        result = peer_step(arguments, **ATTEMPTS[arguments.peer_attempt])
        arguments.peer_to.write_text(json.dumps(result))
        return
    started = time.monotonic()

    def left() -> float:
        return arguments.seconds - (time.monotonic() - started)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.data or prepare_corpus(folder, arguments.sequence_length)
        first = ours(folder / "ours", corpus, arguments, arguments.memory_limit, "compute")
        print(f"ours after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        beside = peer(folder, left)
        print(f"peer after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    result = describe_measurement(*PACKAGES) | {
        "model": arguments.model,
        "lora": {"rank": arguments.rank, "targets": TARGETS},
        "sequence_length": arguments.sequence_length,
        "tokens_per_step": arguments.tokens_per_step,
        **first,
        "peers": {"Unsloth": beside},
    }
    print(json.dumps(without_plans(result), indent=1))
    print(table(first, beside))
    if arguments.output:
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
