"""Plan -> PyTorch: what a plan decides, applied to a model. One device so far; other meshes are refused."""

from __future__ import annotations

import torch

from moescale.errors import ConfigError
from moescale.model.transformer import Transformer
from moescale.plan import ParallelPlan
from moescale.runtime.optimizer import OptimizerFormat


def apply_plan(model: Transformer, plan: ParallelPlan) -> None:
    """Set the model's recompute choices by the plan. Raises ConfigError for a plan this runtime cannot run."""
    model.recompute_layers = frozenset(
        layer
        for layer in range(model.config.num_layers)
        if (plan.moe_layers if model.config.is_moe_layer(layer) else plan.dense_layers).recompute == "block"
    )
    if plan.runtime_gpus != 1:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) must be 1: this version runs plans of one device; "
            "compile one with --plan-gpus 1 --runtime-gpus 1"
        )


def compile_layers(model: Transformer) -> None:
    """Compile every block by itself: equal blocks share one compilation, and the first step waits for two."""
    for block in model.layers:
        block.compile(fullgraph=True)


def optimizer_format(plan: ParallelPlan) -> OptimizerFormat:
    """The plan's formats of optimizer state, master weights and gradients."""
    return OptimizerFormat(
        moments=plan.optimizer_state_dtype,
        master=plan.master_weight_format,
        gradients=torch.bfloat16 if plan.gradient_dtype == "bf16" else torch.float32,
    )
