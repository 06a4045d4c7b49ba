"""Time what one would run instead on several GPUs, on some of DeepSeek-Coder-V2-Lite's layers: whole training steps.

    torchrun --nproc-per-node 2 benchmarks/peers_ranks.py --system transformers --micro-batch-sequences 4
    torchrun --nproc-per-node 2 benchmarks/peers_ranks.py --system torchtitan --ep 2 --micro-batch-sequences 4

``transformers``: its DeepSeek-V2 with grouped GEMMs, sdpa and compiled layers, sharded by FSDP2 with fp32 weights and
gradients and bf16 computation. ``torchtitan``: its DeepSeek-V3 trainer (0.2.2) with this model's sizes, sdpa, compiled
layers. Both with fused AdamW, gradients clipped to 1, random tokens, no checkpointing of activations unless asked for.
``--system moescale`` times a plan of ours in the same way: the trainer alone, random tokens. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist

WARM_UP_STEPS, MEASURED_STEPS = 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("transformers", "torchtitan", "moescale"), required=True)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--tokens-per-step", type=int, default=131072)
    parser.add_argument("--micro-batch-sequences", type=int, default=4)
    parser.add_argument("--ep", type=int, default=1, help="torchtitan's expert parallel degree")
    parser.add_argument("--recompute", action="store_true", help="whole layers in the backward pass")
    parser.add_argument("--plan", type=Path, help="moescale's plan, for a model of as many layers")
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    step = {"transformers": transformers_step, "torchtitan": torchtitan_step, "moescale": moescale_step}[
        arguments.system
    ](arguments)
    for _ in range(WARM_UP_STEPS):
        step()
    seconds = [timed(step) for _ in range(MEASURED_STEPS)]
    if dist.get_rank() == 0:
        print(json.dumps(report(arguments, seconds)), flush=True)
    dist.barrier()
    os._exit(0)  # a peer's threads may not hold the next row up


def timed(step: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    dist.barrier()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def report(arguments: argparse.Namespace, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    from moescale.tools.measurement import describe_measurement

    return describe_measurement(arguments.system) | {
        "system": arguments.system,
        "gpus": dist.get_world_size(),
        "layers": arguments.layers,
        "ep": arguments.ep,
        "micro_batch_sequences": arguments.micro_batch_sequences,
        "recompute": arguments.recompute,
        "step_seconds": median,
        "each_step_seconds": [round(s, 4) for s in seconds],
        "tokens_per_second": arguments.tokens_per_step / median,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def micro_batches(arguments: argparse.Namespace) -> int:
    tokens = arguments.micro_batch_sequences * arguments.sequence_length * dist.get_world_size()
    if arguments.tokens_per_step % tokens:
        raise SystemExit(f"{arguments.tokens_per_step} tokens a step are no multiple of a micro-batch's {tokens}")
    return int(arguments.tokens_per_step // tokens)


def transformers_step(arguments: argparse.Namespace) -> Callable[[], Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    from moescale.convert.hf_config import read_hf_config, resolve_model

    dist.init_process_group("nccl")
    document = read_hf_config(resolve_model("deepseek-coder-v2-lite")) | {"num_hidden_layers": arguments.layers}
    document.pop("auto_map", None)
    config = DeepseekV2Config(**document)
    config._attn_implementation, config._experts_implementation, config.use_cache = "sdpa", "grouped_mm", False
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM._from_config(config, dtype=torch.float32)
    if arguments.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = model.model.layers
    for number in range(len(layers)):
        layers[number] = torch.compile(layers[number])
        fully_shard(layers[number], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    rotary = model.model.rotary_emb
    model = model.to_empty(device="cuda")
    model.model.rotary_emb = type(rotary)(config=config, device="cuda")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    shape = (arguments.micro_batch_sequences, arguments.sequence_length)
    num_micro_batches = micro_batches(arguments)

    def step() -> None:
        for _ in range(num_micro_batches):
            tokens = torch.randint(config.vocab_size, shape, device="cuda")
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            (loss / num_micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchtitan_step(arguments: argparse.Namespace) -> Callable[[], Any]:
    from torchtitan.config import JobConfig
    from torchtitan.models.deepseek_v3 import get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    spec = get_train_spec()
    sizes = dataclasses.replace(
        spec.model_args["16B"], n_layers=arguments.layers, attn_type="sdpa", attn_mask_type="causal"
    )
    spec = dataclasses.replace(
        spec,
        model_args={"cut": sizes},
        build_tokenizer_fn=None,
        build_dataloader_fn=RandomLoader,
        build_validator_fn=None,
    )
    register_train_spec("random_tokens", spec)
    job = JobConfig()
    job.job.dump_folder = tempfile.mkdtemp()
    job.model.name, job.model.flavor = "random_tokens", "cut"
    job.training.seq_len, job.training.local_batch_size = arguments.sequence_length, arguments.micro_batch_sequences
    job.training.global_batch_size = arguments.tokens_per_step // arguments.sequence_length
    job.parallelism.expert_parallel_degree = arguments.ep
    job.activation_checkpoint.mode = "full" if arguments.recompute else "none"
    job.compile.enable = True
    job.metrics.log_freq = 1
    trainer = Trainer(job)
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    return step


class RandomLoader:
    """Random tokens in torchtitan's form; built as its data loaders are."""

    def __init__(self, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any, **_: Any) -> None:
        self.shape = (job_config.training.local_batch_size, job_config.training.seq_len)
        self.generator = torch.Generator().manual_seed(dp_rank)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            tokens = torch.randint(102400, self.shape, generator=self.generator)
            yield {"input": tokens}, tokens

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def moescale_step(arguments: argparse.Namespace) -> Callable[[], Any]:
    from step import RandomSteps, Silent

    from moescale.convert.hf_config import read_model_config
    from moescale.plan import load_plan
    from moescale.runtime import session
    from moescale.runtime.checkpoint_store import CheckpointStore
    from moescale.runtime.join import join_ranks
    from moescale.runtime.mapping import compile_layers, optimizer_format
    from moescale.runtime.settings import TrainSettings
    from moescale.runtime.train import Trainer

    config = dataclasses.replace(read_model_config("deepseek-coder-v2-lite"), num_layers=arguments.layers)
    plan = load_plan(arguments.plan)
    arguments.ep, arguments.micro_batch_sequences = plan.mesh.ep, plan.micro_batch_sequences
    member = join_ranks(torch.device("cuda")).__enter__()
    placed = session.place_model(config, plan, member.ranks, member.device)
    placed.initialize(seed=0)
    compile_layers(placed.model)
    source = RandomSteps(plan, config.vocab_size)
    trainer = Trainer(
        model=placed.model,
        settings=TrainSettings(learning_rate=1e-5, final_checkpoint=False),
        total_steps=1000,
        source=source,
        store=CheckpointStore(Path(tempfile.gettempdir()) / "never-written", keep=1),
        observer=Silent(),
        optimizer_format=optimizer_format(plan),
        ranks=member.ranks,
        parts=placed.parts,
        coordinates=placed.coordinates,
        on_progress=member.progress,
    )
    return lambda: trainer.train_step(source.step())


if __name__ == "__main__":
    main()
