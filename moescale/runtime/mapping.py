"""Applies a plan to a PyTorch model, on the meta device or with memory allocated.

Routed experts are sharded over ``ep``. With ``dense_sharding`` zero1, every rank holds all other weights whole, and the
ranks with the same weights share their update (:mod:`moescale.runtime.zero`). With fsdp, FSDP2 shards parameters
outside the routed experts over ``dp_shard``, block by block, and experts over ``edp``; both are replicated over
``dp_replicate``. Gradients are summed, not averaged: each rank's loss is its share of the mean over all targets of a
step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moescale.errors import ConfigError
from moescale.kernels.dispatch.buffers import ExchangeShape
from moescale.models.blocks.moe import Dispatcher, LocalDispatcher, RoutedExperts
from moescale.models.layer_plans import plan_of_layers
from moescale.models.lora import add_adapters
from moescale.models.transformer import Transformer
from moescale.plan import LayerPlan, ParallelPlan, expert_shard_dim
from moescale.runtime.expert_parallel import AllToAllDispatcher, PaddedExchange, SplitExchange, shard_experts
from moescale.runtime.meshes import Meshes
from moescale.runtime.optimizer import OptimizerFormat
from moescale.runtime.peer_dispatch import PeerDispatcher, peers_are_readable


def apply_plan(model: Transformer, plan: ParallelPlan, meshes: Meshes | None = None) -> None:
    """Add the plan's adapters, shard the model over ``meshes`` and set its recomputation, in place.

    Parameter names do not change.

    Args:
        model: preferably on the meta device, with memory allocated later by ``to_empty``, so that no rank ever holds
            the whole model.
        meshes: from :func:`moescale.runtime.meshes.build_meshes`; None for one device.

    Raises ConfigError for a plan this runtime cannot run.
    """
    if plan.lora is not None:
        add_adapters(model, plan.lora)
    layer_plans = plan_of_layers(plan, model.config)
    model.recompute_layers = frozenset(
        layer for layer, layer_plan in enumerate(layer_plans) if layer_plan.recompute == "block"
    )
    if meshes is None:
        if plan.runtime_gpus != 1:
            raise ConfigError(
                f"plan.runtime_gpus ({plan.runtime_gpus}) must be 1 if the model is not sharded over ranks"
            )
    else:
        _shard(model, plan, meshes, layer_plans)
    for block, layer_plan in zip(model.layers, layer_plans, strict=True):
        if "experts" in layer_plan.recompute:
            for module in block.modules():
                if isinstance(module, RoutedExperts):
                    module.recompute_up = True


def sum_over_replicas_at_the_last(model: nn.Module, *, last: bool) -> None:
    """Prepare a micro-batch: replicas reduce their gradients in the last micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def compile_layers(model: Transformer) -> None:
    """Compile every block separately: equal blocks share a compilation, so the first step waits for two."""
    for block in model.layers:
        # Dispatch between ranks is not traced, so a block with it is compiled in pieces.
        dispatchers = [module.dispatcher for module in block.modules() if isinstance(module, RoutedExperts)]
        block.compile(fullgraph=all(isinstance(dispatcher, LocalDispatcher) for dispatcher in dispatchers))


def optimizer_format(plan: ParallelPlan) -> OptimizerFormat:
    """Return the plan's formats of optimizer state, master weights and gradients."""
    return OptimizerFormat(
        moments=plan.optimizer_state_dtype,
        master=plan.master_weight_format,
        gradients=torch.bfloat16 if plan.gradient_dtype == "bf16" else torch.float32,
        offload=plan.offload_optimizer,
    )


def choose_dispatcher(model: Transformer, plan: ParallelPlan, meshes: Meshes) -> Dispatcher:
    """Return the dispatcher of all MoE layers: through peer memory if the GPUs can, else all-to-all. A collective."""
    group = meshes.experts["ep"].get_group()
    device_type = meshes.experts.device_type
    num_tokens = plan.micro_batch_sequences * plan.sequence_length
    if device_type == "cuda" and plan.dense_sharding == "zero1":
        device = torch.device("cuda", torch.cuda.current_device())
        if peers_are_readable(group, device):
            config = model.config
            assert config.num_experts is not None
            shape = ExchangeShape(
                num_ranks=plan.mesh.ep,
                num_tokens=num_tokens,
                hidden_size=config.hidden_size,
                num_experts=config.num_experts,
                top_k=config.top_k,
                dtype=next(model.parameters()).dtype,
                in_fp8=plan.expert_gemms == "fp8",
            )
            return PeerDispatcher(shape, group, device)
    # Padded slots save a host synchronisation for up to ``ep`` times the rows, which pays off on two GPUs.
    padded = device_type == "cuda" and plan.mesh.ep == 2
    return AllToAllDispatcher(group, PaddedExchange(num_tokens) if padded else SplitExchange())


def _shard(model: Transformer, plan: ParallelPlan, meshes: Meshes, layer_plans: list[LayerPlan]) -> None:
    precision = MixedPrecisionPolicy(
        reduce_dtype=torch.float32 if plan.compute_dtype == "bf16" and plan.gradient_dtype == "fp32" else None,
        cast_forward_inputs=False,
    )
    if plan.mesh.ep > 1:
        shard_experts(model, plan, meshes, dispatcher=choose_dispatcher(model, plan, meshes), precision=precision)
    if plan.dense_sharding == "zero1":
        return
    mesh = meshes.dense if plan.mesh.dp_replicate > 1 else meshes.dense["dp_shard"]
    # Experts held by one rank only stay plain parameters.
    own = {
        parameter
        for module in model.modules()
        if isinstance(module, RoutedExperts) and module.dispatcher.num_ranks > 1 and not isinstance(module, FSDPModule)
        for parameter in module.parameters()
    }
    stacked = {
        parameter
        for module in model.modules()
        if isinstance(module, RoutedExperts) and module.dispatcher.num_ranks == 1
        for parameter in module.parameters()
    }

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(expert_shard_dim(parameter.shape, plan.mesh.dp_shard)) if parameter in stacked else None

    shard: Any = partial(fully_shard, mesh=mesh, mp_policy=precision, ignored_params=own, shard_placement_fn=placement)
    for block, layer_plan in zip(model.layers, layer_plans, strict=True):
        shard(block, reshard_after_forward=layer_plan.reshard_after_forward)
    # Embedding and output: the backward needs the output first, and never the embedding's weight.
    shard(model, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
