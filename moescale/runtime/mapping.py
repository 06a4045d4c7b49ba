"""Plan -> PyTorch: what a plan decides, applied to a model. One device so far; other meshes are refused."""

from __future__ import annotations

from moescale.errors import ConfigError
from moescale.model.transformer import Transformer
from moescale.plan import ParallelPlan


def apply_plan(model: Transformer, plan: ParallelPlan) -> None:
    """Set the model's recompute choices by the plan. Raises ConfigError for a plan this runtime cannot run."""
    if plan.runtime_gpus != 1:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) must be 1: this version runs plans of one device; "
            "compile one with --plan-gpus 1 --runtime-gpus 1"
        )
